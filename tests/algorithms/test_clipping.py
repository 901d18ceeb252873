from __future__ import annotations

import pytest
import torch
from torch import Tensor

from autoquant.algorithms import clipping
from autoquant.algorithms.clipping import best_share, clipped_maximum, percentile, sampled
from autoquant.config.format import ActivationQuantization, StaticClip
from autoquant.quantizer import int8


def inputs(spike: float = 0.0) -> Tensor:
    """Normal inputs [T, I] = [1000, 16], one value of which is ``spike``."""
    x = torch.randn(1000, 16, generator=torch.Generator().manual_seed(0))
    if spike:
        x[500, 3] = spike
    return x


def choice(clip: StaticClip, percent: float = 99.99) -> ActivationQuantization:
    return ActivationQuantization(clip=clip, percentile=percent)


def error(x: Tensor, maximum: Tensor) -> float:
    return float((int8.fake_quantize(x, int8.scale_of(maximum)) - x).square().sum())


def test_absmax_is_the_maximum() -> None:
    x = inputs(-9.0)
    assert clipped_maximum(x, torch.ones(1, 16), choice(StaticClip.ABSMAX)) == 9.0


@pytest.mark.parametrize(("percent", "expected"), [(100.0, 100.0), (99.0, 99.0), (50.5, 51.0), (99.5, 100.0)])
def test_percentile_is_the_nearest_rank_of_magnitudes(percent: float, expected: float) -> None:
    x = torch.arange(1.0, 101.0) * torch.tensor([1.0, -1.0]).repeat(50)
    assert percentile(x, percent) == expected
    assert clipped_maximum(x[:, None], torch.ones(1, 1), choice(StaticClip.PERCENTILE, percent)) == expected


@pytest.mark.parametrize("percent", [100.0, 99.99, 99.0, 90.0, 60.0, 1e-9])
@pytest.mark.parametrize("kind", ["normal", "ties", "zeros", "sorted", "sample lies", "not a number"])
def test_a_percentile_of_many_is_found_among_the_largest(
    kind: str, percent: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clipping, "SELECTED", 100)
    x = torch.randn(5000, generator=torch.Generator().manual_seed(1))
    if kind in ("ties", "zeros"):
        x = torch.zeros_like(x) if kind == "zeros" else x.mul(2).round()
    elif kind == "sorted":
        x = x.abs().sort().values
    elif kind == "sample lies":
        x[::50] = 100.0
    elif kind == "not a number":
        x[:20] = torch.nan
    rank = min(5000, max(1, -(-int(5000 * percent * 1e6) // 100_000_000)))
    torch.testing.assert_close(percentile(x, percent), x.abs().kthvalue(rank).values, rtol=0, atol=0, equal_nan=True)


def test_mse_clips_a_rare_spike_and_is_never_worse_than_the_maximum() -> None:
    x = inputs(12.0)
    found = clipped_maximum(x, torch.ones(1, 16), choice(StaticClip.MSE))
    assert found < 12 and error(x, found) <= error(x, x.abs().amax())
    plain = inputs()
    assert error(plain, clipped_maximum(plain, torch.ones(1, 16), choice(StaticClip.MSE))) <= error(
        plain, plain.abs().amax()
    )


def test_output_clips_what_the_weight_does_not_read() -> None:
    """Spikes in a channel that the weight ignores cost nothing when they are clipped; in one that it reads, much."""
    x = inputs()
    x[::10, 3] = 40.0
    ignores = torch.ones(4, 16)
    ignores[:, 3] = 0
    clipped = clipped_maximum(x, ignores, choice(StaticClip.OUTPUT))
    kept = clipped_maximum(x, torch.ones(4, 16), choice(StaticClip.OUTPUT))
    assert clipped < 8 < 35 < kept


@pytest.mark.parametrize("clip", list(StaticClip))
def test_zeros_have_maximum_zero_for_the_caller_to_refuse(clip: StaticClip) -> None:
    assert clipped_maximum(torch.zeros(10, 4), torch.ones(1, 4), choice(clip)) == 0


def test_best_share_goes_from_coarse_to_fine_and_prefers_the_larger() -> None:
    assert best_share(lambda share: abs(share - 0.63)) == pytest.approx(0.625)
    assert best_share(lambda share: 0.0) == 1.0


def test_sample_is_evenly_spaced() -> None:
    x = torch.arange(100)[:, None]
    assert sampled(x, 10).flatten().tolist() == list(range(0, 100, 10))
    assert len(sampled(x, 1000)) == 100
