"""What a long command is at: a bar with the time left on a terminal, a line for each finished step elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TextIO

from autoquant.io.inert import inert
from autoquant.steps import Progress, silent

NARROW = 70
"""Columns below which there is no room for a bar beside its step."""


@dataclass(frozen=True, slots=True)
class Shown:
    """What a command tells while it works: ``progress`` of its steps, ``say`` a line that stays."""

    progress: Progress
    say: Callable[[str], None]


def steps(quiet: bool = False) -> AbstractContextManager[Shown]:
    """A place to tell of steps, shown on what is stderr now, whatever redirects it meanwhile."""
    stderr = sys.stderr
    if quiet or stderr is None:
        return nullcontext(Shown(silent, lambda line: None))
    return _bar(stderr) if stderr.isatty() else _lines(stderr)


def importing_little(progress: Progress, held: ExitStack) -> Progress:
    """The same; from when it is told of imports on, and until ``held`` ends, they go without Dynamo, which a config
    needs not.

    For commands alone: whoever goes on with torch.compile in the same process is better off with the real one.
    """
    from autoquant.api.arguments import IMPORTING

    def told(step: str, done: int, total: int) -> None:
        progress(step, done, total)
        if step == IMPORTING:
            from autoquant.library_patches import without_dynamo

            held.enter_context(without_dynamo())

    return told


@contextmanager
def _lines(file: TextIO) -> Iterator[Shown]:
    """One line for each step when it is done, with what it took. A step that fails has none: the error follows."""
    current, count, start = "", 0, 0.0

    def progress(step: str, done: int, total: int) -> None:
        nonlocal current, count, start
        if step != current:
            finish()
            current, start = step, time.perf_counter()
        count = total

    def say(line: str) -> None:
        print(inert(line), file=file, flush=True)

    def finish() -> None:
        if current:
            say(f"{current}{f' ({count:,})' if count > 1 else ''}: {time.perf_counter() - start:.1f} s")

    yield Shown(progress, say)
    finish()


@contextmanager
def _bar(file: TextIO) -> Iterator[Shown]:
    """A bar for the current step, gone when all is done.

    Rich would put itself in the place of the standard streams, which others redirect meanwhile; it is told not to.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar
    from rich.table import Column
    from rich.text import Text

    console = Console(file=file)
    step = TextColumn("{task.description}", markup=False, table_column=Column())  # broken between words, never cut
    drawn = (BarColumn(),) if console.width >= NARROW else ()
    bar = Bar(
        SpinnerColumn(),
        step,
        *drawn,
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    )
    task = bar.add_task("", total=None)
    current = ""

    def progress(step: str, done: int, total: int) -> None:
        nonlocal current
        if step != current:
            current = step
            bar.reset(task, description=inert(step), total=None)
        bar.update(task, completed=done, total=total if total > 1 else None)

    def say(line: str) -> None:
        bar.console.print(Text(inert(line)), soft_wrap=True)

    with bar:
        yield Shown(progress, say)
