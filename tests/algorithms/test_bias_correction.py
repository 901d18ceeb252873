from __future__ import annotations

import torch
from torch.nn import functional

from autoquant.algorithms.bias_correction import corrected_bias

GENERATOR = torch.Generator().manual_seed(0)
EXACT = torch.randn(64, 6, generator=GENERATOR, dtype=torch.float64) + 1
WEIGHT = torch.randn(4, 6, generator=GENERATOR, dtype=torch.float64)
BIAS = torch.randn(4, generator=GENERATOR, dtype=torch.float64)


def test_the_mean_output_is_the_exact_one_and_the_error_falls() -> None:
    inputs, weight = EXACT.round(), (4 * WEIGHT).floor() / 4
    expected, plain = functional.linear(EXACT, WEIGHT, BIAS), functional.linear(inputs, weight, BIAS)
    found = functional.linear(inputs, weight, corrected_bias(EXACT, WEIGHT, inputs, weight, BIAS))
    assert torch.allclose(found.mean(0), expected.mean(0), atol=1e-12)
    assert (plain.mean(0) - expected.mean(0)).abs().min() > 0.05, "floor shifts every mean"
    assert (found - expected).square().sum() < 0.8 * (plain - expected).square().sum()


def test_a_linear_without_bias_gets_the_mean_error_as_one() -> None:
    weight = WEIGHT + 0.5
    found = corrected_bias(EXACT, WEIGHT, EXACT, weight, None)
    assert torch.allclose(found, (-0.5 * EXACT.sum(1).mean()).expand(4))
    assert torch.equal(corrected_bias(EXACT, WEIGHT, EXACT, WEIGHT, None), torch.zeros(4, dtype=torch.float64))


def test_the_dtype_is_the_weights() -> None:
    half = WEIGHT.half()
    assert corrected_bias(EXACT.half(), half, EXACT.half(), half, None).dtype is torch.float16
