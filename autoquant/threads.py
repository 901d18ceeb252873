"""Threads: many small tensor operations are slower on several cores than on one, and far slower on busy ones.

So what is one piece of work after the other runs on one thread, and what is many goes to workers of one thread each:
torch lets go of the interpreter while it computes.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread; the number of threads is put back afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def one_arena_() -> None:
    """Let all threads allocate memory in one place from now on, where glibc allows it.

    Threads that run one after the other would else keep each what it once needed: gigabytes, of which one is in use.
    """
    with contextlib.suppress(OSError, AttributeError):  # another system's library
        ctypes.CDLL(None).mallopt(_ARENA_MAX, 1)


_ARENA_MAX = -8
"""M_ARENA_MAX of glibc's malloc.h."""


def cores() -> int:
    """As many as torch may use: OMP_NUM_THREADS, else those of the machine."""
    return torch.get_num_threads()


def in_parallel(work: Callable[[T], R], items: Iterable[T], workers: int) -> Generator[R]:
    """What ``work`` makes of each item, in the order in which it is done, by so many workers of one thread.

    Items are taken one ahead of each worker, and no further where results are not. The first error of a work ends all:
    nothing new begins, and it is raised when what runs has ended. Whoever stops early has to close what this returns.
    """
    given = iter(items)
    with one_thread(), ThreadPoolExecutor(workers, "autoquant", torch.set_num_threads, (1,)) as pool:
        running: set[Future[R]] = set()
        try:
            while True:
                while len(running) < 2 * workers:
                    try:
                        running.add(pool.submit(work, next(given)))
                    except StopIteration:
                        break
                if not running:
                    return
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        finally:
            for future in running:
                future.cancel()
