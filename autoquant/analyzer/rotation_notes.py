"""What the analysis of rotations notes on its way: who reads vectors, who wrote them, what cannot be mixed."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from autoquant.analyzer.interpreter import Site
from autoquant.analyzer.variables import Ints, Reason
from autoquant.config.format import Norm


@dataclass(frozen=True, slots=True)
class Read:
    """A linear that reads a vector."""

    site: Site
    weight: str
    bias: str | None
    dim: int
    gain: Norm | None
    behind: bool = False
    """The gain is applied behind the linear, and is folded into its rows (or its bias), which then write."""
    columns: Tensor | None = field(default=None, compare=False, repr=False)
    """The labels of the columns that read, None where it is not kept."""
    in_part: bool = False
    """The other columns read what is behind another gain: the norm goes with these alone."""


@dataclass(frozen=True, slots=True)
class Product:
    """The rows of a weight, and a bias, that made what a node holds: names, and the dimension of the rows."""

    weight: str
    dim: int
    bias: str | None


@dataclass(frozen=True, slots=True)
class Split:
    """Coordinates with different keys cannot be mixed."""

    labels: Ints
    keys: Ints
    reason: Reason
    centre: bool = False
    """Their mean is subtracted."""
    length: bool = False
    """Their length is taken while their mean is still in it: it would be another one without."""
