"""Vectors that are joined, added, blended and summed over tokens, with a gain that waits behind them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from oracle import proved
from small_graphs import Graph, lin, par
from torch import Tensor, nn
from torch.nn import functional

TOKENS = torch.tensor([[3, 1, 4], [1, 5, 2]])

Turned = Callable[[Graph, Tensor], Tensor]


def rms(x: Tensor, gain: Tensor | None = None) -> Tensor:
    return functional.rms_norm(x, (4,), gain)


def graph(turned: Turned) -> Graph:
    """A stream, what ``turned`` makes of it, a unit and a head."""

    def function(s: Graph, tokens: Tensor) -> Tensor:
        x = turned(s, s.emb(tokens))
        return s.head(rms(x + s.b(functional.relu(s.a(rms(x))))))

    parts = {"g": par(4), "g2": par(4), "bias": par(4), "rows": par(1, 2, 4), "row": par(4), "two": par(8, 4)}
    made = {"emb": nn.Embedding(8, 4), "head": lin(), "a": lin(), "b": lin(), "c": lin(), "d": lin(), **parts}
    return Graph(function, **made)  # type: ignore[arg-type]  # modules and parameters


def before(x: Tensor) -> Tensor:
    """Each token in place of the next one, zeros in place of the first."""
    return torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)


def running_mean(x: Tensor) -> Tensor:
    return x.cumsum(1) / torch.arange(1, 4)[:, None]


def behind(mixed: Callable[[Tensor], Tensor]) -> Turned:
    """What a linear reads of the normed stream behind its gain g."""
    return lambda s, x: x + s.c(mixed(rms(x, s.g)))


WITH_A_GAIN = {
    "zeros": behind(before),
    "padded": behind(lambda y: functional.pad(y, (0, 0, 1, -1))),
    "its neighbour is added": behind(lambda y: y + before(y)),
    "blended": behind(lambda y: torch.lerp(y, before(y), 0.25)),
    "blended token by token": lambda s, x: x + s.c(torch.lerp(y := rms(x, s.g), before(y), s.d(y)[..., :1].sigmoid())),
    "running mean": behind(lambda y: y + running_mean(y)),
    "mean of all tokens": behind(lambda y: y + y.mean(1, keepdim=True)),
    "mixed by data": lambda s, x: x + s.c(torch.softmax(s.d(x0 := rms(x, s.g))[..., :3], -1) @ x0),
    "mixed by an einsum": lambda s, x: (
        x + s.c(torch.einsum("bts,bsd->btd", torch.softmax(s.d(x0 := rms(x, s.g))[..., :3], -1), x0))
    ),
}


@pytest.mark.parametrize("name", WITH_A_GAIN)
def test_a_gain_waits_behind_whole_vectors_together(name: str) -> None:
    (space,) = (space for space in proved(graph(WITH_A_GAIN[name]), TOKENS).spaces if space.kind == "R1")
    readers = {read.norm.weight if read.norm else None: {r.path for r in read.readers} for read in space.reads}
    assert readers["g"] in ({"c.weight"}, {"c.weight", "d.weight"})
    assert readers[None] == {"a.weight", "head.weight"}


REFUSED = {
    "a bias was not added to the zeros": (
        lambda s, x: x + s.c(before(functional.layer_norm(x, (4,), s.g, s.bias))),
        "it is joined with 0, to which bias was not added",
    ),
    "two gains": (
        lambda s, x: x + s.c(torch.cat([rms(x[:, :1], s.g), rms(x[:, 1:], s.g2)], 1)),
        "its parts are behind different gains",
    ),
    "a sum of two gains": (
        lambda s, x: x + s.c(rms(x, s.g) + rms(x, s.g2)),
        "g is applied to it before it is added: it cannot be folded into a linear",
    ),
    "a bias is added as often as there are tokens": (
        lambda s, x: x + s.c(functional.layer_norm(x, (4,), s.g, s.bias).cumsum(1)),
        "vectors are added, to each of which bias was added",
    ),
    "a share for each channel": (
        lambda s, x: x + s.c(torch.lerp(x, rms(x), s.g)),
        "a tensor that is not rotated is blended in",
    ),
    "not zeros": (
        lambda s, x: x + s.c(torch.cat([torch.ones_like(x[:, :1]), rms(x)[:, :-1]], 1)),
        "it is joined with something else",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_turned_together_says_why(name: str) -> None:
    turned, reason = REFUSED[name]
    findings = proved(graph(turned), TOKENS)
    assert not [space for space in findings.spaces if space.kind == "R1"]
    assert any(reason == found.reason for found in findings.blocked if found.what == "rotation"), findings.blocked


def joined(s: Graph, x: Tensor) -> Tensor:
    return torch.cat([s.rows.expand(len(x), -1, -1), x], 1)


@pytest.mark.parametrize(
    ("turned", "writer"),
    [
        (joined, "rows"),
        (lambda s, x: torch.cat([s.row.expand(len(x), 1, -1), x], 1), "row"),
        (lambda s, x: torch.cat([s.two.expand(len(x), -1, -1), x], 1), "two"),
    ],
)
def test_registers_are_written_with_the_stream(turned: Turned, writer: str) -> None:
    (space,) = (space for space in proved(graph(turned), TOKENS).spaces if space.kind == "R1")
    assert writer in {slot.path for slot in space.writers}
