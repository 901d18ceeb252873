"""Layouts of sounds: samples, or the spectrum of each moment, beside the text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch

from autoquant.models.layouts import Layout, Wanted
from autoquant.models.source import sub_configs

SOUNDS = ("input_features", "input_values")
"""Inputs of a forward that hold a sound."""

_PART = re.compile(r"audio|speech|sound|acoustic|asr")
_BINS = (
    "num_mel_bins",
    "n_mels",
    "input_feat_per_channel",
    "feature_size",
    "input_dim",
    "mel_bins",
    "feature_projection_input_dim",
)
_MASKS = ("input_features_mask", "feature_attention_mask", "padding_mask")
_LONGEST = 6000


def sound_layouts(wanted: Wanted, name: str) -> Iterator[Layout]:
    """Layouts of ``name``, one of ``SOUNDS``, the usual ones first."""
    if name == "input_values":
        yield lambda: {name: wanted.floats(1, 4000)}
        return
    config = wanted.module.config
    parts = [part for path, part in sub_configs(config).items() if _PART.search(path)]
    parts += [part for path, part in sub_configs(config).items() if "encoder" in path and part not in parts]
    parts.append(config)
    bins = _size(parts, *_BINS)
    if not bins:
        return
    longest = _size(parts, "max_source_positions", "max_position_embeddings") or 0
    for length in sorted({2 * longest, _multiple(64, _size(parts, "subsampling_factor") or 1)}):
        masks = {mask: torch.ones(1, length, dtype=torch.long) for mask in _MASKS if mask in wanted.names}
        for extra in (masks, {}) if masks else ({},):
            for shape in ((1, bins, length), (1, length, bins)) if 0 < length <= _LONGEST else ():
                yield lambda shape=shape, extra=extra: {name: wanted.floats(*shape), **extra}  # type: ignore[misc]


def _size(parts: list[Any], *names: str) -> int | None:
    """The first of ``names`` that a configuration says or derives, the parts in their order."""
    found = (getattr(part, name, None) for part in parts for name in names)
    return next((value for value in found if type(value) is int), None)


def _multiple(size: int, step: int) -> int:
    return -(-size // step) * step
