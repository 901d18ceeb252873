"""A module is read off at two lengths: what holds at one of them alone is not claimed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from autoquant.analyzer.analyze import analyze
from autoquant.analyzer.lengths import LONGER, OFFSET, longer_inputs
from autoquant.models.source import LoadedModel, ModelSource


class Between(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor], longest: int = 1000) -> None:
        super().__init__()
        self.up, self.down, self.function, self.longest = nn.Linear(6, 10), nn.Linear(10, 6), function, longest

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] > self.longest:
            raise ValueError("too long")
        return self.down(self.function(self.up(x)))


PROGRAMS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "the same at every length": (lambda h: h.relu(), True),
    "another branch": (lambda h: h.relu() if h.shape[1] <= 16 else h.tanh(), False),
    "a tail that is empty": (lambda h: torch.cat([h[:, :8], h[:, 8:].tanh()], 1), False),
    "chunks": (lambda h: torch.cat([c.relu() if i < 2 else c.exp() for i, c in enumerate(h.split(4, 1))], 1), False),
    "the last ones": (lambda h: torch.cat([h[:, :-20].sigmoid(), h[:, -20:]], 1), False),
    "an int of the length": (lambda h: h.relu() + max(h.shape[1] - 8, 0), False),
    "a mean over the length": (lambda h: h - h.mean(1, keepdim=True), True),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_claims_hold_at_both_lengths(name: str) -> None:
    function, holds = PROGRAMS[name]
    source = ModelSource(name, factory=lambda: (Between(function), (torch.randn(2, 5, 6),)))
    config = analyze(source).config
    assert ([group.name for group in config.smoothing.groups] == ["up -> down"]) is holds
    assert any(blocked.path == "down" and blocked.what == "smoothing" for blocked in config.blocked) is not holds


def test_a_module_of_one_length_is_read_off_at_that() -> None:
    made = lambda: (Between(lambda h: h.relu() if h.shape[1] <= 16 else h.tanh(), longest=5), (torch.randn(2, 5, 6),))  # noqa: E731
    assert [group.name for group in analyze(ModelSource("short", factory=made)).config.smoothing.groups] == [
        "up -> down"
    ]


def test_every_dimension_of_tokens_grows() -> None:
    tokens, hidden, mask = torch.tensor([[3, 1, 4]]), torch.randn(1, 3, 8), torch.zeros(1, 1, 3, 3)
    loaded = LoadedModel(nn.Identity(), (tokens, hidden), {"mask": mask})
    first, second = longer_inputs(loaded)
    assert [tuple(t.shape) for t in first.args] == [(1, LONGER), (1, LONGER, 8)]
    assert first.kwargs["mask"].shape == (1, 1, LONGER, 3)
    assert second.kwargs["mask"].shape == (1, 1, LONGER, LONGER)
    assert first.args[0][0, :5].tolist() == [3, 1, 4, 3, 1]


def test_a_batch_of_vectors_has_no_length() -> None:
    assert list(longer_inputs(LoadedModel(nn.Identity(), (torch.randn(4, 8),)))) == []


class Positions(nn.Module):
    """Positions are chosen from a table by numbers, and not by a module."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.up, self.down, self.table = nn.Linear(6, 10), nn.Linear(10, 6), nn.Parameter(torch.randn(rows, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x + self.table.index_select(0, torch.arange(x.shape[1]))).relu())


@pytest.mark.parametrize("rows", [LONGER - 3, LONGER])
def test_a_table_that_ends_before_the_longer_inputs_is_read_off_at_the_given_length(rows: int) -> None:
    source = ModelSource("positions", factory=lambda: (Positions(rows), (torch.randn(2, 5, 6),)))
    assert [group.name for group in analyze(source).config.smoothing.groups] == ["up -> down"]


class FromStart(nn.Module):
    """The position of the first token is a Python number."""

    def __init__(self, function: Callable[[Tensor, float], Tensor]) -> None:
        super().__init__()
        self.up, self.down, self.function = nn.Linear(6, 10), nn.Linear(10, 6), function

    def forward(self, x: Tensor, start: float) -> Tensor:
        return self.down(self.function(self.up(x), start))


@pytest.mark.parametrize("start", [0, 0.0])
@pytest.mark.parametrize(
    ("function", "holds"),
    [
        (lambda h, start: h + 0.1 * start, False),
        (lambda h, start: h.relu() if start == 0 else h.tanh(), False),
        (lambda h, start: h.relu() + h.relu() ** 2 * start, False),
        (lambda h, start: torch.where((torch.arange(h.shape[1]) + start > 3)[:, None], h, 0.5 * h), True),
    ],
)
def test_a_number_that_is_0_is_not_0_for_ever(
    function: Callable[[Tensor, float], Tensor], holds: bool, start: float
) -> None:
    source = ModelSource("start", factory=lambda: (FromStart(function), (torch.randn(2, 5, 6), start)))
    found = [group.name for group in analyze(source).config.smoothing.groups]
    assert found == (["up -> down"] if holds else [])


def test_flags_and_other_numbers_stay() -> None:
    loaded = LoadedModel(nn.Identity(), (torch.randn(1, 3, 8), 2, False, 0))
    assert [inputs.args[1:] for inputs in longer_inputs(loaded)] == [(2, False, OFFSET)] * 2 + [(2, False, 0)] * 2
