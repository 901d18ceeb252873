from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from autoquant.algorithms import rounding
from autoquant.algorithms.rounding import RIDGE, corrected, cross_moment, gptq
from autoquant.quantizer import int8


def correlated(seed: int = 0, tokens: int = 600, channels: int = 80) -> Tensor:
    """Inputs [T, I] whose channels share a few directions, as activations do."""
    generator = torch.Generator().manual_seed(seed)
    low = torch.randn(tokens, 6, generator=generator) @ torch.randn(6, channels, generator=generator)
    return low + 0.1 * torch.randn(tokens, channels, generator=generator)


def weight_of(seed: int = 1, outputs: int = 16, channels: int = 80) -> Tensor:
    return torch.randn(outputs, channels, generator=torch.Generator().manual_seed(seed))


def output_error(x: Tensor, target: Tensor, values: Tensor, scale: Tensor) -> float:
    return float((functional.linear(x, target) - functional.linear(x, int8.dequantize(values, scale))).square().sum())


def test_moment_is_the_product_over_several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autoquant.algorithms.rounding.ROWS", 100)
    x, y = correlated(), correlated(2)
    expected = x.double().mT @ y.double()
    assert cross_moment(x, y).dtype is torch.float64
    assert torch.allclose(cross_moment(x, y), expected, rtol=1e-5, atol=1e-3)


def test_gptq_of_uncorrelated_inputs_is_rounding_to_the_nearest() -> None:
    weight = weight_of()
    scale = int8.absmax_scale(weight, (-1,))
    assert torch.equal(gptq(weight, torch.eye(80, dtype=torch.float64), scale), int8.quantize(weight, scale))


@pytest.mark.parametrize("dims", [(-1,), (-2, -1)], ids=["per channel", "per tensor"])
def test_gptq_makes_the_output_error_smaller(dims: tuple[int, ...]) -> None:
    x, weight = correlated(), weight_of()
    scale = int8.absmax_scale(weight, dims)
    values = gptq(weight, cross_moment(x, x), scale)
    nearest = output_error(x, weight, int8.quantize(weight, scale), scale)
    assert output_error(x, weight, values, scale) < 0.5 * nearest
    assert values.dtype is torch.int8 and int(values.abs().max()) <= 127


def test_gptq_without_calibration_tokens_is_rounding_to_the_nearest() -> None:
    weight = weight_of()
    scale = int8.absmax_scale(weight, (-1,))
    empty = torch.zeros(80, 80, dtype=torch.float64)
    assert torch.equal(gptq(weight, empty, scale), int8.quantize(weight, scale))


def test_channels_that_were_always_zero_are_rounded_to_the_nearest() -> None:
    x, weight = correlated(), weight_of()
    x[:, 3] = 0
    scale = int8.absmax_scale(weight, (-1,))
    values = gptq(weight, cross_moment(x, x), scale)
    assert torch.equal(values[:, 3], int8.quantize(weight, scale)[:, 3])


def test_weights_stay_where_inputs_are_exact() -> None:
    x, weight = correlated(), weight_of()
    moment = cross_moment(x, x)
    assert torch.allclose(corrected(weight, moment, moment), weight.double(), atol=1e-9)


def test_weights_undo_what_happened_to_their_inputs() -> None:
    """Inputs that arrive at half their size want weights of twice the size, up to the ridge."""
    generator = torch.Generator().manual_seed(4)
    x, weight = torch.randn(4000, 80, generator=generator), weight_of()
    noisy = 0.5 * x
    found = corrected(weight, cross_moment(x, noisy), cross_moment(noisy, noisy))
    expected = weight.double() * (2 + RIDGE) / (1 + RIDGE)
    assert torch.allclose(found, expected, rtol=1e-2, atol=1e-2)


def test_correction_makes_the_error_against_the_exact_output_smaller() -> None:
    x, weight = correlated(), weight_of()
    noisy = x + 0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    found = corrected(weight, cross_moment(x, noisy), cross_moment(noisy, noisy)).float()
    exact = functional.linear(x, weight)
    before = float((exact - functional.linear(noisy, weight)).square().sum())
    assert float((exact - functional.linear(noisy, found)).square().sum()) < 0.7 * before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="kernels are recorded on a GPU")
@pytest.mark.parametrize("device", range(torch.cuda.device_count()))
@pytest.mark.parametrize(("rows", "columns", "scales"), [(96, 256, 96), (96, 256, 1), (40, 100, 40)])
def test_recorded_kernels_give_the_same_values(
    rows: int, columns: int, scales: int, device: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the current card and on others."""
    generator = torch.Generator().manual_seed(rows + columns)
    weight, x = (torch.randn(n, columns, generator=generator).cuda(device) for n in (rows, 512))
    scale = weight.abs().amax(1, keepdim=True)[:scales] / 127
    found = [gptq(weight, cross_moment(x, x), scale) for _ in range(2)]
    monkeypatch.setattr(rounding, "_replayed", lambda *_: rounding._columns)
    expected = gptq(weight, cross_moment(x, x), scale)
    assert all(torch.equal(one, expected) for one in found)
