from __future__ import annotations

import os
from pathlib import Path

import pytest

from autoquant.errors import AutoQuantError
from autoquant.io.files import write_text


def test_writes_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_text(path, "één\n", force=False)
    assert path.read_bytes() == "één\n".encode()
    write_text(path, "two\n", force=True)
    assert path.read_text(encoding="utf-8") == "two\n"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_has_the_mode_of_an_ordinary_file(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "", force=False)
    (tmp_path / "b").touch()
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


@pytest.mark.parametrize(
    ("name", "force", "message"),
    [
        ("there", False, "there: exists already; give --force to replace it"),
        ("folder", True, "folder: is a folder; name a file"),
        ("pipe", True, "pipe: is no ordinary file; name another"),
        ("x" * 300, True, "x: cannot be written: File name too long"),
        ("none/a.json", True, "none/a.json: the folder .*none does not exist"),
    ],
)
def test_refuses(tmp_path: Path, name: str, force: bool, message: str) -> None:
    (tmp_path / "there").write_text("old", encoding="utf-8")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(AutoQuantError, match=message):
        write_text(tmp_path / name, "new", force=force)
    assert (tmp_path / "there").read_text(encoding="utf-8") == "old"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["folder", "pipe", "there"]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old", encoding="utf-8")
    (tmp_path / "link").symlink_to("file")
    write_text(tmp_path / "link", "new", force=True)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text(encoding="utf-8") == "new"


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_the_old_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    path = tmp_path / "a.json"
    path.write_text("old", encoding="utf-8")

    def fail(descriptor: int) -> None:
        raise failure

    monkeypatch.setattr(os, "fsync", fail)
    expected = AutoQuantError if isinstance(failure, OSError) else type(failure)
    with pytest.raises(expected, match=r"No space left|^$"):
        write_text(path, "new", force=True)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]
    assert path.read_text(encoding="utf-8") == "old"
