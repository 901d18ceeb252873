"""What happens to the process: closed pipes, full disks, Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

RUN = (sys.executable, "-m", "autoquant")


@pytest.mark.parametrize("arguments", [["--help"], ["schema"]])
def test_a_closed_pipe_is_quiet(arguments: list[str]) -> None:
    process = subprocess.Popen([*RUN, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 141  # as `cat` has it


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("arguments", [["--help"], ["schema"]])
def test_a_full_disk_is_one_line(arguments: list[str]) -> None:
    with open("/dev/full", "w") as full:
        result = subprocess.run([*RUN, *arguments], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr == "error: standard output cannot be written: No space left on device\n"


@pytest.mark.parametrize("seconds", [0.3, 1.0, 2.0])
def test_an_interruption_while_libraries_are_imported_is_one_line(seconds: float) -> None:
    process = subprocess.Popen(
        [*RUN, "analyze", "llama", "--layers", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    lines = [line for line in stderr.splitlines() if not line.endswith(" s")]  # steps that were done by then
    assert (process.returncode, stdout, lines) == (130, "", ["error: interrupted"])


DRESSED_UP = """import os, signal
try:
    os.kill(os.getpid(), signal.SIGINT)
except KeyboardInterrupt as error:
    raise SystemError('initialization failed') from error
"""
IN_TEXT = """import ctypes
run, value = ctypes.pythonapi.PyRun_String, ctypes.py_object
run.restype, run.argtypes = value, (ctypes.c_char_p, ctypes.c_int, value, value)
run(b'import os, signal; os.kill(os.getpid(), signal.SIGINT); list(range(9))', 257, {}, {})
"""
"""Without care the interpreter ends by the signal then, exit code -2 to who waits for it."""


@pytest.mark.parametrize("code", [DRESSED_UP, IN_TEXT], ids=["dressed up", "in text"])
def test_an_interruption_in_a_library_is_one_line_and_an_exit_code(code: str, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text(code)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    result = subprocess.run([*RUN, "analyze", "llama"], capture_output=True, text=True, check=False, env=environment)
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "error: interrupted\n")


def test_an_interruption_that_a_destructor_swallows_comes_once_more(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text(
        "import os, signal, time\n"
        "class Passing:\n    def __del__(self):\n        os.kill(os.getpid(), signal.SIGINT)\n"
        "Passing()\n"
        "time.sleep(60)\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    result = subprocess.run([*RUN, "analyze", "llama"], capture_output=True, text=True, check=False, env=environment)
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "error: interrupted\n")
