"""Numbers for the channels of a smoothing group: gathered from its members' positions, or drawn at random."""

from __future__ import annotations

import torch
from torch import Tensor

from autoquant.executor.resolved import Resolved, SmoothedSlot


def merge_channels(result: Tensor, slot: SmoothedSlot, positions: Tensor) -> Tensor:
    """The maximum of ``result [channels]`` and of the values at a slot's positions, float64 ``[positions]``."""
    channels = slot.axis.channels
    carried = channels >= 0
    return result.scatter_reduce(0, channels[carried], positions[carried], "amax")


def random_scales(resolved: Resolved, seed: int, octaves: float = 1) -> dict[tuple[str, int | None], Tensor]:
    """Random scales (log-uniform) for every selected group, between 1/2 and 2, or so many ``octaves`` down and up: what
    a certificate multiplies by.
    """
    generator = torch.Generator().manual_seed(seed)

    def drawn(channels: int) -> Tensor:
        return 2 ** ((torch.rand(channels, dtype=torch.float64, generator=generator) * 2 - 1) * octaves)

    return {(group.name, group.layer): drawn(group.channels) for group in resolved.groups}
