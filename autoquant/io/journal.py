"""What of a folder's files is written already, so that a run that was killed can be gone on with.

A line for each part of a file, with the CRC-32 of its bytes: what the disk holds of it is compared before it is kept,
so that a power cut, after which neither files nor this one need be whole, does no harm. The file is locked while its
run lives, and its first line tells what the files are made of.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

NAME = ".autoquant-journal"
_AT_ONCE = 1 << 24

Part = tuple[str, int, int]
"""The name of a file, the first byte and how many."""


@dataclass(frozen=True, slots=True)
class Journal:
    """``done``: the CRC-32 of what earlier runs wrote."""

    descriptor: int
    done: Mapping[Part, int]

    def add(self, part: Part, content: memoryview) -> None:
        """Note that a part is written."""
        line = json.dumps([*part, zlib.crc32(content)], separators=(",", ":")) + "\n"
        os.write(self.descriptor, line.encode())  # appended in one step

    def holds(self, part: Part, descriptor: int) -> bool:
        """True if an earlier run wrote this part and ``descriptor``'s file still has it."""
        wanted = self.done.get(part)
        if wanted is None:
            return False
        _, begin, length = part
        found = 0
        for at in range(0, length, _AT_ONCE):
            found = zlib.crc32(os.pread(descriptor, min(_AT_ONCE, length - at), begin + at), found)
        return found == wanted

    def close(self) -> None:
        """Let others have it."""
        os.close(self.descriptor)


def begin(folder: Path, digest: str) -> Journal:
    """A new journal in a new folder. Raises OSError as the system does."""
    descriptor = os.open(folder / NAME, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.write(descriptor, f"{digest}\n".encode())
    return Journal(descriptor, {})


def take(folder: Path, digest: str) -> Journal | None:
    """The journal that a run which is over left in a folder, where it was making the same; else None."""
    try:
        descriptor = os.open(folder / NAME, os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        first, *lines = (folder / NAME).read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:  # its run lives
        os.close(descriptor)
        return None
    if first != digest:
        os.close(descriptor)
        return None
    done: dict[Part, int] = {}
    for line in lines:
        with contextlib.suppress(ValueError, TypeError):  # the last may be cut short
            name, start, length, found = json.loads(line)
            done[str(name), int(start), int(length)] = int(found)
    if lines and lines[-1]:  # what comes next is a line of its own
        os.write(descriptor, b"\n")
    return Journal(descriptor, done)


def is_resumable(folder: Path) -> bool:
    """True if a run left a journal in a folder."""
    return (folder / NAME).is_file()
