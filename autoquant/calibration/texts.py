"""Calibration texts: a plain file, a JSONL file or a folder saved by Hugging Face datasets. Nothing is downloaded."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from autoquant.config.layers import did_you_mean
from autoquant.errors import AutoQuantError


def read_text(path: Path, field: str = "text") -> str:
    """All texts of ``path`` joined by blank lines; ``field`` names the column of a JSONL file or a dataset.

    Raises AutoQuantError, naming the line, for anything that cannot be read.
    """
    if path.is_dir():
        texts = list(_dataset_texts(path, field))
    elif path.suffix in (".jsonl", ".ndjson"):
        texts = list(_json_lines(path, field))
    else:
        texts = [_read(path)]
    if not any(texts):
        raise AutoQuantError(f"{path}: holds no text")
    return "\n\n".join(texts)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise AutoQuantError(f"{path}: cannot be read as UTF-8 text: {error}") from error


def _json_lines(path: Path, field: str) -> Iterator[str]:
    for number, line in enumerate(_read(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise AutoQuantError(f"{path}:{number}: not JSON ({error})") from error
        if not isinstance(record, dict):
            raise AutoQuantError(f"{path}:{number}: expected an object with a '{field}'")
        yield _field(record, field, f"{path}:{number}")


def _dataset_texts(path: Path, field: str) -> Iterator[str]:
    try:
        datasets: Any = importlib.import_module("datasets")
    except ImportError as error:
        raise AutoQuantError(f"{path}: reading a dataset folder needs the package 'datasets'; install it") from error
    try:
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise AutoQuantError(f"{path}: not a dataset saved on disk ({error})") from error
    parts = loaded.values() if isinstance(loaded, dict) else [loaded]
    for part in parts:
        for number, record in enumerate(part):
            yield _field(record, field, f"{path}: row {number}")


def _field(record: dict[str, Any], field: str, where: str) -> str:
    text = record.get(field)
    if not isinstance(text, str):
        raise AutoQuantError(f"{where}: no text in '{field}'{did_you_mean(field, list(record))}")
    return text
