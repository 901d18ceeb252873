from __future__ import annotations

import io
import sys
import time

import pytest

from autoquant.cli.progress import steps


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def told(monkeypatch: pytest.MonkeyPatch, stderr: io.StringIO, quiet: bool = False, delay: float = 0.01) -> str:
    monkeypatch.setattr(sys, "stderr", stderr)
    with steps(quiet, delay) as tell:
        tell("first")
        time.sleep(0.05)
        monkeypatch.setattr(sys, "stderr", io.StringIO())  # as a capture does
        tell("second")
        time.sleep(0.05)
    return stderr.getvalue()


def test_lines_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    assert told(monkeypatch, io.StringIO()) == "first ...\nsecond ...\n"


def test_what_is_quick_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert told(monkeypatch, io.StringIO(), delay=60) == ""


def test_quiet_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert told(monkeypatch, io.StringIO(), quiet=True) == ""


def test_a_spinner_on_a_terminal_leaves_the_streams_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stdout = sys.stdout
    assert "second ..." in told(monkeypatch, Terminal())
    assert sys.stdout is stdout
