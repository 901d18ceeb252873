"""Rows as aligned columns, or as one paragraph each where they do not fit: no cell is ever cut."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from textwrap import wrap

from autoquant.io.inert import inert

GAP = "  "


def columns(header: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> list[str]:
    """Lines of at most ``width`` characters, for ``rows`` of as many cells as the ``header`` has.

    The first column stands left and names the row, the others stand right. A name that is longer than a line is kept
    whole: terminals break it, and nothing is lost.
    """
    cells = [[inert(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
    if sum(widths) + len(GAP) * (len(widths) - 1) > width:
        return list(_paragraphs(header, cells, width))
    lines = [_line(header, widths), "─" * (sum(widths) + len(GAP) * (len(widths) - 1))]
    return [*lines, *(_line(row, widths) for row in cells)]


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = (
        cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
    )
    return GAP.join((first, *others)).rstrip()


def _paragraphs(header: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> Iterator[str]:
    for name, *cells in rows:
        yield name
        for title, cell in zip(header[1:], cells, strict=True):
            if cell:
                yield from wrapped(f"{title}: {cell}" if title else cell, width, indent=2)


def wrapped(text: str, width: int, indent: int = 0) -> list[str]:
    """Lines of ``text`` broken between words only; what follows the first is indented by four more."""
    return wrap(
        text,
        max(width, indent + 5),
        initial_indent=" " * indent,
        subsequent_indent=" " * (indent + 4),
        break_long_words=False,
        break_on_hyphens=False,
    )
