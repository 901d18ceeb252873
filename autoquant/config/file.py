"""Reading and writing config files. An error names file, line, column and JSON path, and what was expected there."""

from __future__ import annotations

import codecs
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from enum import Enum
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from pydantic import BaseModel
from pydantic import ValidationError as PydanticError

from autoquant.config.arrangement import arranged, arrangement_problems, gathered
from autoquant.config.check import Problem, problems
from autoquant.config.format import (
    FORMAT_VERSION,
    SCHEMA_NAME,
    Blocked,
    Certificate,
    Config,
    IndexMap,
    Linear,
    Norm,
    Read,
    Slot,
    SmoothingGroup,
)
from autoquant.config.jsonschema import config_schema, first_schema
from autoquant.config.places import JsonPath, in_file, json_path, path_text
from autoquant.config.spelling import cut, did_you_mean, listed
from autoquant.config.text import Document, JsonSyntaxError, line_column, parse
from autoquant.errors import AutoQuantError
from autoquant.io.files import write_text

if TYPE_CHECKING:
    from jsonschema import ValidationError

MAX_SHOWN = 20
MAX_BYTES = 64 * 2**20
"""Far above any config: the largest of those that are generated has 0.2 MB."""
FIRST_SCHEMA = "autoquant-config.v1.schema.json"
MAX_DIGITS = 19
MAX_WIDTH = 120

# Facts leave out what has its default; everything else is a knob or a section and is written in full, so that a person
# sees what there is to set.
_FACTS = (Slot, IndexMap, Norm, Read, Linear, Blocked)
_LATER = {(Certificate, "settings"), (SmoothingGroup, "by_hand")}
"""Fields that came later: a file that was written without them is written without them again."""

_LINES = {"weights", "activations"}
"""Objects that stand on one line, where they fit."""

_KINDS = {
    dict: "an object",
    list: "an array",
    str: "a string",
    bool: "true or false",
    int: "an integer",
    float: "a number",
}
_TYPES = {
    "object": "an object",
    "array": "an array",
    "string": "a string",
    "boolean": "true or false",
    "integer": "an integer",
    "number": "a number",
    "null": "null",
}


def load_config(path: Path) -> Config:
    """Read and check a config file.

    Raises AutoQuantError for a file that cannot be read and for every problem in it, at most 20 of them in full.
    """
    return parse_config(_read(path), str(path))


def parse_config(text: str, file: str = "<text>") -> Config:
    """Check the text of a config; ``file`` is its name in messages. Raises AutoQuantError."""
    read = _read_quickly(text)
    if read is not None and not read[1]:
        return read[0]
    try:
        document = parse(text)
    except JsonSyntaxError as error:
        line, column = line_column(text, error.problem.offset)
        raise AutoQuantError(f"{file}:{line}:{column}: {error.problem.message}") from error
    found = [(problem.offset, Problem((), problem.message)) for problem in document.problems]
    skip = {offset for offset, _ in found}
    bare = len(found)
    config, wrong = _validate(document) if read is None else (read[0], _placed(read[1], document))
    for problem in wrong:
        offset = document.offset(problem.path, key=problem.key)
        if offset not in skip:
            found.append((offset, problem))
    if found or config is None:
        raise _error(file, document, found, bare)
    return config


def _read_quickly(text: str) -> tuple[Config, list[Problem]] | None:
    """The config that the classes make of a text, and what does not fit together in it, without the positions that only
    a message needs. None where a message about the text, the schema or the classes may be due.
    """
    try:
        value = json.loads(
            text,
            object_pairs_hook=_distinct,
            parse_constant=_refused,
            parse_int=lambda digits: int(digits) if len(digits) < MAX_DIGITS else _refused(digits),
            parse_float=lambda digits: _finite(float(digits)),
        )
        if "schema_" in value or type(value["format_version"]) is not int:  # pydantic takes what the schema does not
            return None
        config = _config(value)
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError):  # pydantic's own error is a ValueError
        return None
    return config, problems(config)


def _config(content: Mapping[str, Any]) -> Config:
    """The config of a file's content. Raises as :func:`gathered`, and pydantic's own error."""
    if content["format_version"] == 1:
        plain, schema = dict(content), content.get("$schema")
        if isinstance(schema, str) and schema.endswith(FIRST_SCHEMA):
            plain["$schema"] = schema.removesuffix(FIRST_SCHEMA) + SCHEMA_NAME
    elif content["format_version"] == FORMAT_VERSION:
        plain = gathered(content)
    else:
        raise ValueError("another version of the format")
    # From JSON text: strict mode then takes arrays for tuples and strings for enumerations, and nothing else.
    return Config.model_validate_json(json.dumps({**plain, "format_version": FORMAT_VERSION}))


def _placed(found: Sequence[Problem], document: Document) -> list[Problem]:
    """Problems of a config by where their causes stand in its file."""
    return [replace(problem, path=in_file(problem.path, document.value)) for problem in found]


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    return found if len(found) == len(pairs) else _refused(f"{len(pairs) - len(found)} keys are there twice")


def _finite(number: float) -> float:
    return number if math.isfinite(number) else _refused(str(number))


def _refused(what: str) -> NoReturn:
    raise ValueError(what)


def config_text(config: Config) -> str:
    """The file's content: ``$schema`` first, two spaces a level, arrays of numbers on one line; always the same."""
    plain = {**_plain(config), "$schema": config.schema_ or SCHEMA_NAME}
    return _render(arranged(plain), 0, inline=False) + "\n"


def save_config(config: Config, path: Path, *, force: bool = False) -> None:
    """Write ``config`` whole or not at all.

    Raises AutoQuantError where the file exists and ``force`` is false, where its folder does not exist, and for a
    config that :func:`load_config` would refuse.
    """
    wrong = problems(config)
    if wrong:
        lines = tuple(f"{json_path(problem.path)}: {problem.message}" for problem in wrong[:MAX_SHOWN])
        raise AutoQuantError(f"{path}: not written, the config does not fit together: {_count(wrong)}", lines)
    write_text(path, config_text(config), force=force)


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise AutoQuantError(f"{path}: {path.stat().st_size:,} bytes; a config has {MAX_BYTES:,} at most")
        data = path.read_bytes()
    except FileNotFoundError as error:
        names = [entry.name for entry in path.parent.glob("*.json")] if path.parent.is_dir() else []
        raise AutoQuantError(f"{path}: no such file{did_you_mean(path.name, names)}") from error
    except IsADirectoryError as error:
        raise AutoQuantError(f"{path}: is a folder; name a config's file") from error
    except OSError as error:
        raise AutoQuantError(f"{path}: cannot be read: {error.strerror}") from error
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise AutoQuantError(f"{path}:1:1: is UTF-16, by its byte order mark; expected UTF-8: save it as that")
    data = data.removeprefix(codecs.BOM_UTF8)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        before = data[: error.start].decode("utf-8")
        line, column = line_column(before, len(before))
        raise AutoQuantError(f"{path}:{line}:{column}: byte 0x{data[error.start]:02x} is not UTF-8") from error


def _validate(document: Document) -> tuple[Config | None, list[Problem]]:
    """The config, or what the JSON Schema, the classes or the checks in between refuse, whichever comes first."""
    version = document.value.get("format_version") if isinstance(document.value, dict) else None
    if isinstance(version, int) and version not in (1, FORMAT_VERSION):
        message = f"version {version} of the format; this AutoQuant reads versions 1 and {FORMAT_VERSION}"
        return None, [Problem(("format_version",), message)]
    errors: dict[Problem, None] = {}
    for error in _validator(1 if version == 1 else FORMAT_VERSION).iter_errors(document.value):
        errors.update(dict.fromkeys(_explain(error)))
    if errors:
        return None, list(errors)
    misplaced = [] if version == 1 else arrangement_problems(document.value)
    if misplaced:
        return None, misplaced
    try:
        config = _config(document.value)
    except PydanticError as error:
        found = error.errors()
        inner = [item for item in found if not any(_within(other["loc"], item["loc"]) for other in found)]
        return None, _placed([Problem(tuple(item["loc"]), _what(item)) for item in inner], document)
    return config, _placed(problems(config), document)


def _within(inner: tuple[int | str, ...], outer: tuple[int | str, ...]) -> bool:
    """True if one place is inside of another, whose error is then that of what is inside."""
    return len(inner) > len(outer) and inner[: len(outer)] == outer


def _what(error: Any) -> str:
    """A pydantic error in words; the schema takes 7.0 for an integer, which the classes do not."""
    value = error["input"]
    if error["type"] == "int_type" and isinstance(value, float):
        return f"expected an integer, found {value:.1f}; write {value:.0f}"
    return str(error["msg"])


@cache
def _validator(version: int) -> Any:
    from jsonschema import Draft202012Validator  # which files with a mistake need alone

    return Draft202012Validator(first_schema() if version == 1 else config_schema())


def _explain(error: ValidationError) -> Iterator[Problem]:
    """One schema error in words: the path, what was expected, the nearest valid name."""
    path: JsonPath = tuple(error.absolute_path)
    value, limit = error.instance, error.validator_value
    if error.validator == "anyOf":
        yield from _explain_choice(error)
    elif error.validator == "additionalProperties":
        known = list(error.schema["properties"])
        for key in value:
            if key not in known:
                yield Problem((*path, key), "unknown key", key=True, rest=partial(_hint, key, known))
    elif error.validator == "required":
        for key in limit:
            if key not in value:
                yield Problem(path, f"the key '{key}' is missing")
    elif error.validator == "enum":
        names = [str(choice) for choice in limit]
        rest = partial(did_you_mean, value, names) if isinstance(value, str) else None
        yield Problem(path, f"{cut(json.dumps(value))} is not among {listed(list(map(json.dumps, limit)))}", rest=rest)
    elif error.validator == "type":
        yield Problem(path, f"expected {_expected(error.schema)}, found {_kind(value)}")
    elif error.validator == "pattern":
        yield Problem(path, f"'{cut(value)}' is not of the form: {error.schema.get('description', limit)}")
    elif error.validator in ("minimum", "maximum"):
        word = "at least" if error.validator == "minimum" else "at most"
        yield Problem(path, f"{cut(json.dumps(value))} is out of range; expected {word} {limit}")
    elif error.validator == "minItems":
        yield Problem(path, f"expected at least {limit} {'entry' if limit == 1 else 'entries'}, found {len(value)}")
    else:
        yield Problem(path, error.message)


def _hint(key: str, known: list[str]) -> str:
    return did_you_mean(key, known) or f"; expected {listed(known)}"


def _explain_choice(error: ValidationError) -> Iterator[Problem]:
    """``X or null``: what is wrong with it as X, unless it is of another type altogether."""
    branches = error.validator_value
    context = [item for item in error.context or () if branches[item.schema_path[0]].get("type") != "null"]
    if any(item.validator == "type" and item.absolute_path == error.absolute_path for item in context):
        expected = " or ".join(_expected(_resolve(branch)) for branch in branches)
        yield Problem(tuple(error.absolute_path), f"expected {expected}, found {_kind(error.instance)}")
        return
    for item in context:
        yield from _explain(item)


def _resolve(schema: dict[str, Any]) -> dict[str, Any]:
    if "$ref" not in schema:
        return schema
    definition: dict[str, Any] = _validator(FORMAT_VERSION).schema["$defs"][schema["$ref"].rpartition("/")[2]]
    return definition


def _expected(schema: dict[str, Any]) -> str:
    if "enum" in schema:
        return "one of " + listed(list(map(json.dumps, schema["enum"])))
    return _TYPES.get(schema["type"], str(schema["type"]))


def _kind(value: Any) -> str:
    return "null" if value is None else _KINDS[type(value)]


def _error(file: str, document: Document, found: list[tuple[int, Problem]], bare: int) -> AutoQuantError:
    """The problems in the order of the file. The first ``bare`` are of the text and have no JSON path."""
    rows = [(offset, number, problem) for number, (offset, problem) in enumerate(found)]
    rows.sort(key=lambda row: (row[0], "" if row[1] < bare else path_text(row[2].path), row[2].text))
    lines = []
    for offset, number, problem in rows[:MAX_SHOWN]:
        line, column = line_column(document.text, offset)
        where = "" if number < bare else f"{path_text(problem.path)}: "
        lines.append(f"{file}:{line}:{column}: {where}{problem.message}")
    if len(found) == 1:
        return AutoQuantError(lines[0])
    return AutoQuantError(f"{file}: {_count(found)}", tuple(lines))


def _count(found: list[Any]) -> str:
    shown = f", the first {MAX_SHOWN} are shown" if len(found) > MAX_SHOWN else ""
    return f"{len(found)} {'problem' if len(found) == 1 else 'problems'}{shown}"


def _plain(value: Any) -> Any:
    """Dictionaries, lists and scalars in the order of the classes' fields."""
    if isinstance(value, BaseModel):
        result = {}
        for name, field in type(value).model_fields.items():
            item = getattr(value, name)
            if item != field.default or not (isinstance(value, _FACTS) or (type(value), name) in _LATER):
                result[field.alias or name] = _plain(item)
        return result
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value.value if isinstance(value, Enum) else value


def _render(value: Any, level: int, *, inline: bool) -> str:
    """JSON text. With ``inline``, a flat object that fits on the line stays there: slots, blocks, overrides."""
    if not isinstance(value, dict | list) or not value:
        return _scalar(value)
    if isinstance(value, list) and all(_is_number(item) for item in value):
        return _scalar(value)
    if inline and isinstance(value, dict) and all(_is_flat(item) for item in value.values()):
        line = _scalar(value)
        # A line of knobs stays one, however long the name at its end: what there is to set stands in columns.
        if 2 * level + len(line) < MAX_WIDTH or next(iter(value)) == "enable":
            return line
    indent = "  " * (level + 1)
    if isinstance(value, dict):
        rows = [f"{_scalar(key)}: {_render(item, level + 1, inline=key in _LINES)}" for key, item in value.items()]
        opening, closing = "{}"
    else:
        rows = [_render(item, level + 1, inline=True) for item in value]
        opening, closing = "[]"
    return f"{opening}\n{indent}" + f",\n{indent}".join(rows) + f"\n{indent[2:]}{closing}"


def _scalar(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_flat(value: Any) -> bool:
    return not isinstance(value, dict | list) or (isinstance(value, list) and all(_is_number(item) for item in value))
