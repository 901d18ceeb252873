"""Whether the process that left something behind is still there."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from autoquant.io.locks import left_behind


def test_of_a_running_an_ended_and_this_process() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        assert not left_behind(f".out-{child.pid}")
        child.communicate(b"\n")
    assert left_behind(f".out-{child.pid}") and left_behind(f".out-{os.getpid()}")
    assert not left_behind(".out-now") and not left_behind(f".out-{10**30}")


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="only /proc tells an ended process from a running one")
def test_of_a_process_that_has_ended_and_was_not_waited_for() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    stat = Path(f"/proc/{child.pid}/stat")
    while stat.read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)
    assert left_behind(f".out-{child.pid}")
    child.wait()
