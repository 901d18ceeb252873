"""What a trace knows of values: numbers that depend on length, position or a checkpoint are none of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoquant.analyzer.analyze import analyze
from autoquant.config.format import Config
from autoquant.models.source import ModelSource

EXPERTS = 8


class Between(nn.Module):
    """up, a function of its result, down."""

    def __init__(self, function: Callable[[Between, Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.down, self.function = nn.Linear(6, 10), nn.Linear(10, 6), function
        self.register_buffer("steps", torch.zeros(10, dtype=torch.int64))
        self.register_buffer("order", torch.arange(10).flip(0))
        self.register_buffer("keep", torch.ones(10, dtype=torch.bool))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.function(self, self.up(x).relu()))


def found(module: Callable[[], nn.Module], example: Tensor) -> Config:
    return analyze(ModelSource("constants", factory=lambda: (module(), (example,)))).config


def positions(h: Tensor) -> Tensor:
    return torch.arange(h.shape[1], device=h.device)


PROGRAMS: dict[str, tuple[Callable[[Between, Tensor], Tensor], bool]] = {
    "ramp that starts later": (lambda s, h: h + 0.1 * (positions(h) - 8).clamp(min=0)[:, None], False),
    "integers of positions": (lambda s, h: h + (positions(h) // 64)[:, None], False),
    "positions by a running sum": (lambda s, h: h + (torch.ones(h.shape[1]).cumsum(0) - 1)[:1], False),
    "sine of the first position": (lambda s, h: h + (positions(h)[:1] * 0.5).sin(), False),
    "length": (lambda s, h: h + torch.ones(h.shape[1]).sum() - 3, False),
    "buffer as a number": (lambda s, h: h + s.steps, False),
    "buffer as a factor of a number": (lambda s, h: h + 0.1 * s.steps.to(h.dtype), False),
    "buffer as a condition, with a number": (lambda s, h: torch.where(s.keep, h, torch.ones_like(h)), False),
    "buffer as an index": (lambda s, h: h[..., s.order], True),
    "buffer as a factor": (lambda s, h: h * s.steps, True),
    "zeros": (lambda s, h: h + torch.zeros(h.shape[1], 1), True),
    "mask of positions, chosen from 0": (
        lambda s, h: h + torch.where((positions(h) > 1)[:, None], 0.0, torch.zeros(1, 10)),
        True,
    ),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_numbers_that_are_not_settled_let_no_scale_pass(name: str) -> None:
    function, passes = PROGRAMS[name]
    config = found(lambda: Between(function), torch.randn(2, 3, 6))
    assert ([group.name for group in config.smoothing.groups] == ["up -> down"]) is passes


class Routed(nn.Module):
    """An expert chosen by the token; the second product by what ``pick`` makes of the first one's choice."""

    def __init__(self, pick: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.emb, self.pick = nn.Embedding(16, 6), pick
        self.w1, self.w2 = nn.Parameter(torch.rand(EXPERTS, 6, 10)), nn.Parameter(torch.rand(EXPERTS, 10, 6))

    def forward(self, tokens: Tensor) -> Tensor:
        x, e = self.emb(tokens).flatten(0, 1), tokens.flatten() % EXPERTS
        h = F.relu(torch.bmm(x.unsqueeze(1), self.w1[e]))
        return torch.bmm(h, self.w2[self.pick(e)])


PICKS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "the same": (lambda e: e, True),
    "cast": (lambda e: e.to(torch.int32), True),
    "reshaped": (lambda e: e.view(1, -1).reshape(-1), True),
    "clamped to all experts": (lambda e: e.clamp(0, EXPERTS - 1), True),
    "clamped to few": (lambda e: e.clamp(max=4), False),
    "clamped from below": (lambda e: e.clamp(min=1), False),
    "running sum": (lambda e: e.cumsum(0).clamp(max=EXPERTS - 1), False),
    "to bool and back": (lambda e: e.to(torch.bool).to(torch.int64), False),
    "another": (lambda e: (e + 1) % EXPERTS, False),
}


@pytest.mark.parametrize("name", PICKS)
def test_experts_that_are_not_the_same_share_their_scales(name: str) -> None:
    pick, same = PICKS[name]
    config = found(lambda: Routed(pick), torch.tensor([[3, 1, 4]]))
    (group,) = [group for group in config.smoothing.groups if group.name == "w1 -> w2"]
    each = {slot.path: slot for slot in group.sources}["w1"].stack is not None
    assert each is same
