"""What a config asks of a model's parameters, with every name, layer and index resolved: the input of planning."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from autoquant.config import RotationMethod, SmoothingKind, SmoothingMethod
from autoquant.executor.operations import Axis, Blocks


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
    """A space at one layer, or over all of its layers. ``seeds``: one text per block."""

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
