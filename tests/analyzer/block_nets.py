"""Networks of equal blocks, for tests of which layers stand for others."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn


class Mixer(nn.Module):
    def __init__(self, index: int, width: int, window: int | None) -> None:
        super().__init__()
        self.layer_idx = index
        self.window = window
        self.rate = 0.1 / (index + 1)
        self.up = nn.Linear(8, width)
        self.down = nn.Linear(width, 8)


class Block(nn.Module):
    def __init__(self, index: int, width: int = 16, window: int | None = None) -> None:
        super().__init__()
        self.mixer = Mixer(index, width, window)
        self.experts = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(3)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mixer.down(self.mixer.up(x))


class Net(nn.Module):
    def __init__(self, blocks: list[nn.Module], config: object = None) -> None:
        super().__init__()
        self.config = config
        self.stem = nn.Linear(4, 8)
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return x


def settings(**fields: object) -> SimpleNamespace:
    return SimpleNamespace(**fields, to_dict=dict)
