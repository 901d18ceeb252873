"""Write safetensors files tensor by tensor, in any order.

All dtypes and shapes being known beforehand, the headers are written first and each tensor goes to its place when it is
there, so that no more than one is in memory. The same tensors give the same bytes, whatever their order.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from autoquant.io.safetensors_stream import INDEX, NAMES, SINGLE

Described = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]

SHARD_BYTES = 5_000_000_000
"""A file of a checkpoint holds so many bytes of tensors at most, one large tensor apart."""


def write_tensors(path: Path, described: Described, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write the described tensors, each given once, and flush the file to disk. Raises OSError as the system does."""
    _write([(path, described)], tensors)


def write_checkpoint_tensors(
    folder: Path, described: Described, tensors: Iterable[tuple[str, Tensor]], most: int = SHARD_BYTES
) -> None:
    """Write them as a checkpoint of transformers: one file, or shards of at most ``most`` bytes with their index."""
    shards: list[dict[str, tuple[torch.dtype, tuple[int, ...]]]] = [{}]
    held = 0
    for name, (dtype, shape) in described.items():
        size = torch.Size(shape).numel() * dtype.itemsize
        if held and held + size > most:
            shards.append({})
            held = 0
        shards[-1][name] = (dtype, shape)
        held += size
    if len(shards) == 1:
        write_tensors(folder / SINGLE, described, tensors)
        return
    files = [f"model-{at:05d}-of-{len(shards):05d}.safetensors" for at in range(1, len(shards) + 1)]
    _write([(folder / file, shard) for file, shard in zip(files, shards, strict=True)], tensors)
    total = sum(torch.Size(shape).numel() * dtype.itemsize for dtype, shape in described.values())
    index = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))}
    (folder / INDEX).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor goes."""

    stream: BinaryIO
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]


def _write(files: list[tuple[Path, Described]], tensors: Iterable[tuple[str, Tensor]]) -> None:
    with ExitStack() as opened:
        places: dict[str, _Place] = {}
        streams = [opened.enter_context(open(path, "wb")) for path, _ in files]
        for stream, (_, described) in zip(streams, files, strict=True):
            places |= _begin(stream, described)
        missing = set(places)
        for name, tensor in tensors:
            place = places[name]
            assert (tensor.dtype, tuple(tensor.shape)) == (place.dtype, place.shape), name
            missing.remove(name)
            place.stream.seek(place.offset)
            place.stream.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        assert not missing, missing
        for stream in streams:
            stream.flush()
            os.fsync(stream.fileno())


def _begin(stream: BinaryIO, described: Described) -> dict[str, _Place]:
    """Write a file's header and give it its full length; where in it each tensor goes."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets: dict[str, int] = {}
    end = 0
    # Wide elements first, so that each tensor begins at a multiple of its element's size.
    for name, (dtype, shape) in sorted(described.items(), key=lambda item: (-item[1][0].itemsize, item[0])):
        offsets[name] = end
        end += torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offsets[name], end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    stream.write(len(encoded).to_bytes(8, "little"))
    stream.write(encoded)
    begin = 8 + len(encoded)
    stream.truncate(begin + end)
    return {name: _Place(stream, begin + offset, *described[name]) for name, offset in offsets.items()}
