"""Attention whose scores a function of the model changes: queries meet keys, values pass."""

from __future__ import annotations

import torch
from oracle import proved
from small_graphs import Graph, lin, par
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention

from autoquant.analyzer.findings import Findings

TOKENS = torch.tensor([[3, 1, 4], [1, 5, 2]])


def attention(kv_heads: int, use_slopes: bool = True, values_score: bool = False) -> Findings:
    def function(s: Graph, tokens: Tensor) -> Tensor:
        x = s.emb(tokens)
        q = s.q(x).view(2, 3, 2, 2).transpose(1, 2)
        k, v = (f(x).view(2, 3, kv_heads, 2).transpose(1, 2) for f in (s.k, s.v))
        slopes, own = s.slopes, v[0, 0, :, 0] if values_score else None

        def score(value: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            value = value - slopes[h] * (i - j) if use_slopes else value
            value = value if own is None else value + own[j]
            return torch.where(i >= j, value, -float("inf"))

        out = flex_attention(q, k, v, score_mod=score, enable_gqa=kv_heads == 1)
        assert isinstance(out, Tensor)
        return s.o(out.transpose(1, 2).reshape(2, 3, 4))

    kv = 2 * kv_heads
    parts = {"q": lin(), "k": lin(4, kv), "v": lin(4, kv), "o": lin(), "slopes": par(2)}
    return proved(Graph(function, emb=nn.Embedding(8, 4), **parts), TOKENS)


def test_scores_of_any_function_leave_both_symmetries() -> None:
    for kv_heads in (1, 2):
        findings = attention(kv_heads)
        assert [group.name for group in findings.groups] == ["emb -> q, k, v", "q -> k", "v -> o"]
        assert [(s.kind, s.size, s.blocks) for s in findings.spaces if s.kind == "R2"] == [("R2", 2, kv_heads)]


def test_what_the_function_holds_keeps_its_scale() -> None:
    """Slopes take no scale; and the values of a head that scores depend on are not rotated."""
    assert all("slopes" not in group.name for group in attention(2).groups)
    (space,) = (space for space in attention(2, values_score=True).spaces if space.kind == "R2")
    assert [writer.index and writer.index[0].start for writer in space.writers] == [2, 2]
