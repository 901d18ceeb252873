"""What a search has judged, kept in a file, so that one that was interrupted goes on where it was.

A line for each config; the first is a digest of all else that decides what judging gives. Numbers are written so that
they are read again bit for bit: a search that goes on decides what it would have decided in one run.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autoquant.config.format import Config


@dataclass(frozen=True, slots=True)
class Kept:
    """``known``: what was judged, by config. ``path`` None: it is not written down. ``digest``: the first line."""

    path: Path | None = None
    digest: str = ""
    known: dict[str, Any] = field(default_factory=dict)

    def get(self, config: Config) -> Any:
        """What was found of a config; None where it was not judged."""
        return self.known.get(_key(config))

    def put(self, config: Config, found: Sequence[Any]) -> None:
        """Keep it. Raises OSError as the system does."""
        key = _key(config)
        self.known[key] = found
        if self.path is None:
            return
        lines = [] if len(self.known) > 1 else [self.digest]
        with open(self.path, "a" if not lines else "w", encoding="utf-8") as stream:
            stream.writelines(f"{line}\n" for line in (*lines, json.dumps([key, found])))


def open_kept(file: str | Path | None, said: Sequence[object]) -> Kept:
    """What an earlier search left in a file if it was the same one, by all that is ``said`` of it; else nothing."""
    if file is None:
        return Kept()
    path = Path(file)
    digest = hashlib.sha256(repr(said).encode()).hexdigest()
    known: dict[str, Any] = {}
    with contextlib.suppress(OSError):
        first, *lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
        for line in lines if first == digest else ():
            with contextlib.suppress(ValueError, TypeError):  # the last may be cut short
                key, found = json.loads(line)
                known[str(key)] = found
    return Kept(path, digest, known)


def _key(config: Config) -> str:
    return hashlib.sha256(config.model_dump_json(by_alias=True).encode()).hexdigest()
