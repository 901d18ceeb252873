"""One setting of a knob."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from autoquant.config.format import Config, Quantization, QuantizationOverride, Strategy, edited
from autoquant.config.layers import fill, layer_numbers, layer_set
from autoquant.quantizer.strategies import PlannedLinear, scheme_of
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


def with_overrides(config: Config, linears: Iterable[PlannedLinear], **update: Any) -> Config:
    """The config with other choices for these linears, which keep what else is chosen for them."""
    section, changed = config.quantization, {linear.weight: linear for linear in linears}
    new = []
    for entry in config.model.linears:
        layers = (None,) if entry.layers is None else layer_numbers(entry.layers)
        chosen: dict[str, tuple[QuantizationOverride, list[int | None]]] = {}
        for layer in layers:
            linear = changed.get(entry.weight if layer is None else fill(entry.weight, layer))
            if linear is not None:
                choice = QuantizationOverride(path=entry.path, **(_choice(linear, section) | update))
                chosen.setdefault(repr(choice), (choice, []))[1].append(layer)
        for choice, at in chosen.values():
            named = [layer for layer in at if layer is not None]
            everywhere = len(at) == len(layers)
            new.append(choice if everywhere else edited(choice, layers=layer_set(named)))
    return with_quantization(config, overrides=(*section.overrides, *new))


def _choice(linear: PlannedLinear, section: Quantization) -> dict[str, Any]:
    """What an override has to say for a linear to stay as it is."""
    return {
        "strategy": next(one for one in Strategy if scheme_of(one) == replace(linear.scheme, kv_cache=None)),
        "weights": linear.weights if linear.weights != section.weights else None,
        "activations": linear.activations if linear.activations != section.activations else None,
    }


def with_rotation(config: Config, **update: Any) -> Config:
    """The config with other values in its section ``rotation``."""
    return edited(config, rotation=edited(config.rotation, **update))
