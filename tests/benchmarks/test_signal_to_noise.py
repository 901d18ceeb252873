"""The roundings of benchmarks/signal_to_noise.py, and its reason why a rotation costs FP8 something."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

WIDTH = 256


@pytest.fixture(scope="module")
def benchmark() -> Any:
    path = Path(__file__).parents[2] / "benchmarks" / "signal_to_noise.py"
    spec = importlib.util.spec_from_file_location("signal_to_noise", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["signal_to_noise"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


class Made(nn.Module):
    """A table of inputs and a linear that reads them."""

    def __init__(self, inputs: Tensor, weight: Tensor) -> None:
        super().__init__()
        self.table = nn.Embedding.from_pretrained(inputs)
        self.read = nn.Linear(WIDTH, len(weight), bias=False)
        self.read.weight.data = weight

    def forward(self, ids: Tensor) -> Tensor:
        read: Tensor = self.read(self.table(ids))
        return read


def test_fp8_rounds_by_a_part_of_each_element_and_integers_by_one_step(benchmark: Any) -> None:
    x = torch.tensor([448.0, 100.0, 1.1, -0.03])
    found = benchmark.rounded_fp8(x, x.abs().max())
    assert found[0] == 448
    assert ((found - x).abs() <= x.abs() / 16).all()
    assert benchmark.rounded(torch.tensor([127.0, 0.6, -0.4]), torch.tensor(127.0)).tolist() == [127, 1, 0]


def test_int4_has_a_scale_for_each_group_of_a_row(benchmark: Any) -> None:
    weight = torch.cat([torch.full((1, 128), 7.0), torch.full((1, 64), 0.07)], 1)
    weight[0, 1] = 3.4
    found = benchmark.int4_groups(weight, weight.max())
    assert found[0, :3].tolist() == [7.0, 3.0, 7.0]
    assert torch.allclose(found[0, 128:], torch.tensor(0.07))


def test_what_a_rotation_mixes_is_what_fp8_loses(benchmark: Any) -> None:
    """Large inputs meet small weights; scales change nothing, a rotation takes what is expected of it."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.exp(2 * torch.rand(WIDTH, generator=generator) - 1)
    inputs = torch.randn(400, WIDTH, generator=generator) * sizes
    weight = torch.randn(64, WIDTH, generator=generator) / sizes
    turn = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator))[0]
    rows = [torch.arange(400)]
    found = {}
    for name, model in {
        "as it is": Made(inputs, weight),
        "scaled": Made(inputs * 1.7, weight / 1.7),
        "rotated": Made(inputs @ turn, weight @ turn),
    }.items():
        found[name] = benchmark.signals(model, benchmark.largest_inputs(model, rows), rows, {})
    plain, scaled, rotated = (found[name]["FP8", "read"] for name in ("as it is", "scaled", "rotated"))
    expected = found["as it is"]["expected", "read"] - found["rotated"]["expected", "read"]
    assert expected > 1
    assert abs(scaled - plain) < 0.1
    assert abs((plain - rotated) - expected) < 0.2
    assert abs(found["rotated"]["expected", "read"]) < 0.1
