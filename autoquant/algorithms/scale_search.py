"""The free scales of smoothing groups, chosen by what they do to the quantized output.

Every choice of a group's scales leaves the float model as it is, and each leaves another rounding error. They are
chosen in the sequence of the forward pass, each on inputs that carry the noise of everything quantized before, by
the output error of the group's own linears under the strategy: SmoothQuant's alpha from a grid, or all scales freely
by coordinate descent (:mod:`autoquant.algorithms.scale_descent`). SmoothQuant (Xiao et al. 2023) searches
one alpha for a model; a grid by output error for each layer is AWQ's (Lin et al. 2023, "AWQ: Activation-aware Weight
Quantization for LLM Compression and Acceleration").
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autoquant.algorithms.clipping import sampled
from autoquant.algorithms.gptq_qronos import Run, int8_run, static_input_scale, walk, weight_scale
from autoquant.algorithms.scale_descent import best_alpha, optimise_scales
from autoquant.algorithms.smoothquant import smoothing_scales, weight_maxima
from autoquant.calibration.runner import Progress, Runner, silent, whole
from autoquant.config.format import SmoothingMethod
from autoquant.executor.resolved import ResolvedGroup, SmoothedSlot
from autoquant.executor.scales import merge_channels
from autoquant.quantizer import int8
from autoquant.quantizer.linear import Rounded
from autoquant.quantizer.strategies import PlannedLinear, Scheme

TOKENS = 1024
"""Tokens that a group's output error is computed on, evenly spaced over the calibration windows."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """One group's scales [channels], float64, with the output error of its linears before and after; ``alpha`` where
    it is SmoothQuant's formula.
    """

    scales: Tensor
    before: float
    after: float
    alpha: float | None = None


@dataclass(frozen=True, slots=True)
class _Reading:
    """What a group's linears read: sampled noisy inputs [T, C], the channels of their columns, and their weights."""

    inputs_TC: Tensor
    maximum_C: Tensor
    columns_C: Tensor
    weights: tuple[Tensor, ...]
    scheme: Scheme


Choose = Callable[[ResolvedGroup, _Reading], Chosen]


def choose_alphas(
    model: nn.Module,
    groups: Iterable[ResolvedGroup],
    planned: Sequence[PlannedLinear],
    batches: Sequence[Tensor],
    progress: Progress = silent,
    runner: Runner = whole,
) -> dict[tuple[str, int | None], Chosen]:
    """SmoothQuant's alpha of each group of a model that is rotated and not smoothed, by (name, layer).

    Groups whose linears the pass cannot reach (experts, convolutions) are absent: their alpha is for the config to say.
    """

    def choose(group: ResolvedGroup, reading: _Reading) -> Chosen:
        activation_max = merge_channels(
            torch.zeros(group.channels, dtype=torch.float64), group.targets[0], reading.maximum_C.double().cpu()
        )
        weight_max = weight_maxima(group, model.get_parameter)

        def scales_at(alpha: float) -> Tensor:
            return smoothing_scales(activation_max, weight_max, alpha)[0]

        alpha, best = best_alpha(
            reading.inputs_TC,
            reading.weights,
            scales_at,
            reading.columns_C,
            reading.scheme,
            maximum_C=reading.maximum_C,
        )
        return Chosen(best.scales, best.before, best.after, alpha)

    return _choose(model, groups, planned, batches, choose, progress, runner)


def descend(
    model: nn.Module,
    groups: Iterable[ResolvedGroup],
    planned: Sequence[PlannedLinear],
    batches: Sequence[Tensor],
    progress: Progress = silent,
    runner: Runner = whole,
) -> dict[tuple[str, int | None], Chosen]:
    """Scales, on top of those it has, of each group of a smoothed model whose method is descent, by (name, layer)."""

    def choose(group: ResolvedGroup, reading: _Reading) -> Chosen:
        best = optimise_scales(
            reading.inputs_TC,
            reading.weights,
            torch.ones(group.channels, dtype=torch.float64),
            reading.columns_C,
            reading.scheme,
            maximum_C=reading.maximum_C,
        )
        return Chosen(best.scales, best.before, best.after)

    wanted = [group for group in groups if group.method is SmoothingMethod.DESCENT]
    return _choose(model, wanted, planned, batches, choose, progress, runner)


def _choose(
    model: nn.Module,
    groups: Iterable[ResolvedGroup],
    planned: Sequence[PlannedLinear],
    batches: Sequence[Tensor],
    choose: Choose,
    progress: Progress,
    runner: Runner,
) -> dict[tuple[str, int | None], Chosen]:
    """Scales of the groups in the order in which the model reaches them; roots are taken where a power is not 1."""
    by_weight = {entry.weight: entry for entry in planned}
    owner: dict[str, tuple[ResolvedGroup, SmoothedSlot]] = {}
    for group in groups:
        if _reads_one_tensor(group, by_weight):
            owner |= {slot.name: (group, slot) for slot in group.targets}
    chosen: dict[tuple[str, int | None], Chosen] = {}

    def visit(entry: PlannedLinear, exact: Tensor, noisy: Tensor, weight: Tensor, bias: Tensor | None) -> Run:
        if entry.weight not in owner:
            return _nearest(entry, noisy, weight, bias)
        group, slot = owner[entry.weight]
        key = (group.name, group.layer)
        if key not in chosen:
            weights = [model.get_parameter(other.name).detach() for other in group.targets if other.name in by_weight]
            chosen[key] = choose(group, _reading(noisy, slot, weights, entry.scheme))
        factors = slot.axis.gather(chosen[key].scales, 1.0).to(noisy)
        run = _nearest(entry, noisy * factors, weight / factors, bias)
        return lambda x: run(x * factors)

    walk(model, planned, batches, visit, progress, runner)
    return {
        (group.name, group.layer): _rooted(group, chosen[group.name, group.layer])
        for group in dict.fromkeys(group for group, _ in owner.values())
        if (group.name, group.layer) in chosen
    }


def _reading(noisy: Tensor, slot: SmoothedSlot, weights: Sequence[Tensor], scheme: Scheme) -> _Reading:
    """Maxima come from the first half of the tokens and errors from the second: a scale that lets every channel reach
    the limit looks best on the tokens that set the maxima, and clips on all others.
    """
    half = len(noisy) // 2
    maxima = int8.absmax(noisy[:half], (0,))[0]
    return _Reading(sampled(noisy[half:], TOKENS), maxima, slot.axis.channels, tuple(weights), scheme)


def _rooted(group: ResolvedGroup, found: Chosen) -> Chosen:
    """The targets see ``s ** power``; what was chosen is that."""
    return Chosen(found.scales ** (1 / group.targets[0].power), found.before, found.after, found.alpha)


def _reads_one_tensor(group: ResolvedGroup, planned: Mapping[str, PlannedLinear]) -> bool:
    """True if the group's quantized linears are plain ones that read the scaled tensor itself, all in the same way."""
    mine = [(slot, planned[slot.name]) for slot in group.targets if slot.name in planned]
    if not mine:
        return False
    first, entry = mine[0]
    return all(
        other.stack is None
        and other.in_dim == slot.axis.dim == 1
        and other.scheme == entry.scheme
        and slot.power == first.power
        and torch.equal(slot.axis.channels, first.axis.channels)
        for slot, other in mine
    )


def _nearest(entry: PlannedLinear, noisy: Tensor, weight: Tensor, bias: Tensor | None) -> Run:
    """The linear rounded to the nearest values, its static scale as the config says."""
    scale = weight_scale(weight, entry, entry.weights)
    input_scale = static_input_scale(entry, noisy, weight, entry.activations)
    return int8_run(entry, Rounded(int8.quantize(weight, scale), scale, input_scale, bias, 0.0), weight.dtype)
