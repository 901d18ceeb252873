"""Models without weights that branch on integers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from autoquant.analyzer.capture import capture, check_against_eager
from autoquant.tracing import known_values, stand_ins_, undisturbed


class Placed(nn.Module):
    """Puts features where the ids say so, in runs whose lengths the ids decide."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8, 4)
        self.project = nn.Linear(3, 4)

    def forward(self, features: torch.Tensor, ids: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        assert ids is not None
        mask = ids == 7
        if mask.sum() != features.shape[0]:
            raise ValueError("as many features as places")
        lengths = torch.unique_consecutive(mask, return_counts=True)[1].tolist()
        made = self.project(features)
        text = self.table(ids).masked_scatter(mask[..., None], made)
        parts = torch.split(text, lengths, 1)
        return torch.cat([part * (i + 1) for i, part in enumerate(parts)], 1), made[made.new_zeros(2).long()]


IDS = torch.tensor([[1, 2, 7, 7, 3]])


def test_a_model_that_branches_on_known_integers_is_captured_and_computes_the_same() -> None:
    module = Placed()
    inputs = {"ids": IDS, "features": torch.randn(2, 3)}
    captured = capture(module, (), inputs, known=["ids"])
    assert (captured.how, captured.known) == ("export", ("ids",))
    assert [source.name for source in captured.pieces[0].inputs.values() if source.kind == "input"] == ["features"]
    assert check_against_eager(module, (), inputs, captured) < 1e-6
    other = {**inputs, "ids": torch.tensor([[7, 1, 2, 7, 3]])}  # a check that can fail
    assert check_against_eager(module, (), other, captured) > 1e-2


def test_the_first_output_alone() -> None:
    module = Placed()
    inputs = {"ids": IDS, "features": torch.randn(2, 3)}
    both, one = (capture(module, (), inputs, known=["ids"], first=first) for first in (False, True))
    counts = [len(c.pieces[0].graph.graph.output_node().args[0]) for c in (both, one)]
    assert counts == [2, 1]
    assert check_against_eager(module, (), inputs, one) < 1e-6


def test_without_weights() -> None:
    module = Placed().to("meta")
    inputs = {"ids": IDS, "features": torch.empty(2, 3, device="meta")}
    with undisturbed(module):
        given, mode = stand_ins_(module, inputs)
        with mode, known_values():
            text, rows = module(**given)
    assert (text.shape, rows.shape) == ((1, 5, 4), (2, 4))
    assert all(parameter.is_meta for parameter in module.parameters())
    with undisturbed(module):
        given, mode = stand_ins_(module, inputs)
        with mode, known_values(), pytest.raises(ValueError, match="as many features as places"):
            module(**{**given, "ids": torch.tensor([[7, 7, 7]])})


def test_integers_alone_are_computed_and_nothing_is_assumed_of_others() -> None:
    module = nn.Linear(2, 2).to("meta")
    with undisturbed(module):
        _, mode = stand_ins_(module, ())
        with mode, known_values():
            assert (torch.arange(4) * 2).tolist() == [0, 2, 4, 6]
            assert torch.zeros(2, dtype=torch.long).tolist() == [0, 0]
            x = torch.zeros(2, 2)  # a fill in floating point is the trace's
            assert type(x) is not torch.Tensor
            assert x[torch.tensor([True, False])].shape == (1, 2)
            assert module.weight[torch.tensor([True, True]), 0].shape == (2,)
