"""Which tensors of a checkpoint are stored with scales beside them, by their names: see :mod:`autoquant.io.scaled`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from autoquant.errors import AutoQuantError
from autoquant.io.safetensors_stream import Entry, Shards
from autoquant.io.scaled import FLOAT8, Scaled, grid

METHODS = ("fp8", "mxfp4")
"""What ``quantization_config`` calls float8 in blocks and MXFP4."""
_SCALE, _BLOCKS, _SCALES = "_scale_inv", "_blocks", "_scales"
_ACTIVATIONS = (".activation_scale", ".input_scale")
"""Factors of what a linear reads; its weight does without."""


def as_numbers(shards: Shards, method: str, block: Sequence[int] | None, dtype: torch.dtype) -> Shards:
    """The tensors of a checkpoint with the scaled ones in ``dtype``; the same where there are none.

    ``block``: rows and columns with one factor, as the configuration says. Raises AutoQuantError where a scale is
    missing or does not fit.
    """
    entries = dict(shards.entries)
    found = _float8(shards, block, dtype) if method == "fp8" else _mxfp4(shards, dtype)
    if not found:
        return shards
    for name, scaled in found.items():
        values = entries.pop(scaled.values)
        del entries[scaled.scales]
        shape = values.shape if scaled.block is not None else _opened(values.shape)
        entries[name] = Entry(values.file, dtype, shape, values.begin)
    kept = {name: entry for name, entry in entries.items() if not name.endswith(_ACTIVATIONS)}
    files = tuple(file for file in shards.files if any(entry.file == file for entry in kept.values()))
    ordered = sorted(kept.items(), key=lambda item: (files.index(item[1].file), item[1].begin))
    return replace(shards, files=files, entries=dict(ordered), scaled=found, stored=shards.entries)


def _float8(shards: Shards, block: Sequence[int] | None, dtype: torch.dtype) -> Mapping[str, Scaled]:
    found = {}
    for name, entry in shards.entries.items():
        if entry.dtype not in FLOAT8:
            continue
        scale = shards.entries.get(name + _SCALE)
        if scale is None:
            raise AutoQuantError(f"{shards.folder}: {name} is float8, and there is no {name + _SCALE}")
        size = (block[0], block[1]) if block is not None and len(block) == 2 else None
        if scale.shape in ((), (1,), (1, 1)):
            size = (entry.shape[-2], entry.shape[-1])
        elif size is None or grid(entry.shape, size) != scale.shape:
            raise AutoQuantError(
                f"{shards.folder}: {name + _SCALE}: expected the factors of {name} {list(entry.shape)} in blocks of "
                f"{list(block or [])}, got {list(scale.shape)}"
            )
        found[name] = Scaled(name, name + _SCALE, size, dtype)
    return found


def _mxfp4(shards: Shards, dtype: torch.dtype) -> Mapping[str, Scaled]:
    found = {}
    for values, entry in shards.entries.items():
        if not values.endswith(_BLOCKS) or entry.dtype is not torch.uint8:
            continue
        name = values.removesuffix(_BLOCKS)
        scale = shards.entries.get(name + _SCALES)
        if scale is None or len(entry.shape) != 4 or entry.shape[:-1] != scale.shape or entry.shape[-1] != 16:
            shape = None if scale is None else list(scale.shape)
            raise AutoQuantError(
                f"{shards.folder}: {values} {list(entry.shape)} and {name + _SCALES} {shape}: expected four "
                "dimensions, the last one 16, and an exponent for each of these"
            )
        found[name] = Scaled(values, name + _SCALES, None, dtype)
    return found


def _opened(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of what blocks of MXFP4 stand for."""
    return shape[0], 2 * shape[2] * shape[3], shape[1]
