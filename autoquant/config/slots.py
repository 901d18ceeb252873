"""Slots expanded: which position of an axis carries which channel. Bounds are checked before anything is allocated."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from autoquant.config.format import IndexMap, Slot

MAX_POSITIONS = 1 << 22
"""Of one axis that is given by blocks: 32 MiB; the widest expert stacks of the survey have 2.1 million."""


PositionProblem: TypeAlias = tuple[tuple[str | int, ...], str]
"""Where in a slot something is wrong, and what."""


def channels_of(slot: Slot) -> NDArray[np.int64]:
    """The channel of each position, int64 ``[size]``; -1 where a position carries none.

    For a slot without :func:`index_problems`.
    """
    if slot.index is None:
        return np.arange(slot.size)
    channels = np.full(slot.size, -1, dtype=np.int64)
    for block in slot.index:
        channels[_strided(block.start, block.shape, block.stride)] = _strided(
            block.channel_start, block.shape, block.channel_stride
        )
    return channels


def positions_of(slot: Slot) -> NDArray[np.int64]:
    """The positions that carry a channel, ascending."""
    return np.flatnonzero(channels_of(slot) >= 0)


def index_problems(slot: Slot, channels: int, blocks: int | None = None) -> tuple[PositionProblem, ...]:
    """What is wrong with the positions of ``slot`` and their channels: where in the slot, and why.

    Every channel must be on a position. In a space of ``blocks``, that goes for each block of which there is anything,
    and all channels of a block must occur equally often: a rotation mixes them.
    """
    return _index_problems(slot.size, slot.index, channels, blocks)


@lru_cache(maxsize=1 << 14)  # the slots of one axis mostly have one index, and a file's are looked at by each check
def _index_problems(
    size: int, index: tuple[IndexMap, ...] | None, channels: int, blocks: int | None
) -> tuple[PositionProblem, ...]:
    return tuple(_positions(size, index, channels, blocks))


def _positions(
    size: int, index: tuple[IndexMap, ...] | None, channels: int, blocks: int | None
) -> Iterator[PositionProblem]:
    if index is None:
        if size != channels:
            yield ("size",), f"without index, expected one position for each of the {channels} channels"
        return
    if not index:
        yield ("index",), "expected at least one block, or null for the whole axis"
        return
    if size > MAX_POSITIONS or (blocks is not None and channels > MAX_POSITIONS):
        yield ("size",), f"more than {MAX_POSITIONS} positions"
        return
    found = [
        (("index", i, *at), reason)
        for i, block in enumerate(index)
        for at, reason in _block_problems(block, size, channels)
    ]
    yield from found
    if found:
        return
    if sum(math.prod(block.shape) for block in index) > size:
        yield ("index",), f"names more positions than the {size} of the axis, so some occur twice"
        return
    taken = np.zeros(size, dtype=bool)
    # Of a group's channels, one of the first size + 1 is missing if any is.
    counts = np.zeros(channels if blocks is not None else min(channels, size + 1), dtype=np.int64)
    for block in index:
        positions = np.sort(_strided(block.start, block.shape, block.stride))
        twice = positions[1:][positions[1:] == positions[:-1]]
        again = twice if twice.size else positions[taken[positions]]
        if again.size:
            yield ("index",), f"position {again[0]} occurs more than once"
            return
        taken[positions] = True
        carried = _strided(block.channel_start, block.shape, block.channel_stride)
        counts += np.bincount(carried[carried < counts.size], minlength=counts.size)
    yield from _coverage(counts, channels, blocks)


def _coverage(counts: NDArray[np.int64], channels: int, blocks: int | None) -> Iterator[PositionProblem]:
    """``counts`` ``[C]``: on how many positions each of the first channels is."""
    parts = counts.reshape(blocks or 1, -1)
    missing = np.flatnonzero(((parts == 0) & ((parts > 0).any(1, keepdims=True) | (counts.sum() == 0))).reshape(-1))
    if missing.size:
        yield ("index",), f"channel {missing[0]} of {channels} is on no position"
    elif blocks is not None and (uneven := np.flatnonzero((parts != parts[:, :1]).any(1))).size:
        channel = int(uneven[0]) * parts.shape[1] + int(parts[uneven[0]].argmin())
        yield ("index",), f"holds a part of block {uneven[0]} only (channel {channel} is short)"


def _strided(start: int, shape: Sequence[int], stride: Sequence[int]) -> NDArray[np.int64]:
    """``start + sum(i * stride)`` for every multi-index i below ``shape``, in row-major order."""
    total = np.full((1,), start, dtype=np.int64)
    for extent, step in zip(shape, stride, strict=True):
        total = (total[:, None] + step * np.arange(extent)).reshape(-1)
    return total


def _block_problems(block: IndexMap, size: int, channels: int) -> Iterator[PositionProblem]:
    lengths = len(block.shape), len(block.stride), len(block.channel_stride)
    if len(set(lengths)) > 1:
        yield (), "shape, stride and channel_stride differ in length: {}, {} and {}".format(*lengths)
        return
    if not block.shape or min(block.shape) < 1:
        yield ("shape",), "expected at least one extent, and each at least 1"
        return
    if math.prod(block.shape) > MAX_POSITIONS:
        yield ("shape",), f"more than {MAX_POSITIONS} positions"
        return
    for what, start, strides, limit in (
        ("position", block.start, block.stride, size),
        ("channel", block.channel_start, block.channel_stride, channels),
    ):
        # The extremes of a sum of independent terms are the sums of their extremes.
        ends = [(extent - 1) * step for extent, step in zip(block.shape, strides, strict=True)]
        low, high = start + sum(min(end, 0) for end in ends), start + sum(max(end, 0) for end in ends)
        if low < 0 or high >= limit:
            wrong = low if low < 0 else high
            yield (), f"{what} {wrong} is out of range; expected 0 to {limit - 1}"
