"""The table that ``autoquant analyze`` prints: plain characters, readable at 80 columns and in a pipe."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from io import StringIO
from textwrap import wrap
from typing import IO

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text as RichText

from autoquant.certificate.claims import ran
from autoquant.config.format import Certificate, Config
from autoquant.config.layers import layer_numbers
from autoquant.io.inert import inert
from autoquant.report.summary import Row, Section, Summary, summarise

PIPE_WIDTH = 140
"""Columns where the output is no terminal."""
ANY_WIDTH = 1000
"""Wider than any table."""

_KEY = (
    ("R1 ", "R1: the residual stream, rotated once and for all in the weights that write and read it"),
    ("R2 ", "R2: the values of each attention head, rotated in the weights as well"),
    ("other ", "other: a vector that passes from one linear to another, rotated in the weights as well"),
    ("online R4", "online R4: a Hadamard rotation can be computed before the linear while the model runs"),
    ("online in", "online in: no rotation in the weights reaches it; one computed while the model runs can"),
)


def print_summary(config: Config, unknown_operators: Sequence[str] = (), file: IO[str] | None = None) -> None:
    """Print what ``config`` says about each linear, with totals in the last line. ``file``: stdout by default."""
    console = Console(file=file, highlight=False)
    if console.is_terminal:
        _print(console, config, summarise(config, unknown_operators))
        return
    print("\n".join(summary_lines(config, unknown_operators, PIPE_WIDTH)), file=file)


def summary_lines(config: Config, unknown_operators: Sequence[str] = (), width: int = PIPE_WIDTH) -> list[str]:
    """What :func:`print_summary` prints, without colours."""
    buffer = StringIO()
    _print(Console(file=buffer, highlight=False, width=width), config, summarise(config, unknown_operators))
    return [line.rstrip() for line in buffer.getvalue().splitlines()]  # cells are padded to the column's width


def _print(console: Console, config: Config, summary: Summary) -> None:
    console.print(_text(_headline(config)))
    console.print()
    table = _table(summary)
    if console.measure(table, options=console.options.update(width=ANY_WIDTH)).maximum <= console.width:
        console.print(table)
    else:
        _print_lines(console, summary)
    for title, lines in _lists(config, summary):
        console.print(_text(title, style="bold"))
        for line in lines:
            _print_wrapped(console, line)
        console.print()
    console.print(_text(summary.totals), soft_wrap=True)  # one line, for grep and tail -1


def _print_lines(console: Console, summary: Summary) -> None:
    """The table for a terminal that is too narrow for it: two lines a linear, so that no name is broken."""
    for section in summary.sections:
        console.print(_text(_section_title(section), style="bold"))
        for row in section.rows:
            console.print(_text(f"  {row.name}: {row.shape}"), soft_wrap=True)
            rotation = ", ".join(row.rotation) or "-"
            _print_wrapped(console, f"smoothed by: {_smoothing(row)}; rotation: {rotation}", indent=6)
        console.print()


def _print_wrapped(console: Console, line: str, indent: int = 2) -> None:
    for text in wrap(inert(line), console.width, initial_indent=" " * indent, subsequent_indent="      "):
        console.print(_text(text))


def _text(text: str, style: str = "") -> RichText:
    """Text that rich takes as it is, names within it inert."""
    return RichText(inert(text), style)


def _headline(config: Config) -> str:
    facts = config.model
    parts = [_count(facts.layers, "layer")]
    if facts.hidden_size:
        parts.append(f"hidden size {facts.hidden_size}")
    if facts.heads and facts.head_size:
        over = f" over {facts.kv_heads} key/value heads" if facts.kv_heads and facts.kv_heads != facts.heads else ""
        parts.append(f"{_count(facts.heads, 'head')}{over} of {facts.head_size}")
    parts.append(f"{facts.parameters:,} parameters")
    parts += ["tied " + " = ".join(names) for names in facts.tied]
    return f"{config.provenance.model}: {', '.join(parts)}"


def _table(summary: Summary) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), show_edge=False)
    table.add_column("linear", no_wrap=True)
    table.add_column("in -> out", no_wrap=True)
    table.add_column("smoothed by", no_wrap=True)
    table.add_column("rotation", no_wrap=True)
    for section in summary.sections:
        table.add_row(_text(_section_title(section), style="bold"))
        for row in section.rows:
            table.add_row(_text(f"  {row.name}"), row.shape, _smoothing(row), ", ".join(row.rotation) or "-")
        table.add_row()
    return table


def _section_title(section: Section) -> str:
    if section.layers is None:
        return "outside of the layers"
    where = f" of {section.stack}" if section.stack else ""
    return f"{_count(len(layer_numbers(section.layers)), 'layer')}{where}: {section.layers}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _smoothing(row: Row) -> RichText:
    return _text("; ".join(row.smoothing) or "-", style="" if row.smoothable else "yellow")


def _lists(config: Config, summary: Summary) -> Iterator[tuple[str, list[str]]]:
    rotations = [text for section in summary.sections for row in section.rows for text in row.rotation]
    legend = [text for start, text in _KEY if any(rotation.startswith(start) for rotation in rotations)]
    if summary.notes:
        yield "Not smoothable", [f"[{number}] {text}" for number, text in enumerate(summary.notes, start=1)]
    if summary.query_keys:
        yield "Keys against queries, of use for int8 key caches (off by default)", list(summary.query_keys)
    if summary.spaces:
        yield "Rotations", list(summary.spaces)
    if summary.blocked_rotations:
        yield "Not rotatable", list(summary.blocked_rotations)
    if config.certificate is not None:
        yield "Proof", _proof(config.certificate)
    if legend:
        yield "In the table", legend


def _proof(certificate: Certificate) -> list[str]:
    if not certificate.proved:
        return ["none: --no-verify was given"]
    lines = [
        f"{row.kind}: {row.count} tried, logits change by {row.worst:.1e} at most (allowed {certificate.tolerance:.0e})"
        for row in certificate.rows
    ]
    return lines if certificate.coverage is None else [*lines, f"run: {ran(certificate.coverage)}"]
