"""Lists of positions and their channels, written as strided blocks."""

from __future__ import annotations

import numpy as np

from autoquant.analyzer.variables import Ints
from autoquant.config.format import IndexMap


def index_maps(positions: Ints, channels: Ints, size: int) -> tuple[IndexMap, ...] | None:
    """A short list of strided blocks that enumerates ``positions`` (sorted) with their ``channels``.

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
    repeating = _repeating(positions, channels) if len(found) > 2 else None
    return tuple(repeating if repeating is not None and len(repeating) < len(found) else found)


MAX_PERIOD = 32


def _repeating(positions: Ints, channels: Ints) -> list[IndexMap] | None:
    """Runs that repeat as a pattern (partial rotary: per head two tied halves and the rest); None if they do not."""
    breaks = np.flatnonzero((np.diff(positions) != 1) | (np.diff(channels) != 1)) + 1
    start = np.concatenate([[0], breaks])
    length = np.diff(np.concatenate([start, [len(positions)]]))
    for period in range(1, min(MAX_PERIOD, len(start) // 2) + 1):
        if len(start) % period:
            continue
        at, lengths = start.reshape(-1, period), length.reshape(-1, period)
        step, channel_step = np.diff(positions[at], axis=0), np.diff(channels[at], axis=0)
        if all(bool((rows == rows[:1]).all()) for rows in (lengths, step, channel_step)):
            runs = [
                (
                    (int(positions[at[0, i]]), int(channels[at[0, i]])),
                    (len(at), int(lengths[0, i])),
                    (int(step[0, i]), 1),
                    (int(channel_step[0, i]), 1),
                )
                for i in range(period)
            ]
            return _joined(runs)
    return None


Run = tuple[tuple[int, int], tuple[int, int], tuple[int, int], tuple[int, int]]


def _joined(runs: list[Run]) -> list[IndexMap]:
    """Runs of one shape at equal distances, as one block."""
    found = []
    while runs:
        (start, channel), shape, stride, channel_stride = runs[0]
        alike = 1
        while alike < len(runs) and runs[alike][1:] == runs[0][1:]:
            before, here = runs[alike - 1][0], runs[alike][0]
            first = runs[1][0]
            if (here[0] - before[0], here[1] - before[1]) != (first[0] - start, first[1] - channel):
                break
            alike += 1
        if alike > 1:
            step, channel_step = runs[1][0][0] - start, runs[1][0][1] - channel
            found.append(
                IndexMap(
                    start=start,
                    shape=(shape[0], alike, shape[1]),
                    stride=(stride[0], step, stride[1]),
                    channel_start=channel,
                    channel_stride=(channel_stride[0], channel_step, channel_stride[1]),
                )
            )
        else:
            found.append(
                IndexMap(start=start, shape=shape, stride=stride, channel_start=channel, channel_stride=channel_stride)
            )
        runs = runs[alike:]
    return found


def _repeats(values: Ints, length: int, step: int) -> int:
    """How often the first ``length`` values occur one after the other, each time ``step`` further on."""
    most, seen = len(values) // length, 1
    while seen < most:
        many = min(most, 2 * seen)  # as much work as there are repetitions, not as there are values
        rows = values[seen * length : many * length].reshape(-1, length)
        alike = (rows == values[:length] + np.arange(seen, many)[:, None] * step).all(axis=1)
        if not alike.all():
            return seen + int(np.argmin(alike))
        seen = many
    return seen


def _longest(positions: Ints, channels: Ints) -> tuple[IndexMap, int]:
    """The longest prefix that is one strided block, grown from the inside out."""
    shape: list[int] = []
    stride: list[int] = []
    channel_stride: list[int] = []
    length = 1
    while length < len(positions):
        step, channel_step = int(positions[length] - positions[0]), int(channels[length] - channels[0])
        repeats = min(_repeats(positions, length, step), _repeats(channels, length, channel_step))
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
