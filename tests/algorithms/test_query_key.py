from __future__ import annotations

import pytest
import torch

from autoquant.algorithms.query_key import key_scales, scaled_keys
from autoquant.config.format import SmoothingKind
from autoquant.errors import AutoQuantError
from autoquant.executor.operations import Axis
from autoquant.executor.resolved import ResolvedGroup, SmoothedSlot


def group(channels: list[int], power: int = 1) -> ResolvedGroup:
    """Keys of two heads of four channels, rotary halves tied: rows of a projection, -1 for rows of something else."""
    axis = Axis(0, None, False, torch.tensor(channels))
    slot = SmoothedSlot("k.weight", axis, power, 0)
    return ResolvedGroup("q -> k", 3, SmoothingKind.QUERY_KEY, 0.5, max(channels) + 1, (slot,), (slot,))


HALVES = [0, 1, 0, 1, 2, 3, 2, 3]
MAXIMA = torch.tensor([[1.0, 2, 4, 1], [8, 0, 2, 0]])


@pytest.mark.parametrize("channels", [HALVES, [-1, *HALVES[:4], -1, -1, *HALVES[4:]]], ids=["alone", "fused"])
@pytest.mark.parametrize("power", [1, 2])
def test_all_channels_reach_the_same_maximum(channels: list[int], power: int) -> None:
    scales = key_scales(group(channels, power), MAXIMA)
    flat = torch.tensor([4.0, 2, 8, 1], dtype=torch.float64)  # the last is dead
    mean = (4 * 2 * 8) ** (1 / 3)
    wanted = torch.where(flat > 1, (flat / mean), 1.0) if power == 1 else None
    if wanted is not None:
        torch.testing.assert_close(scales, wanted)
    after = scaled_keys(group(channels, power), scales, MAXIMA)
    tied = torch.stack([after[:, :2], after[:, 2:]]).amax(0).flatten()
    torch.testing.assert_close(tied[:3], tied[0].expand(3))
    assert tied[3] == 0 and scales.log()[:3].sum().abs() < 1e-12


def test_a_norm_of_all_heads_takes_the_largest() -> None:
    shared = group([0, 1, 0, 1])
    scales = key_scales(shared, MAXIMA)
    torch.testing.assert_close(scales, torch.tensor([2.0, 0.5], dtype=torch.float64))
    torch.testing.assert_close(scaled_keys(shared, scales, MAXIMA), torch.tensor([[0.5, 4, 2, 2], [4, 0, 1, 0]]))


def test_rows_that_are_not_the_cached_keys_are_refused() -> None:
    with pytest.raises(AutoQuantError, match=r"q -> k \(layer 3\): scales 2 of the 8 channels of the cached keys"):
        key_scales(group([0, 1]), MAXIMA)
