"""Every operator between two linears: whatever is claimed of it holds, and what is not homogeneous blocks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from oracle import proved
from small_graphs import Graph, lin
from torch import Tensor

X = torch.randn(1, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
MASK = torch.tensor([True, False, True])[:, None]

_ACTIVATIONS = [
    *("silu", "gelu", "elu", "selu", "celu", "mish", "hardswish", "hardsigmoid", "logsigmoid", "relu6", "softsign"),
    *("softplus", "hardtanh", "hardshrink", "softshrink", "tanhshrink"),
]

# f(s x) = s**power f(x) for every s > 0, channel by channel
HOMOGENEOUS: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "to": (lambda x: x.to(torch.float64), 1),
    "dropout": (lambda x: F.dropout(x, 0.3, training=False), 1),
    "neg": (torch.neg, 1),
    "relu": (torch.relu, 1),
    "leaky_relu": (lambda x: F.leaky_relu(x, 0.3), 1),
    "abs": (torch.abs, 1),
    "clone": (torch.clone, 1),
    "mul by a number": (lambda x: x * -0.3, 1),
    "div by a number": (lambda x: x / 7, 1),
    "add of zero": (lambda x: x + 0.0, 1),
    "square": (torch.square, 2),
    "pow 2": (lambda x: x**2, 2),
    "pow 3": (lambda x: x.pow(3), 3),
    "product with itself": (lambda x: x * x, 2),
    "product with its relu": (lambda x: x * torch.relu(x), 2),
    "clamp from zero": (lambda x: x.clamp(min=0), 1),
    "threshold at zero": (lambda x: F.threshold(x, 0.0, 0.0), 1),
    "maximum over tokens": (lambda x: x.amax(1, keepdim=True).expand(1, 3, 4), 1),
    "sum over tokens": (lambda x: x.sum(1), 1),
    "mean over tokens": (lambda x: x.mean(1, keepdim=True), 1),
    "cumsum over tokens": (lambda x: x.cumsum(1), 1),
    "length over tokens": (lambda x: torch.linalg.vector_norm(x, dim=1), 1),
    "where": (lambda x: torch.where(MASK, x, 0.0), 1),
    "masked_fill": (lambda x: x.masked_fill(MASK, 0.0), 1),
    "tril": (lambda x: torch.tril(x, 1), 1),
    "roll of tokens": (lambda x: x.roll(1, 1), 1),
    "flip of tokens": (lambda x: x.flip(1), 1),
    "pad of tokens": (lambda x: F.pad(x[:, 1:], (0, 0, 1, 0)), 1),
    "in place": (lambda x: x.mul_(2.0).relu_(), 1),
    "expand_as": (lambda x: x[:, :1].expand_as(x), 1),
    "mixing tokens": (lambda x: torch.softmax(torch.eye(3, dtype=torch.float64), -1) @ x, 1),
}

BLOCKS: dict[str, Callable[[Tensor], Tensor]] = {
    **{
        name: getattr(torch, name)
        for name in "sigmoid tanh exp exp2 expm1 erf sin cos tan atan sign round floor ceil".split()  # noqa: SIM905 - shorter
    },
    **{name: getattr(F, name) for name in _ACTIVATIONS},
    "softmax": lambda x: torch.softmax(x, -1),
    "softmax over tokens": lambda x: torch.softmax(x, 1),
    "log_softmax": lambda x: torch.log_softmax(x, -1),
    "add of a constant": lambda x: x + 1.0,
    "sub from a constant": lambda x: 1.0 - x,
    "add of a constant tensor": lambda x: x + torch.ones(4, dtype=torch.float64),
    "clamp": lambda x: x.clamp(-1, 1),
    "clamp from a half": lambda x: x.clamp(min=0.5),
    "threshold": lambda x: F.threshold(x, 0.1, 0.0),
    "masked_fill with a number": lambda x: x.masked_fill(MASK, 2.0),
    "where with a number": lambda x: torch.where(MASK, x, 2.0),
    "division with rounding": lambda x: torch.div(x, 2.0, rounding_mode="floor"),
    "to integers": lambda x: (100 * x).to(torch.int64).to(torch.float64),
    "layer_norm": lambda x: F.layer_norm(x, (4,)),
    "group_norm": lambda x: F.group_norm(x.transpose(1, 2), 2).transpose(1, 2),
    "mean and variance": lambda x: (x - x.mean(-1, keepdim=True)) / x.var(-1, keepdim=True).add(1e-3).sqrt(),
    "glu": lambda x: F.glu(torch.cat([x, x], -1)),
    "pow of a number": lambda x: 2.0**x,
    "fmod": lambda x: torch.fmod(x, 0.5),
    "maximum with a constant": lambda x: torch.maximum(x, torch.ones(4, dtype=torch.float64)),
    "erfinv": lambda x: torch.erfinv(torch.tanh(x)),
    "einsum": lambda x: torch.einsum("bti,btj->bij", x, x)[:, :3],
}


def between(function: Callable[[Tensor], Tensor]) -> Graph:
    return Graph(lambda s, x: s.b(function(s.a(x))), a=lin(), b=lin())


@pytest.mark.parametrize("name", HOMOGENEOUS)
def test_homogeneous(name: str) -> None:
    function, power = HOMOGENEOUS[name]
    groups = proved(between(function), X).groups
    (group,) = groups
    assert group.channels == 4
    assert [(slot.path, slot.power) for slot in group.sources] == [("a.weight", 1), ("a.bias", 1)]
    assert [(slot.path, slot.power) for slot in group.targets] == [("b.weight", power)]


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(name: str) -> None:
    findings = proved(between(BLOCKS[name]), X)
    assert findings.groups == ()
    (blocked,) = (b for b in findings.blocked if b.path == "b" and b.what == "smoothing")
    assert blocked.reason and blocked.operator.startswith(("aten.", "constant"))


@pytest.mark.parametrize("name", [*HOMOGENEOUS, *BLOCKS])
def test_in_a_space(name: str) -> None:
    """The same operators on a residual stream: the proof is what is tested."""
    function = HOMOGENEOUS[name][0] if name in HOMOGENEOUS else BLOCKS[name]

    def forward(s: Graph, tokens: Tensor) -> Tensor:
        stream = s.table(tokens)
        stream = stream + function(s.a(s.norm(stream)))
        return s.b(s.norm_2(stream))

    graph = Graph(
        forward,
        table=torch.nn.Embedding(7, 4),
        norm=torch.nn.RMSNorm(4, eps=1e-3),
        norm_2=torch.nn.RMSNorm(4, eps=1e-3),
        a=lin(),
        b=lin(),
    )
    proved(graph, torch.tensor([[1, 4, 2]]))
