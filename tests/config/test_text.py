from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoquant.config.text import JsonSyntaxError, line_column, parse

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**17), 10**17)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(VALUES, st.sampled_from([None, 0, 2]), st.booleans())
def test_reads_what_the_standard_library_writes(value: Any, indent: int | None, ascii_only: bool) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
    document = parse(text)
    assert document.value == value
    assert document.problems == ()
    for path, offset in document.values.items():
        inner = value
        for part in path:
            inner = inner[part]
        assert json.JSONDecoder().raw_decode(text, offset)[0] == inner


def test_places() -> None:
    document = parse('{\n  "a": [1, {"b": "x"}],\n  "c": null\n}\n')
    assert document.value == {"a": [1, {"b": "x"}], "c": None}
    assert line_column(document.text, document.offset(("a", 1, "b"))) == (2, 18)
    assert line_column(document.text, document.offset(("a", 1, "b"), key=True)) == (2, 13)
    assert line_column(document.text, document.offset(("c",))) == (3, 8)
    assert line_column(document.text, document.offset(("c", "d", 3))) == (3, 8), "the nearest parent that is there"
    assert line_column(document.text, document.offset(())) == (1, 1)


@pytest.mark.parametrize(
    ("text", "place", "message"),
    [
        ("", (1, 1), "expected a value, found the end of the file"),
        ("{", (1, 2), "expected a key in double quotes, found the end of the file"),
        ("[1, 2", (1, 6), "expected ',' or ']', found the end of the file"),
        (
            '{"a": 1,\n}',
            (2, 1),
            "expected a key in double quotes, found '}'; a comma after the last entry is not allowed",
        ),
        ("[1,]", (1, 4), "expected a value, found ']'; a comma after the last entry is not allowed"),
        ("[1 2]", (1, 4), "expected ',' or ']', found '2'"),
        ('{"a" 1}', (1, 6), "expected ':' after the key 'a', found '1'"),
        ("{'a': 1}", (1, 2), 'expected a key in double quotes, found "\'"'),
        ("{a: 1}", (1, 2), "expected a key in double quotes, found 'a'"),
        ('{"a": True}', (1, 7), "expected a value, found 'True'"),
        ("[01]", (1, 2), "expected a value, found '01'"),
        ("[+1]", (1, 2), "expected a value, found '+1'"),
        ("[.5]", (1, 2), "expected a value, found '.5'"),
        ("[1.]", (1, 2), "expected a value, found '1.'"),
        ("[1] // note", (1, 5), "expected the end of the file, found '/'"),
        ('["a\nb"]', (1, 2), "string without an end, or with a line break or control character in it"),
        ('["abc]', (1, 2), "string without an end, or with a line break or control character in it"),
        (r'["\x41"]', (1, 3), r"in a string: invalid \escape"),
        (r'["\ud800"]', (1, 2), "half of a surrogate pair in a string"),
        ("[" * 100 + "]" * 100, (1, 66), "nested more than 64 deep"),
    ],
)
def test_syntax_errors(text: str, place: tuple[int, int], message: str) -> None:
    with pytest.raises(JsonSyntaxError, match=rf"^{re.escape(message)}") as error:
        parse(text)
    assert line_column(text, error.value.problem.offset) == place


@pytest.mark.parametrize(
    ("text", "place", "message"),
    [
        ('{"a": 1,\n "a": 2}', (2, 2), "key 'a' is there twice, first in line 1"),
        ('{"a": NaN}', (1, 7), "NaN is no JSON number; expected a finite number or null"),
        ('{"a": -Infinity}', (1, 7), "-Infinity is no JSON number; expected a finite number or null"),
        ("[1e400]", (1, 2), "the number is too large: 1e400"),
        ("[" + "9" * 5000 + "]", (1, 2), "the number is too large: " + "9" * 24),
    ],
)
def test_mistakes_that_do_not_stop_the_parser(text: str, place: tuple[int, int], message: str) -> None:
    problem, *others = parse(text).problems
    assert others == []
    assert (line_column(text, problem.offset), problem.message) == (place, message)
