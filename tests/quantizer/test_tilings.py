from __future__ import annotations

import pytest

from autoquant.quantizer.tilings import power_of_two, tilings


@pytest.mark.parametrize("hopper", [True, False])
def test_tiles_of_any_number_of_rows(hopper: bool) -> None:
    for rows in (1, 2, 16, 17, 64, 65, 128, 512, 8192):
        candidates = tilings(rows, 4096, hopper)
        assert candidates and len(set(candidates)) == len(candidates)
        assert all((tiling.rows == 1) == (rows == 1) for tiling in candidates)
        assert all(hopper or not tiling.tma for tiling in candidates)
        assert not any(tiling.specialized and (tiling.swap or tiling.split > 1) for tiling in candidates)
        assert all(not tiling.swap or tiling.rows >= min(rows, 128) for tiling in candidates)


def test_powers_of_two_are_those_that_hold_a_number() -> None:
    assert [power_of_two(n) for n in (0, 1, 2, 3, 16, 17)] == [0, 1, 2, 4, 16, 32]
