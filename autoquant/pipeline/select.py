"""What is done to a model before it is quantized, as a short expression.

``none``, or parts joined by ``+``:

- ``smooth[:A]``: norm -> linear groups, SmoothQuant's alpha A;
- ``fc_fc[:A]``: linear -> linear groups (v -> o, up -> down, fc1 -> fc2);
- ``rotation[:R1]``: every rotation that the config enables; ``rotation:R1`` the residual stream's alone.

An alpha that is left out is that of the part before, or else the config's. After ``rotation``, norms that were folded
for it are not smoothed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from autoquant.config.format import SmoothingKind
from autoquant.config.layers import did_you_mean
from autoquant.errors import AutoQuantError

PARTS = ("none", "smooth", "fc_fc", "rotation")
KINDS = {"smooth": SmoothingKind.NORM_LINEAR, "fc_fc": SmoothingKind.LINEAR_LINEAR}


@dataclass(frozen=True, slots=True)
class Preopt:
    """``alphas``: the kinds of groups that are smoothed, each with its alpha (null: the config's)."""

    name: str
    rotation: Literal["none", "R1", "all"] = "none"
    alphas: Mapping[SmoothingKind, float | None] = field(default_factory=dict)


def parse_preopt(text: str) -> Preopt:
    """The meaning of an expression. Raises AutoQuantError for anything else, with the nearest part that exists."""
    rotation: Literal["none", "R1", "all"] = "none"
    alphas: dict[SmoothingKind, float | None] = {}
    alpha: float | None = None
    parts = text.split("+")
    for part in parts:
        name, colon, value = part.partition(":")
        if name not in PARTS:
            raise AutoQuantError(f"--preopt {text}: no '{name}'{did_you_mean(name, PARTS)}; parts: {', '.join(PARTS)}")
        if name == "none":
            if len(parts) > 1 or colon:
                raise AutoQuantError(f"--preopt {text}: 'none' stands alone")
        elif name == "rotation":
            if colon and value != "R1":
                raise AutoQuantError(f"--preopt {text}: expected 'rotation' or 'rotation:R1', got '{part}'")
            rotation = "R1" if colon else "all"
        else:
            alpha = _alpha(text, value) if colon else alpha
            if KINDS[name] in alphas:
                raise AutoQuantError(f"--preopt {text}: '{name}' is there twice")
            alphas[KINDS[name]] = alpha
    return Preopt(text, rotation, alphas)


def _alpha(text: str, value: str) -> float:
    try:
        alpha = float(value)
    except ValueError:
        alpha = -1.0
    if not 0 <= alpha <= 1:
        raise AutoQuantError(f"--preopt {text}: alpha: expected a number from 0 to 1, got '{value}'")
    return alpha
