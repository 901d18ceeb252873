from __future__ import annotations

import pytest

from autoquant.config.format import SmoothingKind
from autoquant.errors import AutoQuantError
from autoquant.pipeline.select import Transforms

NORM, FC = SmoothingKind.NORM_LINEAR, SmoothingKind.LINEAR_LINEAR


@pytest.mark.parametrize(
    ("text", "rotation", "alphas"),
    [
        ("none", "none", {}),
        ("smooth:0.85", "none", {NORM: 0.85}),
        ("smooth:0.5+fc_fc", "none", {NORM: 0.5, FC: 0.5}),
        ("smooth:0.5+fc_fc:0.7", "none", {NORM: 0.5, FC: 0.7}),
        ("fc_fc:0.5+rotation", "all", {FC: 0.5}),
        ("rotation:R1", "R1", {}),
        ("smooth+fc_fc", "none", {NORM: None, FC: None}),
    ],
)
def test_expressions(text: str, rotation: str, alphas: dict[SmoothingKind, float | None]) -> None:
    transforms = Transforms.parse(text)
    assert (transforms.rotation, transforms.alphas) == (rotation, alphas)
    assert str(transforms) == text


@pytest.mark.parametrize("first", [None, 0.5, 0.7])
@pytest.mark.parametrize("second", [None, 0.5])
def test_every_choice_has_a_text_that_means_it(first: float | None, second: float | None) -> None:
    for alphas in ({}, {NORM: first}, {FC: second}, {NORM: first, FC: second}, {FC: second, NORM: first}):
        for rotation in ("none", "R1", "all"):
            chosen = Transforms(rotation, alphas)  # type: ignore[arg-type]  # one of the literals
            assert Transforms.parse(str(chosen)) == chosen


def test_the_options_of_a_command() -> None:
    assert Transforms.of() == Transforms.parse("smooth+fc_fc+rotation")
    assert Transforms.of(rotate=False, smooth="fc_fc", alpha=0.3) == Transforms.parse("fc_fc:0.3")
    assert Transforms.of(rotate=False, smooth="none", alpha=0.3) == Transforms.parse("none")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("smoth:0.5", "no 'smoth'; did you mean 'smooth'"),
        ("none+rotation", "'none' stands alone"),
        ("rotation:R4", "expected 'rotation' or 'rotation:R1', got 'rotation:R4'"),
        ("smooth:1.5", "alpha: expected a number from 0 to 1, got '1.5'"),
        ("smooth:x", "got 'x'"),
        ("smooth:0.5+smooth", "'smooth' is there twice"),
        ("", "no ''"),
    ],
)
def test_mistakes_are_named(text: str, message: str) -> None:
    with pytest.raises(AutoQuantError, match=message):
        Transforms.parse(text)
