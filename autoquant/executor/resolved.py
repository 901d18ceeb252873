"""What a config asks of a model's parameters, with every name, layer and index resolved: the input of planning."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from autoquant.config.format import RotationMethod, SmoothingKind, SmoothingMethod
from autoquant.errors import AutoQuantError
from autoquant.executor.operations import Axis, Blocks
from autoquant.executor.rotation import Rotation


def check_not_learned(resolved: Resolved) -> None:
    """Raise AutoQuantError where a rotation has to be learned, for whatever sees no text or less than a whole model."""
    for space in resolved.spaces:
        if space.method is RotationMethod.LEARNED:
            raise AutoQuantError(
                f"{space.name}: its rotation is learned from calibration text with the whole model in memory; use "
                "`autoquant quantize --calibration` without --low-memory, or set its method to hadamard"
            )


@dataclass(frozen=True, slots=True)
class Member:
    """A parameter and the axis of it that a slot names."""

    name: str
    axis: Axis


@dataclass(frozen=True, slots=True)
class ResolvedNorm:
    """A norm's parameter names; ``offset`` 1 where the gain is 1 + weight."""

    kind: Literal["rms", "layer"]
    weight: str | None
    bias: str | None
    offset: int
    eps: float | None


@dataclass(frozen=True, slots=True)
class RotatedSlot:
    """A writer (perhaps with a norm to fold into its rows) or a reader (perhaps with its linear's bias)."""

    name: str
    axis: Axis
    blocks: Blocks
    fold_norm: ResolvedNorm | None
    bias: str | None


@dataclass(frozen=True, slots=True)
class ResolvedRead:
    """All readers behind one norm, or behind none."""

    norm: ResolvedNorm | None
    readers: tuple[RotatedSlot, ...]


@dataclass(frozen=True, slots=True)
class ResolvedSpace:
    """A space at one layer, or over all of its layers. ``seeds``: one text per block; ``given``: the rotation of every
    block where it is not to be made from them.
    """

    name: str
    layer: int | None
    kind: str
    method: RotationMethod
    seeds: tuple[str, ...]
    size: int
    blocks: int
    keep_ones: bool
    centre: bool
    writers: tuple[RotatedSlot, ...]
    reads: tuple[ResolvedRead, ...]
    given: Rotation | None = None

    def norms(self) -> Iterator[ResolvedNorm]:
        return (read.norm for read in self.reads if read.norm is not None)


@dataclass(frozen=True, slots=True)
class SmoothedSlot:
    """One side of a smoothing group: the scale enters to ``power``."""

    name: str
    axis: Axis
    power: int
    offset: int


@dataclass(frozen=True, slots=True)
class ResolvedGroup:
    """A smoothing group at one layer."""

    name: str
    layer: int | None
    kind: SmoothingKind
    alpha: float
    channels: int
    sources: tuple[SmoothedSlot, ...]
    targets: tuple[SmoothedSlot, ...]
    method: SmoothingMethod = SmoothingMethod.SMOOTHQUANT


@dataclass(frozen=True, slots=True)
class ResolvedOnline:
    """An online rotation: the module, and for a linear the columns that undo it."""

    kind: Literal["R3", "R4", "input"]
    path: str
    size: int
    columns: RotatedSlot | None


@dataclass(frozen=True, slots=True)
class Resolved:
    """Everything that was selected, in the config's order."""

    spaces: tuple[ResolvedSpace, ...]
    groups: tuple[ResolvedGroup, ...]
    online: tuple[ResolvedOnline, ...]
