from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoquant.config.layers import fill, layer_numbers, layer_set, template
from autoquant.config.spelling import did_you_mean, nearest
from autoquant.errors import AutoQuantError


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("0", (0,)),
        ("0-3", (0, 1, 2, 3)),
        ("0-30:2,31", (*range(0, 31, 2), 31)),
        ("7,0-1", (0, 1, 7)),
        ("0-5:2", (0, 2, 4)),
        ("1-3,2", (1, 2, 3)),
    ],
)
def test_layer_numbers(text: str, numbers: tuple[int, ...]) -> None:
    assert layer_numbers(text) == numbers


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' is not a number"),
        ("0,,1", "'' is not a number"),
        ("0 - 3", "'0 - 3' is not a number"),
        ("-1", "'-1' is not a number"),
        ("٣", "is not a number"),
        ("3-1", "'3-1' runs backwards"),
        ("0-3:0", "'0-3:0' has step 0"),
        ("0-100000", "'0-100000' is out of range"),
        ("0-99999999999999999999", "is out of range"),
    ],
)
def test_layer_numbers_refuses(text: str, message: str) -> None:
    with pytest.raises(AutoQuantError, match=r"^layer set '") as error:
        layer_numbers(text)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ((0,), "0"),
        ((0, 1), "0-1"),
        ((0, 2), "0,2"),
        ((0, 2, 4), "0-4:2"),
        (range(32), "0-31"),
        ((0, 1, 2, 4, 6, 8), "0-1,2-8:2"),
        ((*range(0, 31, 2), 31), "0-30:2,31"),
        ([n for n in range(24) if n % 6 != 5], "0-4,6-10,12-16,18-22"),
        ((3, 1, 2, 1), "1-3"),
    ],
)
def test_layer_set(numbers: tuple[int, ...], text: str) -> None:
    assert layer_set(numbers) == text


@given(st.sets(st.integers(0, 130), min_size=1))
def test_layer_set_round_trip(numbers: set[int]) -> None:
    text = layer_set(numbers)
    assert layer_numbers(text) == tuple(sorted(numbers))
    assert len(text) <= len(",".join(map(str, numbers)))


def test_layer_set_of_any_shuffled_text_is_canonical() -> None:
    assert layer_set(layer_numbers("31,0-10:2,12-30:2,2-4:2")) == "0-30:2,31"


@pytest.mark.parametrize("numbers", [(), (-1, 0)])
def test_layer_set_refuses(numbers: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="at least one layer"):
        layer_set(numbers)


def test_template_and_fill() -> None:
    path = "model.layers.3.mlp.experts.3.weight"
    assert template(path, 3) == "model.layers.{layer}.mlp.experts.3.weight"
    assert fill(template(path, 3), 12) == "model.layers.12.mlp.experts.3.weight"
    assert fill("lm_head.weight", 12) == "lm_head.weight"


def test_template_needs_the_layer() -> None:
    with pytest.raises(AutoQuantError, match=r"layers\.13\.weight: no component is the layer number 3"):
        template("layers.13.weight", 3)


def test_nearest() -> None:
    names = ["model.layers.{layer}.mlp.up_proj", "model.layers.{layer}.mlp.down_proj", "lm_head"]
    assert nearest("model.layers.{layer}.mlp.upproj", names) == names[0]
    assert nearest("LM_HEAD", names) == "lm_head"
    assert nearest("xyz", names) is None
    assert did_you_mean("lm_haed", names) == "; did you mean 'lm_head'?"
    assert did_you_mean("xyz", names) == ""
