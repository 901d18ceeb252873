"""Scales by descent: never worse, ties kept, a planted optimum found, the cheap steps those of the whole error."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from autoquant.algorithms import scale_descent as descent
from autoquant.algorithms.scale_descent import Optimised, best_alpha, optimise_scales
from autoquant.algorithms.smoothquant import smoothing_scales
from autoquant.errors import AutoQuantError
from autoquant.quantizer import int8
from autoquant.quantizer.strategies import Granularity, Scheme

STATIC, DYNAMIC, TOKEN = Granularity.TENSOR_STATIC, Granularity.TENSOR_DYNAMIC, Granularity.TOKEN_DYNAMIC
SCHEMES = [Scheme(channel, granularity, None) for channel in (True, False) for granularity in Granularity]


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def uneven(tokens: int = 192, columns: int = 24, rows: int = 20, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs and a weight whose columns have magnitudes of their own."""
    x = random(tokens, columns, seed=seed) * random(columns, seed=seed + 1).exp()
    return x, random(rows, columns, seed=seed + 2) * (random(columns, seed=seed + 3) / 2).exp()


def error_of(x: Tensor, weights: list[Tensor], s: Tensor, scheme: Scheme) -> float:
    """The error by its definition, in float64 apart from the scales."""
    scaled = x.double() * s
    input_scale = int8.absmax_scale(scaled, (1,) if scheme.activation is TOKEN else None).double()
    total = 0.0
    for weight in weights:
        divided = weight.double() / s
        weight_scale = int8.absmax_scale(divided, (1,) if scheme.weight_per_channel else None).double()
        rounded = [(t / scale).round() * scale for t, scale in ((scaled, input_scale), (divided, weight_scale))]
        total += float((x.double() @ weight.double().T - rounded[0] @ rounded[1].T).square().sum())
    return total


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_error_is_that_of_the_definition_and_falls(scheme: Scheme) -> None:
    x, weight = uneven()
    weights, start = [weight[:8], weight[8:]], torch.ones(24)
    found = optimise_scales(x, weights, start, torch.arange(24), scheme)
    assert found.before == pytest.approx(error_of(x, weights, start.double(), scheme), rel=1e-4)
    assert found.after == pytest.approx(error_of(x, weights, found.scales, scheme), rel=1e-2)  # ties of rounding
    assert found.after < 0.5 * found.before
    assert found.scales.dtype == torch.float64


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_what_is_better_here_is_better_on_other_tokens(scheme: Scheme) -> None:
    x, weight = uneven(tokens=1024)
    fitted, fresh = x[:512].clamp(-3, 3), x[512:].clamp(-3, 3)
    start, _ = smoothing_scales(fitted.abs().amax(0), weight.abs().amax(0), 0.5)
    found = optimise_scales(fitted, [weight], start, torch.arange(24), scheme)
    assert error_of(fresh, [weight], found.scales, scheme) < error_of(fresh, [weight], start, scheme)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_cheap_steps_keep_account_of_the_whole_error(scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(descent, "GAIN", -1e9)  # every step is kept, good or bad
    x, weight = uneven()
    columns = torch.arange(24) // 2
    problem = descent._problem(x, [weight[:8], weight[8:]], columns, scheme, None)
    state = descent._state(problem, torch.ones(24))
    for step in range(40):
        channel, delta = step * 7 % 12, float(random(1, seed=step))
        assert descent._step_(problem, state, torch.nonzero(columns == channel).flatten(), delta)
        whole = descent._state(problem, state.s_C)
        assert state.error == pytest.approx(whole.error, rel=1e-5)
        torch.testing.assert_close(state.residual_TO, whole.residual_TO, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_planted_optimum_is_found(scheme: Scheme) -> None:
    """Even inputs and weights, then scales are put between them: the error comes back to that of the even ones."""
    x, weight = random(256, 16, seed=0).clamp(-2, 2), random(12, 16, seed=1)
    planted = torch.ones(16, dtype=torch.float64)
    planted[[2, 3, 9]] = torch.tensor([64.0, 32.0, 1 / 8], dtype=torch.float64)
    start = torch.ones(16)
    even = error_of(x, [weight], start.double(), scheme)
    hidden_x, hidden_weight = (x * planted).float(), (weight / planted).float()
    found = optimise_scales(hidden_x, [hidden_weight], start, torch.arange(16), scheme, rounds=4)
    assert found.before > 20 * even
    assert found.after < 1.05 * even


def test_ties_share_a_scale_and_columns_without_a_channel_keep_theirs() -> None:
    x, weight = uneven()
    columns = torch.arange(24) // 2 % 6  # each channel in four columns
    columns[20:] = -1
    found = optimise_scales(x, [weight], torch.ones(6), columns, SCHEMES[0])
    s = torch.where(columns >= 0, found.scales[columns.clamp(min=0)], 1.0)
    assert found.scales.shape == (6,) and not torch.equal(found.scales, torch.ones(6, dtype=torch.float64))
    assert found.after == pytest.approx(error_of(x, [weight], s, SCHEMES[0]), rel=1e-2)
    assert found.after < found.before


def test_an_optimum_stays_as_it_is() -> None:
    x, weight = torch.full((4, 3), 127.0), torch.eye(3) * 127  # represented exactly
    found = optimise_scales(x, [weight], torch.ones(3), torch.arange(3), SCHEMES[0])
    assert found.before == found.after == 0
    assert torch.equal(found.scales, torch.ones(3, dtype=torch.float64))


def test_static_scales_come_from_all_calibrated_tokens() -> None:
    x, weight = uneven()
    seen = x.abs().amax(0)
    seen[5] *= 100  # a spike that is not among these tokens
    spiked, plain = (
        optimise_scales(x, [weight], torch.ones(24), torch.arange(24), Scheme(True, STATIC, None), maximum_C=maximum)
        for maximum in (seen, None)
    )
    assert spiked.before > 10 * plain.before
    share, usual = (found.scales[5] / found.scales.median() for found in (spiked, plain))  # a common factor is free
    assert share < 0.1 * usual, "the channel of the spike is brought down"
    assert spiked.after < 0.1 * spiked.before


def test_the_same_twice() -> None:
    x, weight = uneven()
    first, again = (optimise_scales(x, [weight], torch.ones(24), torch.arange(24), SCHEMES[2]) for _ in range(2))
    assert torch.equal(first.scales, again.scales) and first.after == again.after


def test_dead_channels_and_dead_weights_do_no_harm() -> None:
    x, weight = uneven()
    x[:, 3], weight[:, 4], weight[2] = 0, 0, 0
    for scheme in SCHEMES:
        found = optimise_scales(x, [weight], torch.ones(24), torch.arange(24), scheme)
        assert found.scales.isfinite().all() and (found.scales > 0).all() and found.after < found.before


def test_not_finite_inputs_are_refused() -> None:
    x, weight = uneven()
    x[0, 0] = float("nan")
    with pytest.raises(AutoQuantError, match="inputs or the weights hold a NaN or an infinity"):
        optimise_scales(x, [weight], torch.ones(24), torch.arange(24), SCHEMES[0])


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_best_alpha_is_no_worse_than_the_whole_grid_it_starts_from(scheme: Scheme) -> None:
    x, weight = uneven()

    def scales_at(alpha: float) -> Tensor:
        return smoothing_scales(x.abs().amax(0), weight.abs().amax(0), alpha)[0]

    alpha, found = best_alpha(x, [weight], scales_at, torch.arange(24), scheme)
    assert isinstance(found, Optimised) and torch.equal(found.scales, scales_at(alpha))
    grid = [error_of(x, [weight], scales_at(i / 10), scheme) for i in range(11)]
    assert found.after <= min(grid) * 1.001
    assert found.before == pytest.approx(error_of(x, [weight], torch.ones(24).double(), scheme), rel=1e-3)
    assert (alpha * 40) % 1 == pytest.approx(0, abs=1e-9)
