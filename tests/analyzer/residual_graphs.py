"""Small graphs with a residual stream: an embedding, norms, and linears that read and write it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from small_graphs import IDS, Graph, lin, par, rms
from torch import nn


def tied():
    e = nn.Embedding(7, 4)
    h = nn.Linear(4, 7, bias=False)
    h.weight = e.weight
    return Graph(
        lambda s, i: s.h(s.n(s.e(i) + s.b(s.n2(s.e(i))))),
        e=e,
        h=h,
        n=nn.RMSNorm(4, eps=1e-6),
        n2=nn.RMSNorm(4, eps=1e-6),
        b=lin(),
    )


SECOND_AND_THIRD = torch.tensor([[[False], [True], [True]]])
PICTURE = torch.ones(1, 4, dtype=torch.float64)


def rms_norm():
    return nn.RMSNorm(4, eps=1e-6)


def embedded(f, **k):
    return Graph(f, e=nn.Embedding(7, 4), **k)


def out_of_step(f):
    """``f`` of the residual and of two rows, each of three channels of one vector and the first one of the next."""
    return (
        embedded(
            lambda s, i: (lambda x: s.o(s.n(f(x, s.v(x).view(-1)[1:9].view(1, 2, 4)))))(s.e(i)),
            v=lin(),
            n=rms_norm(),
            o=lin(),
        ),
        IDS,
    )


RESIDUAL: dict[str, Callable[[], tuple[Any, ...]]] = {
    "post_norm": lambda: (
        embedded(
            lambda s, i: (lambda e: s.o(s.f_(e + s.n(s.b(s.m(e))))))(s.e(i)),
            n=nn.RMSNorm(4),
            m=nn.RMSNorm(4),
            f_=nn.RMSNorm(4),
            b=lin(),
            o=lin(),
        ),
        IDS,
    ),
    "tied": lambda: (tied(), IDS),
    "extra_output_space": lambda: (
        embedded(lambda s, i: (lambda h: (s.o(s.n(h)), h))(s.e(i)), n=nn.RMSNorm(4), o=lin()),
        IDS,
    ),
    "norm_read_and_added": lambda: (
        embedded(
            lambda s, i: (lambda h: s.o(s.n2(s.b(h) + h)))(s.n(s.e(i) + s.p(s.n3(s.e(i))))),
            n=nn.RMSNorm(4),
            n2=nn.RMSNorm(4),
            n3=nn.RMSNorm(4),
            p=lin(),
            b=lin(),
            o=lin(),
        ),
        IDS,
    ),
    "buffer_space": lambda: (
        embedded(lambda s, i: s.o(s.n(s.e(i) * s.k)), n=nn.RMSNorm(4), o=lin(), k=torch.rand(4).double()),
        IDS,
    ),
    "emb_scaled_norm": lambda: (embedded(lambda s, i: s.o(s.n(s.e(i) * 3.0)), n=nn.RMSNorm(4, eps=0.1), o=lin()), IDS),
    "emb_norm": lambda: (
        embedded(
            lambda s, i: (lambda h: s.o(s.f_(h + s.b(s.n2(h)))))(s.n(s.e(i))),
            n=nn.LayerNorm(4),
            n2=nn.RMSNorm(4),
            f_=nn.RMSNorm(4),
            b=lin(),
            o=lin(),
        ),
        IDS,
    ),
    "mlp_bias_ln_space": lambda: (
        embedded(
            lambda s, i: (lambda h: s.o(s.f_(h + s.b(F.gelu(s.c(s.n2(h)))))))(s.e(i) + s.pos),
            n2=nn.LayerNorm(4),
            f_=nn.LayerNorm(4),
            b=lin(8, 4),
            c=lin(4, 8),
            o=lin(4, 4, False),
            pos=par(3, 4),
        ),
        IDS,
    ),
    "pos_table": lambda: (
        embedded(
            lambda s, i: (lambda h: s.o(s.f_(h)))(s.e(i) + s.pe(torch.arange(3))),
            pe=nn.Embedding(5, 4),
            f_=nn.LayerNorm(4),
            o=lin(4, 4, False),
        ),
        IDS,
    ),
    "positions_by_number": lambda: (
        embedded(lambda s, i: s.o(s.n(s.e(i) + s.pos[torch.arange(3) + 2])), pos=par(8, 4), n=rms_norm(), o=lin()),
        IDS,
    ),
    "every_second_position": lambda: (
        embedded(lambda s, i: s.o(s.n(s.e(i) + s.pos[::2])), pos=par(6, 4), n=rms_norm(), o=lin()),
        IDS,
    ),
    "positions_used_otherwise": lambda: (
        embedded(lambda s, i: s.o(s.n(s.e(i) + s.pos[:3])) * s.pos[5].tanh(), pos=par(8, 4), n=rms_norm(), o=lin()),
        IDS,
    ),
    "pos_slice": lambda: (
        embedded(
            lambda s, i: (lambda h: s.o(s.f_(h)))(s.e(i) + s.pos[:3]),
            pos=par(5, 4),
            f_=nn.RMSNorm(4),
            o=lin(4, 4, False),
        ),
        IDS,
    ),
    "norm_gain_two_offsets": lambda: (
        embedded(
            lambda s, i: (lambda h: s.b(rms(s, h) * (1 + s.w)) + s.c(rms(s, h) * s.w))(s.e(i)),
            w=par(4),
            b=lin(),
            c=lin(),
        ),
        IDS,
    ),
    "norm_gain_reused": lambda: (
        embedded(lambda s, i: (lambda h: s.b(s.n(h)) * s.n.weight)(s.e(i)), n=nn.RMSNorm(4), b=lin()),
        IDS,
    ),
    "norm_twice_space": lambda: (
        embedded(
            lambda s, i: (lambda h: s.b(s.n(h)) + s.c(s.n(s.e2(i))))(s.e(i)),
            e2=nn.Embedding(7, 4),
            n=nn.RMSNorm(4),
            b=lin(),
            c=lin(),
        ),
        IDS,
    ),
    "two_norms_one_linear": lambda: (
        embedded(
            lambda s, i: (lambda h: s.b(s.n(h) + 0 * h) + s.b(s.n2(h)))(s.e(i)),
            n2=nn.RMSNorm(4),
            n=nn.RMSNorm(4),
            b=lin(),
        ),
        IDS,
    ),
    "ln_and_raw": lambda: (
        embedded(lambda s, i: (lambda h: s.b(s.n(h)) + s.c(h))(s.e(i)), n=nn.LayerNorm(4), b=lin(), c=lin()),
        IDS,
    ),
    "ln_and_rms": lambda: (
        embedded(
            lambda s, i: (lambda h: s.b(s.n(h)) + s.c(s.n2(h)))(s.e(i)),
            n=nn.LayerNorm(4),
            n2=nn.RMSNorm(4),
            b=lin(),
            c=lin(),
        ),
        IDS,
    ),
    "class_token": lambda: (
        embedded(
            lambda s, i: s.o(s.n(torch.cat([s.cls.expand(1, 1, 4), s.e(i)], 1) + s.pos)),
            cls=par(1, 1, 4),
            pos=par(1, 4, 4),
            n=nn.LayerNorm(4),
            o=lin(),
        ),
        IDS,
    ),
    "class_token_among_others": lambda: (
        embedded(
            lambda s, i: s.o(s.n(torch.cat([s.cls, s.e(i).softmax(-1)], 1))), cls=par(1, 1, 4), n=rms_norm(), o=lin()
        ),
        IDS,
    ),
    "token_of_two_channels": lambda: (
        embedded(
            lambda s, i: s.o(s.n(torch.cat([s.cls.repeat(1, 1, 2), s.e(i)], 1))),
            cls=par(1, 1, 2),
            n=rms_norm(),
            o=lin(),
        ),
        IDS,
    ),
    "pictures_and_newlines": lambda: (
        embedded(
            lambda s, i: s.o(s.n(s.e(i).masked_scatter(SECOND_AND_THIRD, torch.cat([s.v(PICTURE), s.newline[None]])))),
            v=lin(),
            newline=par(4),
            n=rms_norm(),
            o=lin(),
        ),
        IDS,
    ),
    "pictures_in_one_row": lambda: (
        embedded(
            lambda s, i: s.o(s.n((lambda x: x.masked_scatter(SECOND_AND_THIRD, s.v(x[:, 1:3]).view(-1)))(s.e(i)))),
            v=lin(),
            n=rms_norm(),
            o=lin(),
        ),
        IDS,
    ),
    "pictures_out_of_step": lambda: out_of_step(lambda x, rows: x.masked_scatter(SECOND_AND_THIRD, rows)),
    "sum_of_rows_out_of_step": lambda: out_of_step(lambda x, rows: x + rows.sum(1, keepdim=True)),
    "rows_out_of_step": lambda: out_of_step(lambda x, rows: x.index_add(1, torch.tensor([0, 2]), rows)),
    "rows_out_of_step_by_the_data": lambda: out_of_step(lambda x, rows: x + rows[:, IDS[0] % 2]),
    "mean_of_rows_out_of_step": lambda: out_of_step(lambda x, rows: x + torch.full((3, 2), 0.5).double() @ rows),
    "length_then_ln": lambda: (
        embedded(lambda s, i: s.b(s.n(F.rms_norm(s.e(i), (4,)))), n=nn.LayerNorm(4), b=lin()),
        IDS,
    ),
    "ln_then_length": lambda: (
        embedded(
            lambda s, i: (lambda h: s.b(h) * h.square().sum(-1, True))(s.n(s.e(i))),
            n=nn.LayerNorm(4, elementwise_affine=False),
            b=lin(),
        ),
        IDS,
    ),
    **{
        f"norm_before_addmm_with_beta_{beta}": lambda beta=beta: (
            embedded(
                lambda s, i: torch.addmm(s.c, s.n(s.b(s.e(i)))[0], s.m, beta=beta),
                **{"b": lin(), "n": nn.LayerNorm(4), "m": par(4, 4), "c": par(4)},
            ),
            IDS,
        )
        for beta in (1, 0.5)
    },
    "ln_only_bias": lambda: (
        embedded(lambda s, i: (lambda h: s.b(s.n(h)))(s.e(i)), n=nn.LayerNorm(4, elementwise_affine=False), b=lin()),
        IDS,
    ),
    "emb_twice_folded": lambda: (
        embedded(
            lambda s, i: s.o(s.n(s.e(i))) + s.p(s.n2(s.e(i))),
            n=nn.RMSNorm(4, eps=0.1),
            n2=nn.RMSNorm(4, eps=0.1),
            o=lin(),
            p=lin(),
        ),
        IDS,
    ),
    "emb_twice_folded_same": lambda: (
        embedded(lambda s, i: s.o(s.n(s.e(i))) + s.p(s.n(s.e(i.flip(1)))), n=nn.RMSNorm(4, eps=0.1), o=lin(), p=lin()),
        IDS,
    ),
    "emb_folded_norm_reused": lambda: (
        embedded(
            lambda s, i: (lambda h: s.o(s.n(h + s.p(h))))(s.n(s.e(i))), n=nn.RMSNorm(4, eps=0.1), o=lin(), p=lin()
        ),
        IDS,
    ),
    "emb_turned_before_its_norm": lambda: (
        embedded(
            lambda s, i: (lambda h: s.o(s.n2(h + s.p(h))))(s.n(s.e(i).roll(1, -1))),
            **{"n": rms_norm(), "n2": rms_norm(), "o": lin(), "p": lin()},
        ),
        IDS,
    ),
    "emb_folded_in_parts": lambda: (
        embedded(
            lambda s, i: (lambda h: s.a(h[..., :2]) + s.b(h[..., 2:]))(s.n(s.e(i))), n=rms_norm(), a=lin(2), b=lin(2)
        ),
        IDS,
    ),
    "emb_folded_then_tied": lambda: (tied(), IDS),
    "read_again_as_tokens": lambda: (
        embedded(
            lambda s, i: s.o(s.b(torch.stack([s.b(s.e(i))[..., j] for j in (2, 0, 3, 1)], -1))),
            b=lin(4, 4, False),
            o=lin(),
        ),
        IDS,
    ),
    "table_is_weight": lambda: (embedded(lambda s, i: s.o(F.linear(s.e(i), s.e.weight)), o=lin(7, 4)), IDS),
    "table_is_head": lambda: (
        embedded(
            lambda s, i: F.linear(rms(s, s.e(i) + s.b(F.silu(s.a(rms(s, s.e(i)))))), s.e.weight), a=lin(), b=lin()
        ),
        IDS,
    ),
    "table_is_head_of_a_layer_norm": lambda: (
        embedded(
            lambda s, i: F.linear(
                F.layer_norm(s.e(i) + s.b(F.silu(s.a(F.layer_norm(s.e(i), (4,))))), (4,)), s.e.weight
            ),
            a=lin(),
            b=lin(),
        ),
        IDS,
    ),
    "table_is_head_behind_a_gain": lambda: (
        embedded(
            lambda s, i: F.linear(s.n(s.e(i) + s.b(F.silu(s.a(rms(s, s.e(i)))))), s.e.weight),
            a=lin(),
            b=lin(),
            n=rms_norm(),
        ),
        IDS,
    ),
    "weight_is_bias": lambda: (
        embedded(lambda s, i: s.o(F.layer_norm(s.e(i), (4,), s.p, s.p)), p=par(4), o=lin()),
        IDS,
    ),
    "bias_of_two_norms": lambda: (
        embedded(
            lambda s, i: (lambda h: s.o(F.layer_norm(h, (4,), s.n, s.p)) + s.o2(F.layer_norm(h, (4,), s.n2, s.p)))(
                s.e(i)
            ),
            p=par(4),
            n=par(4),
            n2=par(4),
            o=lin(),
            o2=lin(),
        ),
        IDS,
    ),
    "bias_of_two_spaces": lambda: (
        embedded(
            lambda s, i: s.o(F.layer_norm(s.e(i), (4,), s.n, s.p)) + s.o2(F.layer_norm(s.e2(i), (4,), s.n, s.p)),
            p=par(4),
            n=par(4),
            e2=nn.Embedding(7, 4),
            o=lin(),
            o2=lin(),
        ),
        IDS,
    ),
    "token_mix": lambda: (
        embedded(lambda s, i: (lambda h: s.o(s.n(h + h.roll(1, 1))))(s.e(i)), n=nn.RMSNorm(4), o=lin()),
        IDS,
    ),
    "token_mean": lambda: (
        embedded(lambda s, i: (lambda h: s.o(s.n(h + h.mean(1, keepdim=True))))(s.e(i)), n=nn.RMSNorm(4), o=lin()),
        IDS,
    ),
    "token_cumsum": lambda: (
        embedded(lambda s, i: (lambda h: s.o(s.n(h.cumsum(1))))(s.e(i)), n=nn.RMSNorm(4), o=lin()),
        IDS,
    ),
    "half_norm": lambda: (
        embedded(
            lambda s, i: (lambda h: s.o(torch.cat([s.n(h[..., :2]), h[..., 2:]], -1)))(s.e(i)), n=nn.RMSNorm(2), o=lin()
        ),
        IDS,
    ),
    "gain_of_joined_parts": lambda: (
        embedded(
            lambda s, i: s.o(s.n(torch.cat([s.e(i), s.e2(i)], -1))),
            e2=nn.Embedding(7, 4),
            n=nn.RMSNorm(8, eps=1e-6),
            o=lin(8),
        ),
        IDS,
    ),
    "table_that_is_measured_alone": lambda: (
        embedded(lambda s, i: s.o(s.e2(i)) * s.e(i).norm(dim=-1, keepdim=True), e2=nn.Embedding(7, 4), o=lin()),
        IDS,
    ),
    "table_of_unlike_channels": lambda: (
        embedded(
            lambda s, i: s.o(torch.cat([s.a(s.e(i)), s.b(s.e(i))], -1) + s.e2(i)),
            e2=nn.Embedding(7, 2),
            a=lin(4, 1, False),
            b=lin(4, 1, False),
            o=lin(2),
        ),
        IDS,
    ),
    "mean_of_joined_parts": lambda: (
        embedded(
            lambda s, i: s.o(F.layer_norm(torch.cat([s.e(i), s.e2(i)], -1), (8,))), e2=nn.Embedding(7, 4), o=lin(8)
        ),
        IDS,
    ),
    "parts_of_two": lambda: (
        embedded(
            lambda s, i: (lambda x, y: s.o(torch.cat([y[..., 2:], x[..., :2]], -1)))(
                *(lambda x: (x, x + s.b(x)))(s.e(i))
            ),
            b=lin(),
            o=lin(),
        ),
        IDS,
    ),
    "parts_of_a_vector_and_its_norm": lambda: (
        embedded(
            lambda s, i: (lambda x: s.o(torch.cat([F.rms_norm(x, (4,))[..., 2:], x[..., :2]], -1)))(s.e(i)), o=lin()
        ),
        IDS,
    ),
    "halves_added": lambda: (
        embedded(lambda s, i: s.o(F.linear(s.e(i), s.w[:8]) + F.linear(s.e(i), s.w[-8:])), w=par(12, 4), o=lin(8, 4)),
        IDS,
    ),
    "halves_added_and_read_from_the_second": lambda: (
        embedded(
            lambda s, i: F.linear(F.linear(s.e(i), s.w[:8]) + F.linear(s.e(i), s.w[-8:]), s.o.roll(1, 1)),
            w=par(12, 4),
            o=par(4, 8),
        ),
        IDS,
    ),
    "norm_with_a_rolled_bias": lambda: (
        embedded(lambda s, i: s.o(s.n(s.b(s.e(i))) + s.p.roll(1, 0)), n=nn.RMSNorm(4), p=par(4), b=lin(), o=lin()),
        IDS,
    ),
    "gain_of_another_vector_too": lambda: (
        embedded(
            lambda s, i: (lambda x: s.o(s.n(x * s.p[0])) + s.o2(s.n(s.b(x))))(s.e(i)),
            n=nn.RMSNorm(4),
            p=par(4, 4),
            b=lin(),
            o=lin(),
            o2=lin(),
        ),
        IDS,
    ),
    "norm_that_is_no_module": lambda: (
        embedded(
            lambda s, i: (lambda h: s.o(h + s.b(h)))(F.layer_norm(s.e(i), (4,), s.n, s.p)),
            n=par(4),
            p=par(4),
            b=lin(),
            o=lin(),
        ),
        IDS,
    ),
    "stack_tokens": lambda: (
        embedded(lambda s, i: (lambda h: s.o(torch.cat([h[:, :2], h[:, 1:]], -1)))(s.e(i)), o=lin(8, 4)),
        IDS,
    ),
    "cat_tokens": lambda: (
        embedded(
            lambda s, i: (lambda h: s.o(s.n(torch.cat([h, s.e2(i)], 1) + torch.cat([s.e2(i), h], 1))))(s.e(i)),
            e2=nn.Embedding(7, 4),
            n=nn.RMSNorm(4),
            o=lin(),
        ),
        IDS,
    ),
    "layer_scale": lambda: (
        embedded(
            lambda s, i: (lambda h: s.o(s.f_(h + s.g * s.b(s.n(h)))))(s.e(i)),
            n=nn.RMSNorm(4),
            f_=nn.RMSNorm(4),
            b=lin(),
            o=lin(),
            g=par(4),
        ),
        IDS,
    ),
    "layer_scalar": lambda: (
        embedded(
            lambda s, i: (lambda h: s.o(s.f_(h * s.g1 + s.g * s.b(s.n(h)))))(s.e(i)),
            n=nn.RMSNorm(4),
            f_=nn.RMSNorm(4),
            b=lin(),
            o=lin(),
            g=par(1),
            g1=par(1),
        ),
        IDS,
    ),
    "norm_bias_no_reader_bias": lambda: (
        embedded(lambda s, i: (lambda h: s.n(h) @ s.w)(s.e(i)), n=nn.LayerNorm(4), w=par(4, 5)),
        IDS,
    ),
}
