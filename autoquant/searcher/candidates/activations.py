"""Scales of activations: below the maximum, or one for each token."""

from __future__ import annotations

from collections.abc import Iterator

from autoquant.config.format import QuantizationOverride, StaticClip, Strategy, edited
from autoquant.quantizer.strategies import plan_linears, scheme_of
from autoquant.searcher.candidates.candidate import Candidate, with_quantization
from autoquant.searcher.judge import Judged, Searcher


def static_clip(searcher: Searcher, best: Judged) -> Iterator[Candidate]:
    """Static scales below the maximum."""
    if not scheme_of(searcher.task.strategy).activation.is_static:
        return
    for clip in (StaticClip.OUTPUT, StaticClip.MSE, StaticClip.PERCENTILE):
        choice = edited(best.config.quantization.activations, clip=clip)
        yield Candidate("quantization.activations.clip", clip.value, with_quantization(best.config, activations=choice))


def per_token(searcher: Searcher, best: Judged) -> Iterator[Candidate]:
    """Per-token scales for the linears with the largest output error (QFeM, Yang et al. 2024, ranks by spikes)."""
    per_token = _per_token(searcher.task.strategy)
    if searcher.task.per_token < 1 or per_token is None or not best.errors:
        return
    by_weight = {entry.weight: entry.path for entry in plan_linears(best.config, searcher.task.strategy)}
    worst = sorted(best.errors, key=lambda name: -best.errors[name])
    overrides = best.config.quantization.overrides
    for count in sorted({1, max(1, searcher.task.per_token // 2), searcher.task.per_token}):
        new = tuple(QuantizationOverride(path=by_weight[name], strategy=per_token) for name in worst[:count])
        changed = with_quantization(best.config, overrides=(*overrides, *new))
        cost = f"{count} linears measure each token at inference"
        yield Candidate("quantization.overrides", ", ".join(by_weight[name] for name in worst[:count]), changed, cost)


def _per_token(strategy: Strategy) -> Strategy | None:
    return Strategy.PER_CHANNEL_PER_TOKEN if scheme_of(strategy).activation.is_static else None
