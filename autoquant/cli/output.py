"""Everything that a command prints goes through here: names are inert, a full disk is one line, a closed pipe none."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TextIO

import click

from autoquant.errors import AutoQuantError
from autoquant.io.columns import fitted
from autoquant.io.inert import inert

PIPE_WIDTH = 140
"""Columns where the output is no terminal."""


def width() -> int:
    """Columns of standard output: what COLUMNS says, what the terminal has, or PIPE_WIDTH."""
    return shutil.get_terminal_size().columns if has_width() else PIPE_WIDTH


def has_width() -> bool:
    """True if tables have to fit: on a terminal, or where COLUMNS says how wide."""
    return os.environ.get("COLUMNS", "").isdecimal() or _is_terminal(sys.stdout)


def show(lines: Iterable[str]) -> None:
    """Print results on standard output; a line break within a line is part of a name and shown as such.

    Long lines are broken between words on a terminal. In a pipe they are whole, for grep and tail, whatever COLUMNS
    says: a process that Python's readline is in hands it on to all that it starts.
    """
    show_text("".join(f"{line}\n" for line in _broken(lines, sys.stdout)))


def show_json(value: Any) -> None:
    """Print a result as JSON, in which every character but printable ASCII is escaped."""
    show_text(json.dumps(value, indent=2) + "\n")


def show_text(text: str) -> None:
    """Print text that is inert already. Raises AutoQuantError where it cannot be written, BrokenPipeError as it is."""
    try:
        click.echo(text, nl=False)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise AutoQuantError(f"standard output cannot be written: {error.strerror}") from error


def remark(lines: Iterable[str]) -> None:
    """Print what is no result on standard error."""
    for line in _broken(lines, sys.stderr):
        click.echo(line, err=True)


def _broken(lines: Iterable[str], stream: TextIO | None) -> Iterator[str]:
    columns = shutil.get_terminal_size().columns if _is_terminal(stream) else sys.maxsize
    return (part for line in lines for part in fitted(inert(line), columns))


def _is_terminal(stream: TextIO | None) -> bool:
    return stream is not None and stream.isatty()
