from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from autoquant.calibration.layer_by_layer import in_step


class Stack(nn.Module):
    """Two layers, the first of which is called again at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.layers[0], self.layers[0], self.layers[1], self.layers[0]):
            x = layer(x)
        return x


def walk(works: int, body: Callable[[Stack, Tensor], Tensor]) -> tuple[Stack, list[Tensor], list[Tensor], list[str]]:
    torch.manual_seed(0)
    model = Stack()
    inputs, outputs, events = [torch.randn(2, 3) for _ in range(works)], [torch.empty(0)] * works, []

    def work(i: int) -> None:
        outputs[i] = body(model, inputs[i])

    layers = {f"layers.{i}": layer for i, layer in enumerate(model.layers)}
    try:
        for path, passed in in_step([partial(work, i) for i in range(works)], layers):
            events.append(f"{'leave' if passed else 'enter'} {path}")
    finally:
        assert not any(layer._forward_pre_hooks for layer in model.layers)
    return model, inputs, outputs, events


def test_each_layer_is_entered_once_for_all_works() -> None:
    model, inputs, outputs, events = walk(3, lambda model, x: model(x))
    assert all(torch.equal(got, model(x)) for got, x in zip(outputs, inputs, strict=True))
    paths = ["layers.0", "layers.1", "layers.0"]
    assert events == [f"{what} {path}" for path in paths for what in ("enter", "leave")]


def test_what_comes_last_waits_for_the_others() -> None:
    """The first work wants the second layer at once; the other comes to it through the first."""
    model, order = Stack(), []

    def late() -> None:
        model.layers[1](torch.ones(1, 3))

    def early() -> None:
        model.layers[1](model.layers[0](torch.ones(1, 3)))

    layers = {f"layers.{i}": layer for i, layer in enumerate(model.layers)}
    for last in ((0,), ()):
        order.append([path for path, passed in in_step([late, early], layers, last) if passed])
    assert order == [["layers.0", "layers.1"], ["layers.1", "layers.0", "layers.1"]]


def test_works_that_call_no_layer_and_no_works_at_all() -> None:
    assert walk(2, lambda model, x: x)[3] == []
    assert walk(0, lambda model, x: x)[3] == []


def test_an_error_ends_all_works_and_is_raised() -> None:
    def fail(model: Stack, x: Tensor) -> Tensor:
        model.layers[0](x)
        raise IndexError("too long")

    with pytest.raises(IndexError, match="too long"):
        walk(3, fail)


def test_an_error_while_a_layer_is_entered_ends_all_works() -> None:
    model, ended = Stack(), []

    def work() -> None:
        try:
            model(torch.ones(1, 3))
        finally:
            ended.append(True)

    def refuse() -> None:
        for path, _ in in_step([work] * 2, {"layers.0": model.layers[0]}):
            raise KeyError(path)

    with pytest.raises(KeyError, match=r"layers\.0"):
        refuse()
    assert len(ended) == 2 and not model.layers[0]._forward_pre_hooks
