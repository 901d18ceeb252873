"""What a long command is at: a spinner on a terminal, plain lines elsewhere, nothing for the first second."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner

DELAY = 1.0
"""Seconds before anything is shown."""


@contextmanager
def steps(quiet: bool = False, delay: float = DELAY) -> Iterator[Callable[[str], None]]:
    """Yield a function to be told each step before it starts; what it shows goes to stderr."""
    if quiet:
        yield lambda step: None
        return
    stderr = sys.stderr  # what is stderr now: a capture redirects it for a while
    shown = _Spinner(stderr) if stderr.isatty() else _Lines(stderr)
    timer = threading.Timer(delay, shown.start)
    timer.daemon = True
    timer.start()
    try:
        yield shown.tell
    finally:
        timer.cancel()
        timer.join()
        shown.stop()


class _Lines:
    """One line a step."""

    def __init__(self, file: TextIO) -> None:
        self._file, self._step, self._started = file, "", False
        self._lock = threading.Lock()

    def start(self) -> None:
        with self._lock:
            self._started = True
            self._print()

    def tell(self, step: str) -> None:
        with self._lock:
            self._step = step
            if self._started:
                self._print()

    def stop(self) -> None:
        self._started = False

    def _print(self) -> None:
        if self._step:
            print(f"{self._step} ...", file=self._file, flush=True)


class _Spinner:
    """A spinner with the current step, gone when it is done."""

    def __init__(self, file: TextIO) -> None:
        self._spinner = Spinner("dots", "")
        # Live would put itself in the place of stdout and stderr, which others redirect meanwhile.
        self._live = Live(
            self._spinner, console=Console(file=file), transient=True, redirect_stdout=False, redirect_stderr=False
        )

    def start(self) -> None:
        self._live.start()

    def tell(self, step: str) -> None:
        self._spinner.update(text=f"{step} ...")

    def stop(self) -> None:
        self._live.stop()
