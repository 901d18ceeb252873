"""Scales of smoothing groups: SmoothQuant's alpha, or descent."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from autoquant.algorithms.scale_search import choose_alphas
from autoquant.config.format import Config, SmoothingGroup, SmoothingMethod, SmoothingOverride, edited
from autoquant.pipeline.quantize import linear_groups
from autoquant.quantizer.strategies import plan_linears
from autoquant.searcher.candidates.candidate import Candidate
from autoquant.searcher.judge import Judged, Searcher


def alpha(searcher: Searcher, best: Judged) -> Iterator[Candidate]:
    """SmoothQuant's alpha: one for all groups, and one for each group and layer by its linears' output error."""
    smoothing = best.config.smoothing
    if not smoothing.groups:
        return
    for alpha in (0.3, 0.4, 0.6, 0.7, 0.8, 0.9):
        if alpha != smoothing.alpha:
            changed = edited(smoothing, alpha=alpha)
            yield Candidate("smoothing.alpha", str(alpha), edited(best.config, smoothing=changed))
    found = _alphas(searcher, best.config)
    if found:
        groups = tuple(_with_alphas(group, found) for group in smoothing.groups)
        changed = edited(smoothing, groups=groups)
        yield Candidate(
            "smoothing.groups[*].overrides",
            f"{len(found)} alphas, one for each group and layer, between {min(found.values())} and "
            f"{max(found.values())}",
            edited(best.config, smoothing=changed),
        )


@torch.no_grad()
def _alphas(searcher: Searcher, config: Config) -> dict[tuple[str, int | None], float]:
    """Alpha by (group, layer) on the rotated model, with upstream noise."""
    task, said = searcher.task, "alphas by group and layer"
    with searcher.rotated_model(config, said) as found:
        chosen = choose_alphas(
            found.model,
            linear_groups(found.selected).groups,
            plan_linears(config, task.strategy),
            task.fit,
            lambda *at: searcher.progress(f"{said}: choose", *at),
            found.runner,
        )
    return {key: one.alpha for key, one in chosen.items() if one.alpha is not None}


def _with_alphas(group: SmoothingGroup, found: Mapping[tuple[str, int | None], float]) -> SmoothingGroup:
    mine = {layer: alpha for (name, layer), alpha in found.items() if name == group.name}
    if not mine:
        return group
    if None in mine:
        return edited(group, alpha=mine[None])
    new = tuple(
        SmoothingOverride(layers=str(layer), enable=None, alpha=alpha, method=None)
        for layer, alpha in sorted((layer, alpha) for layer, alpha in mine.items() if layer is not None)
    )
    return edited(group, overrides=(*group.overrides, *new))


def descent(searcher: Searcher, best: Judged) -> Iterator[Candidate]:
    """All scales of the groups that are in use, by coordinate descent."""
    smoothing = best.config.smoothing
    if smoothing.groups and smoothing.method is not SmoothingMethod.DESCENT:
        changed = edited(smoothing, method=SmoothingMethod.DESCENT)
        yield Candidate("smoothing.method", "descent", edited(best.config, smoothing=changed))
