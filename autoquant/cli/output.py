"""Everything that a command prints goes through here: names are inert, a full disk is one line, a closed pipe none."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterable
from typing import Any

import click

from autoquant.errors import AutoQuantError
from autoquant.io.inert import inert

PIPE_WIDTH = 140
"""Columns where the output is no terminal."""


def width() -> int:
    """Columns of standard output."""
    stdout = sys.stdout
    return shutil.get_terminal_size().columns if stdout is not None and stdout.isatty() else PIPE_WIDTH


def show(lines: Iterable[str]) -> None:
    """Print results on standard output; a line break within a line is part of a name and shown as such."""
    show_text("".join(f"{inert(line)}\n" for line in lines))


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
    for line in lines:
        click.echo(inert(line), err=True)
