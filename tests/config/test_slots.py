"""Slots expanded: positions and channels as the format says, and nothing allocated beyond the bounds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from autoquant.config.format import IndexMap, Slot
from autoquant.config.slots import MAX_POSITIONS, channels_of, index_problems, positions_of


@given(st.data())
def test_blocks_expand_as_the_format_says(data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, 3))
    small = st.tuples(*[st.integers(0, 4)] * rank)
    index = IndexMap(
        start=data.draw(st.integers(0, 9)),
        shape=data.draw(st.tuples(*[st.integers(1, 4)] * rank)),
        stride=data.draw(small),
        channel_start=data.draw(st.integers(0, 9)),
        channel_stride=data.draw(small),
    )
    slot = Slot(path="w", size=99, index=(index,))
    expected = [
        (index.start + int(np.dot(i, index.stride)), index.channel_start + int(np.dot(i, index.channel_stride)))
        for i in np.ndindex(*index.shape)
    ]
    assume(len({position for position, _ in expected}) == len(expected))
    assert positions_of(slot).tolist() == sorted(position for position, _ in expected)
    assert sorted(enumerate(channels_of(slot).tolist())) == [(p, dict(expected).get(p, -1)) for p in range(99)]


def test_without_index_position_is_channel() -> None:
    assert channels_of(Slot(path="w", size=3)).tolist() == [0, 1, 2]


def strided(start: int, count: int, channel: int = 0, step: int = 1, repeat: int = 1) -> IndexMap:
    return IndexMap(
        start=start,
        shape=(repeat, count),
        stride=(count * step, step),
        channel_start=channel,
        channel_stride=(0, 1),
    )


@pytest.mark.parametrize(
    ("index", "blocks", "expected"),
    [
        ((strided(0, 6),), None, []),
        ((strided(0, 5),), None, [(("index",), "channel 5 of 6 is on no position")]),
        ((strided(0, 3),), 2, []),  # one block of two, the whole of it
        ((strided(3, 3, channel=3),), 2, []),
        ((strided(0, 3),), None, [(("index",), "channel 3 of 6 is on no position")]),
        ((strided(0, 2),), 2, [(("index",), "channel 2 of 6 is on no position")]),
        ((strided(0, 6), strided(6, 2)), 1, [(("index",), "holds a part of block 0 only (channel 2 is short)")]),
        ((strided(0, 3), strided(2, 3)), None, [(("index",), "position 2 occurs more than once")]),
        ((strided(8, 6),), None, [(("index", 0), "position 13 is out of range; expected 0 to 11")]),
        ((), None, [(("index",), "expected at least one block, or null for the whole axis")]),
    ],
)
def test_channels_of_a_slot(index: tuple[IndexMap, ...], blocks: int | None, expected: list[object]) -> None:
    assert list(index_problems(Slot(path="w", size=12, index=index), 6, blocks)) == expected


def test_nothing_is_expanded_beyond_the_bound() -> None:
    size = MAX_POSITIONS + 1
    index = (IndexMap(shape=(1,), stride=(1,), channel_stride=(1,)),)
    assert list(index_problems(Slot(path="w", size=size, index=index), 1)) == [
        (("size",), f"more than {MAX_POSITIONS} positions")
    ]
