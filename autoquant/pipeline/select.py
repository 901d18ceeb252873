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
from dataclasses import dataclass, field, replace
from typing import Literal

from autoquant.config.format import Config, SmoothingKind
from autoquant.config.spelling import did_you_mean_or
from autoquant.errors import AutoQuantError
from autoquant.executor.resolve import resolve
from autoquant.executor.resolved import Resolved, ResolvedGroup
from autoquant.models.structure import ModelStructure

Rotation = Literal["none", "R1", "all"]
Smooth = Literal["all", "fc_fc", "none"]

PARTS = ("none", "smooth", "fc_fc", "rotation")
KINDS = {"smooth": SmoothingKind.NORM_LINEAR, "fc_fc": SmoothingKind.LINEAR_LINEAR}
CHOICES: Mapping[Smooth, tuple[SmoothingKind, ...]] = {
    "none": (),
    "fc_fc": (SmoothingKind.LINEAR_LINEAR,),
    "all": (SmoothingKind.NORM_LINEAR, SmoothingKind.LINEAR_LINEAR),
}


@dataclass(frozen=True, slots=True)
class Transforms:
    """Which rotations and which kinds of smoothing groups are used, each kind with its alpha (None: the config's)."""

    rotation: Rotation = "none"
    alphas: Mapping[SmoothingKind, float | None] = field(default_factory=dict)

    @classmethod
    def of(cls, *, rotate: bool = True, smooth: Smooth = "all", alpha: float | None = None) -> Transforms:
        """What the options ``--rotate``, ``--smooth`` and ``--alpha`` of a command ask for."""
        return cls("all" if rotate else "none", dict.fromkeys(CHOICES[smooth], alpha))

    @classmethod
    def parse(cls, text: str) -> Transforms:
        """The meaning of an expression. Raises AutoQuantError for anything else, with the nearest part that exists."""
        rotation: Rotation = "none"
        alphas: dict[SmoothingKind, float | None] = {}
        alpha: float | None = None
        parts = text.split("+")
        for part in parts:
            name, colon, value = part.partition(":")
            if name not in PARTS:
                near = did_you_mean_or(name, PARTS, "the parts are")
                raise AutoQuantError(f"transforms '{text}': no '{name}'{near}")
            if name == "none":
                if len(parts) > 1 or colon:
                    raise AutoQuantError(f"transforms '{text}': 'none' stands alone")
            elif name == "rotation":
                if colon and value != "R1":
                    raise AutoQuantError(f"transforms '{text}': expected 'rotation' or 'rotation:R1', got '{part}'")
                rotation = "R1" if colon else "all"
            else:
                alpha = _alpha(text, value) if colon else alpha
                if KINDS[name] in alphas:
                    raise AutoQuantError(f"transforms '{text}': '{name}' is there twice")
                alphas[KINDS[name]] = alpha
        return cls(rotation, alphas)

    @property
    def rotates(self) -> bool:
        """True if anything is rotated."""
        return self.rotation != "none"

    def __str__(self) -> str:
        """The expression that :meth:`parse` reads as this."""
        parts = []
        before: float | None = None
        # An alpha that is left out is that of the part before, so those that are the config's come first.
        for name, kind in sorted(KINDS.items(), key=lambda part: self.alphas.get(part[1]) is not None):
            if kind in self.alphas:
                alpha = self.alphas[kind]
                parts.append(name if alpha == before else f"{name}:{str(alpha).removesuffix('.0')}")
                before = alpha
        if self.rotates:
            parts.append("rotation" if self.rotation == "all" else "rotation:R1")
        return "+".join(parts) or "none"


EVERYTHING = Transforms.of()
"""All that the config enables."""


def resolve_transforms(
    config: Config, inventory: ModelStructure, transforms: Transforms, seed: int | None = None, *, keys: bool
) -> Resolved:
    """What ``transforms`` asks for among what the config enables; ``keys``: groups that scale cached keys as well.

    ``seed`` replaces ``rotation.seed``. Raises AutoQuantError where the config does not fit the model.
    """
    resolved = resolve(config, inventory, rotate=transforms.rotates, seed=seed)
    only_r1 = transforms.rotation == "R1"
    return Resolved(
        tuple(space for space in resolved.spaces if space.kind == "R1" or not only_r1),
        tuple(
            _with_alpha(group, transforms)
            for group in resolved.groups
            if group.kind in transforms.alphas or (keys and group.kind is SmoothingKind.QUERY_KEY)
        ),
        () if only_r1 else resolved.online,
    )


def _with_alpha(group: ResolvedGroup, transforms: Transforms) -> ResolvedGroup:
    alpha = transforms.alphas.get(group.kind)
    return group if alpha is None else replace(group, alpha=alpha)


def _alpha(text: str, value: str) -> float:
    try:
        alpha = float(value)
    except ValueError:
        alpha = -1.0
    if not 0 <= alpha <= 1:
        raise AutoQuantError(f"transforms '{text}': alpha: expected a number from 0 to 1, got '{value}'")
    return alpha
