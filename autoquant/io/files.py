"""Writing a file so that it is there whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from autoquant.errors import AutoQuantError
from autoquant.io.locks import claim, left_behind, release


def write_text(path: Path, text: str, *, force: bool) -> None:
    """Write UTF-8 text; see :func:`finished_file`."""
    with finished_file(path, force=force) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as file:
        file.write(text)


@contextmanager
def finished_file(path: Path, *, force: bool) -> Iterator[Path]:
    """An empty hidden file beside ``path``, which takes its name when the block ends well and is removed otherwise.

    Behind a symbolic link, the file that it points to is replaced and not the link. Raises AutoQuantError where
    ``path`` exists and ``force`` is false, where it is no ordinary file, and where it cannot be written.
    """
    check_target(path, force=force)
    path = path.resolve()
    temporary = None
    try:
        temporary = _temporary(path)
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        # mkstemp makes the file readable for its owner only; give it what open() would have given.
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        raise AutoQuantError(f"{path}: cannot be written: {reason}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)  # gone already where all went well
        release(path)


def check_target(path: Path, *, force: bool) -> None:
    """Raise the errors of :func:`finished_file` that can be told before the work is done, and keep other runs from the
    file until it is written.
    """
    try:
        if path.is_dir():
            raise AutoQuantError(f"{path}: is a folder; name a file")
        if path.exists() and not path.is_file():
            # Renaming would put a file in the place of a device such as /dev/null.
            raise AutoQuantError(f"{path}: is no ordinary file; name another")
        if path.exists() and not force:
            raise AutoQuantError(f"{path}: exists already; give --force to replace it")
        place = path.resolve()
        if not place.parent.is_dir():
            raise AutoQuantError(f"{path}: the folder {place.parent} does not exist")
        claim(place)
        for old in place.parent.glob(".*.tmp-*"):
            mine = old.name.endswith(f"-{os.getpid()}")  # of another thread
            if old.name.startswith(f".{place.name}.") and not mine and left_behind(old.name):
                old.unlink(missing_ok=True)
        _temporary(place).unlink()
    except OSError as error:
        raise AutoQuantError(f"{path}: cannot be written: {error.strerror}") from error


def _temporary(path: Path) -> Path:
    # The process's number ends the name: what a killed one leaves is known by it.
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=f".tmp-{os.getpid()}")
    os.close(descriptor)
    return Path(name)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
