"""Smoothing scales: SmoothQuant's formula, ties, powers and channels that cannot be smoothed."""

from __future__ import annotations

import pytest
import torch
from handmade import LLAMA, build, llama_like
from torch import Tensor

from autoquant.algorithms.smoothquant import group_scales, smoothing_scales, weight_maxima
from autoquant.config.format import SmoothingKind, edited
from autoquant.errors import AutoQuantError
from autoquant.executor.operations import Axis
from autoquant.executor.resolve import resolve
from autoquant.executor.resolved import Resolved, ResolvedGroup, SmoothedSlot
from autoquant.executor.scales import random_scales
from autoquant.models.structure import structure_of

INF, NAN = float("inf"), float("nan")


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.85, 1.0])
def test_the_formula_is_smoothquants_inverted(alpha: float) -> None:
    activation, weight = vector(8, 0.5), vector(2, 4)
    scales, left = smoothing_scales(activation, weight, alpha)
    assert left == 0
    assert torch.allclose(1 / scales, activation**alpha / weight ** (1 - alpha), rtol=1e-14)


def test_half_meets_in_the_middle() -> None:
    activation, weight = vector(8, 0.5), vector(2, 4)
    scales, _ = smoothing_scales(activation, weight, 0.5)
    assert torch.allclose(activation * scales, weight / scales, rtol=1e-14)


@pytest.mark.parametrize("power", [2, -1])
def test_powers_give_the_target_the_same_factor(power: int) -> None:
    activation, weight = vector(8, 0.5), vector(2, 4)
    plain, _ = smoothing_scales(activation, weight, 0.5)
    scales, _ = smoothing_scales(activation, weight, 0.5, power)
    assert torch.allclose(scales**power, plain, rtol=1e-14)


def test_dead_and_infinite_channels_keep_scale_one() -> None:
    activation = vector(0, 1, INF, 1, NAN, 1, 4)
    weight = vector(1, 0, 1, INF, 1, NAN, 1)
    scales, left = smoothing_scales(activation, weight, 0.5)
    assert left == 6
    assert torch.equal(scales, vector(1, 1, 1, 1, 1, 1, 0.5))


def group(targets: tuple[SmoothedSlot, ...], channels: int) -> ResolvedGroup:
    return ResolvedGroup("g", None, SmoothingKind.LINEAR_LINEAR, 0.5, channels, (), targets)


def target(name: str, dim: int, channels: list[int], stack: int | None = None, unflatten: bool = False) -> SmoothedSlot:
    return SmoothedSlot(name, Axis(dim, stack, unflatten, torch.tensor(channels)), 1, 0)


def test_weight_maxima_cover_targets_and_ties() -> None:
    weights = {"a": torch.tensor([[1.0, -5, 2, 0]]), "b": torch.tensor([[3.0, 1], [0, -4]])}
    tied = group((target("a", 1, [0, 1, 0, -1]), target("b", 1, [0, 1])), 2)
    assert weight_maxima(tied, weights.__getitem__).tolist() == [3, 5]


def test_weight_maxima_of_experts() -> None:
    weight = torch.arange(24.0).reshape(2, 3, 4) - 12
    expected = weight.abs().amax(1).flatten().tolist()
    assert weight_maxima(group((target("w", 2, list(range(8)), 2),), 8), lambda _: weight).tolist() == expected
    flat = weight.flatten(0, 1)
    assert weight_maxima(group((target("w", 1, list(range(8)), 2, True),), 8), lambda _: flat).tolist() == expected


def test_group_scales_warn_and_count() -> None:
    one = Resolved((), (group((target("w", 1, [0, 1]),), 2),), ())
    with pytest.warns(UserWarning, match="1 of 2 channels are dead or not finite and keep scale 1"):
        scales = group_scales(one, {("g", None): vector(4, 0)}, lambda _: torch.ones(1, 2))
    assert scales["g", None].tolist() == [0.5, 1]


def test_alpha_can_be_replaced() -> None:
    one = Resolved((), (group((target("w", 1, [0]),), 1),), ())
    assert group_scales(one, {("g", None): vector(4)}, lambda _: torch.ones(1, 1), 1.0)["g", None].tolist() == [0.25]


def test_missing_maxima_and_query_key_groups_are_refused() -> None:
    model = build("llama", **LLAMA)
    config = llama_like(model)
    resolved = resolve(config, structure_of(model), only=["v_o"])
    with pytest.raises(AutoQuantError, match=r"v_o \(layer 0\): the calibration has no activation maxima"):
        group_scales(resolved, {}, model.get_parameter)
    groups = tuple(edited(g, kind=SmoothingKind.QUERY_KEY) for g in config.smoothing.groups)
    config = edited(config, smoothing=edited(config.smoothing, groups=groups))
    resolved = resolve(config, structure_of(model), only=["v_o"])
    with pytest.raises(AutoQuantError, match="query_key groups are scaled by cached keys"):
        group_scales(resolved, {}, model.get_parameter)


def test_random_scales_are_reproducible_and_between_half_and_two() -> None:
    model = build("llama", **LLAMA)
    resolved = resolve(llama_like(model), structure_of(model), rotate=False)
    first, again = random_scales(resolved, 1), random_scales(resolved, 1)
    assert first.keys() == {(g.name, g.layer) for g in resolved.groups}
    assert all(torch.equal(s, again[k]) and s.min() >= 0.5 and s.max() <= 2 for k, s in first.items())
