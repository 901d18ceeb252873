"""Layouts of sounds: samples, or the spectrum of each moment, beside the text."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterator
from typing import Any

import torch

from autoquant.models.layouts import Fields, Layout, Values, Wanted, feature_methods
from autoquant.models.source import sub_configs

SOUNDS = ("input_features", "input_values")
"""Inputs of a forward that hold a sound."""

_PART = re.compile(r"audio|speech|sound|acoustic|asr")
_BINS = (
    "input_size",  # of stacked frames, where the number of bins is that of one
    "num_mel_bins",
    "n_mels",
    "input_feat_per_channel",
    "feature_size",
    "input_dim",
    "input_feat_size",
    "mel_bins",
    "feature_projection_input_dim",
)
_MASKS = ("input_features_mask", "feature_attention_mask", "input_values_mask", "padding_mask")
_LONGEST = 6000


def sound_layouts(wanted: Wanted, name: str) -> Iterator[Layout]:
    """Layouts of ``name``, one of ``SOUNDS``, the usual ones first."""
    config = wanted.module.config
    parts = [part for path, part in sub_configs(config).items() if _PART.search(path)]
    parts += [part for path, part in sub_configs(config).items() if "encoder" in path and part not in parts]
    methods = [inspect.signature(method).parameters for method in feature_methods(wanted.module, "audio")]
    demanded = {name for taken in methods for name, parameter in taken.items() if parameter.default is parameter.empty}
    for length, shapes in _shapes(name, [*parts, config]):
        beside = _beside(wanted.names, length, [*parts, config])
        ones = {key: value.bool() if key in _MASKS else value for key, value in beside.items()}
        masks = [mask for mask in _MASKS if mask in beside]
        extras = [beside, ones] if beside else [{}]
        if masks and methods and not any(mask in taken for taken in methods for mask in masks):
            # It is not of these moments, but of the vectors that are made of them: all count without.
            extras.insert(0, {key: value for key, value in beside.items() if key not in masks})
        elif beside and demanded.isdisjoint(beside):
            extras.append({})
        for extra in extras:
            for shape in shapes:
                yield lambda shape=shape, extra=extra: {name: wanted.floats(*shape), **extra}  # type: ignore[misc]


def hears_nothing(fields: Fields) -> bool:
    """Whether a configuration leaves out the part for sound that its kind may have: its forward names a sound still."""
    parts = {name: value for name, value in fields.items() if name.endswith("_config") and _PART.search(name)}
    return bool(parts) and all(value is None for value in parts.values())


def _shapes(name: str, parts: list[Any]) -> Iterator[tuple[int, tuple[tuple[int, ...], ...]]]:
    """Lengths of one sound, each with the shapes that it may have."""
    if name == "input_values":
        step = _size(parts, "samples_per_token", "hop_length") or 1
        for length in dict.fromkeys((4000, _multiple(3840, step))):  # 16 times 15 times 16: of fewer layers' steps too
            yield length, ((1, length), (1, 1, length))
        return
    bins = _size(parts, *_BINS) or _size(parts, "hidden_size")  # a moment is taken for the embedding of a token
    if not bins:
        return
    step = math.lcm(2 * (_size(parts, "n_window") or 1), _size(parts, "subsampling_factor") or 1)  # of one chunk
    for length in sorted({2 * (_size(parts, "max_source_positions") or 32), 64, _multiple(64, step)}):
        if length <= _LONGEST:
            yield length, ((1, bins, length), (1, length, bins))


def _beside(names: tuple[str, ...], length: int, parts: list[Any]) -> Values:
    """What a forward takes beside a sound of ``length`` moments: all of it counts, and none of it is left to chance."""
    made = {name: torch.ones(1, length, dtype=torch.long) for name in _MASKS if name in names}
    if "chunk_sample_lengths" in names:
        made["chunk_sample_lengths"] = torch.tensor([length * (_size(parts, "hop_length") or 1)])
    if "sample" in names:  # of a distribution: else its mean
        made["sample"] = torch.tensor(False)
    return made


def _size(parts: list[Any], *names: str) -> int | None:
    """The first of ``names`` that a configuration says or derives, the parts in their order."""
    found = (getattr(part, name, None) for part in parts for name in names)
    return next((value for value in found if type(value) is int), None)


def _multiple(size: int, step: int) -> int:
    return -(-size // step) * step
