"""Work in parallel: all results, on one thread each, no more held than asked for, and nothing left behind an error."""

from __future__ import annotations

import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

import pytest
import torch

from autoquant.errors import AutoQuantError
from autoquant.threads import give_back_memory, in_parallel, in_processes, one_arena_, one_thread


@pytest.mark.parametrize("workers", [1, 3])
def test_every_item_once_on_one_thread(workers: int) -> None:
    before = torch.get_num_threads()
    found = sorted(in_parallel(lambda item: (item * 2, torch.get_num_threads()), range(50), workers))
    assert found == [(item * 2, 1) for item in range(50)] and torch.get_num_threads() == before
    assert list(in_parallel(str, (), workers)) == []


def test_results_that_nobody_takes_hold_the_work_up() -> None:
    taken: list[int] = []
    before = threading.active_count()  # a library may have threads of its own
    results = in_parallel(taken.append, iter(range(100)), 2)
    with closing(results):
        next(results)
        assert len(taken) <= 6
    assert threading.active_count() == before


def test_the_first_error_ends_all() -> None:
    begun: list[int] = []
    before = threading.active_count()

    def work(item: int) -> None:
        begun.append(item)
        if item == 3:
            raise ValueError("item 3")

    with pytest.raises(ValueError, match="item 3"):
        list(in_parallel(work, range(1000), 2))
    assert len(begun) < 20 and threading.active_count() == before


def test_one_thread_and_back() -> None:
    before = torch.get_num_threads()
    with one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


@pytest.mark.skipif(sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="glibc's")
def test_memory_between_blocks_that_live_on_is_given_back() -> None:
    """In a fresh process, which holds nothing that was freed before."""
    given, kept = (float(subprocess.check_output([sys.executable, __file__, trim])) for trim in ("trim", ""))
    assert kept > 200 and given < kept - 180, (given, kept)


def _resident(trim: bool) -> float:
    """MB more than before when 200 blocks of 1 MB were freed between small ones that are still there."""
    one_arena_()
    torch.ones(4_000_000)  # a block that large, freed: from then on smaller ones are kept
    before = _resident_bytes()
    small, large = [], []
    for _ in range(200):
        large.append(torch.ones(250_000))
        small.append(torch.ones(1_000))
    large.clear()
    if trim:
        give_back_memory()
    assert len(small) == 200
    return (_resident_bytes() - before) / 1e6


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_processes_do_every_item_once_and_keep_what_they_change() -> None:
    kept: list[int] = []

    def work(item: int) -> tuple[int, int, int, int]:
        kept.append(item)
        return item * 2, torch.get_num_threads(), os.getpid(), int(torch.ones(1000).sum())

    found = list(in_processes(work, range(50), 3))
    assert sorted(item for item, *_ in found) == [2 * item for item in range(50)] and kept == []
    assert {threads for _, threads, _, _ in found} == {1} and {total for *_, total in found} == {1000}
    pids = {pid for _, _, pid, _ in found}
    assert len(pids) == 3 and os.getpid() not in pids and not multiprocessing.active_children()
    assert list(in_processes(work, (), 2)) == []


def test_an_error_in_a_process_is_raised_here() -> None:
    def work(item: int) -> int:
        if item == 3:
            raise AutoQuantError("item 3", ("its detail",))
        return item

    with pytest.raises(AutoQuantError, match="item 3") as caught:
        list(in_processes(work, iter(range(1000)), 2))
    assert caught.value.details == ("its detail",) and not multiprocessing.active_children()


def test_a_process_that_the_system_ends_is_told_of() -> None:
    with pytest.raises(AutoQuantError, match="a worker process was ended by the system"):
        list(in_processes(lambda item: os.kill(os.getpid(), signal.SIGKILL), range(4), 2))
    assert not multiprocessing.active_children()


def test_processes_end_with_whoever_takes_their_results() -> None:
    with closing(in_processes(lambda item: item, iter(range(10**9)), 2)) as results:
        next(results)
    assert not multiprocessing.active_children()


if __name__ == "__main__":
    print(_resident(trim=sys.argv[1] == "trim"))
