from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from autoquant.calibration.texts import PACKAGED, read_text
from autoquant.errors import AutoQuantError


class Chat:
    """A tokenizer with a chat template that refuses anything but users and assistants."""

    chat_template = "a template"

    def apply_chat_template(self, messages: list[dict[str, str]], *, tokenize: bool) -> str:
        assert not tokenize
        if any(message["role"] not in ("user", "assistant") for message in messages):
            raise RuntimeError("roles must\nalternate")
        return "".join(f"<{message['role']}>{message['content']}" for message in messages)


def saved(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("name", ["a.raw", "a.txt", "a.TXT", "a", "a.md"])
@pytest.mark.parametrize("text", ["One.\nTwo.", "One, two\nthree, four", "[1] One\n", '{ "One" }', "One\u2028Two\x85"])
def test_prose_is_read_as_it_is(tmp_path: Path, name: str, text: str) -> None:
    assert read_text(saved(tmp_path, name, text)) == text


def test_a_byte_order_mark_and_line_ends_are_no_text(tmp_path: Path) -> None:
    assert read_text(saved(tmp_path, "a.txt", b"\xef\xbb\xbfOne.\r\nTwo.")) == "One.\nTwo."
    assert read_text(saved(tmp_path, "a.jsonl", b'\xef\xbb\xbf{"text": "One."}\r\n{"text": "Two."}\r\n')) == (
        "One.\n\nTwo."
    )


@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL", "a.ndjson", "a.json"])
def test_json_lines(tmp_path: Path, name: str) -> None:
    path = saved(tmp_path, name, '{"text": "One."}\n\n{"text": null}\n{"text": "Two.", "id": 2}\n{"text": ""}\n')
    assert read_text(path) == "One.\n\nTwo."


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x1c"])
def test_separators_within_strings_are_text(tmp_path: Path, separator: str) -> None:
    text = f"One.{separator}Two."
    path = saved(tmp_path, "a.jsonl", json.dumps({"text": text}, ensure_ascii=False) + "\n")
    assert read_text(path) == text


@pytest.mark.parametrize(
    "content",
    [
        '[{"text": "One."}, {"text": null}, {"text": "Two."}]',
        '["One.", "Two."]',
        '{"text": ["One.", "Two."]}',
        '[\n {\n  "text": "One."\n },\n {\n  "text": "Two."\n }\n]\n',
    ],
)
def test_json(tmp_path: Path, content: str) -> None:
    assert read_text(saved(tmp_path, "a.JSON", content)) == "One.\n\nTwo."


def test_one_record(tmp_path: Path) -> None:
    assert read_text(saved(tmp_path, "a.json", '{\n "text": "One."\n}\n')) == "One."


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "id,text\n1,One.\n2,\n3,Two.\n"),
        ("a.CSV", 'text;id\n"One.";1\nTwo.;2\n'),
        ("a.tsv", "id\ttext\n1\tOne.\n2\tTwo."),
    ],
)
def test_tables(tmp_path: Path, name: str, content: str) -> None:
    assert read_text(saved(tmp_path, name, content)) == "One.\n\nTwo."


def test_cells_may_be_long_and_of_several_lines(tmp_path: Path) -> None:
    cell = "One,\nand\u2028another.\n" + 200_000 * "x"
    assert read_text(saved(tmp_path, "a.csv", f'id,text\n1,"{cell}"\n')) == cell


def test_another_column(tmp_path: Path) -> None:
    path = saved(tmp_path, "a.jsonl", '{"content": "One.", "id": 1}')
    assert read_text(path, "content") == "One."
    with pytest.raises(
        AutoQuantError, match=r"no text in 'text'.*; it has 'content', 'id': name the one to read with --field"
    ):
        read_text(path)


def test_conversations_go_through_the_chat_template(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "Two."}]
    path = saved(tmp_path, "a.jsonl", json.dumps({"messages": messages}) + '\n{"text": "Three."}')
    assert read_text(path, tokenizer=Chat()) == "<user>One?<assistant>Two.\n\nThree."
    for tokenizer in (None, types.SimpleNamespace(chat_template=None)):
        with pytest.raises(AutoQuantError, match=r"a\.jsonl:1: 'messages' need a tokenizer with a chat template"):
            read_text(path, tokenizer=tokenizer)
    path = saved(tmp_path, "b.json", json.dumps([{"messages": [{"role": "tool", "content": "1"}]}]))
    with pytest.raises(AutoQuantError, match="item 0: the chat template refuses it: roles must alternate"):
        read_text(path, tokenizer=Chat())


def test_a_folder_of_files(tmp_path: Path) -> None:
    for name, content in {
        "texts/b.txt": "Two.",
        "texts/a.jsonl": '{"text": "One."}',
        "texts/c/d.csv": "id,text\n1,Three.",
        "texts/.hidden": "{",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        saved(tmp_path, name, content)
    assert read_text(tmp_path / "texts") == "One.\n\nTwo.\n\nThree."
    saved(tmp_path, "texts/e.bin", b"\0\0\0")
    with pytest.raises(AutoQuantError, match=r"e\.bin: looks like a binary file; expected \.txt, \.jsonl"):
        read_text(tmp_path / "texts")
    (tmp_path / "empty").mkdir()
    with pytest.raises(AutoQuantError, match="an empty folder; expected"):
        read_text(tmp_path / "empty")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "One."}\n{"text": "Two."}\n', "looks like JSON; name it .json or .jsonl"),
        ('[{"text": "One."}]', "looks like JSON"),
        ('[\n  "One.",\n  "Two."\n]', "looks like JSON"),
        ("id,text\n1,One.\n2,Two.\n", "looks like a table; name it .csv or .tsv"),
        ('"id"\t"text"\n1\tOne.\n', "looks like a table"),
        ("One.\0Two.", "looks like a binary file; expected .txt"),
    ],
)
@pytest.mark.parametrize("name", ["a.txt", "a", "a.data"])
def test_what_is_no_prose_is_not_read_as_prose(tmp_path: Path, name: str, content: str, message: str) -> None:
    with pytest.raises(AutoQuantError, match=message):
        read_text(saved(tmp_path, name, content))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n{"tex": "b"}', r"a.jsonl:2: no text in 'text'; did you mean 'tex'\?"),
        ("a.jsonl", '{"text": 3}', "a.jsonl:1: no text in 'text', but a int"),
        ("a.jsonl", "[1]", "a.jsonl:1: expected an object"),
        ("a.jsonl", "{", "a.jsonl:1: not JSON"),
        ("a.jsonl", "", "holds no text"),
        ("a.jsonl", '{"text": null}\n{"text": " "}', "holds no text"),
        ("a.jsonl", '{"text": "\\ud800"}', "a.jsonl:1: holds no valid text"),
        ("a.jsonl", 100_000 * "[", "a.jsonl:1: not JSON"),
        ("a.json", '[{"text": "a"}, 3]', "a.json: item 1: expected an object"),
        ("a.json", '[{"text": "a"}', "a.json: not JSON"),
        (
            "a.json",
            '[{"instruction": "a", "output": "b"}]',
            "it has 'instruction', 'output': name the one to read with --field",
        ),
        ("a.json", "", "holds no text"),
        ("a.csv", "id,text\n1,One.\n2\n", "row 2 has 1 cells; the first line names 2"),
        ("a.csv", "id,content\n1,One.\n", "row 1: no text in 'text'"),
        ("a.csv", "", "holds no text"),
    ],
)
def test_bad_records_are_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    with pytest.raises(AutoQuantError, match=message):
        read_text(saved(tmp_path, name, content))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(AutoQuantError, match="no such file"):
        read_text(tmp_path / "none.txt")
    with pytest.raises(AutoQuantError, match=r"cannot be read as UTF-8 text.*expected \.txt"):
        read_text(saved(tmp_path, "a.txt", b"\xff\xfe"))


def fake(monkeypatch: pytest.MonkeyPatch, name: str, **functions: Any) -> None:
    module = types.ModuleType(name)
    for function, value in functions.items():
        setattr(module, function, value)
    monkeypatch.setitem(sys.modules, name, module)


def test_a_dataset_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, "state.json", "{}")
    parts = {"train": [{"text": "One."}], "test": [{"text": "Two."}]}
    fake(monkeypatch, "datasets", load_from_disk=lambda path: parts)
    assert read_text(tmp_path) == "One.\n\nTwo."
    fake(monkeypatch, "datasets", load_from_disk=lambda path: [{"txt": "One."}])
    with pytest.raises(AutoQuantError, match="row 0: no text in 'text'"):
        read_text(tmp_path)


def test_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": "One."}, {"text": None}, {"text": "Two."}]
    table = types.SimpleNamespace(to_pylist=lambda: rows)
    fake(monkeypatch, "pyarrow")
    fake(monkeypatch, "pyarrow.parquet", read_table=lambda path: table)
    assert read_text(saved(tmp_path, "a.parquet", b"PAR1")) == "One.\n\nTwo."


@pytest.mark.parametrize(("name", "package"), [("state.json", "datasets"), ("a.parquet", "pyarrow")])
def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    path = saved(tmp_path, name, "{}")
    with pytest.raises(AutoQuantError, match=f"needs the package '{package}': pip install {package}"):
        read_text(tmp_path if name == "state.json" else path)


def test_a_dataset_of_the_hub_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(*names: Any, streaming: bool) -> dict[str, list[dict[str, Any]]]:
        asked.append((*names, streaming))
        return {"test": [{"body": "No."}], "train": [{"body": "One."}, {"body": None}, {"body": "Two."}]}

    fake(monkeypatch, "datasets", load_dataset=load_dataset)
    assert read_text(Path("owner/name"), "body") == "One.\n\nTwo."
    assert read_text(Path("owner/name:part-v1"), "body") == "One.\n\nTwo."
    assert asked == [("owner/name", None, True), ("owner/name", "part-v1", True)]
    with pytest.raises(AutoQuantError, match="owner/name: train row 0: no text in 'text'; it has 'body'"):
        read_text(Path("owner/name"))


def test_no_more_of_the_hub_is_read_than_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows() -> Any:
        yield {"text": "a" * 5_000_000}
        yield {"text": "b" * 5_000_000}
        raise AssertionError("a third was asked for")

    fake(monkeypatch, "datasets", load_dataset=lambda *names, streaming: {"train": rows()})
    assert len(read_text(Path("owner/name"))) == 10_000_002


def test_a_hub_that_does_not_answer_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*names: Any, streaming: bool) -> None:
        raise ConnectionError("Couldn't reach the hub\n(offline)")

    fake(monkeypatch, "datasets", load_dataset=load_dataset)
    with pytest.raises(AutoQuantError) as caught:
        read_text(Path("owner/name"))
    assert caught.value.message == (
        "owner/name: no such file, nor a dataset that the hub gives: Couldn't reach the hub (offline)"
    )
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(AutoQuantError, match="reading a dataset of the hub needs the package 'datasets'"):
        read_text(Path("owner/name"))


def test_a_file_that_is_not_there_is_no_dataset_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, "datasets")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    for name in ("texts/missing", "elsewhere/a.txt", "elsewhere/a.jsonl", "missing"):
        with pytest.raises(AutoQuantError, match=f"{name}: no such file"):
            read_text(Path(name))


def test_the_packaged_text_is_enough_for_the_default_windows() -> None:
    text = read_text(PACKAGED)
    assert text.isascii() and len(text) > 16 * 512 * 6  # a token of a large vocabulary has four or five characters
