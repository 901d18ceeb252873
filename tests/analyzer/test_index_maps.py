"""Strided blocks: they enumerate exactly what they were made of."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from oracle import expand

from autoquant.analyzer.index_maps import index_maps
from autoquant.config.format import IndexMap, Slot


def enumerated(maps: tuple[IndexMap, ...] | None, size: int) -> list[tuple[int, int]]:
    return list(zip(*expand(Slot(path="w", size=size, index=maps)), strict=True))


@given(st.dictionaries(st.integers(0, 40), st.integers(0, 12), min_size=1))
def test_round_trip(channels: dict[int, int]) -> None:
    positions = sorted(channels)
    maps = index_maps(np.array(positions), np.array([channels[p] for p in positions]), 41)
    assert sorted(enumerated(maps, 41)) == [(p, channels[p]) for p in positions]


def test_whole_axis_needs_no_map() -> None:
    assert index_maps(np.arange(8), np.arange(8), 8) is None
    assert index_maps(np.arange(8), np.arange(8), 9) is not None  # part of the axis
    assert index_maps(np.arange(8), np.arange(8)[::-1].copy(), 8) is not None  # another order


def test_heads_that_share_values() -> None:
    """2 KV heads of 3, 2 query heads each."""
    channels = np.concatenate([np.arange(3), np.arange(3), np.arange(3, 6), np.arange(3, 6)])
    (block,) = index_maps(np.arange(12), channels, 12) or ()
    assert (block.shape, block.stride, block.channel_stride) == ((2, 2, 3), (6, 3, 1), (3, 0, 1))


def test_interleaved_rows() -> None:
    """The values in [q k v] x 4 heads of 2."""
    positions = np.concatenate([np.arange(4, 6) + 6 * head for head in range(4)])
    (block,) = index_maps(positions, np.arange(8), 24) or ()
    assert (block.start, block.shape, block.stride, block.channel_stride) == (4, (4, 2), (6, 1), (2, 1))


def test_one_position() -> None:
    (block,) = index_maps(np.array([5]), np.array([0]), 8) or ()
    assert (block.start, block.shape, block.channel_start) == (5, (1,), 0)
