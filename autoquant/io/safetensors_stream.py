"""Read tensors one by one from safetensors shards, and write shards tensor by tensor.

The format is 8 bytes of header length (little endian), a JSON header ``{name: {dtype, shape, data_offsets}}`` and the
tensors' bytes. All shapes being known before the first tensor is computed, the header is written first and the tensors
follow one at a time, so that no more than one of them is in memory. (``safetensors.torch.save_file`` wants a whole
shard at once.)
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from autoquant.errors import AutoQuantError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def open_shards(folder: Path) -> Shards:
    """The tensors of a checkpoint folder, from the headers alone.

    Raises AutoQuantError where there is no safetensors checkpoint, a shard is missing, cut short or otherwise
    unreadable.
    """
    if (folder / INDEX).is_file():
        try:
            weight_map: dict[str, str] = dict(json.loads((folder / INDEX).read_text())["weight_map"])
        except (ValueError, KeyError, TypeError) as error:
            raise AutoQuantError(f"{folder / INDEX}: not an index of shards ({error})") from error
        files = list(dict.fromkeys(weight_map.values()))
    elif (folder / SINGLE).is_file():
        files, weight_map = [SINGLE], {}
    else:
        raise AutoQuantError(f"{folder}: no {SINGLE} and no {INDEX}; only safetensors checkpoints can be read")
    entries: dict[str, Entry] = {}
    metadata: dict[str, str] = {}
    for file in files:
        if Path(file).name != file:
            raise AutoQuantError(f"{folder / INDEX}: names a shard outside of the folder: {file}")
        if not (folder / file).is_file():
            raise AutoQuantError(f"{folder / file}: shard is missing")
        for name, entry in _read_header(folder, file, metadata).items():
            entries[name] = entry
    if absent := [name for name in weight_map if name not in entries]:
        raise AutoQuantError(f"{folder / weight_map[absent[0]]}: lacks the tensor {absent[0]} that the index names")
    return Shards(folder, tuple(files), entries, metadata)


def _read_header(folder: Path, file: str, metadata: dict[str, str]) -> dict[str, Entry]:
    path = folder / file
    try:
        with open(path, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            size = os.fstat(stream.fileno()).st_size
            if length > size - 8:
                raise ValueError("the header is cut short")
            header = json.loads(stream.read(length))
        metadata.update(header.pop("__metadata__", None) or {})
        entries = {n: Entry(file, DTYPES[e["dtype"]], tuple(e["shape"])) for n, e in header.items()}
        end = max((e["data_offsets"][1] for e in header.values()), default=0)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise AutoQuantError(f"{path}: not a safetensors file ({error})") from error
    if 8 + length + end != size:
        raise AutoQuantError(f"{path}: corrupt: {size} bytes, its header describes {8 + length + end}")
    return entries


def write_shard(
    path: Path,
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    make: Callable[[str], Tensor],
    metadata: dict[str, str],
) -> None:
    """Write a shard whose tensors are made one after the other, in the order given, and flush it to disk.

    ``make(name)`` must return the dtype and shape announced.
    """
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        length = torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offset, offset + length]}
        offset += length
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little"))
        stream.write(encoded)
        for name, (dtype, shape) in tensors.items():
            tensor = make(name).contiguous()
            assert tensor.dtype is dtype and tuple(tensor.shape) == shape, name
            stream.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
        stream.flush()
        os.fsync(stream.fileno())


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a tensor lies and what it is."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Shards:
    """A checkpoint's tensors, read when asked for."""

    folder: Path
    files: tuple[str, ...]
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU."""
        path = self.folder / self.entries[name].file
        try:
            with safe_open(path, framework="pt") as file:
                tensor: Tensor = file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise AutoQuantError(f"{path}: {name} cannot be read ({error})") from error
        return tensor
