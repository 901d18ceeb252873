"""Lists of positions and their channels, written as strided blocks."""

from __future__ import annotations

import numpy as np

from autoquant.analyzer.variables import Ints
from autoquant.config import IndexMap

MAX_BLOCKS = 4096


def index_maps(positions: Ints, channels: Ints, size: int) -> tuple[IndexMap, ...] | None:
    """The shortest list of strided blocks that enumerates ``positions`` (sorted) with their ``channels``.

    None stands for the whole axis in order, as in the config file.
    """
    if len(positions) == size and np.array_equal(positions, channels) and np.array_equal(positions, np.arange(size)):
        return None
    found = []
    at = 0
    while at < len(positions):
        block, length = _longest(positions[at:], channels[at:])
        found.append(block)
        at += length
    return tuple(found)


def _longest(positions: Ints, channels: Ints) -> tuple[IndexMap, int]:
    """The longest prefix that is one strided block, grown from the inside out."""
    shape: list[int] = []
    stride: list[int] = []
    channel_stride: list[int] = []
    length = 1
    while length < len(positions):
        step, channel_step = int(positions[length] - positions[0]), int(channels[length] - channels[0])
        repeats = 1
        while (repeats + 1) * length <= len(positions):
            part = slice(repeats * length, (repeats + 1) * length)
            if not (
                np.array_equal(positions[part], positions[:length] + repeats * step)
                and np.array_equal(channels[part], channels[:length] + repeats * channel_step)
            ):
                break
            repeats += 1
        if repeats == 1:
            break
        shape, stride, channel_stride = [repeats, *shape], [step, *stride], [channel_step, *channel_stride]
        length *= repeats
    block = IndexMap(
        start=int(positions[0]),
        shape=tuple(shape or [1]),
        stride=tuple(stride or [1]),
        channel_start=int(channels[0]),
        channel_stride=tuple(channel_stride or [1]),
    )
    return block, length
