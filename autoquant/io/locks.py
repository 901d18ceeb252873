"""One run at a time for each output, and whether the process that left something behind is still there."""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
from pathlib import Path

from autoquant.errors import AutoQuantError

_held: dict[Path, int] = {}
"""Open lock files by target. The system lets go of a lock when its process ends, however it ends."""


def claim(target: Path) -> None:
    """Keep others from writing ``target`` until :func:`release` or the end of this process.

    Locks are files of this user in the system's temporary folder, so that nothing lies beside the output; where that
    cannot be written there is no lock. Raises AutoQuantError where another process has it.
    """
    target = target.resolve()
    if target in _held:
        return
    file = lock_file(target)
    try:
        file.parent.mkdir(mode=0o700, exist_ok=True)
        if file.parent.is_symlink() or file.parent.stat().st_uid != os.getuid():
            return
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except OSError:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.read(descriptor, 20).decode(errors="replace").strip()
        os.close(descriptor)
        raise AutoQuantError(
            f"{target}: is being written by another run (process {holder or 'unknown'}); wait for it or name another"
        ) from error
    os.truncate(descriptor, 0)
    os.write(descriptor, str(os.getpid()).encode())
    _held[target] = descriptor


def lock_file(target: Path) -> Path:
    """The file that is locked while ``target`` is written; the number of the process that did so last is in it."""
    name = hashlib.sha256(os.fsencode(target.resolve())).hexdigest()[:32]
    return Path(tempfile.gettempdir(), f"autoquant-locks-{os.getuid()}", name)


def release(target: Path) -> None:
    """Let others write ``target``."""
    descriptor = _held.pop(target.resolve(), None)
    if descriptor is not None:
        os.close(descriptor)


def left_behind(name: str) -> bool:
    """True if the process whose number ends a file's name has ended, or is this one."""
    number = name.rpartition("-")[2]
    if not number.isdigit():
        return False
    if int(number) == os.getpid():
        return True
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return _is_zombie(int(number))


def _is_zombie(number: int) -> bool:
    """True for a process that has ended and whose parent has not asked how; False where the system has no /proc."""
    try:
        status = Path(f"/proc/{number}/stat").read_text(errors="replace")
    except OSError:
        return False
    return status.rpartition(")")[2].split()[:1] == ["Z"]  # the name before it may hold anything
