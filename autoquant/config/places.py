"""JSON paths: where something stands in a config in memory, and where in its file.

In a file a group's knobs are a line of ``smoothing.groups`` and the rest of it is in ``claims.groups``; spaces likewise
(:mod:`autoquant.config.arrangement`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

JsonPath = tuple[str | int, ...]

KNOBS = {
    ("smoothing", "groups"): ("enable", "alpha", "method", "overrides"),
    ("rotation", "spaces"): ("enable", "method", "seed"),
}
"""The lists that are split, with the keys of theirs that a person chooses."""

SECTIONS = ("$schema", "format_version", "smoothing", "rotation", "quantization", "provenance", "model", "claims")
"""The beginning of a file; what else there is follows."""


def json_path(path: JsonPath) -> str:
    """``$.smoothing.groups[3].alpha``: where in a file stands what has this path in a config in memory."""
    return path_text(in_file(path))


def path_text(path: JsonPath) -> str:
    """``$.claims.groups[3].name``; keys that are no identifiers stand in brackets."""
    text = "$"
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            shown = part if len(part) <= 80 else f"{part[:79]}…"
            text += f".{shown}" if part.isidentifier() else f"[{shown!r}]"
    return text


def in_file(path: JsonPath, content: Mapping[str, Any] | None = None) -> JsonPath:
    """Where in a file stands what has this path in a config in memory.

    ``content``: the file's, whose lines of knobs may be in another order; None: in that of the claims.
    """
    if content is not None and content.get("format_version") == 1:
        return path
    section, key = path[:1], path[1:2]
    knobs = KNOBS.get((*section, *key))  # type: ignore[arg-type]  # a path of the right length or none
    if knobs is None or len(path) < 3:
        return path
    number, rest = path[2], path[3:]
    if not rest or rest[0] not in knobs:
        return ("claims", *key, number, *rest)
    if content is not None:
        name = content["claims"][key[0]][number]["name"]
        lines: Sequence[Mapping[str, Any]] = content[str(section[0])].get(key[0], ())
        there = [i for i, line in enumerate(lines) if line["name"] == name]
        if not there:
            return (*section, *key)
        number = there[0]
    return (*section, *key, number, *rest)
