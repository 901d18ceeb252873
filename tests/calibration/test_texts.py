from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest

from autoquant.calibration.texts import read_text
from autoquant.errors import AutoQuantError


def test_a_plain_file(tmp_path: Path) -> None:
    (tmp_path / "a.raw").write_text("One.\nTwo.")
    assert read_text(tmp_path / "a.raw") == "One.\nTwo."


def test_json_lines(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "One."}\n\n{"text": "Two.", "id": 2}\n')
    assert read_text(tmp_path / "a.jsonl") == "One.\n\nTwo."


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"tex": "b"}', r"a.jsonl:2: no text in 'text'; did you mean 'tex'\?"),
        ('{"text": 3}', "a.jsonl:1: no text in 'text'"),
        ("[1]", "a.jsonl:1: expected an object"),
        ("{", "a.jsonl:1: not JSON"),
        ("", "holds no text"),
    ],
)
def test_bad_json_lines_are_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(AutoQuantError, match=message):
        read_text(tmp_path / "a.jsonl")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(AutoQuantError, match="cannot be read as UTF-8 text"):
        read_text(tmp_path / "none.txt")
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(AutoQuantError, match="cannot be read as UTF-8 text"):
        read_text(tmp_path / "a.txt")


def test_a_dataset_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = types.ModuleType("datasets")
    fake.load_from_disk = lambda path: {"train": [{"text": "One."}], "test": [{"text": "Two."}]}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", fake)
    assert read_text(tmp_path) == "One.\n\nTwo."
    fake.load_from_disk = lambda path: [{"txt": "One."}]  # type: ignore[attr-defined]
    with pytest.raises(AutoQuantError, match="row 0: no text in 'text'"):
        read_text(tmp_path)


def test_a_dataset_folder_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(AutoQuantError, match="needs the package 'datasets'"):
        read_text(tmp_path)
