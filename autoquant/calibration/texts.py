"""Calibration texts: prose, JSON, JSON lines, CSV, Parquet, a folder of these, a dataset's folder or its id on the hub.

The suffix, in any case, says what a file is. A file of any other suffix is prose if its content does not say otherwise:
brackets and commas of a table that is read as prose calibrate for text that nobody writes, and nothing would fail.
"""

from __future__ import annotations

import csv
import importlib
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from autoquant.config.spelling import did_you_mean
from autoquant.errors import AutoQuantError

ACCEPTED = (
    ".txt, .jsonl, .json, .csv, .tsv, .parquet, a folder of such files, a dataset saved on disk, or a dataset's hub id"
)

PACKAGED = Path(__file__).parents[1] / "data" / "default.calibration.txt"
"""What is calibrated on where no text is given: English prose and law, Python and JSON, all free to copy."""

HUB_CHARACTERS = 8_000_000
"""So much of a dataset on the hub is read: some two million tokens. Some would fill a disk."""

Record = tuple[str, Any]
"""Where it stands (file, and line or row), and what stands there."""

_JSON = re.compile(r'\s*(\{\s*"[^"\n]*"\s*:|\[\s*["{\[])')
_NAME = re.compile(r'"?[^\W\d][\w.-]*"?')
_TABLE_ROWS = 5
_HUB_ID = re.compile(r"(?P<dataset>[\w.-]+/[\w.-]+)(:(?P<subset>[\w.-]+))?")


def read_text(path: Path, field: str = "text", tokenizer: Any = None) -> str:
    """All texts of ``path`` joined by blank lines.

    ``field`` names the column of records. Records without it whose ``messages`` are a conversation go through the chat
    template of ``tokenizer``, where it has one. Columns that are null or empty are passed over.

    Raises AutoQuantError, naming the line, for anything that cannot be read.
    """
    texts = [text for text in _texts(path, field, tokenizer) if text]
    if not any(text.strip() for text in texts):
        raise AutoQuantError(f"{path}: holds no text")
    return "\n\n".join(texts)


def _texts(path: Path, field: str, tokenizer: Any) -> Iterator[str]:
    if _is_hub_id(path):
        yield from _at_most(HUB_CHARACTERS, _column(_hub_dataset(str(path)), field, tokenizer))
    elif not path.is_dir():
        yield from _file_texts(path, field, tokenizer)
    elif any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        yield from _column(_saved_dataset(path), field, tokenizer)
    else:
        files = sorted(file for file in path.rglob("*") if file.is_file() and not _hidden(file.relative_to(path)))
        if not files:
            raise AutoQuantError(f"{path}: an empty folder; expected {ACCEPTED}")
        for file in files:
            yield from _file_texts(file, field, tokenizer)


def _is_hub_id(path: Path) -> bool:
    """True for ``owner/name`` and ``owner/name:subset`` where neither a file nor its folder is there."""
    known = path.suffix.lower() in (*_READERS, ".txt")
    return not known and not path.parent.exists() and _HUB_ID.fullmatch(str(path)) is not None


def _at_most(characters: int, texts: Iterator[str]) -> Iterator[str]:
    for text in texts:
        yield text
        characters -= len(text)
        if characters <= 0:
            return


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _file_texts(path: Path, field: str, tokenizer: Any) -> Iterator[str]:
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        yield _prose(path)
    else:
        yield from _column(reader(path, field), field, tokenizer)


def _read(path: Path) -> str:
    """A file's text without byte-order mark, its lines ending in LF."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        why = "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"
        raise AutoQuantError(f"{path}: {why}") from error
    except UnicodeDecodeError as error:
        raise AutoQuantError(f"{path}: cannot be read as UTF-8 text: {error}; expected {ACCEPTED}") from error


def _prose(path: Path) -> str:
    text = _read(path)
    looks = (
        "JSON; name it .json or .jsonl"
        if _JSON.match(text)
        else "a table; name it .csv or .tsv"
        if _is_table(text)
        else f"a binary file; expected {ACCEPTED}"
        if "\0" in text
        else None
    )
    if looks is not None:
        raise AutoQuantError(f"{path}: looks like {looks}")
    return text


def _is_table(text: str) -> bool:
    """True if the first line names columns and those that follow have as many cells."""
    for delimiter in ",\t;":
        names = text.partition("\n")[0].split(delimiter)
        if len(names) > 1 and all(_NAME.fullmatch(name) for name in names):
            rows = list(islice((row for row in _rows(text, delimiter) if row), 1, _TABLE_ROWS))
            if rows and all(len(row) == len(names) for row in rows):
                return True
    return False


def _rows(text: str, delimiter: str) -> Iterator[list[str]]:
    """The rows of a CSV file with cells of any length."""
    before = csv.field_size_limit(max(len(text), 1))
    try:
        yield from csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    finally:
        csv.field_size_limit(before)


def _table(path: Path, field: str) -> Iterator[Record]:
    text = _read(path)
    header = text.partition("\n")[0]
    delimiter = max("\t,;" if path.suffix.lower() == ".tsv" else ",;\t", key=header.count)
    names: list[str] = []
    try:
        for number, row in enumerate(row for row in _rows(text, delimiter) if row):
            names = names or row
            if number == 0:
                continue
            if len(row) != len(names):
                raise AutoQuantError(f"{path}: row {number} has {len(row)} cells; the first line names {len(names)}")
            yield f"{path}: row {number}", dict(zip(names, row, strict=True))
    except csv.Error as error:
        raise AutoQuantError(f"{path}: not CSV ({error})") from error


def _json_lines(path: Path, field: str) -> Iterator[Record]:
    # Not splitlines(): U+0085, U+2028 and U+2029 may stand within JSON's strings.
    for number, line in enumerate(_read(path).split("\n"), 1):
        if line.strip():
            yield f"{path}:{number}", _parsed(line, f"{path}:{number}")


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise AutoQuantError(f"{where}: not JSON ({error})") from error


def _json(path: Path, field: str) -> Iterator[Record]:
    """An array of records or texts, one record, a column of texts; or JSON lines, which often have this suffix."""
    text = _read(path)
    first, _, rest = text.strip().partition("\n")
    if rest and first.startswith("{") and first.rstrip().endswith("}"):
        yield from _json_lines(path, field)
        return
    content = _parsed(text, str(path)) if text.strip() else []
    if isinstance(content, dict) and isinstance(content.get(field), list):
        content = content[field]
    for number, record in enumerate(content if isinstance(content, list) else [content]):
        yield f"{path}: item {number}", {field: record} if isinstance(record, str) else record


def _parquet(path: Path, field: str) -> Iterator[Record]:
    parquet = _package("pyarrow.parquet", path, "a Parquet file")
    try:
        rows = parquet.read_table(str(path)).to_pylist()
    except (OSError, ValueError) as error:
        raise AutoQuantError(f"{path}: not a Parquet file ({error})") from error
    yield from ((f"{path}: row {number}", row) for number, row in enumerate(rows))


def _saved_dataset(path: Path) -> Iterator[Record]:
    datasets = _package("datasets", path, "a dataset folder")
    try:
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise AutoQuantError(f"{path}: not a dataset saved on disk ({error})") from error
    for part in loaded.values() if isinstance(loaded, dict) else [loaded]:
        yield from ((f"{path}: row {number}", record) for number, record in enumerate(part))


def _hub_dataset(name: str) -> Iterator[Record]:
    """The records of a dataset on the hub, streamed: of its part 'train', or of its first."""
    found = _HUB_ID.fullmatch(name)
    assert found is not None
    datasets = _package("datasets", Path(name), "a dataset of the hub")
    try:
        parts = datasets.load_dataset(found["dataset"], found["subset"], streaming=True)
        part = "train" if "train" in parts else next(iter(parts))
        yield from ((f"{name}: {part} row {number}", record) for number, record in enumerate(parts[part]))
    except Exception as error:  # the hub's library raises whatever the network, the server and the data make of it
        said = " ".join(str(error).split())[:200]
        raise AutoQuantError(f"{name}: no such file, nor a dataset that the hub gives: {said}") from error


def _package(name: str, path: Path, what: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise AutoQuantError(f"{path}: reading {what} needs the package '{package}': pip install {package}") from error


_READERS: Mapping[str, Callable[[Path, str], Iterator[Record]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _table,
    ".tsv": _table,
    ".parquet": _parquet,
}


def _column(records: Iterable[Record], field: str, tokenizer: Any) -> Iterator[str]:
    """The text of each record that has one."""
    for where, record in records:
        if not isinstance(record, Mapping):
            raise AutoQuantError(f"{where}: expected an object with a '{field}'")
        text = record.get(field)
        if text is None and isinstance(record.get("messages"), list):
            text = _conversation(record["messages"], field, where, tokenizer)
        elif field not in record:
            names = ", ".join(f"'{name}'" for name in list(record)[:8])
            near = did_you_mean(field, list(record)) or f"; it has {names or 'no columns'}"
            raise AutoQuantError(f"{where}: no text in '{field}'{near}: name the one to read with --field")
        if text is not None and not isinstance(text, str):
            raise AutoQuantError(f"{where}: no text in '{field}', but a {type(text).__name__}")
        if text:
            yield _encodable(text, where)


def _encodable(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can write half of a surrogate pair
        raise AutoQuantError(f"{where}: holds no valid text: {error}") from error
    return text


def _conversation(messages: list[Any], field: str, where: str, tokenizer: Any) -> str:
    if getattr(tokenizer, "chat_template", None) is None:
        raise AutoQuantError(f"{where}: 'messages' need a tokenizer with a chat template, or give a '{field}'")
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # a template is the checkpoint's own code, which raises what it likes
        raise AutoQuantError(f"{where}: the chat template refuses it: {' '.join(str(error).split())[:200]}") from error
    return text
