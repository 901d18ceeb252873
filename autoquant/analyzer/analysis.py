"""From a captured graph to findings: both symmetries, what is blocked and why."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Literal, TypeVar

import numpy as np
from torch import fx

from autoquant.analyzer.extents import EXTENTS, data_sized
from autoquant.analyzer.findings import Findings
from autoquant.analyzer.interpreter import Interpreter
from autoquant.analyzer.lengths import common
from autoquant.analyzer.linears import linears
from autoquant.analyzer.rotation_spaces import Rotations, analyse_rotations
from autoquant.analyzer.rotation_state import Vector
from autoquant.analyzer.rules.sentences import qualified
from autoquant.analyzer.scale_state import Use
from autoquant.analyzer.shared_parameters import shared_names
from autoquant.analyzer.smoothing_groups import Scales, analyse_scales
from autoquant.analyzer.variables import Bools, Ints, Reason
from autoquant.aten import ATTENTION, CASTS, MOVEMENT, NO_RULE, operator_name
from autoquant.capture.routes import Captured, module_path
from autoquant.config.format import Blocked, Linear, Online, Reader, Slot, SmoothingGroup, Space, edited
from autoquant.config.layers import module_of

NO_SOURCE = "nothing that feeds it can absorb a scale"
NO_MODULE = "no rotation in the weights reaches its input, and it is no module that an online one could precede"
NOT_TRACED = "its forward cannot be traced, and nothing is known of what it computes"
ALONE = "none of its channels can be mixed with another"
SHARED = "its scale is that of a tensor that must keep it: "


Model = TypeVar("Model", SmoothingGroup, Space)
Axis = TypeVar("Axis", bound=Slot)


@dataclass(frozen=True, slots=True)
class Analysis:
    """Findings with the solved equations behind them, for explanations."""

    findings: Findings
    scales: Scales
    rotations: Rotations


def analyse(captured: Captured) -> Analysis:
    """Everything that the captured graph allows, with concrete paths.

    What is blocked is part of the result, with operator and module path; nothing is raised for a graph that was
    captured.
    """
    analysis = _analyse(captured, EXTENTS[0])
    if not data_sized(captured):
        return analysis
    return replace(analysis, findings=common(analysis.findings, _analyse(captured, EXTENTS[1]).findings))


def _analyse(captured: Captured, extent: int) -> Analysis:
    """With ``extent`` rows where the data say how many there are."""
    scales = analyse_scales(captured, extent)
    rotations = analyse_rotations(captured, extent)
    shared = shared_names(captured)
    found = linears(scales.analysis.uses)
    online, nowhere = _online(scales, rotations, found, shared)
    findings = Findings(
        linears=found,
        groups=tuple(_with_ties(group, shared) for group in scales.groups),
        spaces=tuple(_with_ties(space, shared) for space in rotations.spaces),
        online=online,
        blocked=(*_blocked_smoothing(scales), *_blocked_rotation(rotations), *nowhere, *_blocked_untraceable(captured)),
        unknown_operators=_unknown_operators(scales, rotations),
    )
    return Analysis(findings, scales, rotations)


def _blocked_untraceable(captured: Captured) -> tuple[Blocked, ...]:
    """The modules that could not be traced: what they hold is neither smoothed nor rotated."""
    whats: tuple[Literal["smoothing", "rotation"], ...] = ("smoothing", "rotation")
    return tuple(
        Blocked(path=path, what=what, reason=f"{NOT_TRACED}: {reason}", operator="forward", at=path)
        for path, reason in {call.path: call.reason for call in captured.untraceable}.items()
        for what in whats
    )


def _with_ties(item: Model, shared: Mapping[str, tuple[str, ...]]) -> Model:
    """``item`` with every name of a shared parameter: what is done to one of them is done to all."""
    if isinstance(item, SmoothingGroup):
        sources, targets = _named(item.sources, shared), _named(item.targets, shared)
        return edited(item, sources=sources, targets=targets)
    reads = tuple(edited(read, readers=_named(read.readers, shared)) for read in item.reads)
    return edited(item, writers=_named(item.writers, shared), reads=reads)


def _named(slots: Iterable[Axis], shared: Mapping[str, tuple[str, ...]]) -> tuple[Axis, ...]:
    found = []
    for slot in slots:
        for name in shared.get(slot.path, (slot.path,)):
            update = {"path": name}
            if isinstance(slot, Reader) and slot.bias is not None and name != slot.path:
                update["bias"] = f"{name.rpartition('.')[0]}.{slot.bias.rpartition('.')[2]}"
            found.append(edited(slot, **update))
    return tuple(found)


def _unknown_operators(scales: Scales, rotations: Rotations) -> tuple[str, ...]:
    """Operators that stopped a scale for want of a rule."""
    reasons = scales.analysis.variables.reasons.values()
    return tuple(sorted({qualified(reason.operator) for reason in reasons if reason.text == NO_RULE}))


def _covered(slots: Iterable[Slot], path: str, dim: int, size: int) -> Bools:
    """Positions ``[size]`` of an axis that some group reaches; for stacked weights, of any of the matrices."""
    covered = np.zeros(size, dtype=np.bool_)
    for slot in slots:
        if slot.path == path and slot.dim == dim:
            if slot.index is None:
                covered[:] = True
                continue
            for block in slot.index:
                positions = np.array([block.start])
                for extent, stride in zip(block.shape, block.stride, strict=True):
                    positions = (positions[:, None] + np.arange(extent) * stride).reshape(-1)
                covered[positions % size] = True
    return covered


def _blocked_smoothing(scales: Scales) -> list[Blocked]:
    slots: dict[tuple[str, int], list[Slot]] = {}
    for group in scales.groups:
        for slot in group.targets:
            slots.setdefault((slot.path, slot.dim), []).append(slot)
    blocked: dict[Blocked, None] = {}
    for use in scales.analysis.uses:
        covered = _covered(
            slots.get((use.weight, use.contracted_dim), []), use.weight, use.contracted_dim, use.in_features
        )
        together = next((g.name for g in scales.groups if any(_reads(slot, use) for slot in g.sources)), None)
        if together is not None and not covered.all():  # of keys that are values too
            reason = use.site.because(f"its input is scaled only with the others of '{together}'")
            blocked[_blocked(module_of(use.weight), "smoothing", reason)] = None
            continue
        for reason in _reasons(scales, use, ~covered):
            blocked[_blocked(module_of(use.weight), "smoothing", reason)] = None
    return list(blocked)


def _reads(slot: Slot, use: Use) -> bool:
    return (slot.path, slot.dim) == (use.weight, use.contracted_dim)


def _reasons(scales: Scales, use: Use, where: Bools) -> list[Reason]:
    """The reason for most of the columns ``where``; none where there are no such columns."""
    if not where.any():
        return []
    whole = use.labels.shape[-1] == use.in_features  # else the product reads a slice of the weight
    labels = (use.labels[..., where] if whole else use.labels).reshape(-1).numpy()
    if not len(labels):
        return []
    table = scales.analysis.variables.reasons
    found, counts = np.unique(labels, return_counts=True)
    label = int(found[np.argmax(counts)])
    if label in table:  # the operator right before the linear
        return [table[label]]
    reason = table.get(int(scales.solution.reason[label]))
    if reason is None:
        component = scales.solution.component[label]
        lost = next((reason for components, reason in scales.lost if component in components), None)
        return [use.site.because(NO_SOURCE) if lost is None else _placed(scales.interpreter, lost)]
    reason = _placed(scales.interpreter, reason)
    return [replace(reason, text=f"{SHARED}{reason.text}")]


def _placed(interpreter: Interpreter, reason: Reason) -> Reason:
    """``reason`` with an operator and its module: of those that name none (two equations that cannot both hold, what a
    config cannot say) where the parameter or the second equation was met.
    """
    if reason.operator:
        return reason
    _, met = next(islice(_nodes(interpreter), reason.order - 1, None))
    return replace(reason, operator=operator_name(met), at=module_path(met))


def _nodes(interpreter: Interpreter) -> Iterator[tuple[int, fx.Node]]:
    """All nodes in the order in which they were met, from 1 on."""
    return enumerate((node for part in interpreter.captured.subgraphs for node in part.graph.graph.nodes), 1)


def _blocked_rotation(rotations: Rotations) -> list[Blocked]:
    """Residual streams and attention values that no rotation was found for."""
    analysis, solution = rotations.analysis, rotations.solution
    blocked: dict[Blocked, None] = {}
    rotated = {slot.path for space in rotations.spaces for slot in space.writers}
    for family in analysis.axes.all():
        if family.role == "table" and family.param not in rotated:
            ids = analysis.axes.labels(family)
            if len(ids) > 1:  # one channel has nothing to be mixed with
                reason = _rotation_reason(rotations, ids, family.order)
                blocked[_blocked(module_of(family.param), "rotation", reason)] = None
    for site, labels in analysis.values:
        ids = np.unique(labels.numpy())
        blocks = rotations.blocks[solution.component[ids]]
        lost = any(np.isin(solution.component[ids], components).any() for components, _ in rotations.lost)
        if lost or (blocks < 0).any() or len(np.unique(blocks)) == len(blocks):
            blocked[_blocked(site.at, "rotation", _rotation_reason(rotations, ids, site.order))] = None
    met = {site.node for site, _ in analysis.values}
    for order, node in _nodes(rotations.interpreter):
        if operator_name(node) not in ATTENTION or node in met:
            continue
        last = _last_vector(rotations, node.args[2])  # no vectors any more, or not along the last axis
        if last is not None:
            blocked[_blocked(module_path(node), "rotation", _rotation_reason(rotations, last, order))] = None
    return list(blocked)


def _last_vector(rotations: Rotations, node: object) -> Ints | None:
    """The coordinates of the vector that ``node`` was made of, before an operator that no rotation passes."""
    while isinstance(node, fx.Node):
        value = rotations.interpreter.values.get(node)
        if isinstance(value, Vector):
            return np.unique(value.coordinates.numpy())
        node = next(iter(node.all_input_nodes), None)
    return None


def _rotation_reason(rotations: Rotations, ids: Ints, order: int) -> Reason:
    """Why channels are not rotated; ``order`` says where they are met."""
    analysis, solution = rotations.analysis, rotations.solution
    fixed = ids[solution.fixed[ids]]
    if len(fixed):
        return analysis.variables.reasons[int(solution.reason[fixed[0]])]
    mine, finest, parts = solution.component[ids], None, 1
    for components, reason in rotations.lost:
        if np.isin(mine, components).any():
            return _placed(rotations.interpreter, reason)
    copies = None
    for split in analysis.splits:  # the one into most parts: heads are apart anyway where each channel is
        here = np.isin(solution.component[split.labels], mine)
        components, place = np.unique(solution.component[split.labels[here]], return_inverse=True)
        seen = np.zeros(len(components), dtype=np.int64)
        np.add.at(seen, place, split.keys[here])
        if len(np.unique(seen)) > parts:
            finest, parts = split.reason, len(np.unique(seen))
        elif len(np.unique(split.keys[here])) > 1:
            copies = copies or split.reason
    return finest or copies or _placed(rotations.interpreter, Reason(ALONE, "", "", order))


def _blocked(path: str, what: str, reason: Reason) -> Blocked:
    return Blocked(path=path, what=what, reason=reason.text, operator=qualified(reason.operator), at=reason.at)  # type: ignore[arg-type]  # one of two literals


def _online(
    scales: Scales, rotations: Rotations, found: tuple[Linear, ...], shared: Mapping[str, tuple[str, ...]]
) -> tuple[tuple[Online, ...], tuple[Blocked, ...]]:
    """R3 wherever queries meet keys; a rotation before every linear that no offline one reaches.

    Also the linears that have no module of their own to put one in front of (the experts of a stack).
    """
    online: dict[Online, None] = {}
    nowhere: dict[Blocked, None] = {}
    for scores in scales.analysis.scores:
        if scores.head_size > 1 and scores.site.at:  # a module to put it in
            online[Online(kind="R3", path=scores.site.at, size=scores.head_size)] = None
    reached = {reader.path for space in rotations.spaces for read in space.reads for reader in read.readers}
    uses: dict[str, dict[str, Use]] = {}
    for use in scales.analysis.uses:
        uses.setdefault(use.weight, {}).setdefault(use.site.at, use)
    mixed = _busy_modules(scales)
    contested = scales.analysis.axes.contested().keys()  # as a tensor: summed, rounded, measured
    for linear in found:
        if linear.role != "linear" or linear.weight in reached or linear.in_features == 1:
            continue
        # What a module's own input rotation undoes in a weight must not be read by any other code. A tied weight may be
        # that of several modules, before each of which there is one.
        own = {module_of(name) for name in shared.get(linear.weight, (linear.weight,))} - mixed
        if linear.stack is None and uses[linear.weight].keys() <= own and linear.weight not in contested:
            for path, use in uses[linear.weight].items():
                kind: Literal["R4", "input"] = "R4" if _follows_product(use) else "input"
                online[Online(kind=kind, path=path, size=linear.in_features)] = None
        else:
            site = next(iter(uses[linear.weight].values())).site
            nowhere[_blocked(linear.path, "rotation", site.because(NO_MODULE))] = None
    return tuple(online), tuple(nowhere)


def _busy_modules(scales: Scales) -> set[str]:
    """Modules that do more than one product: their input is not that of a linear alone."""
    work: dict[str, int] = {}
    for node in scales.interpreter.values:
        if node.op == "call_function" and operator_name(node) not in MOVEMENT | CASTS:
            work[module_path(node)] = work.get(module_path(node), 0) + 1
    calls: dict[str, int] = {}
    for use in scales.analysis.uses:
        calls[use.site.at] = calls.get(use.site.at, 0) + 1
    return {path for path, count in work.items() if count > calls.get(path, 0)}


def _follows_product(use: Use) -> bool:
    """True if the input is an elementwise product or an activation, up to casts and reshapes."""
    node = use.site.node.all_input_nodes[0]
    arguments = [n for n in use.site.node.all_input_nodes if n.op == "call_function"]
    node = arguments[0] if arguments else node
    while (
        operator_name(node)
        in ("view", "reshape", "to", "_to_copy", "contiguous", "clone", "alias", "dropout", "transpose", "permute")
        and node.all_input_nodes
    ):
        node = node.all_input_nodes[0]
    return (
        operator_name(node) in ("mul", "relu", "silu", "gelu", "pow", "square")
        and not any(operator_name(n) in ("rsqrt", "layer_norm", "rms_norm") for n in node.all_input_nodes)
        and not any(n.op == "placeholder" for n in node.all_input_nodes)
    )
