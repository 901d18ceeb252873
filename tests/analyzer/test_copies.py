"""Channels that are one coordinate twice, since they are added somewhere: the first of all are rotated together."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from oracle import proved
from small_graphs import Graph, X, lin
from torch import Tensor
from torch.nn import functional

Pairs = tuple[tuple[int, int], tuple[int, int]]
Made = Callable[[Graph, Tensor, Tensor, Pairs], Tensor]


def parts(h: Tensor, pairs: Pairs) -> list[Tensor]:
    return [h[..., list(pair)] for pair in pairs]


def back(made: list[Tensor], pairs: Pairs) -> Tensor:
    """Parts that were taken out, where they were."""
    return torch.cat(made, -1)[..., torch.tensor([*pairs[0], *pairs[1]]).argsort()]


def gated(s: Graph, x: Tensor, h: Tensor, pairs: Pairs) -> Tensor:
    """A factor of its own for each pair."""
    gates = s.gate(x).tanh().split(1, -1)
    return back([part * gate for part, gate in zip(parts(h, pairs), gates, strict=True)], pairs)


def normed(s: Graph, x: Tensor, h: Tensor, pairs: Pairs) -> Tensor:
    return back([functional.rms_norm(part, (2,)) for part in parts(h, pairs)], pairs)


def measured(s: Graph, x: Tensor, h: Tensor, pairs: Pairs) -> Tensor:
    lengths = [part.square().sum(-1, keepdim=True) for part in parts(h, pairs)]
    return torch.cat([*lengths, *lengths], -1).tanh()


def graph(made: Made, pairs: Pairs) -> Graph:
    """Channels 0 and 1 of ``up`` are added, and 2 and 3: its first copies are 0 and 2, the second ones 1 and 3."""

    def function(s: Graph, x: Tensor) -> tuple[Tensor, Tensor]:
        h = s.up(x)
        return s.both(h.unflatten(-1, (2, 2)).mT.sum(-2)), s.down(made(s, x, h, pairs))

    return Graph(function, up=lin(), down=lin(), both=lin(2), gate=lin(4, 2))


@pytest.mark.parametrize("made", [gated, normed, measured], ids=lambda made: made.__name__)
@pytest.mark.parametrize(
    ("pairs", "together"),
    [(((0, 2), (1, 3)), True), (((0, 3), (1, 2)), False), (((2, 1), (3, 0)), False), (((0, 1), (2, 3)), False)],
)
def test_copies_that_something_else_is_done_to_are_told_apart(made: Made, pairs: Pairs, together: bool) -> None:
    """Where 0 and 3 share what 1 and 2 do not, each coordinate sees the same two things, in another order."""
    found = [(space.size, space.writers[0].path) for space in proved(graph(made, pairs), X).spaces]
    assert found == ([(2, "up.weight")] if together else [])


ORDERS = {
    "none moves": ((0, 1, 2, 3), (0, 1, 2, 3), (0, 1, 2, 3)),
    "both copies": ((0, 1, 2, 3), (1, 0, 3, 2), (0, 1, 2, 3)),
    "those of one coordinate": ((0, 1, 2, 3), (1, 0, 2, 3), (0, 1, 2, 3)),
    "those of each coordinate, in another token": ((0, 1, 2, 3), (1, 0, 2, 3), (0, 1, 3, 2)),
}


@pytest.mark.parametrize("name", ORDERS)
def test_each_token_has_the_copies_in_one_order(name: str) -> None:
    """Of the last ones the largest labels are 1, 1, 3, 3: as they lie in ``up``, and in no token."""

    def mixed(s: Graph, x: Tensor, h: Tensor, pairs: Pairs) -> Tensor:
        return torch.cat([h[:, n : n + 1, list(order)] for n, order in enumerate(ORDERS[name])], 1)

    findings = proved(graph(mixed, ((0, 2), (1, 3))), X)
    found = [(space.size, space.writers[0].path) for space in findings.spaces]
    assert found == ([(2, "up.weight")] if name in ("none moves", "both copies") else [])


def test_a_gate_of_each_channel_is_the_reason_also_where_heads_share_values() -> None:
    """Heads that share values make copies, which see factors of their own too: that is not what is in the way."""

    def function(s: Graph, x: Tensor) -> Tensor:
        def heads(y: Tensor) -> Tensor:
            return y.unflatten(-1, (-1, 2)).transpose(1, 2)

        shared = heads(s.v(x)).expand(-1, 2, -1, -1)
        y = functional.scaled_dot_product_attention(heads(s.q(x)), heads(s.k(x)), shared)
        read: Tensor = s.o(y.transpose(1, 2).flatten(-2) * s.gate(x).sigmoid())
        return read

    findings = proved(Graph(function, q=lin(), k=lin(), v=lin(4, 2), gate=lin(), o=lin()), X)
    assert findings.spaces == ()
    refused = {blocked.reason for blocked in findings.blocked if blocked.what == "rotation"}
    assert refused == {"its channels are multiplied by different factors"}
