"""Resolved config -> an ordered list of operations for each parameter, with every side tensor at hand.

The order is: fold norms into embedding tables, centre, fold norm gains and biases, rotate, smooth, undo online
rotations. Planning reads norm weights and biases and, where a LayerNorm's bias moves into its readers, those readers'
weights; it writes nothing. The plan serves a module in memory and a checkpoint on disk alike.

**Where a LayerNorm's bias goes.** A reader computes ``W (g * n + b) + c`` of the normalised n, which is ``W diag(g) n +
(W b + c)``: the gain goes into the columns and ``W b`` into the linear's bias. Where a reader has no bias, b stays in
the norm: with ``W' = W diag(g) Q`` and a norm of gain 1 and bias ``b' = (b / g) Q``, ``W' (n Q + b')^T = W (g * n +
b)``. So a plain LayerNorm model whose ``lm_head`` has no bias still holds the result. Where a gain is 0 that quotient
does not exist and the linear needs a new bias.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from autoquant.errors import AutoQuantError
from autoquant.executor.operations import Add, Axis, Centre, Fill, Normalise, Operation, Rotate, Scale, contract
from autoquant.executor.resolved import (
    Resolved,
    ResolvedGroup,
    ResolvedNorm,
    ResolvedOnline,
    ResolvedRead,
    ResolvedSpace,
    RotatedSlot,
)
from autoquant.executor.rotation import Rotation, hadamard_rotation, make_rotation
from autoquant.models.structure import ModelStructure

Scales = Mapping[tuple[str, int | None], Tensor]
"""(group name, layer or None) -> scales ``[channels]``: channel c of every source is multiplied by ``scales[c] **
power``.
"""

SMALLEST_GAIN = 1e-3
"""Relative to the largest: a LayerNorm bias is not divided by a smaller gain."""


def make_plan(
    resolved: Resolved, inventory: ModelStructure, read: Callable[[str], Tensor], scales: Scales | None
) -> Plan:
    """All operations, in order. ``read(name)`` gives the original parameter.

    Raises AutoQuantError where a selected group has no scales or unusable ones, where a norm holds a NaN or an
    infinity, and where a shared module would need two different weights.
    """
    _check_scales(resolved, scales)
    draft = _Draft(inventory, read)
    for space in resolved.spaces:
        _fold_tables(space, draft)
    for space in resolved.spaces:
        _fold_norms(space, draft)
    for space in resolved.spaces:
        _rotate(space, draft)
    for group in resolved.groups:
        assert scales is not None
        _smooth(group, scales[group.name, group.layer], draft)
    for online in resolved.online:
        _undo_online(online, draft)
    return _untie(draft, resolved)


def _check_scales(resolved: Resolved, scales: Scales | None) -> None:
    problems = []
    for group in resolved.groups:
        where = group.name if group.layer is None else f"{group.name} (layer {group.layer})"
        s = None if scales is None else scales.get((group.name, group.layer))
        if s is None:
            problems.append(f"{where}: no scales; calibrate first, or do not smooth")
        elif s.shape != (group.channels,):
            problems.append(f"{where}: scales of shape {tuple(s.shape)}, expected ({group.channels},)")
        elif not bool((s.isfinite() & (s > 0)).all()):
            problems.append(f"{where}: scales must be positive and finite")
    if problems:
        raise AutoQuantError(
            f"{len(problems)} smoothing groups cannot be applied; nothing was changed", tuple(problems[:20])
        )


def _fold_tables(space: ResolvedSpace, draft: _Draft) -> None:
    for writer in space.writers:
        norm = writer.fold_norm
        if norm is None:
            continue
        gain = draft.gain(norm, space.size * space.blocks)
        bias = draft.bias(norm, space.size * space.blocks)
        label = f"fold {norm.weight or norm.bias} into its table"
        eps = 1e-5 if norm.eps is None else norm.eps
        draft.add(writer.name, Normalise(label, writer.axis, norm.kind == "layer", eps, gain, bias))
        owner = norm.weight or norm.bias
        if owner is not None:
            draft.identities.append(owner.rpartition(".")[0])
    if space.centre:
        for writer in space.writers:
            draft.add(writer.name, Centre(f"centre {space.name} {space.layer}", writer.axis, writer.blocks))


def _fold_norms(space: ResolvedSpace, draft: _Draft) -> None:
    for read in space.reads:
        norm = read.norm
        if norm is None:
            continue
        channels = space.size * space.blocks
        if norm.bias is not None:
            _move_bias(space, read, norm, draft)
        if norm.weight is not None:
            gain = draft.gain(norm, channels)
            for reader in read.readers:
                draft.add(reader.name, Scale(f"fold gain {norm.weight}", reader.axis, reader.axis.gather(gain, 1.0)))
                if space.centre and norm.kind == "rms":  # a LayerScale's linear: what it writes is centred, too
                    draft.add(reader.name, Centre(f"centre {space.name} {space.layer}", reader.axis, reader.blocks))
            draft.add(norm.weight, Fill(f"gain {1 - norm.offset}", 1.0 - norm.offset))


def _move_bias(space: ResolvedSpace, read: ResolvedRead, norm: ResolvedNorm, draft: _Draft) -> None:
    """Into the readers' biases where all have one, else divided by the gain and kept, else into new biases."""
    assert norm.bias is not None
    channels = space.size * space.blocks
    beta = draft.bias(norm, channels)
    whole = draft.inventory.shapes[norm.bias] == (channels,)
    gain = draft.gain(norm, channels)
    if any(reader.bias is None for reader in read.readers):
        if whole and bool((gain.abs() >= SMALLEST_GAIN * gain.abs().max()).all()) and bool(gain.abs().max() > 0):
            axis = Axis(0, None, False, torch.arange(channels))
            draft.add(norm.bias, Scale(f"divide by gain {norm.weight}", axis, 1 / gain))
            draft.kept.append((norm.bias, space, axis))
            return
        if not bool(beta.any()):
            return
    for reader in read.readers:
        bias = reader.bias
        if bias is None:
            bias = reader.name.rpartition(".")[0] + ".bias"
            if reader.name.rpartition(".")[2] != "weight" or bias not in draft.inventory.growable:
                raise AutoQuantError(
                    f"{space.name}: {norm.bias} has to move into a bias of {reader.name}, which can have none, because "
                    f"the gain {norm.weight} has (nearly) zero elements; disable this space"
                )
            draft.created[bias] = reader.name
        delta = contract(draft.read(reader.name), reader.axis, beta)
        draft.add(bias, Add(f"fold bias {norm.bias} {reader.name}", delta.cpu()))
    draft.add(norm.bias, Fill("bias 0", 0.0))


def _rotate(space: ResolvedSpace, draft: _Draft) -> None:
    rotations = tuple(
        space.given or make_rotation(space.size, space.method, seed, space.keep_ones) for seed in space.seeds
    )
    label = f"rotate {space.name} {space.layer}"
    for member in (*space.writers, *(reader for read in space.reads for reader in read.readers)):
        draft.add(member.name, Rotate(label, member.axis, member.blocks, rotations))
    for name, owner, axis in draft.kept:
        if owner is space:
            positions = torch.arange(space.size * space.blocks).reshape(space.blocks, 1, space.size)
            draft.add(name, Rotate(label, axis, tuple(enumerate(positions)), rotations))
    where = space.name if space.layer is None else f"{space.name} (layer {space.layer})"
    draft.rotations[where] = rotations[0]


def _smooth(group: ResolvedGroup, scales: Tensor, draft: _Draft) -> None:
    s = scales.double().cpu()
    for sign, slots in ((1, group.sources), (-1, group.targets)):
        for slot in slots:
            factors = slot.axis.gather(s ** (sign * slot.power), 1.0)
            label = f"smooth {group.name} {group.layer} {sign * slot.power}"
            draft.add(slot.name, Scale(label, slot.axis, factors, slot.offset))


def _undo_online(online: ResolvedOnline, draft: _Draft) -> None:
    if online.columns is not None:
        columns: RotatedSlot = online.columns
        rotation = hadamard_rotation(online.size)
        draft.add(columns.name, Rotate(f"online {online.kind}", columns.axis, columns.blocks, (rotation,)))


def _untie(draft: _Draft, resolved: Resolved) -> Plan:
    """Tied parameters stay tied where the same is done to all of them; otherwise each gets its own storage."""
    operations = draft.operations
    untied: list[str] = []
    for first, *others in draft.inventory.ties:
        wanted = {name: [_signature(op) for op in operations.get(name, [])] for name in (first, *others)}
        if all(ops == wanted[first] for ops in wanted.values()):
            for name in others:
                operations.pop(name, None)
            continue
        for name in others:
            if name in draft.inventory.shared_modules:
                raise AutoQuantError(
                    f"{name} and {first} are one module used twice, and the config changes them differently; "
                    "disable what does"
                )
            untied.append(name)
            operations.setdefault(name, [])
    return Plan(
        {name: tuple(ops) for name, ops in operations.items()},
        dict(draft.created),
        tuple(untied),
        tuple(draft.identities),
        resolved.online,
        tuple((g.name, g.layer) for g in resolved.groups),
        {where: rotation.construction for where, rotation in draft.rotations.items()},
    )


def _signature(operation: Operation) -> tuple[object, ...]:
    axis = (
        None if isinstance(operation, Add | Fill) else (operation.axis.dim, operation.axis.channels.numpy().tobytes())
    )
    return (type(operation).__name__, operation.label, axis)


@dataclass(slots=True)
class _Draft:
    """The plan while it is being made."""

    inventory: ModelStructure
    read: Callable[[str], Tensor]
    operations: dict[str, list[Operation]] = field(default_factory=dict)
    created: dict[str, str] = field(default_factory=dict)
    identities: list[str] = field(default_factory=list)
    kept: list[tuple[str, ResolvedSpace, Axis]] = field(default_factory=list)
    rotations: dict[str, Rotation] = field(default_factory=dict)

    def add(self, name: str, operation: Operation) -> None:
        self.operations.setdefault(name, []).append(operation)

    def gain(self, norm: ResolvedNorm, channels: int) -> Tensor:
        """The gain per channel, float64 ``[channels]``; ones where the norm has no weight."""
        if norm.weight is None:
            return torch.ones(channels, dtype=torch.float64)
        return self._vector(norm.weight, channels) + norm.offset

    def bias(self, norm: ResolvedNorm, channels: int) -> Tensor:
        if norm.bias is None:
            return torch.zeros(channels, dtype=torch.float64)
        return self._vector(norm.bias, channels)

    def _vector(self, name: str, channels: int) -> Tensor:
        """A norm's parameter as float64 ``[channels]``, repeated where each block has the same."""
        vector = self.read(name).detach().double().cpu().reshape(-1)
        if not bool(vector.isfinite().all()):
            raise AutoQuantError(f"{name} holds a NaN or an infinity")
        return vector.repeat(channels // len(vector))


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do. ``created``: new bias -> the weight beside it; ``untied``: names that need their own storage;
    ``identities``: norm modules that were folded away; ``constructions``: the rotation of each space in words.
    """

    operations: dict[str, tuple[Operation, ...]]
    created: dict[str, str]
    untied: tuple[str, ...]
    identities: tuple[str, ...]
    online: tuple[ResolvedOnline, ...]
    groups: tuple[tuple[str, int | None], ...]
    constructions: dict[str, str]
