"""Threads: many small tensor operations are slower on several cores than on one, and far slower on busy ones.

So what is one piece of work after the other runs on one thread, and what is many goes to workers of one thread each.
Torch lets go of the interpreter while it computes, and asks for it again after each operation: where these are short,
a few threads wait for each other more than they compute, and processes do not.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import signal
import sys
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for_any
from typing import Any, TypeVar

import torch

from autoquant.errors import AutoQuantError

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


def give_back_memory() -> None:
    """Return to the system what was freed, where glibc can do that.

    Freed blocks of up to 32 MiB are kept, and what small ones that live on have between them is too short for the next
    tensors: some 50 MB more for each layer of a 1.1 B model.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


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


def can_fork() -> bool:
    """True where :func:`in_processes` can be used: elsewhere than on Linux libraries do not survive a fork."""
    return sys.platform == "linux" and not multiprocessing.current_process().daemon


def in_processes(work: Callable[[T], R], items: Iterable[T], workers: int) -> Generator[R]:
    """What :func:`in_parallel` does, by processes of one thread that are copies of this one.

    Items and results are sent, ``work`` is not: it sees what is there now, on the CPU, and what it changes stays in its
    process. An error of a work is raised as :func:`in_parallel` says; a process that the system ends is an
    AutoQuantError. The processes end with this one, however that ends.
    """
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe() for _ in range(workers)]
    processes = [context.Process(target=_serve, args=(work, at, pipes), daemon=True) for at in range(workers)]
    ours = [mine for mine, _ in pipes]
    running = dict.fromkeys(ours, 0)
    given = iter(items)
    try:
        with warnings.catch_warnings():  # other threads of this process: the copies do not touch what these may hold
            warnings.simplefilter("ignore", DeprecationWarning)
            for process in processes:
                process.start()
        for _, theirs in pipes:
            theirs.close()
        for connection in 2 * ours:  # the next item is there when one is done
            _send_next(given, connection, running)
        while any(running.values()):
            ready = wait_for_any([one for one, count in running.items() if count])
            for connection in [one for one in ours if one in ready]:
                result: R = _received(connection)
                running[connection] -= 1
                _send_next(given, connection, running)
                yield result
    finally:
        for connection in ours:
            connection.close()
        for process in processes:
            if process.pid is not None:
                process.kill()
                process.join()


def _send_next(items: Iterator[T], connection: Connection, running: dict[Connection, int]) -> None:
    with contextlib.suppress(StopIteration):
        item = next(items)
        with contextlib.suppress(OSError):  # it ended; what it has not sent tells
            connection.send(item)
        running[connection] += 1


def _received(connection: Connection) -> Any:
    try:
        fine, result = connection.recv()
    except (EOFError, OSError) as error:
        reason = "a worker process was ended by the system: give it more memory, or use fewer --workers"
        raise AutoQuantError(reason) from error
    if not fine:
        raise result
    return result


def _serve(work: Callable[[T], R], number: int, pipes: Sequence[tuple[Connection, Connection]]) -> None:
    """In a process of its own: carry out what comes until nothing can come any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process tells
    for at, (theirs, mine) in enumerate(pipes):
        theirs.close()
        if at != number:
            mine.close()
    torch.set_num_threads(1)
    connection = pipes[number][1]
    with contextlib.suppress(EOFError, OSError):
        while True:
            item = connection.recv()
            answer: tuple[bool, R | Exception]
            try:
                answer = True, work(item)
            except Exception as error:
                answer = False, error
            connection.send(answer)
