"""Sums over neighbours: scales and rotations pass those over tokens."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from oracle import proved
from small_graphs import Graph, lin
from torch import Tensor, nn
from torch.nn import functional

TOKENS = torch.tensor([[3, 1, 4, 1], [1, 5, 2, 6]])
Pool = Callable[[Tensor], Tensor]


def pooled(pool: Pool, norm: nn.Module) -> Graph:
    """A residual stream that is pooled behind a norm, and the hidden channels of a unit too."""

    def function(s: Graph, tokens: Tensor) -> Tensor:
        x = s.emb(tokens)
        x = x + s.down(pool(s.up(s.norm(x)).relu()))
        return s.head(functional.rms_norm(pool(x), (4,)))

    return Graph(function, emb=nn.Embedding(8, 4), up=lin(4, 4), down=lin(4, 4), norm=norm, head=lin())


def square(x: Tensor) -> Tensor:
    return x.mT.unflatten(-1, (2, 2))


def windows(x: Tensor) -> Tensor:
    """Each token behind the one before, [B, T, D, 2]; before the first is nothing."""
    return functional.pad(x, (0, 0, 1, 0)).unfold(1, 2, 1)


def shares(x: Tensor) -> Tensor:
    """Weights of the two tokens of each window, [B, T, 1, 2], by lengths, which no rotation changes."""
    return functional.pad(x.norm(dim=-1), (1, 0)).unfold(1, 2, 1).softmax(-1)[..., None, :]


SCORES = torch.tensor(
    [[0.1, 0.5, -0.3, 0.2], [0.9, 0.0, 0.4, -0.7], [-0.2, 0.3, 0.8, 0.6], [0.5, -0.1, 0.7, 0.3]]
).double()


@pytest.mark.parametrize(
    ("pool", "spaces", "groups"),
    [
        (lambda x: functional.avg_pool1d(x.mT, 3, 1, 1).mT, 1, 2),
        (lambda x: functional.avg_pool1d(x.mT, 3, 1, 1, count_include_pad=False).mT, 1, 2),
        (lambda x: functional.avg_pool2d(square(x), 3, 1, 1).flatten(2).mT, 1, 2),
        (lambda x: functional.avg_pool2d(functional.pad(square(x), (0, 1, 0, 1)), 2, 1).flatten(2).mT, 1, 2),
        (lambda x: functional.pad(x, (0, 0, 1, -1)).cumsum(1), 1, 2),
        (lambda x: x + functional.pad(x, (0, 0, 1, 0)).mean(1, keepdim=True), 1, 2),
        (lambda x: functional.adaptive_avg_pool1d(x.mT, 4).mT, 1, 2),
        (lambda x: functional.adaptive_avg_pool2d(square(x), (2, 2)).flatten(2).mT, 1, 2),
        (lambda x: functional.interpolate(x.mT, size=4, mode="linear").mT, 1, 2),
        (lambda x: functional.grid_sample(square(x), PLACES, align_corners=False).flatten(2).mT, 1, 2),
        (lambda x: (windows(x) * shares(x)).sum(-1), 1, 1),
        (lambda x: (windows(x) @ shares(x).mT)[..., 0], 1, 1),
        (lambda x: torch.einsum("btw,btdw->btd", shares(x)[..., 0, :], windows(x)), 1, 1),
        (lambda x: (x.mT @ SCORES.softmax(-1)).mT, 1, 2),
        (lambda x: x @ SCORES.softmax(-1), 0, 2),  # over channels
        (lambda x: functional.max_pool1d(x.mT, 3, 1, 1).mT, 0, 2),  # of each channel by itself
        (lambda x: functional.avg_pool1d(x, 3, 1, 1), 0, 2),  # over channels
    ],
)
def test_what_is_pooled_over_tokens(pool: Pool, spaces: int, groups: int) -> None:
    findings = proved(pooled(pool, nn.RMSNorm(4)), TOKENS)
    assert [space.kind for space in findings.spaces] == ["R1"] * spaces
    assert len(findings.groups) == groups


PLACES = torch.tensor([[[[-0.4, 0.2], [0.3, 0.5]], [[0.1, -0.6], [0.8, 0.1]]]], dtype=torch.float64).expand(2, 2, 2, 2)


def test_a_norm_s_bias_is_not_pooled() -> None:
    """Padding with 0 would leave some of it out, and it would be added as often as there are neighbours."""

    def function(s: Graph, tokens: Tensor) -> Tensor:
        x = s.emb(tokens)
        x = x + s.down(s.up(functional.avg_pool1d(s.norm(x).mT, 3, 1, 1).mT).relu())
        return s.head(functional.layer_norm(x, (4,)))

    found = {}
    for bias in (True, False):
        norm = nn.LayerNorm(4, bias=bias)
        model = Graph(function, emb=nn.Embedding(8, 4), up=lin(), down=lin(), norm=norm, head=lin())
        found[bias] = proved(model, TOKENS)
    assert [len(findings.spaces) for findings in found.values()] == [0, 1]
    reasons = {entry.reason for entry in found[True].blocked if entry.what == "rotation"}
    assert "vectors are added, to each of which norm.bias was added" in reasons
