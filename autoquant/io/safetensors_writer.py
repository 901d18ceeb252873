"""Write safetensors files tensor by tensor, in any order.

All dtypes and shapes being known beforehand, the headers are written first and each tensor goes to its place when it is
there, so that no more than one is in memory. The same tensors give the same bytes, whatever their order.
(``safetensors.torch.save_file`` wants a whole file at once.)
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor

from autoquant.io.journal import Journal
from autoquant.io.safetensors_stream import INDEX, NAMES, SINGLE

Described = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]

PT = {"format": "pt"}
_AT_ONCE = 1 << 30
"""Bytes of one write; the system takes no more than 2 GiB."""
_FLUSHED = 1 << 26
"""A file is flushed each time so many bytes were written: what is left for the end waits for the disk alone."""
_FLUSHERS = 4
_WRITERS = 4
_BEHIND = 1 << 28
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

    file: int
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Places:
    """Files whose headers are written, and whose tensors are put into them by any thread, in any order.

    ``left``: bytes of each tensor that are still to come; ``behind`` puts on disk what is written, meanwhile;
    ``journal`` takes it down under the ``names`` of the files.
    """

    places: Mapping[str, _Place]
    left: dict[str, int]
    lock: Lock
    behind: Behind
    names: Mapping[int, str]
    journal: Journal | None = None

    def put(self, name: str, tensor: Tensor, first: int = 0) -> None:
        """Write a tensor, or those of its rows that begin at ``first``. Raises OSError as the system does."""
        self.arrived(name, self.write(name, tensor, first))

    def write(self, name: str, tensor: Tensor, first: int = 0) -> int:
        """What :func:`put` does, in any process: ``arrived`` has to be told of the bytes, which are returned."""
        place = self.places[name]
        row = torch.Size(place.shape[1:]).numel() * place.dtype.itemsize
        rows = tensor.shape[1:] == place.shape[1:] and first + len(tensor) <= place.shape[0] if place.shape else False
        assert tensor.dtype is place.dtype and (tensor.shape == place.shape or rows), name
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        done = 0
        while done < len(content):
            done += os.pwrite(place.file, content[done : done + _AT_ONCE], place.offset + first * row + done)
        if self.journal is not None:
            self.journal.add((self.names[place.file], place.offset + first * row, len(content)), content)
        return done

    def arrived(self, name: str, size: int) -> None:
        """So many bytes of a tensor are written."""
        with self.lock:
            self.left[name] -= size
        self.behind.wrote(self.places[name].file, size)

    def held(self, name: str, first: int = 0, last: int | None = None) -> int:
        """The bytes of a tensor, or of its rows from ``first`` to ``last``, that an earlier run has put and that need
        not be put; 0 where it has not. ``arrived`` has to be told of them.
        """
        if self.journal is None or not self.journal.done:
            return 0
        place = self.places[name]
        row = torch.Size(place.shape[1:]).numel() * place.dtype.itemsize
        size = torch.Size(place.shape).numel() * place.dtype.itemsize if last is None else (last - first) * row
        there = self.journal.holds((self.names[place.file], place.offset + first * row, size), place.file)
        return size if there else 0

    def is_whole(self, name: str) -> bool:
        """True if nothing of a tensor is still to come."""
        return not self.left[name]

    def put_again(self, name: str, tensor: Tensor) -> None:
        """Write a whole tensor of which something was written before."""
        with self.lock:
            self.left[name] = tensor.numel() * tensor.element_size()
        self.put(name, tensor)


class Behind:
    """Has files flushed to disk while others are written, so that not all of it comes at the end."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool
        self._dirty: dict[int, int] = {}
        self._flushes: list[Future[None]] = []

    def wrote(self, file: int, size: int) -> None:
        """Flush the file where much of it is not on disk."""
        total = self._dirty.get(file, 0) + size  # a count that two threads spoil does no harm
        self._dirty[file] = 0 if total >= _FLUSHED else total
        if total >= _FLUSHED:
            self._flushes.append(self._pool.submit(os.fdatasync, file))

    def finish(self) -> None:
        """Wait for all flushes. Raises OSError where one failed, of which the next would say nothing."""
        for flush in self._flushes:
            flush.result()


@contextmanager
def places(
    files: Mapping[Path, Described],
    metadata: Mapping[str, str] = PT,
    *,
    ordered: bool = False,
    journal: Journal | None = None,
) -> Iterator[Places]:
    """Files with room for the described tensors, each of which must be put before the block ends; on disk then.

    ``ordered``: the tensors lie as they are described; else as ``save_file`` has them. Raises OSError as the system
    does.
    """
    with ExitStack() as opened:
        found: dict[str, _Place] = {}
        names: dict[int, str] = {}
        kept = os.O_TRUNC if journal is None or not journal.done else 0
        for path, described in files.items():
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | kept, 0o666)
            opened.callback(os.close, descriptor)
            found |= _begin(descriptor, described, metadata, ordered)
            names[descriptor] = path.name
        left = {name: torch.Size(place.shape).numel() * place.dtype.itemsize for name, place in found.items()}
        with ThreadPoolExecutor(_FLUSHERS, "autoquant-flush") as pool:
            behind = Behind(pool)
            yield Places(found, left, Lock(), behind, names, journal)
            behind.finish()
        missing = [name for name, size in left.items() if size]
        assert not missing, missing
        with ThreadPoolExecutor(_FLUSHERS, "autoquant-flush") as pool:
            for flushed in [pool.submit(os.fsync, descriptor) for descriptor in names]:
                flushed.result()


def _write(files: list[tuple[Path, Described]], tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write each while the next are made, which wait only where ``_BEHIND`` bytes are still to be written."""
    with places(dict(files)) as opened, ThreadPoolExecutor(_WRITERS, "autoquant-write") as pool:
        missing = set(opened.places)
        writing: deque[tuple[Future[None], int]] = deque()
        held = 0
        for name, tensor in tensors:
            missing.remove(name)
            writing.append((pool.submit(opened.put, name, tensor), tensor.nbytes))
            held += tensor.nbytes
            while held > _BEHIND:
                written, size = writing.popleft()
                written.result()
                held -= size
        for written, _ in writing:
            written.result()
        assert not missing, missing


def _begin(file: int, described: Described, metadata: Mapping[str, str], ordered: bool) -> dict[str, _Place]:
    """Write a file's header and give it its full length; where in it each tensor goes."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offsets: dict[str, int] = {}
    end = 0
    # Wide elements first, so that each tensor begins at a multiple of its element's size.
    items = (
        described.items() if ordered else sorted(described.items(), key=lambda item: (-item[1][0].itemsize, item[0]))
    )
    for name, (dtype, shape) in items:
        offsets[name] = end
        end += torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offsets[name], end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    begin = 8 + len(encoded)
    os.pwrite(file, len(encoded).to_bytes(8, "little") + encoded, 0)
    os.ftruncate(file, begin + end)
    return {name: _Place(file, begin + offset, *described[name]) for name, offset in offsets.items()}
