"""A folder that is there whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from autoquant.errors import AutoQuantError


def check_target(source: Path, target: Path, force: bool) -> None:
    """Raise AutoQuantError where the output folder cannot be written."""
    if not source.is_dir():
        raise AutoQuantError(f"{source}: not a folder; expected a checkpoint of transformers")
    if target.exists() and not target.is_dir():
        raise AutoQuantError(f"{target}: is a file; name a folder")
    if target.exists() and target.resolve() in (source.resolve(), *source.resolve().parents):
        raise AutoQuantError(f"{target}: holds the input; name another folder")
    if target.exists() and any(target.iterdir()) and not force:
        raise AutoQuantError(f"{target}: exists already; give --force to replace it")
    if not target.absolute().parent.is_dir():
        raise AutoQuantError(f"{target}: the folder {target.absolute().parent} does not exist")


@contextmanager
def finished_folder(target: Path) -> Iterator[Path]:
    """A hidden folder beside ``target``, which takes its name when the block ends well and is removed otherwise.

    An old ``target`` is moved aside first and removed last; where the new one cannot take its place it comes back. A
    kill leaves a hidden folder at most. Raises AutoQuantError for what the operating system refuses (a full disk).
    """
    target = target.absolute()
    partial = target.parent / f".{target.name}.partial-{os.getpid()}"
    replaced = target.parent / f".{target.name}.replaced-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        yield partial
        if target.exists():
            target.rename(replaced)
        partial.rename(target)
    except BaseException as error:
        if replaced.exists() and not target.exists():
            replaced.rename(target)
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError):
            reason = error.strerror or error
            raise AutoQuantError(f"{target}: cannot be written: {reason}; nothing was left there") from error
        raise
    shutil.rmtree(replaced, ignore_errors=True)
