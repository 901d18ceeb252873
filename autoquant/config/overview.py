"""A config in a few lines, for a console and a notebook; ``autoquant analyze`` prints more."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from html import escape
from typing import TYPE_CHECKING

from autoquant.io.columns import columns
from autoquant.io.inert import inert

if TYPE_CHECKING:
    from autoquant.config.format import Config, Smoothing, SmoothingGroup

ROWS = 12
"""Rows of one part that are shown; of the others the number is said."""
WIDTH = 120
"""Columns; a longer line is cut, which an ellipsis shows."""
HEADER = ("", "kind", "layers", "size", "enabled", "name")

Row = tuple[str, str, str, str, str, str]
"""Cells under :data:`HEADER`, the first one being the part."""


def headline(config: Config) -> str:
    """The model, the strategy and how the claims stand, in one line."""
    facts, certificate = config.model, config.certificate
    proof = "no proof" if certificate is None or not certificate.proved else "proved"
    return (
        f"{config.provenance.model}: {facts.layers} layers, {facts.parameters:,} parameters, {len(facts.linears)} "
        f"linears; {config.quantization.strategy.value}; {proof}"
    )


def rows(config: Config) -> list[Row]:
    """Groups, spaces, online rotations and what is blocked, a row each, and one for those that are left out."""
    smoothing, rotation = config.smoothing, config.rotation
    groups: list[Sequence[str]] = [
        (group.kind.value, group.layers or "", f"{group.channels}", _group_enabled(group, smoothing), group.name)
        for group in smoothing.groups
    ]
    spaces: list[Sequence[str]] = [
        (
            space.kind,
            space.layers or "",
            f"{space.size} x {space.blocks}" if space.blocks > 1 else f"{space.size}",
            _enabled(space.enable, rotation.enable),
            space.name,
        )
        for space in rotation.spaces
    ]
    online: list[Sequence[str]] = [
        (one.kind, one.layers or "", f"{one.size}", _enabled(one.enable), one.path) for one in rotation.online
    ]
    blocked: list[Sequence[str]] = [
        (one.what, one.layers or "", "", "", f"{one.path}: {one.reason}") for one in config.blocked
    ]
    parts = {"smoothing": groups, "rotation": spaces, "online": online, "blocked": blocked}
    return [row for part, found in parts.items() for row in _shortened(part, found)]


def overview(config: Config) -> str:
    """The text of ``repr``: at most :data:`WIDTH` columns."""
    found = rows(config)
    table = columns(HEADER, found, sys.maxsize, "<" * len(HEADER)) if found else []
    return "\n".join(_cut(line) for line in (inert(headline(config)), *table[:1], *table[2:]))  # without the rule


def overview_html(config: Config) -> str:
    """The same as a table of HTML, in which no name is markup."""
    lines = [HEADER, *(tuple(map(inert, row)) for row in rows(config))]
    cells = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in line)}</tr>" for line in lines)
    return f"<p>{escape(inert(headline(config)))}</p><table>{cells}</table>"


def _shortened(part: str, found: Sequence[Sequence[str]]) -> Iterator[Row]:
    for number, (kind, layers, size, enabled, name) in enumerate(found[:ROWS]):
        yield ("" if number else part, kind, layers, size, enabled, name)
    if len(found) > ROWS:
        yield ("", "", "", "", "", f"and {len(found) - ROWS} more")


def _group_enabled(group: SmoothingGroup, smoothing: Smoothing) -> str:
    default = smoothing.enable and group.kind.value != "query_key"
    found = {
        _enabled(group.enable, default),
        *(_enabled(o.enable, default) for o in group.overrides if o.enable is not None),
    }
    return found.pop() if len(found) == 1 else "in part"


def _enabled(own: bool | None, default: bool = False) -> str:
    return "yes" if (default if own is None else own) else "no"


def _cut(line: str) -> str:
    return line if len(line) <= WIDTH else f"{line[: WIDTH - 1]}…"
