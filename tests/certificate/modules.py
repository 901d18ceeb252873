"""Small modules whose claims hold, or hold for what a trace sees only."""

from __future__ import annotations

from collections.abc import Callable

import odd_units
import torch
from odd_units import INNER, WIDTH, WORDS
from torch import Tensor, nn

from autoquant.models.source import LoadedModel

Act = Callable[["Unit", Tensor], Tensor]


class Unit(odd_units.Unit):
    """One whose ``act`` is given the module too."""

    def __init__(self, act: Act) -> None:
        super().__init__(act)

    def between(self, x: Tensor) -> Tensor:
        return self.act(self, x)


class Experts(nn.Module):
    """Stacked experts of which a router chooses one for each token, never the last by its scores."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, WIDTH)
        self.router = nn.Linear(WIDTH, count, bias=False)
        self.up = nn.Parameter(torch.randn(count, WIDTH, INNER) / 4)
        self.down = nn.Parameter(torch.randn(count, INNER, WIDTH) / 4)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.table(ids)
        scores = self.router(hidden).sigmoid()
        scores = torch.cat([scores[..., :-1], scores[..., -1:] - 2], -1)
        best, chosen = torch.topk(scores, 1, dim=-1)
        inner = torch.einsum("btd,btdh->bth", hidden, self.up[chosen[..., 0]]).relu()
        return hidden + best * torch.einsum("bth,bthd->btd", inner, self.down[chosen[..., 0]])


def loaded(module: nn.Module, tokens: int = 3) -> LoadedModel:
    """In float64 with random parameters, and one sequence of ``tokens`` ids."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return LoadedModel(module.double().eval(), (torch.arange(1, tokens + 1)[None],))
