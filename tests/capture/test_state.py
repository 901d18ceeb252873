"""What a forward keeps of a call is put back, whatever holds it."""

from __future__ import annotations

import itertools
import random
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autoquant.capture.state import kept_state

X = torch.arange(6.0).view(2, 3)


class Keeps(nn.Module):
    """``step(self, held)`` gives the number that the result is multiplied by."""

    def __init__(self, held: Any, step: Callable[[Keeps], float]) -> None:
        super().__init__()
        self.lin, self.held, self.step = nn.Linear(3, 3), held, step

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x) * self.step(self)  # type: ignore[no-any-return]  # a tensor


class Counter:
    count = 0


def adding(name: str, value: Any) -> Callable[[Keeps], float]:
    def step(module: Keeps) -> float:
        getattr(module.held, name)(value)
        return len(module.held)

    return step


def counted(module: Keeps) -> float:
    module.held.count += 1
    return module.held.count  # type: ignore[no-any-return]  # an int


def number(module: Keeps) -> float:
    module.held += 1
    return module.held  # type: ignore[no-any-return]  # an int


def entry(module: Keeps) -> float:
    module.held["n"] = [*module.held["n"], 1]
    return len(module.held["n"])


def growing(module: Keeps) -> float:
    module.held |= {len(module.held)}
    return len(module.held)


def filled(module: Keeps) -> float:
    module.held[0].add_(1)
    return float(module.held[0])


def closure() -> Callable[[Keeps], float]:
    calls = 0

    def step(module: Keeps) -> float:
        nonlocal calls
        calls += 1
        return calls

    return step


WAYS: dict[str, Callable[[], Keeps]] = {
    "number": lambda: Keeps(1, number),
    "list": lambda: Keeps([], adding("append", 1)),
    "deque": lambda: Keeps(deque(), adding("append", 1)),
    "set": lambda: Keeps(set(), growing),
    "dictionary": lambda: Keeps({"n": []}, entry),
    "object": lambda: Keeps(Counter(), counted),
    "iterator": lambda: Keeps(itertools.count(1), lambda module: next(module.held)),
    "iterator in a list": lambda: Keeps([itertools.count(1)], lambda module: next(module.held[0])),
    "random numbers": lambda: Keeps(random.Random(0), lambda module: module.held.random()),
    "torch's": lambda: Keeps(torch.Generator(), lambda module: float(torch.rand((), generator=module.held))),
    "tensor in a list": lambda: Keeps([torch.zeros(())], filled),
    "closure": lambda: Keeps(None, closure()),
}


@pytest.mark.parametrize("way", list(WAYS))
@torch.no_grad()
def test_each_run_starts_from_the_same_state(way: str) -> None:
    module = WAYS[way]()
    with kept_state(module) as kept:
        first = module(X)
    assert kept.changed
    with kept_state(module):
        assert torch.equal(module(X), first)
        assert not torch.equal(module(X), first)  # within a run the state goes on
    assert torch.equal(module(X), first)


@torch.no_grad()
def test_a_module_that_keeps_nothing_is_not_changed() -> None:
    module = Keeps({"a": [1, {2}], "b": (deque([3]), Counter())}, lambda module: 1.0)
    with kept_state(module) as kept:
        module(X)
    assert not kept.changed


@torch.no_grad()
def test_a_note_beside_weights_that_were_written_stays_with_them() -> None:
    """Put back alone, the weights would be halved again."""

    def once(module: Keeps) -> float:
        if not module.held:
            module.lin.weight.div_(2)
        module.held = True
        return 1.0

    module = Keeps(False, once)
    weight = module.lin.weight.clone()
    for _ in range(2):
        with kept_state(module):
            module(X)
    assert module.held is True and torch.equal(module.lin.weight, weight / 2)
