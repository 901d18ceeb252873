"""Scales of activations: below the maximum, or one for each token."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from autoquant.algorithms.prefix_search import token_maxima
from autoquant.config.format import ActivationQuantization, StaticClip, Strategy, edited
from autoquant.quantizer.strategies import PlannedLinear, plan_linears, scheme_of
from autoquant.searcher.candidates.candidate import Candidate, with_overrides, with_quantization
from autoquant.searcher.judge import Judged, Searcher


def static_clip(searcher: Searcher, best: Judged) -> Iterator[Candidate]:
    """Static scales below the maximum. ``output`` looks at one linear, so those that a server makes one module of, with
    one scale, get ``mse`` beside it.
    """
    task = searcher.task
    if not scheme_of(task.strategy).activation.is_static:
        return
    alike = {weight for weights in task.served.alike for weight in weights}
    for clip in (StaticClip.OUTPUT, StaticClip.MSE, StaticClip.PERCENTILE):
        choice = edited(best.config.quantization.activations, clip=clip)
        config, said = with_quantization(best.config, activations=choice), clip.value
        together = [one for one in plan_linears(config, task.strategy) if one.weight in alike and one.scheme.is_static]
        if clip is StaticClip.OUTPUT and together:
            config = with_overrides(config, together, activations=ActivationQuantization(clip=StaticClip.MSE))
            said = f"output, mse for {len(together)} linears that share a scale"
        yield Candidate("quantization.activations.clip", said, config)


def per_token(searcher: Searcher, best: Judged) -> Iterator[Candidate]:
    """Per-token scales for the linears with the largest spikes (QFeM, Yang et al. 2024)."""
    task = searcher.task
    if task.per_token < 1 or not scheme_of(task.strategy).activation.is_static:
        return
    ranked = _by_spikes(searcher, best)
    modules: list[list[PlannedLinear]] = []
    for weight in ranked:
        if not any(weight == member.weight for module in modules for member in module):
            modules.append([ranked[name] for name in task.served.together(weight) if name in ranked])
    chosen: list[list[PlannedLinear]] = []
    for module in modules:
        if sum(map(len, (*chosen, module))) <= task.per_token:
            chosen.append(module)
    for count in sorted({1, (len(chosen) + 1) // 2, len(chosen)} - {0}):
        linears = [linear for module in chosen[:count] for linear in module]
        changed = with_overrides(best.config, linears, strategy=Strategy.PER_CHANNEL_PER_TOKEN)
        cost = f"{len(linears)} linears measure each token at inference"
        yield Candidate("quantization.overrides", ", ".join(one.path for one in linears), changed, cost)


@torch.no_grad()
def _by_spikes(searcher: Searcher, best: Judged) -> dict[str, PlannedLinear]:
    """Static linears by weight name, first the one whose largest token stands out most from the median one."""
    task = searcher.task
    seen: dict[str, list[Tensor]] = {}
    planned = [one for one in plan_linears(best.config, task.strategy) if one.scheme.is_static and one.stack is None]
    with searcher.smoothed_model(best.config, "spikes") as found, token_maxima(found.model, planned, seen):
        searcher.progress("spikes: find", 0, 0)
        found.runner(found.model, task.fit)

    def spike(linear: PlannedLinear) -> float:
        maxima = torch.cat([maximum.flatten() for maximum in seen[linear.path]])
        return float(maxima.max() / maxima.median().clamp_min(1e-30))

    ranked = sorted((one for one in planned if one.path in seen), key=spike, reverse=True)
    return {one.weight: one for one in ranked}
