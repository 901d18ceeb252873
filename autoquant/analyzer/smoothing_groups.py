"""Smoothable groups: from the solved scale equations to groups of parameters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from autoquant.analyzer.axes import Axis
from autoquant.analyzer.extents import EXTENTS
from autoquant.analyzer.index_maps import index_maps
from autoquant.analyzer.interpreter import Interpreter, interpreted
from autoquant.analyzer.rules import SCALES
from autoquant.analyzer.scale_state import ScaleAnalysis
from autoquant.analyzer.variables import Bools, Floats, Ints, Reason, Solution
from autoquant.capture.routes import Captured
from autoquant.config.format import Slot, SmoothingGroup, SmoothingKind
from autoquant.config.layers import module_of, tail


@dataclass(frozen=True, slots=True)
class Scales:
    """The solved analysis of one capture."""

    analysis: ScaleAnalysis
    interpreter: Interpreter
    solution: Solution
    groups: tuple[SmoothingGroup, ...]
    lost: tuple[tuple[Ints, Reason], ...]
    """Components whose scale is free and that no group says, and why."""


def analyse_scales(captured: Captured, extent: int = EXTENTS[0]) -> Scales:
    """Find every scale that the graph leaves free."""
    analysis = ScaleAnalysis()
    interpreter = interpreted(captured, SCALES.table, analysis, analysis.block, rescales=True, extent=extent)
    for axes, reason in analysis.axes.conflicts():
        for family in axes:
            analysis.variables.fix(torch.from_numpy(analysis.axes.labels(family)), reason)
    keep = np.zeros(analysis.variables.count, dtype=np.bool_)
    for family in analysis.axes.all():
        keep[family.start : family.start + family.count] = family.role != "leaf"
    solution = analysis.variables.solve(keep)
    return Scales(analysis, interpreter, solution, *_groups(analysis, solution))


@dataclass(frozen=True, slots=True)
class _Members:
    """Positions on parameter axes whose scale is free, one row each: aligned arrays sorted by component."""

    component: Ints
    family: Ints
    position: Ints
    weight: Floats
    keyed: Bools
    """Does every expert have a scale of its own here?"""


def _groups(
    analysis: ScaleAnalysis, solution: Solution
) -> tuple[tuple[SmoothingGroup, ...], tuple[tuple[Ints, Reason], ...]]:
    axes = analysis.axes.all()
    members = _members(analysis, axes, solution)
    crossed = np.concatenate([np.zeros(0, np.int64), *(solution.component[q.numpy()] for q in analysis.cancelled)])
    groups, lost = [], []
    for signature in _in_order_of_appearance(members.family, _signatures(members)):
        chosen = _select(members, signature)
        group = _group(analysis, axes, chosen, crossed)
        if isinstance(group, Reason):
            lost.append((np.unique(chosen.component), group))
        elif group is not None:
            groups.append(group)
    return tuple(groups), tuple(lost)


def _members(analysis: ScaleAnalysis, axes: Sequence[Axis], solution: Solution) -> _Members:
    counts = np.array([f.count for f in axes], dtype=np.int64)
    ids = np.concatenate([np.zeros(0, np.int64), *(analysis.axes.labels(f) for f in axes)])
    which = np.repeat(np.arange(len(axes)), counts)
    free = np.flatnonzero(~solution.fixed[ids])
    component = solution.component[ids]
    free = free[np.lexsort((ids[free], component[free]))]
    component, which, ids = component[free], which[free], ids[free]
    _, start, inverse = np.unique(component, return_index=True, return_inverse=True)
    # Powers count from the first axis met, and the smallest is 1: whole numbers wherever that is possible.
    weight = solution.weight[ids] / solution.weight[ids][start][inverse]
    least = np.full(len(start), 1.0)
    np.minimum.at(least, inverse, np.abs(weight))
    keys = np.array([f.keyed for f in axes], dtype=np.int64)[which]
    one_key = (
        np.minimum.reduceat(keys, start) == np.maximum.reduceat(keys, start) if len(start) else np.zeros(0, np.bool_)
    )
    mixed = np.isin(component, solution.component[analysis.variables.mixed()])
    starts = np.array([f.start for f in axes], dtype=np.int64)[which]
    return _Members(component, which, ids - starts, weight / least[inverse], (keys != 0) & one_key[inverse] & ~mixed)


def _signatures(members: _Members) -> Ints:
    """A number per member, equal for components that join the same axes to the same powers."""
    code = (members.family * 64 + np.round(members.weight * 4).astype(np.int64)) * 2 + members.keyed
    codes, which = np.unique(code, return_inverse=True)
    salt = np.random.default_rng(0).integers(0, 2**63, size=len(codes))  # sums of salts stand for sets of codes
    pairs = np.unique(members.component * len(codes) + which)
    components, inverse = np.unique(members.component, return_inverse=True)
    total = np.zeros(len(components), dtype=np.int64)
    with np.errstate(over="ignore"):
        np.add.at(total, np.searchsorted(components, pairs // max(len(codes), 1)), salt[pairs % max(len(codes), 1)])
    return total[inverse]


def _in_order_of_appearance(family: Ints, signature: Ints) -> list[Ints]:
    """The members of each signature, in their order; the signatures by the axes that each touches."""
    order = np.argsort(signature, kind="stable")
    parts = np.split(order, np.flatnonzero(np.diff(signature[order])) + 1) if len(order) else []
    return sorted(parts, key=lambda part: tuple(np.unique(family[part]).tolist()))


def _select(members: _Members, chosen: Ints) -> _Members:
    return _Members(
        *(getattr(members, name)[chosen] for name in ("component", "family", "position", "weight", "keyed"))
    )


def _group(
    analysis: ScaleAnalysis, axes: Sequence[Axis], members: _Members, crossed: Ints
) -> SmoothingGroup | Reason | None:
    """One group from the components of one signature; None where they hold no source with a target, and the reason
    where the config cannot describe one.
    """
    if not np.allclose(members.weight, np.round(members.weight)):
        return Reason("its scale is needed to a power that is no whole number", "", "", _last_met(axes, members))
    first = members.family == members.family.min()
    component, start = np.unique(members.component[first], return_index=True)
    rank = np.argsort(np.argsort(members.position[first][start], kind="stable"), kind="stable")
    channel = rank[np.searchsorted(component, members.component)]
    sources: list[Slot] = []
    targets: list[Slot] = []
    for index in np.unique(members.family):
        for power in sorted(set(members.weight[members.family == index].tolist()), reverse=True):
            here = (members.family == index) & (members.weight == power)
            slot = slot_of(
                axes[index],
                members.position[here],
                channel[here],
                len(component),
                bool(members.keyed[here][0]),
                abs(round(power)),
            )
            if slot is None:
                return Reason(several_dimensions(axes[index]), "", "", axes[index].order)
            (sources if power > 0 else targets).append(slot)
    both = [slot for slot in sources if slot in targets]  # a depthwise convolution that reads and makes one scale
    sources, targets = ([slot for slot in side if slot not in both] for side in (sources, targets))
    met = Counter((axes[i].param, axes[i].dim, axes[i].offset) for i in np.unique(members.family))
    sides = [{(slot.path, slot.dim) for slot in side} for side in (sources, targets)]
    twice = {(param, dim) for (param, dim, _), count in met.items() if count > 1}
    if not sources or not targets:
        return None
    if sides[0] & sides[1] & twice:
        name = min(sides[0] & sides[1] & twice)[0]
        return Reason(f"{name} would take two scales along one dimension", "", "", _last_met(axes, members))
    roles = {axes[i].role for i in np.unique(members.family[members.weight > 0])}
    readers = {(use.weight, use.contracted_dim) for use in analysis.uses}
    # A depthwise convolution or a gain is not quantized: a scale that it alone takes is legal and of no use.
    useful = any((slot.path, slot.dim) in readers for slot in targets)
    if bool(np.isin(members.component, crossed).any()):
        kind = SmoothingKind.QUERY_KEY
    else:
        kind = SmoothingKind.NORM_LINEAR if roles == {"leaf"} else SmoothingKind.LINEAR_LINEAR
    stack = matrices(axes[int(members.family.min())]) if members.keyed[0] else 1
    return SmoothingGroup(
        name=group_name(sources, targets),
        kind=kind,
        enable=None if useful or kind is SmoothingKind.QUERY_KEY else False,
        channels=len(component) * stack,
        sources=tuple(sources),
        targets=tuple(targets),
    )


def _last_met(axes: Sequence[Axis], members: _Members) -> int:
    """Where in the graph the last of some members is met first."""
    return max(axes[int(index)].order for index in np.unique(members.family))


def several_dimensions(family: Axis) -> str:
    """Why ``slot_of`` has no form for positions of a parameter."""
    return f"{family.param} has its channels along several dimensions at once"


def matrices(family: Axis) -> int:
    """How many matrices are stacked in the family's parameter."""
    return (
        int(np.prod(family.full_shape[: family.dim])) if family.role == "leaf" else int(np.prod(family.full_shape[:-2]))
    )


def slot_of(family: Axis, position: Ints, channel: Ints, channels: int, keyed: bool, power: int) -> Slot | None:
    """The config's form of some positions of a family and their channels, None where it has none."""
    dim, stack, size = family.dim, None if family.keyed else family.stack, family.count
    if keyed:
        stack = matrices(family)
        expert = np.repeat(np.arange(stack), len(position))
        position = np.tile(position, stack) + expert * size
        channel = np.tile(channel, stack) + expert * channels
        size *= stack
    elif family.role == "leaf" and stack is not None:
        along = _along_one(family, position, channel)
        if along is None:
            return None
        dim, stack, position, channel = along
        size = (stack or 1) * family.full_shape[dim]
    order = np.argsort(position, kind="stable")
    return Slot(
        path=family.param,
        dim=dim,
        stack=stack,
        size=size,
        index=index_maps(position[order], channel[order], size),
        power=power,
        offset=1 if family.offset else 0,
    )


def _along_one(family: Axis, position: Ints, channel: Ints) -> tuple[int, int | None, Ints, Ints] | None:
    """Elements of a tensor of two dimensions or more as positions along one of them, for each entry of the first.

    None where what an element carries changes along a third dimension too: a slot has one axis and a stack, or no stack
    where all entries are alike. The result is the dimension, the stack, and the positions with their channels.
    """
    shape = family.full_shape
    carried = np.full(family.count, -1, dtype=np.int64)
    carried[position] = channel
    carried = carried.reshape(shape)
    for dim in range(len(shape) - 1, 0, -1):
        one = carried[(slice(None), *(slice(None if other == dim else 1) for other in range(1, len(shape))))]
        if shape[dim] > 1 and bool((carried == one).all()):
            one = one.reshape(shape[0], -1)
            alike = bool((one == one[:1]).all())
            found = np.flatnonzero((one[0] if alike else one.reshape(-1)) >= 0)
            return dim, None if alike else shape[0], found, one.reshape(-1)[found]
    return None


def group_name(sources: Sequence[Slot], targets: Sequence[Slot]) -> str:
    """``'model.layers.0.mlp.up_proj -> down_proj'``: the first source, then every target by its own name."""
    source = module_of(sources[0].path)
    return f"{source} -> {', '.join(dict.fromkeys(tail(module_of(slot.path), source) for slot in targets))}"
