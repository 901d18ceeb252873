"""Whatever happens to a writer, the old folder or the new one is there, whole."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from autoquant.errors import AutoQuantError
from autoquant.io import folders
from autoquant.io.files import write_text
from autoquant.io.folders import PROVENANCE, check_report, check_target, finished_folder
from autoquant.io.locks import claim, release

FILES = 20


def write(target: Path, word: str = "new", *, force: bool = True) -> None:
    with finished_folder(target, force=force) as folder:
        for i in range(FILES):
            (folder / f"{i}").write_text(word)
        (folder / PROVENANCE).write_text(word)


def content(target: Path) -> set[str]:
    """The words in a whole folder."""
    files = sorted(target.iterdir())
    assert len(files) == FILES + 1, files
    return {path.read_text() for path in files}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "source").mkdir()
    return tmp_path / "source"


@pytest.fixture
def work(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "work").mkdir()
    yield tmp_path / "work"
    release(tmp_path / "work" / "out")


def test_new_empty_and_old_folders(work: Path) -> None:
    (work / "out").mkdir()
    write(work / "out", "first", force=False)  # an empty folder needs no force
    assert content(work / "out") == {"first"}
    with pytest.raises(AutoQuantError, match="out: exists already; give --force"):
        write(work / "out", force=False)
    write(work / "out", "second")
    assert content(work / "out") == {"second"} and names(work) == ["out"]


def test_what_is_not_ours_is_not_replaced(work: Path, source: Path) -> None:
    (work / "out").mkdir()
    for name in ("a", "b"):
        (work / "out" / name).touch()
    for refuse in (lambda: write(work / "out"), lambda: check_target(source, work / "out", True)):
        with pytest.raises(AutoQuantError, match="holds a and 1 more, and autoquant did not write it"):
            refuse()
    (work / "out" / "autoquant.json").touch()  # a config that the user put there
    with pytest.raises(AutoQuantError, match="autoquant did not write it"):
        check_target(source, work / "out", True)
    (work / "out" / "quantized.json").touch()
    check_target(source, work / "out", True)


@pytest.mark.parametrize("before", ["empty", "ours", "dangling"])
def test_a_link_stays_a_link(work: Path, source: Path, tmp_path: Path, before: str) -> None:
    (tmp_path / "disk").mkdir()
    if before == "empty":
        (tmp_path / "disk" / "there").mkdir()
    elif before == "ours":
        write(tmp_path / "disk" / "there", "old")
    (work / "out").symlink_to(tmp_path / "disk" / "there")
    check_target(source, work / "out", before == "ours")
    write(work / "out", force=before == "ours")
    assert (work / "out").is_symlink() and content(tmp_path / "disk" / "there") == {"new"}
    assert names(work) == ["out"] and names(tmp_path / "disk") == ["there"]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("source", "holds the input"),
        (".", "holds the input"),
        ("source/out", "lies within the input"),
        ("none/out", "the folder .*none does not exist"),
        ("file", "is a file; name a folder"),
        ("x" * 300, "cannot be written: File name too long"),
    ],
)
def test_bad_targets_are_told_before_the_work(tmp_path: Path, source: Path, target: str, message: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("source")
    with pytest.raises(AutoQuantError, match=message):
        check_target(source, tmp_path / target, True)
    with pytest.raises(AutoQuantError, match="holds the input"):
        check_target(source, tmp_path / "link", True)
    assert names(tmp_path) == ["file", "link", "source"]


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_read_only_parent_is_told_before_the_work(work: Path, source: Path) -> None:
    work.chmod(0o555)
    with pytest.raises(AutoQuantError, match="out: cannot be written: Permission denied"):
        check_target(source, work / "out", False)
    work.chmod(0o755)


def test_a_system_that_refuses_the_probe(work: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(AutoQuantError, match="out: cannot be written: Read-only file system"):
        check_target(source, work / "out", False)


def test_the_umask_decides_who_may_read(work: Path) -> None:
    old = os.umask(0o027)
    try:
        write(work / "out")
    finally:
        os.umask(old)
    assert (work / "out").stat().st_mode & 0o777 == 0o750
    assert (work / "out" / "0").stat().st_mode & 0o777 == 0o640


def test_a_full_disk_keeps_the_old_folder(work: Path) -> None:
    write(work / "out", "old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))  # a write beyond it fails as on a full disk
    try:
        with pytest.raises(AutoQuantError, match="cannot be written: File too large; nothing was left there"):
            write(work / "out", "longer than ten bytes")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert content(work / "out") == {"old"} and names(work) == ["out"]


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interruption_keeps_the_old_folder(
    work: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool, error: type[BaseException]
) -> None:
    if not exchange:  # file systems that cannot let two folders change places
        monkeypatch.setattr(folders, "_exchange", lambda one, other: False)
    write(work / "out", "old")
    with pytest.raises(error), finished_folder(work / "out") as folder:
        (folder / "0").touch()
        raise error
    assert content(work / "out") == {"old"} and names(work) == ["out"]
    write(work / "out", "new")
    assert content(work / "out") == {"new"} and names(work) == ["out"]


def dead_process() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_leftovers_of_dead_processes_are_swept(work: Path, source: Path) -> None:
    dead, alive = dead_process(), os.getppid()
    for name in (f".out.partial-{dead}", f".out.partial-{alive}", f".other.partial-{dead}", ".out.partial-x"):
        (work / name).mkdir()
    check_target(source, work / "out", False)
    assert names(work) == sorted([f".out.partial-{alive}", f".other.partial-{dead}", ".out.partial-x"])


def test_an_old_folder_that_was_moved_aside_comes_back(work: Path, source: Path) -> None:
    write(work / "out", "old")
    (work / "out").rename(work / f".out.replaced-{dead_process()}")
    check_target(source, work / "out", False)
    assert content(work / "out") == {"old"} and names(work) == ["out"]


PROLOGUE = """
import sys, time
from pathlib import Path
from autoquant.io.files import write_text
from autoquant.io.folders import PROVENANCE, check_report, check_target, finished_folder
target = Path(sys.argv[1])
"""
WRITER = (
    PROLOGUE
    + f"""
print("ready", flush=True)
for round in range(100_000):
    with finished_folder(target) as folder:
        for i in range({FILES}):
            (folder / str(i)).write_text(str(round))
        (folder / PROVENANCE).write_text(str(round))
"""
)


def start(script: str, *arguments: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def end(process: subprocess.Popen[str], number: signal.Signals) -> None:
    process.send_signal(number)
    process.communicate(timeout=30)


def test_kills_at_random_moments(work: Path, source: Path) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    write(work / "out", "first")
    for _ in range(6):
        process = start(WRITER, work / "out")
        time.sleep(chance.uniform(0, 0.2))
        end(process, signal.SIGKILL)
        assert len(content(work / "out")) == 1, "a folder of two runs"
        assert len(names(work)) <= 2
    check_target(source, work / "out", True)
    assert names(work) == ["out"]


def test_two_runs_into_one_output(work: Path, source: Path) -> None:
    script = PROLOGUE + 'check_target(Path(sys.argv[2]), target, True)\nprint("ready", flush=True)\ntime.sleep(60)\n'
    process = start(script, work / "out", source)
    with pytest.raises(AutoQuantError, match=f"is being written by another run .process {process.pid}.; wait"):
        check_target(source, work / "out", True)
    with pytest.raises(AutoQuantError, match="is being written by another run"):
        write(work / "out")
    check_target(source, work / "elsewhere", True)
    end(process, signal.SIGKILL)  # the lock dies with its process
    write(work / "out")
    assert content(work / "out") == {"new"}
    claim(work / "out")  # and a finished run has let go of it


def test_the_folder_of_a_report(work: Path) -> None:
    check_report(work / "out")  # nothing there, and nothing is made
    assert names(work) == []
    (work / "out").mkdir()
    check_report(work / "out")
    (work / "out" / "precious").touch()
    with pytest.raises(AutoQuantError, match="out: holds precious, and is no report of autoquant; remove it"):
        check_report(work / "out")
    (work / "out" / "cells").mkdir()
    check_report(work / "out")
    assert names(work / "out") == ["cells", "precious"]
    (work / "file").touch()
    with pytest.raises(AutoQuantError, match="file: is a file; name a folder"):
        check_report(work / "file")
    with pytest.raises(AutoQuantError, match=r"the folder .*nowhere does not exist"):
        check_report(work / "nowhere" / "out")
    script = (
        PROLOGUE + 'from autoquant.io.locks import claim\nclaim(target)\nprint("ready", flush=True)\ntime.sleep(60)\n'
    )
    process = start(script, work / "other")
    with pytest.raises(AutoQuantError, match="is being written by another run"):
        check_report(work / "other")
    with pytest.raises(AutoQuantError, match="is being written by another run"):
        write_text(work / "other", "text", force=True)
    end(process, signal.SIGKILL)
    write_text(work / "other", "text", force=True)
    assert (work / "other").read_text() == "text"
