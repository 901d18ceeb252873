"""Learned tokens as inputs of linears and norms, and linears that are parts of packed ones."""

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
Pieces = Callable[[Tensor], tuple[Tensor, ...]]


def lines(findings: Findings, kind: str) -> list[str]:
    return [line.strip() for space in findings.spaces if space.kind == kind for line in space_lines(space)]


def latent(normed: bool) -> Graph:
    """Latents look at the tokens: what they ask is made of a parameter, behind a norm or not."""

    def function(s: Graph, tokens: Tensor) -> Tensor:
        asking = s.latents.expand(2, 2, 4)
        x = functional.rms_norm(s.emb(tokens), (4,), s.g)
        q = s.q(functional.rms_norm(asking, (4,), s.g2) if normed else asking)
        q, k, v = (y.unflatten(-1, (2, 2)).transpose(1, 2) for y in (q, s.k(x), s.v(x)))
        found = asking + s.o(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return s.head(functional.rms_norm(found, (4,)))

    parts = {name: lin() for name in ("q", "k", "v", "o", "head")}
    return Graph(function, emb=nn.Embedding(8, 4), latents=par(1, 2, 4), g=par(4), g2=par(4), **parts)


@pytest.mark.parametrize("normed", [True, False])
def test_learned_tokens_are_a_stream_of_their_own(normed: bool) -> None:
    findings = proved(latent(normed), TOKENS)
    assert {group.name for group in findings.groups} == {"g -> k, v", "q -> k", "v -> o", *["g2 -> q"] * normed}
    assert lines(findings, "R2") == ["R2 2 x 2", "v.weight.0", "v.bias.0", "-> o.weight.1 +bias"]
    stream = next(space for space in findings.spaces if "latents" in {writer.path for writer in space.writers})
    assert {reader.path for read in stream.reads for reader in read.readers} == {"q.weight", "head.weight"}


def packed(pieces: Pieces, norm: nn.Module) -> Graph:
    """Queries, keys and values of one weight, whose bias is cut in pieces too."""

    def function(s: Graph, tokens: Tensor) -> Tensor:
        x = s.emb(tokens)
        parts = zip(s.w.weight.chunk(3), pieces(s.w.bias), strict=True)
        q, k, v = (functional.linear(s.norm(x), w, b).unflatten(-1, (2, 2)).transpose(1, 2) for w, b in parts)
        h = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return s.head(functional.layer_norm(x + s.o(h), (4,)))

    return Graph(function, emb=nn.Embedding(8, 4), w=lin(4, 12), o=lin(), head=lin(), norm=norm)


@pytest.mark.parametrize(
    ("pieces", "values"),
    [
        (lambda bias: bias.chunk(3), ["R2 2 x 2", "w.weight.0[8..11]", "w.bias.0[8..11]", "-> o.weight.1 +bias"]),
        (lambda bias: bias.chunk(3)[::-1], []),  # each is of other rows
    ],
)
def test_a_part_of_a_bias_goes_with_the_rows_beside_it(pieces: Pieces, values: list[str]) -> None:
    """The norm's bias is folded into it only then."""
    findings = proved(packed(pieces, nn.LayerNorm(4)), TOKENS)
    assert lines(findings, "R2") == values
    (stream,) = (space for space in findings.spaces if space.kind == "R1")
    bias = {reader.bias for read in stream.reads for reader in read.readers if reader.path == "w.weight"}
    assert bias == {"w.bias" if values else None}


@pytest.mark.parametrize("times", [torch.mul, torch.div])
@pytest.mark.parametrize(
    "other", [lambda x: x**2, lambda x: x.mean(-1, keepdim=True), lambda x: x], ids=["square", "mean", "itself"]
)
def test_a_token_that_is_joined_of_parameters_multiplies_as_any_activation(
    times: Callable[[Tensor, Tensor], Tensor], other: Callable[[Tensor], Tensor]
) -> None:
    """What it multiplies is looked at too, channel by channel: not only vectors, also what is made of them."""

    def function(s: Graph, tokens: Tensor) -> Tensor:
        x = s.emb(tokens)
        return s.a(times(other(x), torch.cat([s.token, s.token])[:4])) + s.b(x)

    graph = Graph(function, emb=nn.Embedding(8, 4), token=par(4), a=lin(), b=lin())
    assert lines(proved(graph, TOKENS), "R1") == []
