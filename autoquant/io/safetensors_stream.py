"""Read tensors one by one from safetensors shards.

The format is 8 bytes of header length (little endian), a JSON header ``{name: {dtype, shape, data_offsets}}`` and the
tensors' bytes.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from autoquant.errors import AutoQuantError
from autoquant.io.scaled import Scaled

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
    "F8_E8M0": torch.float8_e8m0fnu,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "C64": torch.complex64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
WRAPPERS = ("base_model.model.", "module.", "_orig_mod.")
"""Prefixes that wrappers of a model (adapters, data parallelism, compilation) leave on the names in its state dict."""
_LONGEST_HEADER = 100_000_000
"""Bytes; the limit of the safetensors library."""


def open_shards(folder: Path) -> Shards:
    """The tensors of a checkpoint folder, from the headers alone: those that transformers reads, from the same files.

    A wrapper's prefix that every name has (``WRAPPERS``) is left out of the names, with a warning. Raises
    AutoQuantError where there is no safetensors checkpoint, a shard is missing, cut short or otherwise unreadable.
    """
    files, weight_map = _files(folder)
    entries: dict[str, Entry] = {}
    metadata: dict[str, str] = {}
    for file in files:
        if not (folder / file).is_file():
            raise AutoQuantError(f"{folder / file}: shard is missing")
        for name, entry in _read_header(folder, file, metadata).items():
            if name in entries:
                raise AutoQuantError(f"{folder}: {name} is in two shards, {entries[name].file} and {file}; delete one")
            entries[name] = entry
    if absent := [name for name in weight_map if name not in entries]:
        raise AutoQuantError(f"{folder / weight_map[absent[0]]}: lacks the tensor {absent[0]} that the index names")
    if adapter := next((name for name in entries if ".lora_A." in name or ".lora_B." in name), None):
        raise AutoQuantError(f"{folder}: holds the adapter {adapter}; merge it into the model first (merge_and_unload)")
    prefix = _wrapper(entries)
    if prefix:
        warnings.warn(f"{folder}: every tensor's name begins with {prefix!r}, which is left out", stacklevel=2)
        entries = {name.removeprefix(prefix): entry for name, entry in entries.items()}
    return Shards(folder, tuple(files), entries, metadata, prefix)


def open_file(path: Path) -> Shards:
    """Open one file of tensors that is no checkpoint of transformers. Raises AutoQuantError where it is damaged."""
    if not path.is_file():
        raise AutoQuantError(f"{path}: there is no such file")
    metadata: dict[str, str] = {}
    entries = _read_header(path.parent, path.name, metadata)
    return Shards(path.parent, (path.name,), entries, metadata)


def _files(folder: Path) -> tuple[list[str], dict[str, str]]:
    """The files that transformers reads, in its order, and the index of tensors where there are several."""
    if (folder / SINGLE).is_file():
        if (folder / INDEX).is_file():
            warnings.warn(f"{folder}: {SINGLE} is read, as transformers does, and {INDEX} is not", stacklevel=3)
        return [SINGLE], {}
    if not (folder / INDEX).is_file():
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        convert = (
            f"; {pickles[0]} may hold code: where you trust it, load it with transformers and save_pretrained"
            if pickles
            else ""
        )
        raise AutoQuantError(f"{folder}: no {SINGLE} and no {INDEX}; only safetensors checkpoints can be read{convert}")
    try:
        weight_map: dict[str, str] = dict(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise AutoQuantError(f"{folder / INDEX}: not an index of shards ({_brief(error)})") from error
    for name, file in weight_map.items():
        if not name.isprintable():
            raise AutoQuantError(f"{folder / INDEX}: not an index of shards (the name {name!r} cannot be printed)")
        if not isinstance(file, str):
            raise AutoQuantError(f"{folder / INDEX}: not an index of shards ({name} is in {file!r}, no file)")
        if Path(file).name != file or not file.isprintable():
            raise AutoQuantError(f"{folder / INDEX}: names a shard outside of the folder: {file!r}")
    # Sorted, as transformers has them.
    return sorted(set(weight_map.values())), weight_map


def _wrapper(names: Collection[str]) -> str:
    """The wrappers' prefix that all names have, several in a row included; empty where there is none."""
    prefix = ""
    while names:
        further = (w for w in WRAPPERS if all(name.startswith(prefix + w) for name in names))
        found = next(further, None)
        if found is None:
            break
        prefix += found
    return prefix


def _read_header(folder: Path, file: str, metadata: dict[str, str]) -> dict[str, Entry]:
    path = folder / file
    entries: dict[str, Entry] = {}
    try:
        with open(path, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            size = os.fstat(stream.fileno()).st_size
            if length.to_bytes(8, "little") == b"version ":
                raise ValueError("a pointer of git-lfs: run `git lfs pull` in its folder")
            if length > size - 8:
                raise ValueError("the header is cut short")
            if length > _LONGEST_HEADER:
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(stream.read(length))
        metadata.update({str(key): str(value) for key, value in (header.pop("__metadata__", None) or {}).items()})
        spans = []
        for name, described in header.items():
            if not name.isprintable():
                raise ValueError(f"the name {name!r} holds what cannot be printed")
            if described["dtype"] not in DTYPES:
                raise ValueError(f"{name} is of the unknown type {described['dtype']!r}")
            begin, end = described["data_offsets"]
            entry = Entry(file, DTYPES[described["dtype"]], tuple(described["shape"]), begin)
            if any(type(number) is not int or number < 0 for number in (*entry.shape, begin, end)):
                raise ValueError(f"{name} has a shape or an offset that is no natural number")
            if end - begin != math.prod(entry.shape) * entry.dtype.itemsize:
                raise ValueError(f"{name} has {end - begin} bytes, its shape and type want another number")
            spans.append((begin, end, name))
            entries[name] = replace(entry, begin=8 + length + begin)
        reached = 0
        for begin, end, name in sorted(spans):
            if begin != reached:
                raise ValueError(f"{name} begins at byte {begin}, not at {reached} where the tensor before it ends")
            reached = end
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise AutoQuantError(f"{path}: not a safetensors file ({_brief(error)})") from error
    if 8 + length + reached != size:
        again = ": half a download? fetch it again" if size < 8 + length + reached else ""
        raise AutoQuantError(f"{path}: corrupt: {size} bytes, its header describes {8 + length + reached}{again}")
    return entries


def _brief(error: Exception) -> str:
    text = " ".join(str(error).split())[:200]
    return text if text.isprintable() else repr(text)


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a tensor lies, from which byte of the file on, and what it is."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int


@dataclass(frozen=True, slots=True)
class Shards:
    """A checkpoint's tensors, read when asked for.

    ``entries`` says of each what it is as stored: its dtype is the one to write what stays in floating point in.
    ``prefix`` stands before every name in the files, and not in ``entries``. ``scaled``: the tensors that are computed
    of others when they are read; ``stored`` has the entries of these.
    """

    folder: Path
    files: tuple[str, ...]
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]
    prefix: str = ""
    scaled: Mapping[str, Scaled] = field(default_factory=dict)
    stored: Mapping[str, Entry] = field(default_factory=dict)

    def paths(self) -> list[Path]:
        """The files."""
        return [self.folder / file for file in self.files]

    def stamps(self) -> list[tuple[str, int, int]]:
        """Name, size and time of each file, which stand for its bytes."""
        return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in self.paths()]

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU: a view of the file, whose bytes are read where they are looked at."""
        return self.rows(name, 0, None)

    def rows(self, name: str, first: int, last: int | None) -> Tensor:
        """Some of a tensor along its first dimension, ``last`` None: to its end."""
        if name in self.scaled:
            return self.scaled[name].rows(self._read, first, last)
        tensor = self._read(name)
        return tensor[first:last] if first or last is not None else tensor

    def _read(self, name: str) -> Tensor:
        path = self.folder / (self.stored or self.entries)[name].file
        try:
            with safe_open(path, framework="pt") as file:
                tensor: Tensor = file.get_tensor(self.prefix + name)
        except (SafetensorError, OSError) as error:
            raise AutoQuantError(f"{path}: {name} cannot be read ({_brief(error)})") from error
        return tensor

    def read_ahead(self, name: str, first: int, length: int) -> None:
        """Have the system fetch some bytes of a tensor while others are worked on."""
        if name in self.scaled:
            return
        entry = self.entries[name]
        with contextlib.suppress(OSError):  # a hint
            descriptor = os.open(self.folder / entry.file, os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, entry.begin + first, length, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(descriptor)
