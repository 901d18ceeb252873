"""Depthwise convolutions take the scale of what they read and of what they make, apart from each other."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from oracle import proved
from small_graphs import Graph, lin
from torch import Tensor, nn
from torch.nn import functional

X = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def convolved(act: Callable[[Tensor], Tensor], each: int) -> Graph:
    """Two channels, of which a convolution makes ``each``."""

    def function(s: Graph, x: Tensor) -> Tensor:
        made = s.cv(functional.pad(s.a(x).transpose(1, 2), (2, 0)))
        return s.b(act(made).transpose(1, 2))

    return Graph(function, a=lin(4, 2), b=lin(2 * each, 4), cv=nn.Conv1d(2, 2 * each, 3, groups=2))


def groups(act: Callable[[Tensor], Tensor], each: int) -> list[tuple[str, int]]:
    return [(group.name, group.channels) for group in proved(convolved(act, each), X).groups]


@pytest.mark.parametrize("each", [1, 2, 3])
def test_both_scales_pass(each: int) -> None:
    assert groups(lambda made: made, each) == [("a -> cv", 2), ("cv -> b", 2 * each)]


def test_behind_the_convolution_the_scale_may_end() -> None:
    assert groups(functional.silu, 2) == [("a -> cv", 2)]


def test_positions_of_a_multiplier_carry_one_channel() -> None:
    (group,) = proved(convolved(functional.silu, 2), X).groups
    (target,) = group.targets
    assert target.index is not None
    (index,) = target.index
    assert (index.shape, index.stride, index.channel_stride) == ((2, 2), (2, 1), (1, 0))


def test_what_is_added_to_what_it_makes_leaves_the_convolution_alone() -> None:
    def function(s: Graph, x: Tensor) -> Tensor:
        a = s.a(x).transpose(1, 2)
        return s.b((a + s.cv(functional.pad(a, (2, 0)))).transpose(1, 2))

    found = proved(Graph(function, a=lin(), b=lin(), cv=nn.Conv1d(4, 4, 3, groups=4, bias=False)), X).groups
    assert [group.name for group in found] == ["a -> b"]
    assert [slot.path for slot in found[0].sources] == ["a.weight", "a.bias"]


def test_of_two_channels_that_are_swapped_behind_it_neither_is_left() -> None:
    """The channel that is added carries the scale of its neighbour, which the weight would take twice."""

    def function(s: Graph, x: Tensor) -> Tensor:
        a = s.a(x).transpose(1, 2)
        return s.b((a.flip(1) + s.cv(functional.pad(a, (2, 0)))).transpose(1, 2))

    found = proved(Graph(function, a=lin(), b=lin(), cv=nn.Conv1d(4, 4, 3, groups=4, bias=False)), X).groups
    assert all(slot.path != "cv.weight" for group in found for slot in (*group.sources, *group.targets))
