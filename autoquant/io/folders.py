"""The one writer of folders: a folder is there whole or not at all, and an old one stays until the new one is whole."""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from autoquant.errors import AutoQuantError
from autoquant.io.journal import NAME as JOURNAL
from autoquant.io.journal import Journal, begin, is_resumable, take
from autoquant.io.locks import claim, left_behind, release

PROVENANCE = "autoquant_provenance.json"
"""In every folder that is written here, and by that a folder is known as one that may be replaced."""
_MARKERS = ({PROVENANCE}, {"quantized.json"}, {"autoquant.json", "config.json"})
"""Files of which one set tells a folder of ours; the later two are those of version 0.1."""
_REPORT = ("cells", "report.json", "report.md")
"""What a report's folder holds: `autoquant compare`."""
_EXCHANGE = 2  # renameat2's RENAME_EXCHANGE
_HERE = -100  # AT_FDCWD


def check_target(source: Path, target: Path, force: bool) -> None:
    """Raise, before the work, AutoQuantError where the output folder cannot be written; then keep other runs from it.

    An empty folder is written into. ``force`` replaces one that was written here, and no other.
    """
    if not source.is_dir():
        raise AutoQuantError(f"{source}: not a folder; expected a checkpoint of transformers")
    inside, outside = source.resolve(), target.resolve()
    if outside in (inside, *inside.parents):
        raise AutoQuantError(f"{target}: holds the input; name another folder")
    if inside in outside.parents:
        raise AutoQuantError(f"{target}: lies within the input; name another folder")
    check_replaceable(target, force)
    claim(target)
    probe = _beside(outside, "partial")
    try:
        sweep(target, resumable=False)
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        raise AutoQuantError(f"{target}: cannot be written: {error.strerror}") from error


def check_replaceable(target: Path, force: bool) -> None:
    """Raise AutoQuantError where what stands at ``target`` may not be replaced, and where nothing can stand there."""
    try:
        target.lstat() if target.parent.is_dir() else None
        if target.exists() and not target.is_dir():
            raise AutoQuantError(f"{target}: is a file; name a folder")
        there = sorted(path.name for path in target.iterdir()) if target.exists() else []
    except FileNotFoundError:
        there = []
    except OSError as error:
        raise AutoQuantError(f"{target}: cannot be written: {error.strerror}") from error
    if there and not force:
        raise AutoQuantError(f"{target}: exists already; give --force to replace it")
    if there and not any(marker <= set(there) for marker in _MARKERS):
        more = f" and {len(there) - 1} more" if len(there) > 1 else ""
        raise AutoQuantError(
            f"{target}: holds {there[0]}{more}, and autoquant did not write it; remove it yourself or name another"
        )
    parent = target.resolve().parent
    if not parent.is_dir():
        raise AutoQuantError(f"{target}: the folder {parent} does not exist")


def check_report(target: Path) -> None:
    """Raise AutoQuantError where the folder of a report, which is filled file by file, cannot be written, or holds what
    is none; then keep other runs from it.
    """
    there = {path.name for path in target.iterdir()} if target.is_dir() else set()
    if there and not there & set(_REPORT):
        raise AutoQuantError(
            f"{target}: holds {min(there)}, and is no report of autoquant; remove it yourself or name another"
        )
    if not there:
        check_replaceable(target, force=False)
    claim(target)
    try:
        probe = (target if target.is_dir() else target.resolve().parent) / f".probe.partial-{os.getpid()}"
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        raise AutoQuantError(f"{target}: cannot be written: {error.strerror}") from error


def sweep(target: Path, *, resumable: bool = True) -> None:
    """Remove what dead processes left beside ``target``; an old folder that one of them moved aside comes back.

    ``resumable`` False leaves what the next run may go on with.
    """
    target = target.resolve()
    for path in target.parent.glob(f".{_escaped(target.name)}.replaced-*"):
        if left_behind(path.name):
            if target.exists():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.rename(target)
    for path in target.parent.glob(f".{_escaped(target.name)}.partial-*"):
        if left_behind(path.name) and (resumable or not is_resumable(path)):
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def finished_folder(target: Path, *, force: bool = True) -> Iterator[Path]:
    """A hidden folder beside ``target``, which takes its name when the block ends well and is removed otherwise.

    Behind a symbolic link, the folder that it points to is replaced and not the link. An old folder and the new one
    change places in one step where the system can; a kill leaves one of them, whole, and a hidden folder at most, which
    the next run removes. Raises AutoQuantError for what :func:`check_replaceable` refuses, and for what the operating
    system does (a full disk).
    """
    with _finished(target, force, None) as (folder, _):
        yield folder


@contextmanager
def resumable_folder(target: Path, digest: str) -> Iterator[tuple[Path, Journal]]:
    """The same with a journal of what is written: what a kill left of a run with the same ``digest``, which stands for
    all that decides what is written, is gone on with. Shards alone are kept, and what is no shard written anew.
    """
    with _finished(target, True, digest) as (folder, journal):
        assert journal is not None
        yield folder, journal


@contextmanager
def _finished(target: Path, force: bool, digest: str | None) -> Iterator[tuple[Path, Journal | None]]:
    check_replaceable(target, force)
    claim(target)
    place = target.resolve()
    partial = _beside(place, "partial")
    journal = None
    try:
        try:
            journal = None if digest is None else _adopted(place, partial, digest)
            sweep(target) if journal is None else None
            if not partial.is_dir():
                partial.mkdir()
            if digest is not None and journal is None:
                journal = begin(partial, digest)
            yield partial, journal
            (partial / JOURNAL).unlink(missing_ok=True)
            _flush(partial)
            check_replaceable(target, force)  # what came there meanwhile is kept
            _put(partial, place)
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
            raise AutoQuantError(f"{target}: cannot be written: {reason}; nothing was left there") from error
    finally:
        if journal is not None:
            journal.close()
        shutil.rmtree(partial, ignore_errors=True)  # the old folder, where the two changed places
        release(target)


def _adopted(place: Path, partial: Path, digest: str) -> Journal | None:
    """The journal of a killed run's folder, which is now ``partial``; None where there is none to go on with."""
    for path in sorted(place.parent.glob(f".{_escaped(place.name)}.partial-*")):
        journal = take(path, digest) if left_behind(path.name) else None
        if journal is not None:
            if path != partial:
                path.rename(partial)
            for other in partial.iterdir():
                if other.name != JOURNAL and other.suffix != ".safetensors":
                    shutil.rmtree(other) if other.is_dir() and not other.is_symlink() else other.unlink()
            for other in place.parent.glob(f".{_escaped(place.name)}.partial-*"):
                if other != partial and left_behind(other.name):
                    shutil.rmtree(other, ignore_errors=True)
            return journal
    return None


def _put(partial: Path, place: Path) -> None:
    """Give the new folder its name; the old one is under the other's name, or gone, afterwards."""
    if not place.exists() or not any(place.iterdir()):
        partial.rename(place)  # an empty folder is replaced in one step
    elif not _exchange(partial, place):
        replaced = _beside(place, "replaced")
        place.rename(replaced)
        try:
            partial.rename(place)
        except BaseException:
            replaced.rename(place)
            raise
        shutil.rmtree(replaced, ignore_errors=True)
    _sync(place.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders change places in one step; False where the system or the file system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    return int(rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE)) == 0


def _beside(place: Path, state: str) -> Path:
    return place.parent / f".{place.name}.{state}-{os.getpid()}"


def _escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _flush(folder: Path) -> None:
    """Have everything on disk before the name is: else a power cut could leave a whole folder of empty files."""
    for path in (*folder.rglob("*"), folder):
        if not path.is_symlink():
            _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
