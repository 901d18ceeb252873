"""A model for tests of what people see: gated layers without attention, a post-norm in every second one."""

from __future__ import annotations

import torch
from torch import nn


class Layer(nn.Module):
    def __init__(self, post: bool) -> None:
        super().__init__()
        self.before = nn.RMSNorm(16)
        self.gate = nn.Linear(16, 24, bias=False)
        self.rise = nn.Linear(16, 24, bias=False)
        self.fall = nn.Linear(24, 16, bias=False)
        self.after = nn.RMSNorm(16) if post else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.before(x)
        y = self.fall(nn.functional.silu(self.gate(y)) * self.rise(y))
        return x + (y if self.after is None else self.after(y))


class Model(nn.Module):
    def __init__(self, post: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(32, 16)
        self.steps = nn.ModuleList(Layer(post) for _ in range(3))
        self.norm = nn.RMSNorm(16)
        self.act = nn.Linear(16, 12)
        self.head = nn.Linear(12, 32, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        for step in self.steps:
            x = step(x)
        return self.head(torch.tanh(self.act(self.norm(x))))


def plain() -> tuple[nn.Module, tuple[torch.Tensor]]:
    return Model(post=False), (torch.arange(6).view(2, 3),)


def post() -> tuple[nn.Module, tuple[torch.Tensor]]:
    return Model(post=True), (torch.arange(6).view(2, 3),)
