"""Small graphs of attention: heads, queries, keys and values, written in the ways that models write them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from small_graphs import Graph, X, lin, par
from torch import nn


def attention(q, k, v):
    return torch.softmax(q @ k.transpose(-1, -2) / 2, -1) @ v


def heads(y, h):
    return y.view(1, 3, h, -1).transpose(1, 2)


def cat_heads(y):
    return y.transpose(1, 2).reshape(1, 3, -1)


def attended(q, k, v):
    return cat_heads(attention(q, k, v))


def rotary(q):
    d = q.shape[-1] // 2
    co = torch.cos(torch.arange(3.0)[:, None] * torch.arange(1, d + 1)).double().repeat(1, 2)
    si = torch.sin(torch.arange(3.0)[:, None] * torch.arange(1, d + 1)).double().repeat(1, 2)
    return q * co + torch.cat([-q[..., d:], q[..., :d]], -1) * si


def repeated(y):
    return y[:, :, None].expand(1, 2, 2, 3, 2).reshape(1, 4, 3, 2)


def interleaved(s, x):
    y = s.a(x).view(1, 3, 2, 3, 2)
    q, k, v = y.unbind(3)
    return s.o(attended(*(t.transpose(1, 2) for t in (q, k, v))))


def rotary_complex(q):
    z = torch.view_as_complex(q.reshape(*q.shape[:-1], -1, 2))
    f = torch.polar(torch.ones(3, 2).double(), torch.arange(3.0)[:, None].double() * torch.tensor([1.0, 0.3]).double())
    return torch.view_as_real(z * f).flatten(-2)


def rotary_interleaved(q):
    a, b = q[..., ::2], q[..., 1::2]
    t = torch.arange(3.0).double()[:, None] * torch.tensor([1.0, 0.3]).double()
    return torch.stack([a * t.cos() - b * t.sin(), a * t.sin() + b * t.cos()], -1).flatten(-2)


def rotary_partial(q):
    return torch.cat([rotary(q[..., :4]), q[..., 4:]], -1)


def projections(q: int, k: int, v: int, o: int) -> dict[str, nn.Module]:
    """Those of an attention over a stream of 4: widths out of the first three, into the last."""
    return {"q": lin(4, q), "k": lin(4, k), "v": lin(4, v), "o": lin(o, 4)}


ATTENTION: dict[str, Callable[[], tuple[Any, ...]]] = {
    "norm_over_heads": lambda: (
        Graph(
            lambda s, x: s.o(
                attended(rotary(s.qn(heads(s.q(x), 2))), rotary(s.kn(heads(s.k(x), 2))), heads(s.v(x), 2))
            ),
            **projections(8, 8, 8, 8),
            qn=nn.RMSNorm(4),
            kn=nn.RMSNorm(4),
        ),
        X,
    ),
    "attention": lambda: (
        Graph(
            lambda s, x: s.o(attended(rotary(heads(s.q(x), 2)), rotary(heads(s.k(x), 2)), heads(s.v(x), 2))),
            **projections(8, 8, 8, 8),
        ),
        X,
    ),
    "attention_norope": lambda: (
        Graph(
            lambda s, x: s.o(attended(heads(s.q(x), 2), heads(s.k(x), 2), heads(s.v(x), 2))),
            **projections(8, 8, 8, 8),
        ),
        X,
    ),
    "gqa_repeat": lambda: (
        Graph(
            lambda s, x: s.o(
                attended(
                    heads(s.q(x), 4),
                    heads(s.k(x), 2).repeat_interleave(2, 1),
                    heads(s.v(x), 2).repeat_interleave(2, 1),
                )
            ),
            **projections(8, 4, 4, 8),
        ),
        X,
    ),
    "gqa_expand": lambda: (
        Graph(
            lambda s, x: s.o(
                attended(rotary(heads(s.q(x), 4)), repeated(rotary(heads(s.k(x), 2))), repeated(heads(s.v(x), 2)))
            ),
            **projections(8, 4, 4, 8),
        ),
        X,
    ),
    "sdpa_gqa": lambda: (
        Graph(
            lambda s, x: s.o(
                cat_heads(
                    F.scaled_dot_product_attention(
                        heads(s.q(x), 4), heads(s.k(x), 2), heads(s.v(x), 2), enable_gqa=True
                    )
                )
            ),
            **projections(8, 4, 4, 8),
        ),
        X,
    ),
    "norm_behind_grouped_heads": lambda: (
        Graph(
            lambda s, x: s.o(
                s.n(
                    attended(
                        heads(s.q(x), 4),
                        heads(s.k(x), 2).repeat_interleave(2, 1),
                        heads(s.v(x), 2).repeat_interleave(2, 1),
                    )
                )
            ),
            **projections(8, 4, 4, 8),
            n=nn.RMSNorm(8),
        ),
        X,
    ),
    "clamped_before_attention": lambda: (
        Graph(
            lambda s, x: s.o(
                cat_heads(
                    F.scaled_dot_product_attention(*(heads(y.clamp(-0.5, 0.5), 2) for y in (s.q(x), s.k(x), s.v(x))))
                )
            ),
            **projections(8, 8, 8, 8),
        ),
        X,
    ),
    "attention_over_channels": lambda: (
        Graph(
            lambda s, x: s.o(
                F.scaled_dot_product_attention(*(y.transpose(1, 2) for y in (s.q(x), s.k(x), s.v(x)))).transpose(1, 2)
            ),
            **projections(4, 4, 4, 4),
        ),
        X,
    ),
    "qk_shared": lambda: (
        Graph(
            lambda s, x: s.o(attended(heads(s.q(x), 2), heads(s.q(x), 2), heads(s.v(x), 2))), q=lin(), v=lin(), o=lin()
        ),
        X,
    ),
    "kv_shared": lambda: (
        Graph(
            lambda s, x: s.o(attended(heads(s.q(x), 2), heads(s.k(x), 2), heads(s.k(x), 2))), q=lin(), k=lin(), o=lin()
        ),
        X,
    ),
    "complex_rope": lambda: (
        Graph(
            lambda s, x: s.o(
                attended(rotary_complex(heads(s.q(x), 2)), rotary_complex(heads(s.k(x), 2)), heads(s.v(x), 2))
            ),
            **projections(8, 8, 8, 8),
        ),
        X,
    ),
    "interleaved_rope": lambda: (
        Graph(
            lambda s, x: s.o(
                attended(rotary_interleaved(heads(s.q(x), 2)), rotary_interleaved(heads(s.k(x), 2)), heads(s.v(x), 2))
            ),
            **projections(8, 8, 8, 8),
        ),
        X,
    ),
    "partial_rope": lambda: (
        Graph(
            lambda s, x: s.o(
                attended(rotary_partial(heads(s.q(x), 2)), rotary_partial(heads(s.k(x), 2)), heads(s.v(x), 2))
            ),
            **projections(12, 12, 8, 8),
        ),
        X,
    ),
    "mqa_bcast": lambda: (
        Graph(
            lambda s, x: s.o(attended(heads(s.q(x), 2), heads(s.k(x), 1), heads(s.v(x), 1))),
            **projections(4, 2, 2, 4),
        ),
        X,
    ),
    "interleaved_qkv": lambda: (Graph(interleaved, a=lin(4, 12), o=lin()), X),
    "heads_scalar": lambda: (
        Graph(
            lambda s, x: s.o((heads(s.a(x), 2) * s.k.view(2, 1, 1)).transpose(1, 2).reshape(1, 3, 4)),
            a=lin(),
            o=lin(),
            k=par(2),
        ),
        X,
    ),
    "heads_gate": lambda: (
        Graph(
            lambda s, x: s.o(
                (heads(s.a(x), 2) * torch.sigmoid(s.gt(x)).transpose(1, 2)[..., None]).transpose(1, 2).reshape(1, 3, 4)
            ),
            a=lin(),
            o=lin(),
            gt=lin(4, 2),
        ),
        X,
    ),
}
"""Heads, queries, keys and values."""
