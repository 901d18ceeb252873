"""A forward that puts another module in the place of one of its own: its R3 is not claimed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from autoquant.analyzer.analyze import run_without_weights
from autoquant.analyzer.findings import Findings
from autoquant.analyzer.replaced import without_replaced
from autoquant.config.format import Online
from autoquant.models.source import LoadedModel


class Full(nn.Module):
    def __init__(self, q: nn.Linear, k: nn.Linear) -> None:
        super().__init__()
        self.q, self.k = q, k

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.q(x) @ self.k(x).mT @ x


class Sparse(Full):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.q(x) * self.k(x)


class Attention(nn.Module):
    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit
        self.inner: nn.Module = Sparse(nn.Linear(8, 8), nn.Linear(8, 8))
        self.out = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[1] <= self.limit and isinstance(self.inner, Sparse):
            self.inner = Full(self.inner.q, self.inner.k)
        return self.out(self.inner(x))


class Net(nn.Module):
    def __init__(self, limit: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.attention = Attention(limit)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.attention(self.embed(tokens))


ONLINE = (
    Online(kind="R3", path="attention", size=8),
    Online(kind="input", path="attention.inner.q", size=8),
    Online(kind="R3", path="other", size=8),
)


def found(limit: int) -> Findings:
    net = Net(limit).to("meta")
    loaded = LoadedModel(net, (torch.zeros(1, 3, dtype=torch.long, device="meta"),))
    before = Findings(linears=(), groups=(), spaces=(), online=ONLINE, blocked=(), unknown_operators=())
    after = without_replaced(before, net, loaded, run_without_weights)
    assert isinstance(net.attention.inner, Sparse)
    assert not net._forward_hooks
    return after


@pytest.mark.parametrize(
    ("limit", "which"), [(100, "inputs of up to 100 tokens"), (7, "inputs of up to 7 tokens"), (10**6, "these inputs")]
)
def test_the_length_at_which_it_changes_is_said(limit: int, which: str) -> None:
    after = found(limit)
    assert after.online == ONLINE[1:]
    (blocked,) = after.blocked
    assert (blocked.path, blocked.what, blocked.operator, blocked.at) == (
        "attention.inner",
        "rotation",
        "R3",
        "attention.inner",
    )
    assert blocked.reason == f"{which} put a Full in the place of its Sparse, and one alone is traced"


def test_where_nothing_is_replaced_all_stays() -> None:
    after = found(2)
    assert (after.online, after.blocked) == (ONLINE, ())


def test_what_does_not_run_without_weights_is_left_as_it_was_found() -> None:
    class Raises(Net):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            raise ValueError("not without weights")

    net = Raises(100).to("meta")
    loaded = LoadedModel(net, (torch.zeros(1, 3, dtype=torch.long, device="meta"),))
    before = Findings(linears=(), groups=(), spaces=(), online=ONLINE, blocked=(), unknown_operators=())
    assert without_replaced(before, net, loaded, run_without_weights) == before
    assert not net._forward_hooks
