"""A strict JSON parser (RFC 8259) that remembers where every key and value stands.

The standard library's parser forgets positions, keeps the last of two equal keys without a word and takes NaN. A person
who edits a config needs the line, and is helped by an error for each of those.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from typing import Any

Path = tuple[str | int, ...]

MAX_DEPTH = 64  # a config is about ten deep; without a limit, deep nesting ends in a RecursionError

_BLANK = frozenset(" \t\r\n")
_SPACE = re.compile(r"[ \t\r\n]*")
_STRING = re.compile(r'"(?:[^"\\\x00-\x1f]|\\.)*"')
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?")
_WORD = re.compile(r"-?[A-Za-z_][A-Za-z_0-9]*|[-+.0-9A-Za-z_]+")
MAX_ECHO = 60
"""Of what stands in the file, so many characters are repeated in a message."""

WORDS = {"true": "true", "false": "false", "null": "null", "none": "null"}
_CONSTANTS = {"true": True, "false": False, "null": None}


@dataclass(frozen=True, slots=True)
class TextProblem:
    """A mistake in the text itself, at a character offset."""

    offset: int
    message: str


class JsonSyntaxError(Exception):
    """The text is no JSON and reading cannot go on."""

    def __init__(self, offset: int, message: str) -> None:
        super().__init__(message)
        self.problem = TextProblem(offset, message)


@dataclass(frozen=True, slots=True)
class Document:
    """A parsed text: its value, where things stand, and mistakes that did not stop the parser."""

    text: str
    value: Any
    keys: dict[Path, int]
    values: dict[Path, int]
    problems: tuple[TextProblem, ...]

    def offset(self, path: Path, *, key: bool = False) -> int:
        """Where the value at ``path`` starts, or its key; of a path that is not there, the nearest parent's value."""
        if key and path in self.keys:
            return self.keys[path]
        while path not in self.values:
            path = path[:-1]
        return self.values[path]


def line_column(text: str, offset: int) -> tuple[int, int]:
    """Line and column of a character, both counted from 1."""
    return text.count("\n", 0, offset) + 1, offset - text.rfind("\n", 0, offset)


def parse(text: str) -> Document:
    """Parse ``text``. Equal keys and numbers out of range are collected; anything else wrong raises JsonSyntaxError."""
    parser = _Parser(text)
    value = parser.value((), parser.skip(0))
    if parser.at < len(text):
        raise parser.error(parser.at, "the end of the file")
    return Document(text, value, parser.keys, parser.values, tuple(parser.problems))


@dataclass(slots=True)
class _Parser:
    """Recursive descent. ``at`` is the offset behind the last value and the white space after it."""

    text: str
    at: int = 0
    keys: dict[Path, int] = field(default_factory=dict)
    values: dict[Path, int] = field(default_factory=dict)
    problems: list[TextProblem] = field(default_factory=list)

    def skip(self, at: int) -> int:
        if self.text[at : at + 1] not in _BLANK:
            return at
        match = _SPACE.match(self.text, at)
        assert match is not None  # matches the empty string
        return match.end()

    def error(self, at: int, expected: str) -> JsonSyntaxError:
        """What was expected and what is there, with what to do where that can be told."""
        if at >= len(self.text):
            return JsonSyntaxError(at, f"expected {expected}, found the end of the file")
        word = _WORD.match(self.text, at)
        found = word[0] if word else self.text[at]
        shown = repr(found if len(found) <= MAX_ECHO else f"{found[: MAX_ECHO - 1]}…")
        return JsonSyntaxError(at, f"expected {expected}, found {shown}{self.hint(found, at)}")

    def hint(self, found: str, at: int) -> str:
        if found == "#" or self.text[at : at + 2] in ("//", "/*"):
            return "; JSON has no comments: remove it"
        if found.lower() in ("true", "false", "null", "none"):
            return f"; JSON writes {WORDS[found.lower()]}"
        if found == "'":
            return "; strings stand in double quotes"
        if found in "}]" and self.text[:at].rstrip().endswith(","):
            return "; a comma after the last entry is not allowed"
        return ""

    def value(self, path: Path, at: int) -> Any:
        self.values[path] = at
        if len(path) > MAX_DEPTH:
            raise JsonSyntaxError(at, f"nested more than {MAX_DEPTH} deep")
        first = self.text[at : at + 1]
        if first == "{":
            return self.object(path, at)
        if first == "[":
            return self.array(path, at)
        if first == '"':
            return self.string(at)
        return self.number_or_word(at)

    def object(self, path: Path, at: int) -> dict[str, Any]:
        result: dict[str, Any] = {}
        at = self.skip(at + 1)
        while self.text[at : at + 1] != "}" or result:
            if self.text[at : at + 1] != '"':
                raise self.error(at, "a key in double quotes")
            key = self.string(at)
            child = (*path, key)
            if key in result:
                line, _ = line_column(self.text, self.keys[child])
                self.problems.append(TextProblem(at, f"key '{key}' is there twice, first in line {line}"))
            self.keys[child] = at
            if self.text[self.at : self.at + 1] != ":":
                raise self.error(self.at, f"':' after the key '{key[:MAX_ECHO]}'")
            result[key] = self.value(child, self.skip(self.at + 1))
            at = self.at
            if self.text[at : at + 1] == "}":
                break
            at = self.comma(at, "}")
        self.at = self.skip(at + 1)
        return result

    def array(self, path: Path, at: int) -> list[Any]:
        result: list[Any] = []
        at = self.skip(at + 1)
        while self.text[at : at + 1] != "]" or result:
            if self.text[at : at + 1] == "]":
                raise self.error(at, "a value")
            result.append(self.value((*path, len(result)), at))
            at = self.at
            if self.text[at : at + 1] == "]":
                break
            at = self.comma(at, "]")
        self.at = self.skip(at + 1)
        return result

    def comma(self, at: int, closing: str) -> int:
        if self.text[at : at + 1] != ",":
            before = len(self.text[:at].rstrip(" \t\r\n"))
            if self.text[at : at + 1] in ('"', "{", "[") and "\n" in self.text[before:at]:
                raise JsonSyntaxError(before, f"expected ',' or '{closing}' here, at the end of the line")
            raise self.error(at, f"',' or '{closing}'")
        return self.skip(at + 1)

    def string(self, at: int) -> str:
        match = _STRING.match(self.text, at)
        if match is None:
            raise JsonSyntaxError(at, "string without an end, or with a line break or control character in it")
        self.at = self.skip(match.end())
        if "\\" not in match[0]:
            return match[0][1:-1]
        try:
            result = json.loads(match[0])
            result.encode("utf-8")
        except json.JSONDecodeError as error:
            raise JsonSyntaxError(at + error.pos, f"in a string: {error.msg.lower()}") from error
        except UnicodeEncodeError as error:
            raise JsonSyntaxError(at, "half of a surrogate pair in a string") from error
        return str(result)

    def number_or_word(self, at: int) -> int | float | bool | None:
        word = _WORD.match(self.text, at)
        number = _NUMBER.match(self.text, at)
        if number is not None and word is not None and number.end() == word.end():
            self.at = self.skip(number.end())
            return self.number(number, at)
        if word is not None and word[0] in _CONSTANTS:
            self.at = self.skip(word.end())
            return _CONSTANTS[word[0]]
        if word is not None and word[0].lstrip("-") in ("NaN", "Infinity"):
            self.problems.append(TextProblem(at, f"{word[0]} is no JSON number; expected a finite number or null"))
            self.at = self.skip(word.end())
            return None
        raise self.error(at, "a value")

    def number(self, match: re.Match[str], at: int) -> int | float:
        # Integers of more than 18 digits fit in no tensor and would cost quadratic time.
        whole = match[1] is None and match[2] is None
        result = float(match[0]) if not whole or len(match[0].lstrip("-")) > 18 else int(match[0])
        if math.isinf(result) or (whole and isinstance(result, float)):
            self.problems.append(TextProblem(at, f"the number is too large: {match[0][:24]}"))
            return 0
        return result
