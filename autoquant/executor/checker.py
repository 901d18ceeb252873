"""Claims that are applied together: their members looked up, and everything found in which they disagree.

What is wrong with one claim by itself is ``models.fit``'s to say; here every name, shape and index fits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from autoquant.config.check import Problem
from autoquant.config.format import Norm, Slot
from autoquant.config.layers import fill
from autoquant.config.places import JsonPath, json_path
from autoquant.config.slots import channels_of
from autoquant.executor.operations import Axis, Blocks
from autoquant.executor.resolved import Member, ResolvedNorm
from autoquant.models.structure import FLOATING, ModelStructure

Positions = NDArray[np.bool_]


def blocks_of(member: Member, size: int, blocks: int) -> Blocks:
    """Positions of each block that is there, ``[repeats, size]``. The k-th position of every channel of a block belongs
    to repeat k.
    """
    channels = member.axis.channels.numpy()
    positions = np.argsort(channels, kind="stable")
    positions = positions[np.searchsorted(channels[positions], 0) :]
    counts = np.bincount(channels[positions], minlength=size * blocks)
    found = []
    start = 0
    for block in range(blocks):
        stop = start + int(counts[block * size : (block + 1) * size].sum())
        if stop > start:
            found.append((block, torch.from_numpy(positions[start:stop].reshape(size, -1).T.copy())))
        start = stop
    return tuple(found)


def _meet(mine: Positions, theirs: Positions) -> bool:
    """True if a position is in both. A stack divided in two ways is compared as if all of its matrices were alike."""
    if len(mine) != len(theirs) and 1 not in (len(mine), len(theirs)):
        return bool((mine.any(0) & theirs.any(0)).any())
    return bool((mine & theirs).any())


@dataclass(slots=True)
class Checker:
    """Looks members up in a structure and collects every problem. Mutable, and gone when resolve returns."""

    structure: ModelStructure
    problems: list[Problem] = field(default_factory=list)
    claimed: dict[tuple[str, int], list[tuple[JsonPath, Positions]]] = field(default_factory=dict)
    norms: dict[str, JsonPath] = field(default_factory=dict)

    def problem(self, at: JsonPath, text: str) -> None:
        self.problems.append(Problem(at, text))

    def name(self, at: JsonPath, path: str, layer: int | None) -> str:
        """The parameter's name with its layer filled in; a problem where it cannot be folded."""
        name = path if layer is None else fill(path, layer)
        if (dtype := self.structure.dtypes[name]) not in FLOATING:
            self.problem(at, f"{name} is {dtype}; only float16, bfloat16, float32 and float64 can be folded")
        return name

    def slot(self, at: JsonPath, slot: Slot, layer: int | None) -> Member:
        """The slot's parameter and axis."""
        name = self.name((*at, "path"), slot.path, layer)
        shape = self.structure.shapes[name]
        stack = slot.stack if slot.dim > 0 else None
        channels = channels_of(slot)
        if stack is not None and (channels.reshape(stack, -1) == channels[: shape[slot.dim]]).all():
            # Every matrix alike: one axis, and no need to look at them as a stack.
            stack, channels = None, channels[: shape[slot.dim]]
        unflatten = stack is not None and shape[0] != stack
        return Member(name, Axis(slot.dim, stack, unflatten, torch.from_numpy(channels)))

    def norm(self, at: JsonPath, norm: Norm, layer: int | None) -> ResolvedNorm:
        weight = None if norm.weight is None else self.name((*at, "weight"), norm.weight, layer)
        bias = None if norm.bias is None else self.name((*at, "bias"), norm.bias, layer)
        return ResolvedNorm(norm.kind, weight, bias, norm.offset, norm.eps)

    def claim(self, at: JsonPath, member: Member) -> None:
        """A position can belong to one space only, and once."""
        mine = self._positions(member)
        claims = self.claimed.setdefault((member.name, member.axis.dim), [])
        for where, theirs in claims:
            if _meet(mine, theirs):
                text = f"the same positions of dimension {member.axis.dim} of {member.name} are already in"
                self.problem(at, f"{text} {json_path(where)}")
        claims.append((at, mine))

    def once(self, members: Sequence[tuple[JsonPath, Member]]) -> None:
        """A group scales a position once, as a source or as a target."""
        seen: dict[tuple[str, int], list[Positions]] = {}
        for at, member in members:
            mine = self._positions(member)
            others = seen.setdefault((member.name, member.axis.dim), [])
            if any(_meet(mine, other) for other in others):
                self.problem(at, f"the group names positions of dimension {member.axis.dim} of {member.name} twice")
            others.append(mine)

    def _positions(self, member: Member) -> Positions:
        """Where the member carries a channel, bool ``[matrices, size]``; one matrix where all are alike."""
        return (member.axis.channels.numpy() >= 0).reshape(-1, self.structure.shapes[member.name][member.axis.dim])

    def claim_norm(self, at: JsonPath, norm: ResolvedNorm) -> None:
        """A gain can be folded once only: all its readers stand in one entry."""
        name = norm.weight or norm.bias
        if name is None:
            return
        if name in self.norms:
            self.problem(at, f"{name} is in {json_path(self.norms[name])} too; all its readers belong in one")
        self.norms[name] = at
