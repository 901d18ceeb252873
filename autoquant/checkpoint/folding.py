"""A checkpoint's tensors read, folded, checked and written once each, by several workers of one thread.

A tensor is cut into rows where these do not depend on each other, so that no more than some megabytes are in memory and
one large table does not keep a single worker. Its bytes are read from the file while they are folded; the system
fetches those that come next, and puts on disk those that came before, meanwhile. On the CPU the workers of a large
checkpoint are processes; with a GPU, and for a small one, they are threads.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from autoquant.checkpoint.finite import find_unused
from autoquant.errors import AutoQuantError
from autoquant.executor.apply import is_finite
from autoquant.executor.operations import Fill, Operation
from autoquant.executor.pieces import PIECE, PIECE_OF_MANY, Fitted, carry_out, execute, fit
from autoquant.io.journal import Journal
from autoquant.io.safetensors_stream import Shards
from autoquant.io.safetensors_writer import PT, Described, Places, places
from autoquant.threads import can_fork, cores, in_parallel, in_processes

PART = 1 << 23
"""Elements of a tensor that are one piece of work."""
_FEW = 4
"""Threads whose calls do not yet keep the interpreter busy."""
_LARGE = 1 << 26
"""Elements of a checkpoint that are worth starting processes."""


@dataclass(frozen=True, slots=True)
class Output:
    """A tensor to write: ``name`` there, ``parameter`` of the model (empty: none, written as it is), and under what
    name it is ``stored`` in the source.
    """

    name: str
    parameter: str
    stored: str
    dtype: torch.dtype
    operations: tuple[Operation, ...] = ()


@dataclass(frozen=True, slots=True)
class Folding:
    """What is done to a checkpoint. ``files``: the outputs of each; ``names``: the stored name of each parameter, tied
    ones once, and ``canonical`` which those are; ``tables``: parameters with a row for each token.
    """

    shards: Shards
    files: Mapping[str, Sequence[Output]]
    names: Mapping[str, str]
    canonical: Mapping[str, str]
    tables: Collection[str]

    def outputs(self) -> Iterator[Output]:
        return (output for outputs in self.files.values() for output in outputs)

    def described(self, file: str) -> Described:
        """The tensors of one file that is written."""
        return {one.name: (one.dtype, self.shards.entries[one.stored].shape) for one in self.files[file]}


@dataclass(frozen=True, slots=True)
class _Part:
    """Rows ``first`` to ``last`` of an output, or all of it where ``last`` is None."""

    output: Output
    fitted: Fitted | None
    first: int = 0
    last: int | None = None


@dataclass(frozen=True, slots=True)
class _How:
    """Where, and in pieces of how many elements."""

    device: torch.device
    piece: int


@dataclass(frozen=True, slots=True)
class _Written:
    """So many bytes of an output that are in their place; ``bad``: its source is not finite."""

    output: str
    size: int = 0
    bad: bool = False


def fold(
    folding: Folding,
    folder: Path,
    device: torch.device,
    workers: int | None = None,
    journal: Journal | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write all files to ``folder``, folded on ``device``. ``workers`` None: as many as there are cores; ``journal``:
    what is there already, and from now on.

    Warns of rows of token tables that are not finite. Raises AutoQuantError where all else is not, which is found out
    of every tensor, and where a result overflows its dtype.
    """
    files = {folder / file: folding.described(file) for file in folding.files}
    total = sum(map(len, folding.files.values()))
    bad: set[str] = set()
    done: set[str] = set()
    with places(files, dict(folding.shards.metadata) or PT, ordered=True, journal=journal) as opened:
        number = workers or cores()
        stored = {output.name: output.stored for output in folding.outputs()}
        with closing(_results(folding, device, number, opened, bad)) as results:
            for found in results:
                if found.bad:
                    bad.add(stored[found.output])
                opened.arrived(found.output, found.size)
                if opened.is_whole(found.output) and found.output not in done:
                    done.add(found.output)
                    if progress is not None:
                        progress(len(done), total)
        if bad:
            _repair(folding, opened, bad)


def _results(
    folding: Folding, device: torch.device, workers: int, opened: Places, bad: Collection[str]
) -> Generator[_Written]:
    """All parts written, in the order in which they are. ``bad``: what is known meanwhile, to threads alone."""
    shapes = [folding.shards.entries[output.stored].shape for output in folding.outputs()]
    large = sum(map(math.prod, shapes)) >= _LARGE
    if device.type == "cpu" and workers > 1 and large and can_fork():
        how = _How(device, PIECE)
        parts = list(_parts(folding, workers))
        coming = (number for number, _ in enumerate(_fetched(folding.shards, parts)))
        return in_processes(lambda number: _write(folding, parts[number], how, opened, bad), coming, workers)
    how = _How(device, PIECE if workers <= _FEW else PIECE_OF_MANY)
    given = _fetched(folding.shards, _parts(folding, workers))
    return in_parallel(lambda part: _write(folding, part, how, opened, bad), given, workers)


def _parts(folding: Folding, workers: int) -> Iterator[_Part]:
    """All work: of as many files by turns as half of the workers, which would wait for each other at one file."""
    waiting = [_parts_of(folding, outputs) for outputs in folding.files.values()]
    active: list[Iterator[_Part]] = []
    while waiting or active:
        while waiting and len(active) < max(workers // 2, 1):
            active.append(waiting.pop(0))
        for parts in [*active]:
            part = next(parts, None)
            if part is None:
                active.remove(parts)
            else:
                yield part


def _fetched(shards: Shards, parts: Iterable[_Part]) -> Iterator[_Part]:
    """The same, which the system begins to read when they are asked for."""
    for part in parts:
        entry = shards.entries[part.output.stored]
        row = math.prod(entry.shape[1:]) * entry.dtype.itemsize
        rows = (entry.shape[0] if entry.shape else 1) if part.last is None else part.last - part.first
        shards.read_ahead(part.output.stored, part.first * row, rows * row)
        yield part


def _parts_of(folding: Folding, outputs: Sequence[Output]) -> Iterator[_Part]:
    """The work on one file."""
    for output in outputs:
        shape = folding.shards.entries[output.stored].shape
        fitted = fit(output.operations, shape)
        granule = None if fitted is None or fitted.shape != shape else fitted.rows
        if granule is None or math.prod(shape) <= PART:
            yield _Part(output, fitted)
            continue
        step = max(PART // math.prod(shape[1:]) // granule, 1) * granule
        for first in range(0, shape[0], step):
            yield _Part(output, fitted, first, min(first + step, shape[0]))


def _write(folding: Folding, part: _Part, how: _How, opened: Places, bad: Collection[str]) -> _Written:
    """Read a part, fold it and put it to its place.

    Nothing is put where the source is not finite. With anything but a token table in ``bad`` the work is in vain, so
    that no more is done than to look at the others.
    """
    output = part.output
    if size := opened.held(output.name, part.first, part.last):
        return _Written(output.name, size)
    given = folding.shards.rows(output.stored, part.first, part.last)
    vain = bool(set(bad) - {folding.names.get(table) for table in folding.tables})
    hidden = any(isinstance(operation, Fill) for operation in output.operations)
    if (vain or hidden) and not _is_sound(output, given):
        return _Written(output.name, bad=True)
    if vain or output.stored in bad:
        return _Written(output.name)
    result = _folded(part, given, how)
    if output.parameter and not is_finite(result):  # as it is where the source is not
        if _is_sound(output, given):
            raise _overflow(output)
        return _Written(output.name, bad=True)
    return _Written(output.name, opened.write(output.name, result, part.first))


def _is_sound(output: Output, given: Tensor) -> bool:
    """True if what was read is finite, or has not to be."""
    return not output.parameter or not given.is_floating_point() or is_finite(given)


def _repair(folding: Folding, opened: Places, bad: Collection[str]) -> None:
    """Write the token tables that are not finite in some rows, these as they were; AutoQuantError for all else."""
    shards, names = folding.shards, folding.names
    found = [name for name, stored in names.items() if stored in bad]
    unused = find_unused(shards.folder, found, lambda name: shards.read(names[name]), folding.tables)
    unused = unused.tied(folding.canonical)
    for output in folding.outputs():
        if output.stored in bad and output.parameter:
            given = unused.hidden(output.parameter, shards.read(output.stored))
            result = execute(output.operations, given, output.dtype) if output.operations else given.to(output.dtype)
            if not is_finite(result):
                raise _overflow(output)
            opened.put_again(output.name, unused.restored(output.parameter, result))


def _overflow(output: Output) -> AutoQuantError:
    what = f"overflows {output.dtype} when transformed; choose a wider dtype"
    return AutoQuantError(f"{output.parameter} {what}")


@torch.no_grad()
def _folded(part: _Part, given: Tensor, how: _How) -> Tensor:
    """The part as it is written, in memory that the thread's next one takes."""
    output = part.output
    if not output.operations:
        return given.to(output.dtype)
    if how.device.type != "cpu":
        return _folded_on(part, given, how.device)
    if part.fitted is None:
        return execute(output.operations, given, output.dtype)
    result = _kept_memory(given.numel() * output.dtype.itemsize).view(output.dtype).view(given.shape)
    carry_out(part.fitted, given, result, part.first, how.piece)
    return result


_kept = threading.local()


def _kept_memory(size: int) -> Tensor:
    """So many bytes, the same ones for each call of a thread: memory that is new is dear."""
    found: Tensor | None = getattr(_kept, "memory", None)
    if found is None or len(found) < size:
        found = _kept.memory = torch.empty(size, dtype=torch.uint8)
    return found[:size]


def _folded_on(part: _Part, given: Tensor, device: torch.device) -> Tensor:
    """The same on a GPU, over pinned memory and on a stream of the thread's own: workers copy while others compute."""
    output = part.output
    with torch.cuda.device(device), torch.cuda.stream(_stream(device)):
        moved = given.pin_memory().to(device, non_blocking=True)
        if part.fitted is None:
            result = execute(output.operations, moved, output.dtype)
        else:
            result = torch.empty(moved.shape, dtype=output.dtype, device=device)
            carry_out(part.fitted, moved, result, part.first)
        back = torch.empty(result.shape, dtype=output.dtype, pin_memory=True).copy_(result, non_blocking=True)
        torch.cuda.current_stream(device).synchronize()
    return back


def _stream(device: torch.device) -> torch.cuda.Stream:
    found: torch.cuda.Stream | None = getattr(_kept, "stream", None)
    if found is None or found.device != device:
        found = _kept.stream = torch.cuda.Stream(device)
    return found
