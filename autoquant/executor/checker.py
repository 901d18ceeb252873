"""Looks up the names and slots of a config in a model and collects everything that does not fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from autoquant.config.format import IndexMap, Norm, Slot
from autoquant.config.layers import did_you_mean, fill
from autoquant.errors import AutoQuantError
from autoquant.executor.operations import Axis, Blocks
from autoquant.executor.resolved import Member, ResolvedNorm
from autoquant.models.inventory import FLOATING, Inventory

MAX_DETAILS = 20

Positions = NDArray[np.bool_]


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


def _meet(mine: Positions, theirs: Positions) -> bool:
    """Is a position in both? A stack divided in two ways is compared as if all of its matrices were alike."""
    if len(mine) != len(theirs) and 1 not in (len(mine), len(theirs)):
        return bool((mine.any(0) & theirs.any(0)).any())
    return bool((mine & theirs).any())


@dataclass(slots=True)
class Checker:
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
        if len(shown) == 1:
            raise AutoQuantError(f"the config does not fit the model: {shown[0]}; nothing was changed")
        more = len(shown) - MAX_DETAILS
        details = shown[:MAX_DETAILS] + ((f"... and {more} more",) if more > 0 else ())
        raise AutoQuantError(
            f"the config does not fit the model: {shown[0]} (and {len(shown) - 1} more problems); nothing was changed",
            details,
        )

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
        mine = self._positions(member)
        claims = self.claimed.setdefault((member.name, member.axis.dim), [])
        for where, theirs in claims:
            if _meet(mine, theirs):
                self.problem(f"{member.name}: the same positions of dimension {member.axis.dim} are already in {where}")
        claims.append((self.where, mine))

    def once(self, members: Sequence[Member]) -> None:
        """A group scales a position once, as a source or as a target."""
        seen: dict[tuple[str, int], list[Positions]] = {}
        for member in members:
            mine = self._positions(member)
            others = seen.setdefault((member.name, member.axis.dim), [])
            if any(_meet(mine, other) for other in others):
                self.problem(f"{member.name}: the group names the same positions of dimension {member.axis.dim} twice")
            others.append(mine)

    def _positions(self, member: Member) -> Positions:
        """Where the member carries a channel, bool ``[matrices, size]``; one matrix where all are alike."""
        return (member.axis.channels.numpy() >= 0).reshape(-1, self.inventory.shapes[member.name][member.axis.dim])

    def claim_norm(self, norm: ResolvedNorm) -> None:
        """A gain can be folded once only: all its readers stand in one entry."""
        name = norm.weight or norm.bias
        if name is None:
            return
        if name in self.norms:
            self.problem(f"{name}: stands in two reads ({self.norms[name]}); all its readers belong in one")
        self.norms[name] = self.where
