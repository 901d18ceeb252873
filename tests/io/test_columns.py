from __future__ import annotations

import pytest

from autoquant.io.columns import columns, wrapped

HEADER = ("model", "tokens", "perplexity")
ROWS = (("out/int8", "12,345", "22.340 ± 0.120"), ("a", "7", "1.000 ± 0.001"))

WIDE = [
    "model     tokens      perplexity",
    "────────────────────────────────",
    "out/int8  12,345  22.340 ± 0.120",
    "a              7   1.000 ± 0.001",
]
NARROW = [
    "out/int8",
    "  tokens: 12,345",
    "  perplexity: 22.340 ± 0.120",
    "a",
    "  tokens: 7",
    "  perplexity: 1.000 ± 0.001",
]


@pytest.mark.parametrize(("width", "lines"), [(80, WIDE), (32, WIDE), (31, NARROW)])
def test_columns_are_whole_or_become_paragraphs(width: int, lines: list[str]) -> None:
    assert columns(HEADER, ROWS, width) == lines


def test_a_name_longer_than_the_line_is_whole() -> None:
    assert columns(HEADER, [("x" * 50, "1", "2")], 40)[0] == "x" * 50


def test_a_cell_without_content_has_no_line() -> None:
    assert columns(("claim", ""), [("c" * 30, "")], 10) == ["c" * 30]


def test_names_are_inert() -> None:
    assert columns(("name",), [("[bold]\x1b[31m\n",)], 80)[2] == r"[bold]\x1b[31m\n"


def test_long_lines_are_broken_between_words() -> None:
    assert wrapped("model.layers.0.self_attn: it is normalised", 24, indent=2) == [
        "  model.layers.0.self_attn:",
        "      it is normalised",
    ]
