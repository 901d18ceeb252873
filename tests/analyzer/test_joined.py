"""Vectors behind different norms, joined along the channels before a linear: draft heads (DeepSeek's MTP, EAGLE)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from oracle import proved
from readable import space_lines
from small_graphs import Graph, lin, par
from torch import Tensor, nn
from torch.nn import functional

from autoquant.analyzer.findings import Findings

TOKENS = torch.tensor([[3, 1, 4], [1, 5, 2]])
Draft = Callable[[Graph, Tensor, Tensor], Tensor]


def rms(x: Tensor, gain: Tensor | None = None) -> Tensor:
    return functional.rms_norm(x, (4,), gain)


def stream(findings: Findings) -> list[str]:
    """The space of the embedding, line by line; [] if it is not rotated."""
    return [line.strip() for space in findings.spaces if space.kind == "R1" for line in space_lines(space)]


def drafted(draft: Draft, **parts: nn.Module | nn.Parameter) -> Graph:
    """``draft`` makes a stream of its own of the embedding and the stream of a layer."""

    def function(s: Graph, tokens: Tensor) -> Tensor:
        e = s.emb(tokens)
        x = e + s.down(s.up(rms(e, s.g)).relu())
        return s.head(rms(draft(s, x, e)))

    plain: dict[str, nn.Module | nn.Parameter] = {
        "up": lin(),
        "down": lin(),
        "head": lin(),
        "g": par(4),
        "a": par(4),
        "b": par(4),
    }
    return Graph(function, emb=nn.Embedding(8, 4), **{**plain, "proj": lin(8, 4), **parts})


def shifted(s: Graph, x: Tensor, e: Tensor) -> Tensor:
    return s.proj(torch.cat([rms(x[:, :-1], s.a), rms(e[:, 1:], s.b)], -1))


def half_normed(s: Graph, x: Tensor, e: Tensor) -> Tensor:
    return s.proj(torch.cat([x, rms(e, s.b)], -1))


def swapped(s: Graph, x: Tensor, e: Tensor) -> Tensor:
    """Two linears, each of which has the parts in an order of its own."""
    one, other = rms(x, s.a), rms(e, s.b)
    return s.proj(torch.cat([one, other], -1)) + s.q(torch.cat([other, one], -1))


def also_alone(s: Graph, x: Tensor, e: Tensor) -> Tensor:
    """One of the norms has a reader of its own beside the joined one."""
    return s.proj(torch.cat([rms(x, s.a), rms(e, s.b)], -1)) + s.q(rms(x, s.a))


@pytest.mark.parametrize(
    ("draft", "parts", "readers"),
    [
        (shifted, {}, ["-> rms(a) proj.weight.1[0..3] +bias", "-> rms(b) proj.weight.1[4..7] +bias"]),
        (half_normed, {}, ["-> proj.weight.1[0..3] +bias", "-> rms(b) proj.weight.1[4..7] +bias"]),
        (
            swapped,
            {"q": lin(8, 4)},
            [
                "-> rms(a) proj.weight.1[0..3] +bias q.weight.1[4..7] +bias",
                "-> rms(b) proj.weight.1[4..7] +bias q.weight.1[0..3] +bias",
            ],
        ),
        (
            also_alone,
            {"q": lin()},
            ["-> rms(a) proj.weight.1[0..3] +bias q.weight.1 +bias", "-> rms(b) proj.weight.1[4..7] +bias"],
        ),
    ],
)
def test_each_norm_goes_into_the_columns_that_read_it(
    draft: Draft, parts: dict[str, nn.Module], readers: list[str]
) -> None:
    found = stream(proved(drafted(draft, **parts), TOKENS))
    assert [line for line in found if line.startswith("-> ") and "proj" in line] == readers


def other_way_round(s: Graph, x: Tensor, e: Tensor) -> Tensor:
    one, other = rms(x, s.a), rms(e, s.b)
    return s.proj(torch.cat([one, other], -1)) + s.proj(torch.cat([other, one], -1))


def looked_at(s: Graph, x: Tensor, e: Tensor) -> Tensor:
    joined = torch.cat([rms(x, s.a), rms(e, s.b)], -1)
    return s.proj(joined) * joined.amax()


def behind_each_other(s: Graph, x: Tensor, e: Tensor) -> Tensor:
    return s.q(torch.cat([rms(x, s.a), rms(e, s.b)], 1))


@pytest.mark.parametrize(
    ("draft", "reason"),
    [
        (other_way_round, "the weight is used behind different norms"),
        (looked_at, "its parts are behind different gains"),
        (behind_each_other, "its parts are behind different gains"),
    ],
)
def test_a_column_behind_both_norms_holds_neither(draft: Draft, reason: str) -> None:
    findings = proved(drafted(draft, q=lin()), TOKENS)
    assert stream(findings) == []
    assert reason in {one.reason for one in findings.blocked}


def test_the_biases_of_both_norms_move_into_one() -> None:
    def function(s: Graph, tokens: Tensor) -> Tensor:
        e = s.emb(tokens)
        x = e + s.down(s.up(s.n(e)).relu())
        return s.head(functional.layer_norm(s.proj(torch.cat([s.a(x), s.b(e)], -1)), (4,)))

    norms = {name: nn.LayerNorm(4) for name in ("n", "a", "b")}
    made = Graph(function, emb=nn.Embedding(8, 4), up=lin(), down=lin(), proj=lin(8, 4), head=lin(), **norms)
    found = stream(proved(made, TOKENS))
    assert "-> layer(a.weight, a.bias) proj.weight.1[0..3] +bias" in found
    assert "-> layer(b.weight, b.bias) proj.weight.1[4..7] +bias" in found
