"""Layers of equal modules that do not do the same: what is found in each is what it does."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autoquant.analyzer.analyze import analyze
from autoquant.config.layers import layer_numbers
from autoquant.models.source import ModelSource

DEPTH = 8


class Layer(nn.Module):
    def __init__(self, index: int) -> None:
        super().__init__()
        self.layer_idx = index
        self.rate = 0.1 * index
        self.up = nn.Linear(6, 10)
        self.down = nn.Linear(10, 6)

    def act(self, h: torch.Tensor) -> torch.Tensor:
        return h.relu()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.act(self.up(x)))


class Net(nn.Module):
    def __init__(
        self, layers: list[Layer], after: Callable[[int, torch.Tensor], torch.Tensor] = lambda i, x: x
    ) -> None:
        super().__init__()
        self.layers, self.after = nn.ModuleList(layers), after

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i, layer in enumerate(self.layers):
            x = self.after(i, layer(x))
        return x


class ByNumber(Layer):
    def act(self, h: torch.Tensor) -> torch.Tensor:
        return h.tanh() if self.layer_idx % 4 == 2 else h.relu()


class ByRate(Layer):
    """A float that only rises, compared."""

    def act(self, h: torch.Tensor) -> torch.Tensor:
        return h.tanh() if 0.25 < self.rate < 0.45 else h.relu()


class Held(Layer):
    """What it calls is held by an attribute: a partial function, a closure, an object, a lambda with a default."""

    def __init__(self, index: int, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__(index)
        self.function = function

    def act(self, h: torch.Tensor) -> torch.Tensor:
        return self.function(h)


class Picks(Layer):
    """Reads its channels in an order that an integer buffer holds."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        order = torch.arange(10)
        self.register_buffer("order", order.flip(0) if index in (3, 4) else order)

    def act(self, h: torch.Tensor) -> torch.Tensor:
        return h[..., self.order].relu()


class Power:
    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, h: torch.Tensor) -> torch.Tensor:
        return getattr(torch, self.name)(h)


def closure(smooth: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda h: h.tanh() if smooth else h.relu()


def hooked() -> Net:
    net = Net([Layer(i) for i in range(DEPTH)])
    net.layers[3].up.register_forward_hook(lambda module, args, output: output.tanh())  # type: ignore[union-attr]
    return net


def patched() -> Net:
    net = Net([Layer(i) for i in range(DEPTH)])
    up = net.layers[3].up
    up.forward = lambda x: F.linear(x, up.weight, up.bias).tanh()  # type: ignore[union-attr, method-assign, assignment, arg-type]
    return net


def held(special: Callable[[torch.Tensor], torch.Tensor], usual: Callable[[torch.Tensor], torch.Tensor]) -> Net:
    return Net([Held(i, special if i == 3 else usual) for i in range(DEPTH)])


NETS: dict[str, tuple[Callable[[], Net], list[int]]] = {
    "number": (lambda: Net([ByNumber(i) for i in range(DEPTH)]), [0, 1, 3, 4, 5, 7]),
    "rate": (lambda: Net([ByRate(i) for i in range(DEPTH)]), [0, 1, 2, 5, 6, 7]),
    "hook": (hooked, [0, 1, 2, 4, 5, 6, 7]),
    "patched forward": (patched, [0, 1, 2, 4, 5, 6, 7]),
    "partial": (
        lambda: held(
            functools.partial(F.gelu, approximate="tanh"), functools.partial(F.leaky_relu, negative_slope=0.1)
        ),
        [0, 1, 2, 4, 5, 6, 7],
    ),
    "closure": (lambda: held(closure(True), closure(False)), [0, 1, 2, 4, 5, 6, 7]),
    "object": (lambda: held(Power("tanh"), Power("relu")), [0, 1, 2, 4, 5, 6, 7]),
    "none": (lambda: Net([Layer(i) for i in range(DEPTH)]), list(range(DEPTH))),
}


@pytest.mark.parametrize("name", NETS)
def test_claims_are_made_of_the_layers_they_hold_for(name: str) -> None:
    make, expected = NETS[name]
    config = analyze(ModelSource(name, factory=lambda: (make(), (torch.randn(2, 3, 6),)))).config
    groups = [group for group in config.smoothing.groups if group.sources[0].path.endswith("up.weight")]
    found = [layer for group in groups for layer in layer_numbers(group.layers or "")]
    assert sorted(found) == expected


def test_channels_that_a_buffer_orders_are_told_apart() -> None:
    made = lambda: (Net([Picks(i) for i in range(DEPTH)]), (torch.randn(2, 3, 6),))  # noqa: E731
    config = analyze(ModelSource("picks", factory=made)).config
    assert [group.layers for group in config.smoothing.groups] == ["0-2,5-7", "3-4"]


def test_what_the_loop_does_after_one_layer_is_seen() -> None:
    def rotations(after: Callable[[int, torch.Tensor], torch.Tensor]) -> list[str]:
        made = lambda: (  # noqa: E731
            nn.Sequential(nn.Embedding(16, 6), Net([Layer(i) for i in range(DEPTH)], after), nn.Linear(6, 16)),
            (torch.tensor([[3, 1, 4]]),),
        )
        return [space.kind for space in analyze(ModelSource("loop", factory=made)).config.rotation.spaces]

    assert "R1" in rotations(lambda i, x: x)
    assert "R1" not in rotations(lambda i, x: x.tanh() if i == 3 else x)
