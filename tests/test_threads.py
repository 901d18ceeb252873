"""Work in parallel: all results, on one thread each, no more held than asked for, and nothing left behind an error."""

from __future__ import annotations

import threading
from contextlib import closing

import pytest
import torch

from autoquant.threads import in_parallel, one_thread


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
