"""A run that was killed is gone on with: parts that the disk holds are kept, all else is written anew."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from autoquant.io import journal
from autoquant.io.folders import PROVENANCE, check_target, finished_folder, resumable_folder
from autoquant.io.locks import release

WRITER = """
import os, signal, sys
from pathlib import Path
from autoquant.io.folders import resumable_folder
with resumable_folder(Path(sys.argv[1]), sys.argv[2]) as (folder, journal):
    (folder / "old.txt").write_text("of the run that was killed")
    file = os.open(folder / "a.safetensors", os.O_RDWR | os.O_CREAT)
    for at, content in enumerate((b"first", b"again", b"third")):
        os.pwrite(file, content, 5 * at)
        journal.add(("a.safetensors", 5 * at, 5), memoryview(content))
    os.pwrite(file, b"THIRD", 10)  # as a power cut may leave it
    if len(sys.argv) > 3:
        print("ready", flush=True)
        signal.pause()
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def work(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "work").mkdir()
    yield tmp_path / "work"
    release(tmp_path / "work" / "out")


def killed(target: Path, digest: str) -> Path:
    """The folder that a killed run left."""
    done = subprocess.run([sys.executable, "-c", WRITER, target, digest], check=False)
    assert done.returncode == -signal.SIGKILL
    (left,) = target.parent.glob(".out.partial-*")
    return left


def test_what_is_whole_is_kept(work: Path) -> None:
    left = killed(work / "out", "d")
    with resumable_folder(work / "out", "d") as (folder, kept):
        assert not left.exists() and sorted(path.name for path in folder.iterdir()) == [journal.NAME, "a.safetensors"]
        file = os.open(folder / "a.safetensors", os.O_RDONLY)
        held = [kept.holds(("a.safetensors", 5 * at, 5), file) for at in range(4)]
        assert held == [True, True, False, False], "the third is damaged, of a fourth there is no line"
        os.close(file)
        (folder / PROVENANCE).touch()
    assert sorted(path.name for path in (work / "out").iterdir()) == ["a.safetensors", PROVENANCE]
    assert [path.name for path in work.iterdir()] == ["out"]


def test_a_line_cut_short_is_no_line(work: Path) -> None:
    left = killed(work / "out", "d")
    text = (left / journal.NAME).read_text()
    (left / journal.NAME).write_text(text[:-8])
    kept = journal.take(left, "d")
    assert kept is not None and len(kept.done) == 2
    kept.add(("b", 0, 1), memoryview(b"x"))
    kept.close()
    again = journal.take(left, "d")
    assert again is not None and len(again.done) == 3
    again.close()


@pytest.mark.parametrize("resumes", [True, False])
def test_what_is_of_other_inputs_goes(work: Path, tmp_path: Path, resumes: bool) -> None:
    left = killed(work / "out", "other")
    (tmp_path / "source").mkdir()
    check_target(tmp_path / "source", work / "out", False)
    assert left.exists(), "nobody knows yet what this run makes"
    if resumes:
        with resumable_folder(work / "out", "d") as (folder, kept):
            assert not left.exists() and not kept.done
            assert [path.name for path in folder.iterdir()] == [journal.NAME]
    else:
        with finished_folder(work / "out"):
            assert not left.exists()
    assert [path.name for path in work.iterdir()] == ["out"]


def test_what_a_live_run_holds_is_not_taken(work: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, work / "out", "d", "wait"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    (left,) = work.glob(".out.partial-*")
    assert journal.take(left, "d") is None
    process.kill()
    process.communicate()
    kept = journal.take(left, "d")
    assert kept is not None
    kept.close()


def test_an_error_leaves_nothing(work: Path) -> None:
    with pytest.raises(RuntimeError), resumable_folder(work / "out", "d") as (folder, _):
        (folder / "a.safetensors").touch()
        raise RuntimeError
    assert [*work.iterdir()] == []
