"""States of linear attention: what is stored under keys is read by queries; and values that are no vectors of heads."""

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

X = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Read = Callable[[Graph, Tensor, Tensor, Tensor], Tensor]
"""Of queries, keys and values [2, 3, 2, 2], the last two dimensions heads and channels."""


def found(read: Read, **parts: nn.Module | nn.Parameter) -> Findings:
    def function(s: Graph, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (2, 2)) for f in (s.q, s.k, s.v))
        return s.o(read(s, q, k, v).reshape(2, 3, 4))

    return proved(Graph(function, q=lin(), k=lin(), v=lin(), o=lin(), **parts), X)


def groups(findings: Findings) -> dict[str, tuple[str, int]]:
    return {group.name: (group.kind.value, group.channels) for group in findings.groups}


def values(findings: Findings) -> list[str]:
    return [line.strip() for space in findings.spaces for line in space_lines(space)]


FOUND = {"q -> k": ("query_key", 4), "v -> o": ("linear_linear", 4)}
ROTATED = ["R2 2 x 2", "v.weight.0", "v.bias.0", "-> o.weight.1 +bias"]


def loop(s: Graph, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | float = 0.9) -> Tensor:
    state, out = q.new_zeros(2, 2, 2, 2), []
    for t in range(3):
        state = state * keep + k[:, t, :, :, None] * v[:, t, :, None, :]
        out.append((q[:, t, :, None, :] @ state)[:, :, 0])
    return torch.stack(out, 1)


def bonus(s: Graph, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """RWKV: the present token enters with a factor of its own."""
    state, out = q.new_zeros(2, 2, 2, 2), []
    for t in range(3):
        stored = torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        out.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state + s.u[:, :, None] * stored))
        state = state * torch.sigmoid(k[:, t, :, :, None]).round() + stored
    return torch.stack(out, 1)


def delta(s: Graph, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What was stored under a key is read before it is overwritten."""
    k, state, out = functional.normalize(k, dim=-1), q.new_zeros(2, 2, 2, 2), []
    for t in range(3):
        old = torch.einsum("bhk,bhkv->bhv", k[:, t], state)
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t] - old)
        out.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return torch.stack(out, 1)


def scores(q: Tensor, k: Tensor) -> Tensor:
    return torch.softmax(q.transpose(1, 2) @ k.transpose(1, 2).mT, -1)


def summed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bthk,bhkv->bthv", q, torch.einsum("bthk,bthv->bhkv", k, v))


@pytest.mark.parametrize(
    "read",
    [
        lambda s, q, k, v: summed(q, k, v),
        lambda s, q, k, v: (q.transpose(1, 2) @ (k.transpose(1, 2).mT @ v.transpose(1, 2))).transpose(1, 2),
        lambda s, q, k, v: torch.einsum("bthk,bthkv->bthv", q, torch.einsum("bthk,bthv->bthkv", k, v).cumsum(1)),
        loop,
        lambda s, q, k, v: loop(s, q, k, v, torch.tensor([0.9, 0.8]).to(q)[:, None, None]),
    ],
)
def test_queries_cancel_keys_and_values_pass(read: Read) -> None:
    findings = found(read)
    assert groups(findings) == FOUND
    assert values(findings) == ROTATED


def test_a_parameter_of_the_present_token_keeps_its_scale() -> None:
    """``state + u k v``: what is added has the scale of what is stored."""
    findings = found(bonus, u=par(2, 2))
    assert "v -> o" in groups(findings)
    assert values(findings) == ROTATED


def test_keys_of_length_one_take_no_scale() -> None:
    findings = found(delta)
    assert groups(findings) == {"v -> o": ("linear_linear", 4)}
    assert values(findings) == ROTATED


def test_a_state_that_something_else_reads_too_keeps_fewer_scales() -> None:
    """Its channels are tamed one by one: neither keys nor values may change."""

    def read(s: Graph, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        state = torch.tanh(torch.einsum("bthk,bthv->bhkv", k, v))
        return torch.einsum("bthk,bhkv->bthv", q, state)

    findings = found(read)
    assert {name for name in groups(findings) if "v" in name.split(" -> ")[0]} == set()
    assert values(findings) == []


def test_values_stand_last_in_what_is_stored() -> None:
    """The other way round the keys are taken for what is read: no rotation, and all the scales."""

    def read(s: Graph, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.einsum("bhvk,bthk->bthv", torch.einsum("bthv,bthk->bhvk", v, k), q)

    findings = found(read)
    assert groups(findings) == FOUND
    assert values(findings) == []


def test_the_first_state_is_nothing_and_a_bias_is_something() -> None:
    """0 times anything is 0, but what a linear makes of 0 is its bias: added to values it is a vector like them."""
    findings = found(lambda s, q, k, v: v + s.z(v.new_zeros(2, 3, 2, 2)), z=lin(2, 2))
    assert "z.bias.0" in values(findings)
    assert {path for group in findings.groups for path in (slot.path for slot in group.sources)} >= {"v.bias", "z.bias"}


def test_a_number_for_each_head_leaves_the_channels_their_scales() -> None:
    """A gate without an activation: one scale of a head would be less."""

    def read(s: Graph, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = torch.softmax(torch.einsum("bqhd,bkhd->bhqk", q, k), -1)
        return torch.einsum("bhqk,bkhd->bqhd", weights, v) * s.g(q.flatten(2))[..., None]

    findings = found(read, g=lin(4, 2))
    assert groups(findings)["v -> o"] == ("linear_linear", 4)
    assert values(findings) == ROTATED


def test_two_streams_are_looked_at_together() -> None:
    """Joint attention: the values of both are rotated alike, and so are those who read them."""

    def function(s: Graph, x: Tensor) -> Tensor:
        q, k, v = (
            torch.cat([one(x), other(x[:, :2])], 1).unflatten(-1, (2, 2)).transpose(1, 2)
            for one, other in ((s.q, s.q2), (s.k, s.k2), (s.v, s.v2))
        )
        h = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return torch.cat([s.o(h[:, :3]), s.o2(h[:, 3:])], 1)

    names = ("q", "k", "v", "o", "q2", "k2", "v2", "o2")
    findings = proved(Graph(function, **{name: lin(bias=False) for name in names}), X)
    assert values(findings) == ["R2 2 x 2", "v.weight.0", "v2.weight.0", "-> o.weight.1 o2.weight.1"]
    assert groups(findings)["v -> o, o2"] == ("linear_linear", 4)


@pytest.mark.parametrize(
    ("read", "reason"),
    [
        (  # over channels
            lambda s, q, k, v: (
                torch.softmax(q.permute(0, 2, 3, 1) @ k.transpose(1, 2), -1) @ v.permute(0, 2, 3, 1)
            ).permute(0, 3, 1, 2),
            "its channels are summed",
        ),
        (  # one channel
            lambda s, q, k, v: functional.pad(scores(q[:, :, :1], k[:, :, :1]) @ s.one(v.flatten(2))[:, None], (0, 3)),
            "none of its channels can be mixed with another",
        ),
    ],
)
def test_values_that_are_no_vectors_of_heads_are_said_to_be_lost(read: Read, reason: str) -> None:
    findings = found(read, one=lin(4, 1))
    assert [space for space in findings.spaces if space.kind == "R2"] == []
    assert reason in [entry.reason for entry in findings.blocked if entry.what == "rotation"]


@pytest.mark.parametrize(("first", "cancelled"), [(0.0, True), (1.0, False)])
def test_a_table_of_states_is_read_where_nothing_stands_yet(first: float, cancelled: bool) -> None:
    """xLSTM's chunks: queries read the state before their chunk, the first one."""

    def read(s: Graph, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        states = torch.full((2, 2, 4, 2), first, dtype=q.dtype)
        states[:, :, 2:] = k.mT @ v
        length = torch.full((2, 2, 4), first, dtype=q.dtype)
        length[:, :, 2:] = k.sum(-2)
        before = q @ states[:, :, :2] + (q @ k.mT) @ v
        over = (q @ length[:, :, :2, None] + (q @ k.mT).sum(-1, keepdim=True)).abs() + 1
        return (before / over).transpose(1, 2)

    assert ("q -> k" in groups(found(read))) is cancelled
