"""Writing a text file so that it is there whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from autoquant.errors import AutoQuantError


def write_text(path: Path, text: str, *, force: bool) -> None:
    """Write UTF-8 text under a temporary name beside ``path`` and rename it.

    Raises AutoQuantError where ``path`` exists and ``force`` is false, where it is no ordinary file, and where its
    folder does not exist or cannot be written to.
    """
    check_target(path, force=force)
    path = path.resolve()  # behind a symbolic link, the file it points to is replaced and not the link
    try:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    except OSError as error:
        raise AutoQuantError(f"{path}: cannot be written: {error.strerror}") from error
    try:
        with open(descriptor, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes the file readable for its owner only; give it what open() would have given.
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as error:
        Path(temporary).unlink(missing_ok=True)
        raise AutoQuantError(f"{path}: cannot be written: {error.strerror}") from error
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def check_target(path: Path, *, force: bool) -> None:
    """Raise the errors of :func:`write_text` that can be told before the work is done."""
    try:
        if path.is_dir():
            raise AutoQuantError(f"{path}: is a folder; name a file")
        if path.exists() and not path.is_file():
            # Renaming would put a file in the place of a device such as /dev/null.
            raise AutoQuantError(f"{path}: is no ordinary file; name another")
        if path.exists() and not force:
            raise AutoQuantError(f"{path}: exists already; give --force to replace it")
        if not path.parent.is_dir():
            raise AutoQuantError(f"{path}: the folder {path.parent} does not exist")
    except OSError as error:
        raise AutoQuantError(f"{path}: cannot be written: {error.strerror}") from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
