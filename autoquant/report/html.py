"""Pieces of HTML. Whatever a user named goes through :func:`text`, in which nothing is markup."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape

from autoquant.io.inert import inert

Cell = str | int | float | None


def text(value: object) -> str:
    """Text in which nothing is markup and every character shows."""
    return escape(inert(str(value)))


def table(caption: str, header: Sequence[str], rows: Iterable[Sequence[Cell]]) -> str:
    """A table with a caption and column headers; numbers stand right, with their header."""
    rows = list(rows)
    right = [bool(rows) and all(isinstance(row[at], int | float) for row in rows) for at in range(len(header))]
    classes = [' class="n"' if one else "" for one in right]
    head = "".join(f'<th scope="col"{one}>{escape(name)}</th>' for name, one in zip(header, classes, strict=True))
    body = "".join(f"<tr>{''.join(_cell(cell) for cell in row)}</tr>" for row in rows)
    name = escape(caption)
    return (
        f'<div class="table" role="region" tabindex="0" aria-label="{name}"><table><caption>{name}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def folded(summary: str, html: str) -> str:
    """What is shown when asked for."""
    return f"<details><summary>{escape(summary)}</summary>{html}</details>"


def chart(key: str, label: str, caption: str) -> str:
    """A place for a figure, with its name for those who do not see it."""
    return (
        f'<figure><div class="chart" id="{key}" role="img" aria-label="{escape(label)}"></div>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def choice(key: str, label: str, options: Mapping[str, str], selected: str | None = None) -> str:
    """A list to choose one of; values by their names."""
    rows = "".join(
        f'<option value="{escape(value)}"{" selected" if value == selected else ""}>{text(name)}</option>'
        for value, name in options.items()
    )
    return f'<div class="controls"><label for="{key}">{escape(label)}</label><select id="{key}">{rows}</select></div>'


def _cell(cell: Cell) -> str:
    if isinstance(cell, int | float):
        return f'<td class="n">{cell:,}</td>'
    return f"<td>{text('' if cell is None else cell)}</td>"
