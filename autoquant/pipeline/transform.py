"""A float model made ready for quantization: rotated, calibrated, smoothed, its prefix fixed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from autoquant.algorithms.scale_search import descend
from autoquant.algorithms.spinquant import learn_rotations_
from autoquant.calibration.observers import Sweep
from autoquant.config.format import Config, RotationMethod, SmoothingMethod, Strategy
from autoquant.executor.apply import execute_
from autoquant.executor.plan import Plan
from autoquant.models.reading import Batch, texts
from autoquant.models.structure import structure_of
from autoquant.pipeline.held import InMemory
from autoquant.pipeline.quantize import (
    Selected,
    linear_groups,
    query_key_groups,
    rotation_plan,
    select,
    smooth_held_,
    smoothed,
    smoothing_plan,
    swept_weights,
    with_found,
)
from autoquant.pipeline.select import Transforms
from autoquant.quantizer.prefix import fix_prefix_, prefixed
from autoquant.quantizer.strategies import plan_linears

Progress = Callable[[str, int, int], None]
"""Told of a step, how much of it is done, and of how much."""


def silent(step: str, done: int, total: int) -> None:
    """Tell nobody."""


Sweeping = Callable[[Sequence[str], bool, Callable[[], Sweep]], Sweep]
"""Gives the sweep of a rotated model, or what is known of it, by the weights that are watched and whether the cache
is."""


def swept_now(weights: Sequence[str], cache: bool, sweep: Callable[[], Sweep]) -> Sweep:
    """Nothing is known."""
    return sweep()


def depends_on_strategy(config: Config) -> bool:
    """True if a model that is prepared for one strategy is not prepared for all."""
    smoothing, rotation = config.smoothing, config.rotation
    methods = {smoothing.method, *(group.method for group in smoothing.groups)}
    methods |= {override.method for group in smoothing.groups for override in group.overrides}
    learned = {rotation.method, *(space.method for space in rotation.spaces)}
    return SmoothingMethod.DESCENT in methods or RotationMethod.LEARNED in learned


@dataclass(frozen=True, slots=True)
class Prepared:
    """What was done to a model: the rotations' plan, and the maxima as they are now."""

    plan: Plan
    swept: Sweep


@torch.no_grad()
def prepare_(
    model: nn.Module,
    config: Config,
    strategy: Strategy,
    transforms: Transforms,
    batches: Sequence[Batch],
    seed: int | None = None,
    *,
    cache: bool,
    tell: Progress = silent,
    sweeping: Sweeping = swept_now,
) -> Prepared:
    """Carry out everything that comes before quantization on a module in memory; the function stays the same.

    Arguments and errors as of :func:`prepare_held_`.
    """
    held = InMemory(model)
    selected = select(config, held.inventory, transforms, seed)
    return prepare_held_(held, selected, config, strategy, batches, cache=cache, tell=tell, sweeping=sweeping)


@torch.no_grad()
def prepare_held_(
    held: InMemory,
    selected: Selected,
    config: Config,
    strategy: Strategy,
    batches: Sequence[Batch],
    *,
    cache: bool,
    tell: Progress = silent,
    sweeping: Sweeping = swept_now,
) -> Prepared:
    """Carry out what was selected from ``config``, wherever the parameters are; the function stays the same.

    ``batches``: calibration token ids [1, S] and examples, none where nothing has to be calibrated; ``cache``: keys and
    values are observed too, as they always are for query-key groups. ``strategy`` matters to scales that are found by
    descent, and to learned rotations. ``sweeping`` may know already what the sweep before smoothing finds.
    """
    tell("rotate", 0, 1)
    plan = rotation_plan(selected, held.inventory, held.read, learned_later=True)
    held.execute_(plan)
    swept = Sweep()
    prefix = config.quantization.prefix
    cache = cache or bool(query_key_groups(selected))
    weights = swept_weights(config, selected)
    if batches:
        with held.prefixed(prefix):
            sweep = partial(held.sweep, weights, batches, cache=cache, progress=partial(tell, "calibrate"))
            swept = sweeping(weights, cache, sweep)
    tell("smooth", 0, 1)
    swept = smooth_held_(held, selected, swept)
    if any(group.method is SmoothingMethod.DESCENT for group in linear_groups(selected).groups):
        swept = _descend_(held.module(), config, strategy, selected, swept, batches, tell)
    if any(space.method is RotationMethod.LEARNED for space in selected.resolved.spaces):
        plan = _learn_(held.module(), config, strategy, selected, plan, batches, tell)
        with held.prefixed(prefix):
            swept = held.sweep(weights, batches, cache=cache)
    if prefix:
        fix_prefix_(held.module(), prefix)
    return Prepared(plan, swept)


def _learn_(
    model: nn.Module,
    config: Config,
    strategy: Strategy,
    selected: Selected,
    plan: Plan,
    batches: Sequence[Batch],
    tell: Progress,
) -> Plan:
    """Turn the residual further, behind all smoothing that is left beside a rotation; the plan says what was done."""
    planned = plan_linears(config, strategy)
    with prefixed(model, config.quantization.prefix):
        added = learn_rotations_(
            model, selected.resolved, planned, texts(batches), progress=lambda *at: tell("learn the rotation", *at)
        )
    said = {where: f"{text}, {added[where]}" if where in added else text for where, text in plan.constructions.items()}
    return replace(plan, constructions=said)


def _descend_(
    model: nn.Module,
    config: Config,
    strategy: Strategy,
    selected: Selected,
    swept: Sweep,
    batches: Sequence[Batch],
    tell: Progress,
) -> Sweep:
    with prefixed(model, config.quantization.prefix):
        planned = plan_linears(config, strategy)
        chosen = descend(
            model, linear_groups(selected).groups, planned, texts(batches), lambda *at: tell("descend", *at)
        )
    found, scales = with_found(selected, chosen)
    execute_(model, smoothing_plan(found, structure_of(model), model.get_parameter, scales))
    return smoothed(found, swept, scales)
