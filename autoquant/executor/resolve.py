"""Config x inventory -> what exactly is asked of which parameter, with every path, index and shape checked.

Nothing is read or written here. All problems are collected and raised together, each with the nearest valid name.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from autoquant.config import (
    Config,
    IndexMap,
    Norm,
    Online,
    Read,
    RotationMethod,
    Slot,
    SmoothingGroup,
    SmoothingKind,
    Space,
)
from autoquant.errors import AutoQuantError
from autoquant.executor.inventory import FLOATING, Inventory
from autoquant.executor.operations import Axis, Blocks
from autoquant.paths import LAYER, did_you_mean, fill, layer_numbers

MAX_DETAILS = 20

Smooth = Literal["all", "fc_fc", "none"]
Positions = NDArray[np.int64] | NDArray[np.bool_]
Layers = tuple[int | None, ...]


def resolve(
    config: Config,
    inventory: Inventory,
    *,
    rotate: bool = True,
    smooth: Smooth = "all",
    only: Collection[str] | None = None,
    seed: int | None = None,
) -> Resolved:
    """Everything that the config and the options select, for every layer.

    ``only`` names groups and spaces (and online rotations by their path) and selects exactly these, whatever is
    enabled. ``seed`` replaces ``rotation.seed``. Raises AutoQuantError with one detail per problem, and where nothing
    is selected.
    """
    check = _Checker(inventory)
    if only is not None:
        _check_names(config, only, check)
    if config.model.parameters != inventory.parameters():
        check.problem(
            f"the config is for a model of {config.model.parameters} parameters, this one has {inventory.parameters()}"
        )
    spaces = [s for s in config.rotation.spaces if _selected(s.name, only, rotate and _space_enabled(config, s))]
    resolved_spaces = [r for s in spaces for r in _resolve_space(config, s, check, seed)]
    folded = {n.weight for space in resolved_spaces for n in space.norms() if n.weight}
    groups = [r for g in config.smoothing.groups for r in _resolve_group(config, g, check, smooth, only, folded)]
    online = [
        r
        for o in config.rotation.online
        if _selected(o.path, only, rotate and o.enable)
        for r in _resolve_online(config, o, check)
    ]
    check.finish()
    if not (resolved_spaces or groups or online):
        raise AutoQuantError("nothing to do: no smoothing group, rotation space or online rotation is selected")
    return Resolved(tuple(resolved_spaces), tuple(groups), tuple(online))


def _selected(name: str, only: Collection[str] | None, enabled: bool) -> bool:
    return enabled if only is None else name in only


def _space_enabled(config: Config, space: Space) -> bool:
    return config.rotation.enable if space.enable is None else space.enable


def _check_names(config: Config, only: Collection[str], check: _Checker) -> None:
    names = [g.name for g in config.smoothing.groups] + [s.name for s in config.rotation.spaces]
    names += [o.path for o in config.rotation.online]
    for name in only:
        if name not in names:
            check.problem(f"the config has no group or space '{name}'{did_you_mean(name, names)}")


def _resolve_space(config: Config, space: Space, check: _Checker, seed: int | None) -> Iterator[ResolvedSpace]:
    """One resolved space, or one per layer where each layer has its own.

    Giving layers one Q or several is a matter of chance only where they really are separate, so several are made for R2
    alone, whose heads belong to one attention; every other space gets one Q wherever its members lie.
    """
    own_layers = any(w.layers for w in space.writers) or any(r.layers for r in space.reads)
    if space.kind == "R2" and space.layers is not None and not own_layers:
        for layer in layer_numbers(space.layers):
            yield _space_at(config, space, (layer,), layer, check, seed)
    else:
        yield _space_at(config, space, _layers(space.layers), None, check, seed)


def _space_at(
    config: Config, space: Space, layers: Layers, layer: int | None, check: _Checker, seed: int | None
) -> ResolvedSpace:
    method = space.method or config.rotation.method
    base = seed if seed is not None else config.rotation.seed
    text = f"{base}:{space.name}" if space.seed is None or seed is not None else f"{space.seed}"
    where = space.name if layer is None else f"{space.name} (layer {layer})"
    check.begin(where)
    channels = space.size * space.blocks
    writers = []
    for writer in space.writers:
        for at in _expand(writer.path, writer.layers, layers, check):
            if (member := check.slot(writer, at, channels)) is None:
                continue
            norm = None if writer.fold_norm is None else check.norm(writer.fold_norm, at, (channels,))
            blocks = check.blocks(member, space.size, space.blocks)
            writers.append(RotatedSlot(member.name, member.axis, blocks, norm, None))
            check.claim(member)
    reads = []
    for read in space.reads:
        paths = [r.path for r in read.readers]
        for at in _expand(paths[0], read.layers, layers, check):
            norm = None if read.norm is None else check.norm(read.norm, at, (channels, space.size))
            if norm is not None:
                check.claim_norm(norm)
            if space.centre and (read.norm is None or read.norm.kind != "layer"):
                check.problem(
                    f"centre: {fill(paths[0], at or 0)} reads the space without a LayerNorm, centring would change it"
                )
            reads.append(ResolvedRead(norm, tuple(_readers(read, at, space, channels, check))))
    keep_ones = space.centre or any(read.norm is not None and read.norm.kind == "layer" for read in space.reads)
    seeds = tuple(f"{text}:{layer}:{block}" for block in range(space.blocks))
    return ResolvedSpace(
        space.name,
        layer,
        space.kind,
        method,
        seeds,
        space.size,
        space.blocks,
        keep_ones,
        space.centre,
        tuple(writers),
        tuple(reads),
    )


def _readers(read: Read, at: int | None, space: Space, channels: int, check: _Checker) -> Iterator[RotatedSlot]:
    for reader in read.readers:
        if (member := check.slot(reader, at, channels)) is None:
            continue
        bias = None
        if reader.bias is not None and (bias := check.name(reader.bias, at)) is not None:
            weight = list(check.inventory.shapes[member.name])
            del weight[reader.dim]
            if check.inventory.shapes[bias] != tuple(weight):
                check.problem(f"{bias}: shape {check.inventory.shapes[bias]} does not fit the linear's {tuple(weight)}")
        check.claim(member)
        yield RotatedSlot(member.name, member.axis, check.blocks(member, space.size, space.blocks), None, bias)


def _resolve_group(
    config: Config,
    group: SmoothingGroup,
    check: _Checker,
    smooth: Smooth,
    only: Collection[str] | None,
    folded: set[str | None],
) -> Iterator[ResolvedGroup]:
    smoothing = config.smoothing
    default = smoothing.enable if group.kind is not SmoothingKind.QUERY_KEY else False
    wanted = {"all": True, "fc_fc": group.kind is SmoothingKind.LINEAR_LINEAR, "none": False}[smooth]
    for layer in _layers(group.layers):
        enable, alpha = group.enable, group.alpha
        for override in group.overrides:
            if layer is not None and layer in layer_numbers(override.layers):
                enable = enable if override.enable is None else override.enable
                alpha = alpha if override.alpha is None else override.alpha
        # A norm whose gain went into its readers before a rotation is not smoothed as well, unless it is asked for by
        # name.
        skip = enable is None and any(fill(s.path, layer or 0) in folded for s in group.sources)
        chosen = wanted and not skip and (default if enable is None else enable)
        if not _selected(group.name, only, chosen):
            continue
        check.begin(group.name if layer is None else f"{group.name} (layer {layer})")
        sides = []
        for slots in (group.sources, group.targets):
            members = [(s, check.slot(s, layer, group.channels)) for s in slots]
            sides.append(tuple(SmoothedSlot(m.name, m.axis, s.power, s.offset) for s, m in members if m is not None))
        yield ResolvedGroup(
            group.name,
            layer,
            group.kind,
            smoothing.alpha if alpha is None else alpha,
            group.channels,
            sides[0],
            sides[1],
        )


def _resolve_online(config: Config, online: Online, check: _Checker) -> Iterator[ResolvedOnline]:
    linears = {linear.path: linear for linear in config.model.linears}
    for layer in _layers(online.layers):
        path = online.path if layer is None else fill(online.path, layer)
        check.begin(f"{online.kind} {path}")
        if online.kind == "R3":
            if not any(name.startswith(path + ".") for name in check.inventory.shapes):
                check.problem(f"no module '{path}'")
            yield ResolvedOnline(online.kind, path, online.size, None)
            continue
        linear = linears.get(online.path)
        if linear is None:
            check.problem(f"'{online.path}' is not in model.linears{did_you_mean(online.path, list(linears))}")
            continue
        if linear.stack is not None or linear.weight == linear.path:
            check.problem("an online rotation cannot be put inside fused experts; disable it")
            continue
        slot = Slot(path=linear.weight, dim=linear.in_dim, size=linear.in_features)
        member = check.slot(slot, layer, online.size)
        if member is not None:
            blocks = check.blocks(member, online.size, 1)
            yield ResolvedOnline(
                online.kind, path, online.size, RotatedSlot(member.name, member.axis, blocks, None, None)
            )


def _layers(text: str | None) -> Layers:
    return (None,) if text is None else layer_numbers(text)


def _expand(path: str, own: str | None, outer: Layers, check: _Checker) -> Layers:
    """The layers of one member: its own, else the space's; one time where its path has no layer index."""
    if LAYER not in path:
        return (None,)
    layers = _layers(own) if own is not None else outer
    if layers == (None,):
        check.problem(f"{path}: no layers are given for '{LAYER}'")
        return ()
    return layers


def channel_of_position(slot: Slot) -> NDArray[np.int64] | str:
    """The channel of each position of a slot, int64 ``[size]``, -1 for none; or what is wrong with its index."""
    if slot.index is None:
        return np.arange(slot.size)
    channels = np.full(slot.size, -1, dtype=np.int64)
    for block in slot.index:
        if not len(block.shape) == len(block.stride) == len(block.channel_stride):
            return "index: shape, stride and channel_stride have different lengths"
        positions = block.start + _strided(block, block.stride)
        if positions.size and (positions.min() < 0 or positions.max() >= slot.size):
            return f"index: positions {positions.min()} to {positions.max()} do not fit the {slot.size} of the axis"
        if len(np.unique(positions)) != positions.size or (channels[positions] >= 0).any():
            return "index: a position is named twice"
        channels[positions] = block.channel_start + _strided(block, block.channel_stride)
    return channels


def _strided(block: IndexMap, strides: tuple[int, ...]) -> NDArray[np.int64]:
    offsets = np.zeros(1, dtype=np.int64)
    for extent, stride in zip(block.shape, strides, strict=True):
        offsets = (offsets[:, None] + np.arange(extent) * stride).reshape(-1)
    return offsets


@dataclass(slots=True)
class _Checker:
    """Looks names and slots up in an inventory and collects every problem. Mutable, and gone when resolve returns."""

    inventory: Inventory
    where: str = ""
    problems: list[str] = field(default_factory=list)
    claimed: dict[tuple[str, int], list[tuple[str, Positions]]] = field(default_factory=dict)
    norms: dict[str, str] = field(default_factory=dict)

    def begin(self, where: str) -> None:
        self.where = where

    def problem(self, text: str) -> None:
        self.problems.append(f"{self.where}: {text}" if self.where else text)

    def finish(self) -> None:
        if not self.problems:
            return
        shown = tuple(dict.fromkeys(self.problems))
        more = len(shown) - MAX_DETAILS
        details = shown[:MAX_DETAILS] + ((f"... and {more} more",) if more > 0 else ())
        raise AutoQuantError(f"the config does not fit the model ({len(shown)} problems); nothing was changed", details)

    def name(self, path: str, layer: int | None) -> str | None:
        """The parameter's name with its layer filled in, if there is one and it can be folded."""
        name = path if layer is None else fill(path, layer)
        if name not in self.inventory.shapes:
            near = did_you_mean(name, list(self.inventory.shapes)) if len(self.problems) < MAX_DETAILS else ""
            self.problem(f"no parameter '{name}'{near}")
            return None
        if self.inventory.dtypes[name] not in FLOATING:
            self.problem(
                f"{name} is {self.inventory.dtypes[name]}; only float16, bfloat16, float32 and float64 can be folded"
            )
            return None
        return name

    def slot(self, slot: Slot, layer: int | None, channels: int) -> Member | None:
        """The slot's parameter and axis, with its size and channels checked against the shape."""
        name = self.name(slot.path, layer)
        if name is None:
            return None
        shape = self.inventory.shapes[name]
        if slot.dim >= len(shape):
            self.problem(f"{name}: has no dimension {slot.dim}, its shape is {shape}")
            return None
        stack = slot.stack if slot.dim > 0 else None
        if stack is not None and shape[0] % stack:
            self.problem(f"{name}: {stack} matrices cannot be stacked along dimension 0 of {shape}")
            return None
        size = shape[slot.dim] * (stack or 1)
        if slot.size != size:
            self.problem(f"{name}: the axis has {size} positions (shape {shape}), the config says {slot.size}")
            return None
        mapped = channel_of_position(slot)
        if isinstance(mapped, str):
            self.problem(f"{name}: {mapped}")
            return None
        if mapped.max() >= channels:
            self.problem(f"{name}: channel {mapped.max()} is beyond the {channels} of the group")
            return None
        if not (mapped >= 0).any():
            self.problem(f"{name}: no position carries a channel")
            return None
        if stack is not None and (mapped.reshape(stack, -1) == mapped[: shape[slot.dim]]).all():
            stack, mapped = (
                None,
                mapped[: shape[slot.dim]],
            )  # every matrix alike: one axis, and no need to look at them as a stack
        unflatten = stack is not None and shape[0] != stack
        return Member(name, Axis(slot.dim, stack, unflatten, torch.from_numpy(mapped)))

    def blocks(self, member: Member, size: int, blocks: int) -> Blocks:
        """Positions of each block, ``[repeats, size]``. The k-th position of every channel of a block belongs to repeat
        k.
        """
        channels = member.axis.channels.numpy()
        positions = np.argsort(channels, kind="stable")
        positions = positions[np.searchsorted(channels[positions], 0) :]
        counts = np.bincount(channels[positions], minlength=size * blocks)
        found = []
        start = 0
        for block in range(blocks):
            repeats = counts[block * size : (block + 1) * size]
            if (repeats != repeats[0]).any():
                missing = block * size + int(repeats.argmin())
                self.problem(f"{member.name}: holds a part of block {block} only (channel {missing} is short)")
                return ()
            stop = start + int(repeats.sum())
            if stop > start:
                found.append((block, torch.from_numpy(positions[start:stop].reshape(size, -1).T.copy())))
            start = stop
        return tuple(found)

    def norm(self, norm: Norm, layer: int | None, sizes: tuple[int, ...]) -> ResolvedNorm | None:
        weight = None if norm.weight is None else self.name(norm.weight, layer)
        bias = None if norm.bias is None else self.name(norm.bias, layer)
        for name in (weight, bias):
            if name is not None and self.inventory.shapes[name] not in [(n,) for n in sizes]:
                self.problem(f"{name}: shape {self.inventory.shapes[name]}, but the space has {sizes[0]} channels")
        return ResolvedNorm(norm.kind, weight, bias, norm.offset, norm.eps)

    def claim(self, member: Member) -> None:
        """A position can belong to one space only, and once."""
        mine = member.axis.channels.numpy() >= 0
        claims = self.claimed.setdefault((member.name, member.axis.dim), [])
        for where, theirs in claims:
            if mine.shape == theirs.shape and (mine & theirs).any():
                self.problem(f"{member.name}: the same positions of dimension {member.axis.dim} are already in {where}")
        claims.append((self.where, mine))

    def claim_norm(self, norm: ResolvedNorm) -> None:
        """A gain can be folded once only: all its readers stand in one entry."""
        name = norm.weight or norm.bias
        if name is None:
            return
        if name in self.norms:
            self.problem(f"{name}: stands in two reads ({self.norms[name]}); all its readers belong in one")
        self.norms[name] = self.where


@dataclass(frozen=True, slots=True)
class Member:
    """A parameter and the axis of it that a slot names."""

    name: str
    axis: Axis


@dataclass(frozen=True, slots=True)
class ResolvedNorm:
    kind: Literal["rms", "layer"]
    weight: str | None
    bias: str | None
    offset: int
    eps: float | None


@dataclass(frozen=True, slots=True)
class RotatedSlot:
    """A writer (perhaps with a norm to fold into its rows) or a reader (perhaps with its linear's bias)."""

    name: str
    axis: Axis
    blocks: Blocks
    fold_norm: ResolvedNorm | None
    bias: str | None


@dataclass(frozen=True, slots=True)
class ResolvedRead:
    norm: ResolvedNorm | None
    readers: tuple[RotatedSlot, ...]


@dataclass(frozen=True, slots=True)
class ResolvedSpace:
    """A space at one layer, or over all of its layers. ``seeds``: one text per block."""

    name: str
    layer: int | None
    kind: str
    method: RotationMethod
    seeds: tuple[str, ...]
    size: int
    blocks: int
    keep_ones: bool
    centre: bool
    writers: tuple[RotatedSlot, ...]
    reads: tuple[ResolvedRead, ...]

    def norms(self) -> Iterator[ResolvedNorm]:
        return (read.norm for read in self.reads if read.norm is not None)


@dataclass(frozen=True, slots=True)
class SmoothedSlot:
    name: str
    axis: Axis
    power: int
    offset: int


@dataclass(frozen=True, slots=True)
class ResolvedGroup:
    """A smoothing group at one layer."""

    name: str
    layer: int | None
    kind: SmoothingKind
    alpha: float
    channels: int
    sources: tuple[SmoothedSlot, ...]
    targets: tuple[SmoothedSlot, ...]


@dataclass(frozen=True, slots=True)
class ResolvedOnline:
    """An online rotation: the module, and for a linear the columns that undo it."""

    kind: Literal["R3", "R4", "input"]
    path: str
    size: int
    columns: RotatedSlot | None


@dataclass(frozen=True, slots=True)
class Resolved:
    spaces: tuple[ResolvedSpace, ...]
    groups: tuple[ResolvedGroup, ...]
    online: tuple[ResolvedOnline, ...]
