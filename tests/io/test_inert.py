from __future__ import annotations

import pytest

from autoquant.io.inert import inert


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("model.layers.0", "model.layers.0"),
        ("Größe 模型 ±", "Größe 模型 ±"),
        ("[bold]x[/bold]", "[bold]x[/bold]"),
        ("\x1b[31mred", r"\x1b[31mred"),
        ("a\nb\r\tc\x00", r"a\nb\r\tc\x00"),
        ("\x9b2J", r"\x9b2J"),  # a control sequence in one character
        ("a\u202eb", r"a\u202eb"),  # turns the direction of what follows
        ("a\u2028b", r"a\u2028b"),  # a line break to some
        ("\udcff.json", r"\udcff.json"),  # a byte that is not UTF-8, as Python holds paths
    ],
)
def test_what_no_terminal_acts_on(text: str, shown: str) -> None:
    assert inert(text) == shown
    assert inert(text).isprintable()
