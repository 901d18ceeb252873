"""Small models of which the analysis misses a group: what stands between two linears has no rule, or blocks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

WIDTH, INNER, WORDS = 12, 16, 32


class Unit(nn.Module):
    """Tokens through a norm, a linear, ``act`` and a linear, added to what they were."""

    def __init__(self, act: Callable[..., Tensor]) -> None:
        super().__init__()
        self.act = act
        self.table = nn.Embedding(WORDS, WIDTH)
        self.norm = nn.RMSNorm(WIDTH, eps=1e-6)
        self.up = nn.Linear(WIDTH, INNER)
        self.down = nn.Linear(INNER, WIDTH)

    def between(self, x: Tensor) -> Tensor:
        """What stands between the linears."""
        return self.act(x)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.table(ids)
        return hidden + self.down(self.between(self.up(self.norm(hidden))))  # type: ignore[no-any-return]  # a call's


class WithHead(Unit):
    """The same behind a head. ``spare`` is never read."""

    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__(act)
        self.spare = nn.Linear(WIDTH, INNER)
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(super().forward(ids))  # type: ignore[no-any-return]  # a call's


def build() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A factory: ``copysign`` passes a scale, and has no rule."""
    return WithHead(signed), (torch.tensor([[3, 1, 4]]),)


def build_clamped() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A factory: the clamp is far above what a small model computes."""
    return WithHead(clamped), (torch.tensor([[3, 1, 4]]),)


def signed(x: Tensor) -> Tensor:
    return torch.copysign(x.abs() * 0.5, x)


def clamped(x: Tensor) -> Tensor:
    return x.clamp(-300, 300)


def nearly(x: Tensor) -> Tensor:
    return x.sign() * (x.abs() + 1e-8)


def saturating(x: Tensor) -> Tensor:
    return torch.tanh(x / 500) * 500
