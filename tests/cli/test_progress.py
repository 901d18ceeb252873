from __future__ import annotations

import io
import re
import sys
import time

import pytest

from autoquant.cli.progress import steps
from autoquant.errors import AutoQuantError


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def told(monkeypatch: pytest.MonkeyPatch, stderr: io.StringIO, quiet: bool = False) -> str:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", stderr)
    with steps(quiet) as shown:
        shown.progress("first", 0, 0)
        time.sleep(0.15)
        monkeypatch.setattr(sys, "stderr", io.StringIO())  # as a capture does
        for done in range(5):
            shown.progress("second [bold]\x1b[31m", done, 4)
        shown.say("found\nit")
        time.sleep(0.15)
    return stderr.getvalue()


def test_a_line_for_each_finished_step_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = told(monkeypatch, io.StringIO()).splitlines()
    assert [re.sub(r"\d\.\d s", "T", line) for line in lines] == [
        "first: T",
        r"found\nit",
        r"second [bold]\x1b[31m (4): T",
    ]
    assert float(lines[0].split()[1]) >= 0.1


def test_a_step_that_fails_is_not_said_to_be_done(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    with pytest.raises(AutoQuantError), steps() as shown:
        shown.progress("load", 0, 0)
        raise AutoQuantError("no such file")
    assert stderr.getvalue() == ""


def test_quiet_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert told(monkeypatch, io.StringIO(), quiet=True) == ""
    assert told(monkeypatch, Terminal(), quiet=True) == ""


def test_a_bar_on_a_terminal_leaves_the_streams_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    stdout = sys.stdout
    text = told(monkeypatch, Terminal())
    assert r"second [bold]\x1b[31m" in text
    assert r"found\nit" in text
    assert "4/4" in text
    assert sys.stdout is stdout


@pytest.mark.parametrize(("columns", "has_bar"), [(40, False), (80, True)])
def test_a_step_is_not_cut_in_a_narrow_terminal(columns: int, has_bar: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    stderr = Terminal()
    monkeypatch.setattr(sys, "stderr", stderr)
    with steps() as shown:
        for done in range(3):
            shown.progress("reading off scales and rotations, all of them", done, 12_000)
            time.sleep(0.15)
    text = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", stderr.getvalue())
    assert {"reading", "scales", "rotations,", "them", "2/12000"} <= set(text.split())
    assert "…" not in text
    assert ("━━" in text) is has_bar
