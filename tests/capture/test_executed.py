"""Known values are told apart, whatever mode runs the model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from autoquant.capture.executed import execute, values_of
from autoquant.library_patches import FakeTensorMode


def test_values_that_are_known_are_compared_within_a_mode_of_fake_tensors() -> None:
    one, same, other = torch.tensor([1, 2]), torch.tensor([1, 2]), torch.tensor([1, 3])
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert values_of(one) == values_of(same) != values_of(other)


class _Picks(nn.Module):
    """Layers that add rows which a list of numbers picks, the last one others."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.picked = (torch.tensor([0, 1]), torch.tensor([0, 1]), torch.tensor([1, 0]))

    def forward(self, x: Tensor) -> Tensor:
        for layer, picked in zip(self.layers, self.picked, strict=True):
            x = x + layer(x)
            x = x[picked]
        return x


def test_a_model_runs_on_fake_tensors_with_indices_of_known_values() -> None:
    model = _Picks()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        x = mode.from_tensor(torch.zeros(2, 4))
        ran = execute(model, {"layers": 3}, lambda module: module(x))
    assert [len(calls) for calls in ran.calls["layers"]] == [1, 1, 1]
