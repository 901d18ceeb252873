from __future__ import annotations

import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from autoquant.checkpoint.read_ahead import _Ahead, reading_ahead, to_host


def test_what_will_be_asked_for_is_read_before_it_is_and_no_more_than_fits() -> None:
    begun: list[str] = []
    free = threading.Event()

    def read(name: str) -> Tensor:
        begun.append(name)
        free.wait()
        return torch.tensor(int(name))

    with ThreadPoolExecutor(4) as pool:
        ahead = _Ahead(read, deque((str(i), 10) for i in range(6)), pool, 30)
        ahead._go_on()
        assert set(ahead.coming) == {"0", "1", "2"} and ahead.held == 30
        free.set()
        assert [int(ahead.get(name)) for name in ("0", "1", "5", "2", "3", "4")] == [0, 1, 5, 2, 3, 4], "5 out of order"
        assert not ahead.held or set(ahead.coming) == {"5"}
        assert int(ahead.get("1")) == 1 and begun.count("1") == 2, "asked for again"


def test_one_tensor_larger_than_all_that_fits_is_read_alone() -> None:
    with ThreadPoolExecutor(1) as pool:
        ahead = _Ahead(lambda name: torch.ones(1), deque([("a", 50), ("b", 50)]), pool, 30)
        ahead.get("a")
        assert set(ahead.coming) == {"b"}


def test_the_cpu_reads_when_it_is_asked() -> None:
    read: list[str] = []
    with reading_ahead(lambda name: read.append(name) or torch.ones(1), {"a": 4}, torch.device("cpu")) as fetch:
        assert not read
        fetch("a")
    assert read == ["a"]
    assert [name for name, _ in to_host([("x", torch.ones(1)), ("y", torch.ones(1))])] == ["x", "y"]
