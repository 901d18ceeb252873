"""Linears that are left in floating point."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from autoquant.quantizer.strategies import PlannedLinear, plan_linears
from autoquant.searcher.candidates.candidate import Candidate, with_overrides
from autoquant.searcher.judge import Judged, Searcher

RANKED = 1
"""So many batches of held-out windows show the order of the linears: eight windows in `autoquant search`."""


def in_float(searcher: Searcher, best: Judged) -> Iterator[Candidate]:
    """The linears whose int8 costs most, left in floating point; what a server makes one module of stays together."""
    task = searcher.task
    if task.in_float < 1:
        return
    planned = [one for one in plan_linears(best.config, task.strategy) if one.stack is None]
    weights = sum(one.in_features * one.out_features for one in planned)
    chosen: list[list[PlannedLinear]] = []
    for module in _by_cost(searcher, best, planned):
        if sum(map(len, (*chosen, module))) <= task.in_float:
            chosen.append(module)
    for count in range(1, len(chosen) + 1):
        linears = [linear for module in chosen[:count] for linear in module]
        share = sum(one.in_features * one.out_features for one in linears) / weights
        changed = with_overrides(best.config, linears, strategy=None)
        cost = f"{len(linears)} linears in floating point, {share:.1%} of the weights"
        yield Candidate("quantization.overrides", f"float: {', '.join(one.path for one in linears)}", changed, cost)


@torch.no_grad()
def _by_cost(searcher: Searcher, best: Judged, planned: Sequence[PlannedLinear]) -> list[list[PlannedLinear]]:
    """Modules of linears, first the one without whose rounding the quantized model comes closest to float.

    Each is tried on a part of the held-out windows: which are the first is seen there, and all windows judge these.
    """
    by_weight = {one.weight: one for one in planned}
    modules: dict[tuple[str, ...], list[PlannedLinear]] = {}
    for one in planned:
        members = [by_weight[name] for name in searcher.task.served.together(one.weight) if name in by_weight]
        modules.setdefault(tuple(member.weight for member in members), members)
    plain: dict[str, nn.Module] = {}

    def before_(model: nn.Module) -> None:
        plain.update({one.path: model.get_submodule(one.path) for one in planned})

    model = searcher.quantized(best.config, before_, "float").model
    left = {}
    for weights, members in modules.items():
        rounded = {one.path: model.get_submodule(one.path) for one in members}
        for path in rounded:
            model.set_submodule(path, plain[path])
        left[weights] = sum(searcher.compared(model, RANKED).kl)
        for path, module in rounded.items():
            model.set_submodule(path, module)
    return [modules[weights] for weights in sorted(modules, key=left.__getitem__)]
