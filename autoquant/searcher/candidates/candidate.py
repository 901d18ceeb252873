"""One setting of a knob."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from autoquant.config.format import Config, edited
from autoquant.searcher.judge import Judged, Searcher


@dataclass(frozen=True, slots=True)
class Candidate:
    """One setting of a knob: where it stands in the file, what it is, what it costs at inference; ``online``: it
    rotates activations there.
    """

    where: str
    choice: str
    config: Config
    cost: str = "none"
    online: bool = False


Knob = Callable[[Searcher, Judged], Iterable[Candidate]]
"""The settings of one knob that are worth trying on top of the best config so far."""


def with_quantization(config: Config, **update: Any) -> Config:
    """The config with other values in its section ``quantization``."""
    return edited(config, quantization=edited(config.quantization, **update))


def with_rotation(config: Config, **update: Any) -> Config:
    """The config with other values in its section ``rotation``."""
    return edited(config, rotation=edited(config.rotation, **update))
