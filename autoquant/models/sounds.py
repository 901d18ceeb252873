"""Layouts of sounds: samples, or the spectrum of each moment, beside the text."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from autoquant.models.layouts import Layout, Wanted, first, part

SOUNDS = ("input_features", "input_values")
"""Inputs of a forward that hold a sound."""


def sound_layouts(wanted: Wanted, name: str) -> Iterator[Layout]:
    """Layouts of ``name``, one of ``SOUNDS``, the usual ones first."""
    audio = part(wanted.fields, "audio|speech|encoder")
    if name == "input_values":
        yield lambda: {name: wanted.floats(1, 4000)}
        return
    bins = first(
        audio,
        "num_mel_bins",
        "n_mels",
        "input_feat_per_channel",
        "feature_size",
        "input_dim",
        "mel_bins",
        "feature_projection_input_dim",
    )
    if not bins:
        return
    longest = first(audio, "max_source_positions", "max_position_embeddings")
    lengths = sorted({length for length in (longest and 2 * longest, 64) if length and length <= 6000})
    mask = next((other for other in wanted.names if other in ("input_features_mask", "feature_attention_mask")), None)
    for length in lengths:
        for extra in ({mask: torch.ones(1, length, dtype=torch.long)}, {}) if mask else ({},):
            for shape in ((1, bins, length), (1, length, bins)):
                yield lambda shape=shape, extra=extra: {name: wanted.floats(*shape), **extra}  # type: ignore[misc]
