"""Small graphs that graph walkers get wrong: each a module of a few lines, random parameters, inputs to call it by.

``GRAPHS[name]()`` makes the module and its arguments. Widths are 4, sequences 3 tokens long.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import transformers.integrations.moe  # noqa: F401 - registers the grouped product
from torch import Tensor, nn

X = torch.randn(1, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
C = torch.randn(1, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
SQUARE = torch.randn(1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
IDS = torch.tensor([[1, 4, 2]])


class Graph(nn.Module):
    """A function of itself and the inputs, with named parts: modules, parameters and buffers."""

    def __init__(self, function: Callable[..., Any], **parts: nn.Module | Tensor) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            if isinstance(part, nn.Parameter | nn.Module):
                setattr(self, name, part)
            else:
                self.register_buffer(name, part)

    def forward(self, *args: Tensor) -> Any:
        return self.function(self, *args)


def lin(inputs: int = 4, outputs: int = 4, bias: bool = True) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=bias)


def par(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


def rms(s, x, w=None):
    y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    return y * w if w is not None else y


PERMUTATION = torch.tensor([2, 0, 3, 1])


def scan(s, x):
    u = s.inp(x)
    st = torch.zeros(1, 4, dtype=u.dtype)
    outs = []
    A = -torch.exp(s.A)
    for t in range(3):
        dt = torch.sigmoid(s.dt(x[:, t]))
        st = st * torch.exp(A * dt) + u[:, t] * dt
        outs.append(st)
    return s.out(torch.stack(outs, 1) + u * s.skip)


def shared_weight():
    a = lin(4, 4, False)
    b = lin(4, 4, False)
    b.weight = a.weight
    return Graph(
        lambda s, x: s.o(s.a(s.n(x)) + s.b(s.n2(s.p(x)))), a=a, b=b, n=nn.RMSNorm(4), n2=nn.RMSNorm(4), p=lin(), o=lin()
    )


def shared_weight_in_a_row():
    m = shared_weight()
    m.function = lambda s, x: s.o(s.b(s.a(s.n(x))))
    return m


def shared_bias():
    a, b = lin(), lin()
    b.bias = a.bias
    return Graph(lambda s, x: s.o(s.a(x)) + s.o2(s.b(x)), a=a, b=b, o=lin(), o2=lin())


def shared_norm():
    n, n2 = nn.RMSNorm(4), nn.RMSNorm(4)
    n2.weight = n.weight
    return Graph(lambda s, x: s.o(s.n(s.a(x))) + s.o2(s.n2(s.b(x))), a=lin(), b=lin(), n=n, n2=n2, o=lin(), o2=lin())


def experts(s, x):
    t = x.reshape(-1, 4)
    w, i = torch.topk(torch.softmax(s.r(t), -1), 1)
    out = torch.zeros_like(t)
    for e in range(2):
        m = (i == e).double()
        h = s.up[e](t)
        out = out + s.down[e](h) * w * m
    return s.o(out) + (s.z(s.up[0](t)))


def grouped(s, x, chosen):
    """Each token goes to the expert that ``chosen`` names; rows of one expert lie together."""
    order = chosen.argsort(stable=True)
    ends = torch.histc(chosen.float(), 2, 0, 1).cumsum(0).to(torch.int32)
    hidden = torch.relu(torch.ops.transformers.grouped_mm_fallback(x[0][order], s.up, ends))
    return torch.ops.transformers.grouped_mm_fallback(hidden, s.down, ends)[order.argsort()][None]


def experts_once(s, x):
    return s.o(grouped(s, s.n(x), (s.r(x)[0, :, 0] > 0).long()))


def experts_twice(s, x):
    first, second = (s.r(x)[0] > 0).long().unbind(-1)
    h = s.n(x)
    return s.o(grouped(s, h, first) + grouped(s, h, second))


def scattered(s, x):
    t = x.reshape(-1, 4)
    r = torch.topk(s.r(t)[:, 0], 2).indices
    out = torch.zeros_like(t).index_add(0, r, s.a(t[r]))
    return s.o(out)


def gated_twice(columns):
    """A vector under two gates, side by side, its channels in another order."""

    def forward(s, x):
        v = s.a(x)
        return s.o(torch.cat([v * torch.sigmoid(x[..., :1]), v * torch.sigmoid(x[..., 1:2])], -1)[..., columns])

    return Graph(forward, a=lin(4, 2), o=lin())


CHANNELS: dict[str, Callable[[], tuple[Any, ...]]] = {
    "matrix_per_head_from_left": lambda: (
        Graph(
            lambda s, x: s.o((s.w2[:, None] @ (s.w1[:, None] @ x.mT)).sum(0).mT),
            w1=par(2, 3, 4),
            w2=par(2, 4, 3),
            o=lin(),
        ),
        X,
    ),
    "matrix_from_left_of_one_head": lambda: (
        Graph(lambda s, x: s.o((s.w2 @ (s.w1 @ x.mT)).mT), w1=par(1, 3, 4), w2=par(1, 4, 3), o=lin()),
        X,
    ),
    "block_diagonal": lambda: (
        Graph(
            lambda s, x: s.o(
                torch.bmm(s.a(x).view(3, 2, 2).transpose(0, 1), s.w.view(2, 2, 2).transpose(1, 2))
                .transpose(0, 1)
                .reshape(1, 3, 4)
            ),
            a=lin(),
            w=par(4, 2),
            o=lin(),
        ),
        X,
    ),
    "gain_of_three_dimensions": lambda: (
        Graph(lambda s, x: s.o((x * s.w).reshape(1, 24)), w=par(2, 3, 4), o=lin(24, 4)),
        X,
    ),
    "relu_to_a_broken_power": lambda: (Graph(lambda s, x: s.b(F.relu(s.a(x)).pow(1.5)), a=lin(), b=lin()), X),
    "depthwise_of_flipped": lambda: (
        Graph(
            lambda s, x: (lambda h: s.b((h + s.cv(h.flip(1))).transpose(1, 2)))(s.a(x).transpose(1, 2)),
            a=lin(),
            b=lin(),
            cv=nn.Conv1d(4, 4, 1, groups=4),
        ),
        X,
    ),
    "relu_gate": lambda: (Graph(lambda s, x: s.b(torch.relu(s.a(x)) * s.a2(x)), a=lin(), a2=lin(), b=lin()), X),
    "relu_h_times_h": lambda: (Graph(lambda s, x: (lambda h: s.b(torch.relu(h) * h))(s.a(x)), a=lin(), b=lin()), X),
    "h_times_h": lambda: (Graph(lambda s, x: (lambda h: s.b(h * h))(s.a(x)), a=lin(), b=lin()), X),
    "squared_relu": lambda: (Graph(lambda s, x: s.b(torch.relu(s.a(x)).square()), a=lin(), b=lin()), X),
    "squared_relu_pow": lambda: (Graph(lambda s, x: s.b(torch.relu(s.a(x)) ** 2), a=lin(), b=lin()), X),
    "weight_halved": lambda: (
        Graph(
            lambda s, x: F.linear(torch.relu(F.linear(s.n(x), s.a.weight * 2.0, s.a.bias)), s.b.weight / 2),
            n=nn.LayerNorm(4),
            a=lin(),
            b=lin(4, 4, False),
        ),
        X,
    ),
    "weight_halved_plus_one": lambda: (
        Graph(lambda s, x: F.linear(torch.relu(s.a(x)), s.b.weight / 2 + 1.0), a=lin(), b=lin(4, 4, False)),
        X,
    ),
    "plus_one": lambda: (Graph(lambda s, x: s.b(s.a(x) + 1.0), a=lin(), b=lin()), X),
    "adaln": lambda: (Graph(lambda s, x, c: s.b(s.n(x) * (1 + s.a(c))), n=nn.RMSNorm(4), a=lin(), b=lin()), X, C),
    "adaln_no1": lambda: (Graph(lambda s, x, c: s.b(s.n(x) * s.a(c)), n=nn.RMSNorm(4), a=lin(), b=lin()), X, C),
    "perm_const": lambda: (Graph(lambda s, x: s.b(s.a(x)[..., s.p]), a=lin(), b=lin(), p=PERMUTATION), X),
    "perm_list": lambda: (Graph(lambda s, x: s.b(s.a(x)[..., [2, 0, 3, 1]]), a=lin(), b=lin()), X),
    "perm_index_select": lambda: (
        Graph(lambda s, x: s.b(torch.index_select(s.a(x), -1, s.p)), a=lin(), b=lin(), p=PERMUTATION),
        X,
    ),
    "perm_flip": lambda: (Graph(lambda s, x: s.b(s.a(x).flip(-1)), a=lin(), b=lin()), X),
    "linear_twice": lambda: (Graph(lambda s, x: s.o(s.a(torch.relu(s.a(x)))), a=lin(), o=lin()), X),
    "linear_twice_parallel": lambda: (
        Graph(lambda s, x, c: s.o(s.a(x) * torch.sigmoid(c) + s.a(c)), a=lin(), o=lin()),
        X,
        C,
    ),
    "ln_bias_two": lambda: (
        Graph(lambda s, x: (lambda h: s.a(h) + s.b(h))(s.n(x)), n=nn.LayerNorm(4), a=lin(), b=lin(4, 4, False)),
        X,
    ),
    "silu": lambda: (Graph(lambda s, x: s.b(F.silu(s.a(x))), a=lin(), b=lin()), X),
    "gated": lambda: (Graph(lambda s, x: s.d(F.silu(s.g(x)) * s.u(x)), g=lin(), u=lin(), d=lin()), X),
    "one_expert_elsewhere": lambda: (
        Graph(
            experts, r=lin(4, 2), up=nn.ModuleList([lin(), lin()]), down=nn.ModuleList([lin(), lin()]), o=lin(), z=lin()
        ),
        X,
    ),
    "experts_once": lambda: (
        Graph(experts_once, n=nn.RMSNorm(4), r=lin(4, 2), up=par(2, 4, 6), down=par(2, 6, 4), o=lin()),
        X,
    ),
    "experts_twice": lambda: (
        Graph(experts_twice, n=nn.RMSNorm(4), r=lin(4, 2), up=par(2, 4, 6), down=par(2, 6, 4), o=lin()),
        X,
    ),
    "shared_weight": lambda: (shared_weight(), X),
    "shared_weight_seq": lambda: (shared_weight_in_a_row(), X),
    "conv": lambda: (
        Graph(
            lambda s, x: s.b(s.cv(s.a(x).transpose(1, 2))[..., :3].transpose(1, 2)),
            a=lin(),
            b=lin(),
            cv=nn.Conv1d(4, 4, 3, groups=4, padding=2),
        ),
        X,
    ),
    "conv_silu": lambda: (
        Graph(
            lambda s, x: s.b(F.silu(s.cv(s.a(x).transpose(1, 2))[..., :3]).transpose(1, 2)),
            a=lin(),
            b=lin(),
            cv=nn.Conv1d(4, 4, 3, groups=4, padding=2),
        ),
        X,
    ),
    "conv_gate": lambda: (
        Graph(
            lambda s, x: s.b(s.cv(s.a(x).transpose(1, 2))[..., :3].transpose(1, 2) * s.a2(x)),
            a=lin(),
            a2=lin(),
            b=lin(),
            cv=nn.Conv1d(4, 4, 3, groups=4, padding=2),
        ),
        X,
    ),
    "conv_dense": lambda: (
        Graph(
            lambda s, x: s.b(s.cv(s.a(x).transpose(1, 2))[..., :3].transpose(1, 2)),
            a=lin(),
            b=lin(),
            cv=nn.Conv1d(4, 4, 3, padding=2),
        ),
        X,
    ),
    "leaky": lambda: (Graph(lambda s, x: s.b(F.leaky_relu(s.a(x), 0.1)), a=lin(), b=lin()), X),
    "leaky_negative": lambda: (Graph(lambda s, x: s.b(F.leaky_relu(s.a(x), -0.1)), a=lin(), b=lin()), X),
    "hardtanh": lambda: (Graph(lambda s, x: s.b(F.hardtanh(s.a(x))), a=lin(), b=lin()), X),
    "relu6": lambda: (Graph(lambda s, x: s.b(F.relu6(s.a(x))), a=lin(), b=lin()), X),
    "divide": lambda: (Graph(lambda s, x: s.b(s.a(x) / s.a2(x)), a=lin(), a2=lin(), b=lin()), X),
    "cat": lambda: (Graph(lambda s, x: s.b(torch.cat([s.a(x), s.a2(x)], -1)), a=lin(), a2=lin(4, 2), b=lin(6, 4)), X),
    "chunk": lambda: (
        Graph(lambda s, x: (lambda g, u: s.b(F.gelu(g) * u))(*s.a(x).chunk(2, -1)), a=lin(4, 8), b=lin()),
        X,
    ),
    "split": lambda: (
        Graph(
            lambda s, x: (lambda g, u: s.b(torch.relu(g) + u))(*torch.split(s.a(x), [4, 4], -1)), a=lin(4, 8), b=lin()
        ),
        X,
    ),
    "W.T": lambda: (Graph(lambda s, x: s.a(x) @ s.w.T, a=lin(), w=par(4, 4)), X),
    "W": lambda: (Graph(lambda s, x: (x @ s.u) @ s.w, u=par(4, 6), w=par(6, 4)), X),
    "addmm": lambda: (
        Graph(
            lambda s, x: torch.addmm(s.c, torch.addmm(s.b, x.view(-1, 4), s.u), s.w),
            u=par(4, 6),
            w=par(6, 4),
            b=par(6),
            c=par(4),
        ),
        X,
    ),
    "baddbmm": lambda: (  # a bias of each pair of tokens is added to products of a and b
        Graph(
            lambda s, x: torch.softmax(torch.baddbmm(s.p(x), s.a(x), s.b(x).mT, alpha=0.5), -1),
            p=lin(4, 3),
            a=lin(),
            b=lin(),
        ),
        X,
    ),
    "einsum_mixes_tokens": lambda: (
        Graph(
            lambda s, x: s.o(
                torch.einsum("bts,bshd->bthd", torch.softmax(s.p(x), -1), s.v(x).view(1, 3, 2, 2)).reshape(1, 3, 4)
            ),
            p=lin(4, 3),
            v=lin(),
            o=lin(),
        ),
        X,
    ),
    "einsum": lambda: (
        Graph(lambda s, x: s.b(torch.einsum("btd,de->bte", s.a(x), s.w)), a=lin(), b=lin(), w=par(4, 4)),
        X,
    ),
    "unknown_op": lambda: (Graph(lambda s, x: s.b(torch.special.i0e(s.a(x))), a=lin(), b=lin()), X),
    "shared_bias": lambda: (shared_bias(), X),
    "norm_twice": lambda: (
        Graph(lambda s, x: s.b(s.n(x)) + s.c(s.n(s.a(x))), n=nn.RMSNorm(4), a=lin(), b=lin(), c=lin()),
        X,
    ),
    "norm_tied": lambda: (shared_norm(), X),
    "norm_added": lambda: (Graph(lambda s, x: (lambda h: s.b(h) + h)(s.n(x)), n=nn.RMSNorm(4), b=lin()), X),
    "offset": lambda: (Graph(lambda s, x: s.b(rms(s, x) * (1 + s.w)), w=par(4), b=lin()), X),
    "offset_and_plain": lambda: (
        Graph(lambda s, x: s.b(rms(s, x) * (1 + s.w)) + s.c(rms(s, x) * s.w), w=par(4), b=lin(), c=lin()),
        X,
    ),
    "index_add": lambda: (Graph(scattered, r=lin(4, 1), a=lin(), o=lin()), X),
    "scan": lambda: (Graph(scan, inp=lin(), dt=lin(), out=lin(), A=par(4), skip=par(4)), X),
    "extra_output": lambda: (Graph(lambda s, x: (lambda h: (s.b(h), h))(s.a(x)), a=lin(), b=lin()), X),
    "buffer_scale": lambda: (Graph(lambda s, x: s.b(s.a(x) * s.k), a=lin(), b=lin(), k=torch.rand(4).double()), X),
    "param_scale": lambda: (Graph(lambda s, x: s.b(s.a(x) * s.k), a=lin(), b=lin(), k=par(4)), X),
    "max_binary": lambda: (Graph(lambda s, x: s.b(torch.max(s.a(x), s.a2(x))), a=lin(), a2=lin(), b=lin()), X),
    "normalize": lambda: (Graph(lambda s, x: s.b(F.normalize(s.a(x), dim=-1)), a=lin(), b=lin()), X),
    "vector_norm": lambda: (
        Graph(
            lambda s, x: s.b(s.a(x) * torch.linalg.vector_norm(s.a2(x), dim=-1, keepdim=True)),
            a=lin(),
            a2=lin(),
            b=lin(),
        ),
        X,
    ),
    "to_int": lambda: (Graph(lambda s, x: s.b((s.a(x) * 100).to(torch.int64).double()), a=lin(), b=lin()), X),
    "pad": lambda: (Graph(lambda s, x: s.b(F.pad(s.a(x), (1, 1))), a=lin(), b=lin(6, 4)), X),
    "pad_value": lambda: (Graph(lambda s, x: s.b(F.pad(s.a(x), (1, 1), value=2.0)), a=lin(), b=lin(6, 4)), X),
    "pad_reflect": lambda: (Graph(lambda s, x: s.b(F.pad(s.a(x), (1, 1), mode="reflect")), a=lin(), b=lin(6, 4)), X),
    "expand_as": lambda: (Graph(lambda s, x: s.b(s.a(x[:, :1]).expand_as(x)), a=lin(), b=lin()), X),
    "reshape_as": lambda: (Graph(lambda s, x: s.b(s.a(x).reshape_as(x)), a=lin(), b=lin()), X),
    "repeat_unknown": lambda: (Graph(lambda s, x: s.b(s.a(x).repeat_interleave(3, dim=1)), a=lin(), b=lin()), X),
    "rsub": lambda: (Graph(lambda s, x: s.b(1 - s.a(x)), a=lin(), b=lin()), X),
    "sub": lambda: (Graph(lambda s, x: s.b(s.a(x) - s.a2(x)), a=lin(), a2=lin(), b=lin()), X),
    "alpha": lambda: (Graph(lambda s, x: s.b(torch.add(s.a(x), s.a2(x), alpha=3)), a=lin(), a2=lin(), b=lin()), X),
    "roll": lambda: (Graph(lambda s, x: s.b(s.a(x).roll(1, -1)), a=lin(), b=lin()), X),
    "threshold": lambda: (Graph(lambda s, x: s.b(F.threshold(s.a(x), 0.0, 0.0)), a=lin(), b=lin()), X),
    "threshold1": lambda: (Graph(lambda s, x: s.b(F.threshold(s.a(x), 0.1, 0.0)), a=lin(), b=lin()), X),
    "prelu": lambda: (Graph(lambda s, x: s.b(s.p(s.a(x))), a=lin(), b=lin(), p=nn.PReLU()), X),
    "glu": lambda: (Graph(lambda s, x: s.b(F.glu(s.a(x))), a=lin(4, 8), b=lin()), X),
    "amax": lambda: (Graph(lambda s, x: s.b(s.a(x) - s.a(x).amax(-1, keepdim=True)), a=lin(), b=lin()), X),
    "where_gt": lambda: (Graph(lambda s, x: s.b(torch.where(s.a(x) > 0, s.a(x), 0.0)), a=lin(), b=lin()), X),
    "batchnorm": lambda: (
        Graph(lambda s, x: s.b(s.bn(s.a(x).transpose(1, 2)).transpose(1, 2)), a=lin(), b=lin(), bn=nn.BatchNorm1d(4)),
        X,
    ),
    "groupnorm": lambda: (
        Graph(lambda s, x: s.b(s.gn(s.a(x).transpose(1, 2)).transpose(1, 2)), a=lin(), b=lin(), gn=nn.GroupNorm(2, 4)),
        X,
    ),
    "bilinear": lambda: (Graph(lambda s, x: s.bl(s.a(x), x), a=lin(), bl=nn.Bilinear(4, 4, 3)), X),
    "transposed_add": lambda: (
        Graph(lambda s, x: (lambda h: s.o(h + h.transpose(-1, -2)))(s.a(x)), a=lin(), o=lin()),
        SQUARE,
    ),
    "rms_groups": lambda: (
        Graph(lambda s, x: s.o(rms(s, s.a(x).view(1, 3, 2, 2)).reshape(1, 3, 4)), a=lin(), o=lin()),
        X,
    ),
    "mixed_occurrence": lambda: (gated_twice([0, 3, 1, 2]), X),
    "mixed_occurrence2": lambda: (gated_twice([0, 3, 2, 1]), X),
    "param_slice_rows": lambda: (Graph(lambda s, x: F.linear(F.linear(x, s.w[:3]), s.w[:, :3]), w=par(5, 4)), X),
    "fused_slices": lambda: (Graph(lambda s, x: F.linear(F.linear(x, s.w[:4]), s.w[4:]), w=par(8, 4)), X),
    "weight_scaled": lambda: (Graph(lambda s, x: s.o(F.linear(x, s.w * 2.0)), w=par(4, 4), o=lin()), X),
    "weight_norm": lambda: (
        Graph(lambda s, x: s.o(F.linear(x, s.w / s.w.norm(dim=1, keepdim=True))), w=par(4, 4), o=lin()),
        X,
    ),
    "bias_plus": lambda: (Graph(lambda s, x: s.o(F.linear(x, s.a.weight) + s.a.bias), a=lin(), o=lin()), X),
    "bias_view": lambda: (
        Graph(lambda s, x: s.o(F.linear(x, s.w) + s.k.view(1, 1, -1)), w=par(4, 4), k=par(2, 2), o=lin()),
        X,
    ),
    "param_scalar": lambda: (Graph(lambda s, x: s.b(s.a(x) * s.k), a=lin(), b=lin(), k=par(1)), X),
    "param_scalar_add": lambda: (Graph(lambda s, x: s.b(torch.relu(s.a(x) + s.k)), a=lin(), b=lin(), k=par(1)), X),
    "linear_attention": lambda: (
        Graph(lambda s, x: s.o(s.q(x) @ (s.k(x).transpose(-1, -2) @ s.v(x))), q=lin(), k=lin(), v=lin(), o=lin()),
        X,
    ),
    "max_dim": lambda: (Graph(lambda s, x: s.b(s.a(x).max(-2, keepdim=True).values), a=lin(), b=lin()), X),
    "topk_values": lambda: (Graph(lambda s, x: s.b(s.a(x).topk(2, -1).values), a=lin(), b=lin(2, 4)), X),
    "sort_values": lambda: (Graph(lambda s, x: s.b(s.a(x).sort(-1).values), a=lin(), b=lin()), X),
    "gather": lambda: (Graph(lambda s, x: s.b(torch.gather(s.a(x), -1, (x > 0).long())), a=lin(), b=lin()), X),
    "scatter": lambda: (
        Graph(
            lambda s, x: s.b(torch.zeros_like(x).scatter(-1, s.p.expand(1, 3, 4), s.a(x))),
            a=lin(),
            b=lin(),
            p=PERMUTATION,
        ),
        X,
    ),
    "index_put": lambda: (
        Graph(
            lambda s, x: s.b(torch.zeros_like(x).index_put((s.i,), s.a(x)[0, 0][None])),
            a=lin(),
            b=lin(),
            i=torch.tensor([0]),
        ),
        X,
    ),
    "index_put_zeros": lambda: (
        Graph(
            lambda s, x: s.b(s.a(x).index_put((torch.tensor([[True, False, True]]),), torch.zeros((), dtype=x.dtype))),
            a=lin(),
            b=lin(),
        ),
        X,
    ),
    "index_put_ones": lambda: (
        Graph(
            lambda s, x: s.b(s.a(x).index_put((torch.tensor([[True, False, True]]),), torch.ones((), dtype=x.dtype))),
            a=lin(),
            b=lin(),
        ),
        X,
    ),
    "index_put_zeros_channels": lambda: (
        Graph(
            lambda s, x: s.b(s.a(x).index_put((torch.ones(1, 3, 4).tril() > 0,), torch.zeros((), dtype=x.dtype))),
            a=lin(),
            b=lin(),
        ),
        X,
    ),
    "select_scatter": lambda: (
        Graph(lambda s, x: s.b(torch.select_scatter(s.a(x), s.c(x)[..., 0], -1, 1)), a=lin(), b=lin(), c=lin()),
        X,
    ),
    "slice_assign": lambda: (
        Graph(lambda s, x: (lambda h: (h[..., :2].mul_(2.0), s.b(h))[1])(s.a(x)), a=lin(), b=lin()),
        X,
    ),
    "relu_": lambda: (Graph(lambda s, x: s.b(s.a(x).relu_()), a=lin(), b=lin()), X),
    "mean_pool": lambda: (Graph(lambda s, x: s.b(s.a(x).mean(1)), a=lin(), b=lin()), X),
    "sum_all": lambda: (Graph(lambda s, x: s.b(s.a(x) * s.c(x).sum()), a=lin(), b=lin(), c=lin()), X),
    "x_over_norm": lambda: (
        Graph(lambda s, x: (lambda h: s.b(h / h.norm(dim=-1, keepdim=True)))(s.a(x)), a=lin(), b=lin()),
        X,
    ),
    "x_over_sum": lambda: (
        Graph(lambda s, x: (lambda h: s.b(h / h.sum(-1, keepdim=True)))(s.a(x)), a=lin(), b=lin()),
        X,
    ),
    "pow3": lambda: (Graph(lambda s, x: s.b(s.a(x) ** 3), a=lin(), b=lin()), X),
    "sqrt_relu": lambda: (Graph(lambda s, x: s.b(torch.relu(s.a(x)).sqrt()), a=lin(), b=lin()), X),
    "pow_half_mix": lambda: (
        Graph(lambda s, x: (lambda h: s.b(h.sqrt()) + s.c(h))(torch.relu(s.a(x))), a=lin(), b=lin(), c=lin()),
        X,
    ),
    "pow_gate": lambda: (Graph(lambda s, x: s.b(torch.relu(s.a(x)).square() * s.c(x)), a=lin(), b=lin(), c=lin()), X),
    "h2_plus_h": lambda: (Graph(lambda s, x: (lambda h: s.b(h * h + h))(s.a(x)), a=lin(), b=lin()), X),
    "buffer_index_tokens": lambda: (Graph(lambda s, x: s.b(s.a(x)[:, [2, 0, 1]]), a=lin(), b=lin()), X),
    "moveaxis_mix": lambda: (Graph(lambda s, x: s.b(s.a(x).reshape(1, 4, 3).transpose(1, 2)), a=lin(), b=lin()), X),
    "moveaxis_legal": lambda: (
        Graph(lambda s, x: s.b(s.a(x).view(1, 3, 2, 2).transpose(2, 3).reshape(1, 3, 4)), a=lin(), b=lin()),
        X,
    ),
    "two_linears_sum_bias_none": lambda: (Graph(lambda s, x: s.b(s.a(x) + s.p), a=lin(), b=lin(), p=par(4)), X),
}
"""Linears, and what stands between them."""
