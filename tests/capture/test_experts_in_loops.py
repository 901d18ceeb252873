"""Loops over experts that skip those of no tokens are read with tokens for each: an empty product changes nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from autoquant.capture.routes import capture, check_against_eager


class Experts(nn.Module):
    def __init__(self, takes: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.takes = takes
        self.router = nn.Linear(4, 3)
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))


class Counted(Experts):
    """DeepSeek's."""

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.router(x).topk(1).indices
        counts = torch.bincount(chosen.flatten(), minlength=3)
        self.takes(counts)
        out = torch.zeros_like(x)
        for number, (expert, count) in enumerate(zip(self.experts, counts.tolist(), strict=True)):
            if count == 0:
                continue
            rows, _ = torch.where(chosen == number)
            out[rows] += expert(x[rows])
        return out


class Asked(Experts):
    """Jamba's."""

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.router(x).topk(1).indices
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows, _ = torch.where(chosen == number)
            if rows.shape[0] == 0:
                continue
            out[rows] += expert(x[rows])
        return out


@pytest.mark.parametrize("kind", [Counted, Asked])
def test_every_expert_is_in_the_graph(kind: type[Experts]) -> None:
    module, x = kind(lambda counts: None), torch.randn(5, 4)
    captured = capture(module, (x,), {})
    assert len(captured.subgraphs) == 1 and not captured.untraceable
    names = {what.name for what in captured.subgraphs[0].inputs.values() if what.kind == "parameter"}
    assert names == {name for name, _ in module.named_parameters()}
    for tokens in (x, x[:1].expand(5, 4)):  # all of them to one expert
        assert check_against_eager(module, (tokens,), {}, captured) < 1e-6


def test_counts_that_are_data_are_not_known() -> None:
    module = Counted(lambda counts: counts.float().mean().mul(2))
    with pytest.raises(Exception, match="cannot capture"):
        capture(module, (torch.randn(5, 4),), {}, "export")
