"""Query-key scales for a cache of int8 keys.

Rows of the queries are multiplied by s and the rows of the keys divided by it, so that every score stays the same. A
key cache with one scale has the same rounding error e in every channel, and a score is wrong by the sum of
``q_c * s_c * e``. Its square grows with every s, while the largest ``max|k_c| / s_c`` decides e: for a given e the
smallest s that is allowed, hence the best, is ``max|k_c|`` times a constant. All channels then reach the same maximum;
there is no alpha to choose. The constant, which changes nothing, keeps the geometric mean of s at 1.

SmoothAttention (QServe, Lin et al. 2024, "QServe: W4A8KV4 Quantization and System Co-design for Efficient LLM Serving")
scales queries and keys in this way, with ``s = max|k_c| ** alpha``.

Channels that the rotary embedding mixes share their s (the config's index says so), the largest maximum counting.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autoquant.errors import AutoQuantError
from autoquant.executor.resolved import ResolvedGroup
from autoquant.executor.scales import merge_channels


def key_scales(group: ResolvedGroup, maximum_HD: Tensor) -> Tensor:
    """Float64 ``[channels]`` for a query-key group from the largest magnitudes of its layer's cached keys.

    Dead channels and such with a NaN keep scale 1. Raises AutoQuantError where the group's rows are not those keys.
    """
    largest = torch.zeros(group.channels, dtype=torch.float64)
    for slot in group.targets:
        channels = _cached_channels(group, slot.axis.channels, maximum_HD)
        # A norm's weight is shared by all heads.
        maxima = maximum_HD.double().cpu().reshape(-1, len(channels)).amax(0)
        positions = torch.zeros(len(slot.axis.channels), dtype=torch.float64)
        positions[slot.axis.channels >= 0] = maxima ** (1 / slot.power)
        largest = merge_channels(largest, slot, positions)
    alive = largest.isfinite() & (largest > 0)
    mean = largest[alive].log().mean().exp() if alive.any() else 1.0
    return torch.where(alive, largest / mean, 1.0)


def scaled_keys(group: ResolvedGroup, s: Tensor, maximum_HD: Tensor) -> Tensor:
    """The maxima [H, D] of the cached keys after a query-key group was applied with scales ``s``, float32."""
    slot = group.targets[0]
    channels = _cached_channels(group, slot.axis.channels, maximum_HD)
    factors = (s.double().cpu()[channels] ** slot.power).to(maximum_HD.device)
    return (maximum_HD.double().reshape(-1, len(channels)) / factors).view(maximum_HD.shape).float()


def _cached_channels(group: ResolvedGroup, channels: Tensor, maximum_HD: Tensor) -> Tensor:
    """The group's channel of every cached channel, [H * D], or [D] where all heads share a parameter.

    Key rows lie in the order in which the cache holds them, whatever lies between them in a fused projection.
    """
    carried = channels[channels >= 0]
    if len(carried) not in (maximum_HD.numel(), maximum_HD.shape[-1]):
        raise AutoQuantError(
            f"{group.name} (layer {group.layer}): scales {len(carried)} of the {maximum_HD.numel()} channels of the "
            "cached keys, and it is not known which: disable the group"
        )
    return carried
