"""Rows as aligned columns, or as one paragraph each where they do not fit: no cell is ever cut."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from textwrap import wrap

from autoquant.io.inert import inert

GAP = "  "
INDENT = 4
"""Of what follows the first line of a paragraph, beside the paragraph's own."""


def columns(header: Sequence[str], rows: Sequence[Sequence[str]], width: int, align: str = "") -> list[str]:
    """Lines of at most ``width`` characters, for ``rows`` of as many cells as the ``header`` has.

    The first column names the row. ``align`` has ``<`` for a column that stands left and ``>`` for one that stands
    right, as figures do; by default the first stands left, the others right. A name that is longer than a line is kept
    whole: terminals break it, and nothing is lost.
    """
    sides = align or "<" + ">" * (len(header) - 1)
    cells = [[inert(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
    if sum(widths) + len(GAP) * (len(widths) - 1) > width:
        return list(_paragraphs(header, cells, width))
    lines = [_line(header, widths, sides), "─" * (sum(widths) + len(GAP) * (len(widths) - 1))]
    return [*lines, *(_line(row, widths, sides) for row in cells)]


def _line(row: Sequence[str], widths: Sequence[int], sides: str) -> str:
    return GAP.join(f"{cell:{side}{w}}" for cell, side, w in zip(row, sides, widths, strict=True)).rstrip()


def _paragraphs(header: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> Iterator[str]:
    for name, *cells in rows:
        yield from fitted(name, width)
        indent = _indent(name) + 2
        for title, cell in zip(header[1:], cells, strict=True):
            if cell:
                yield from wrapped(f"{title}: {cell}" if title else cell, width, indent)


def fitted(line: str, width: int) -> list[str]:
    """A line as it is where it fits, else broken between words; its own indent stays."""
    return [line] if len(line) <= width else wrapped(line.lstrip(), width, _indent(line))


def wrapped(text: str, width: int, indent: int = 0) -> list[str]:
    """Lines of ``text`` broken between words only; what follows the first is indented by four more.

    Where a word would fit but for that, the lines are indented by less, so that no terminal breaks it.
    """
    words = inert(text)
    room = width - max(map(len, words.split()), default=0)
    return wrap(
        words,
        max(width, indent + INDENT + 1),
        initial_indent=" " * indent,
        subsequent_indent=" " * (min(indent + INDENT, room) if room >= 0 else indent + INDENT),
        break_long_words=False,
        break_on_hyphens=False,
    )


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())
