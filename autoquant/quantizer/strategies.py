"""What each strategy means, and which linears of a model get it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from autoquant.config.format import ActivationQuantization, Config, Linear, Strategy, WeightQuantization
from autoquant.config.layers import fill, layer_numbers
from autoquant.config.spelling import did_you_mean
from autoquant.errors import AutoQuantError


class Granularity(StrEnum):
    """How many values share a scale, and when it is known."""

    TENSOR_STATIC = "per_tensor_static"
    TENSOR_DYNAMIC = "per_tensor_dynamic"
    TOKEN_DYNAMIC = "per_token_dynamic"

    @property
    def is_static(self) -> bool:
        """True if the scale comes from calibration."""
        return self is Granularity.TENSOR_STATIC


@dataclass(frozen=True, slots=True)
class Scheme:
    """One strategy, taken apart. Weights always have static scales."""

    weight_per_channel: bool
    activation: Granularity
    kv_cache: Granularity | None

    @property
    def is_static(self) -> bool:
        """True if linears need calibrated activation maxima."""
        return self.activation.is_static


@dataclass(frozen=True, slots=True)
class PlannedLinear:
    """One linear of one layer, with every ``{layer}`` filled in, and how it is quantized."""

    path: str
    weight: str
    bias: str | None
    in_features: int
    out_features: int
    stack: int | None
    in_dim: int
    scheme: Scheme
    weights: WeightQuantization = field(default_factory=WeightQuantization)
    activations: ActivationQuantization = field(default_factory=ActivationQuantization)

    @property
    def is_transposed(self) -> bool:
        """True if the model keeps the weight as [I, O] (Conv1D)."""
        return self.in_dim != (1 if self.stack is None else 2)


def scheme_of(strategy: Strategy) -> Scheme:
    """Take a strategy's name apart: ``w_int8_per_<...>_a_int8_per_<...>[_kv_cache_int8_per_<...>]``."""
    weight, _, rest = strategy.value.removeprefix("w_int8_per_").partition("_a_int8_")
    activation, _, kv_cache = rest.partition("_kv_cache_int8_")
    return Scheme(weight == "channel", Granularity(activation), Granularity(kv_cache) if kv_cache else None)


def plan_linears(config: Config, strategy: Strategy | None = None) -> tuple[PlannedLinear, ...]:
    """Every linear that is quantized, in the config's order.

    ``strategy`` replaces ``quantization.strategy``. Excluded linears are left out, then overrides apply, the last match
    winning; paths are those of ``model.linears``, either with ``{layer}`` or of one layer.

    Raises AutoQuantError for a path in exclude or overrides that names no linear, with the nearest one that exists.
    """
    section = config.quantization
    known = {name for linear in config.model.linears for name, _ in _instances(linear)}
    known |= {linear.path for linear in config.model.linears}
    named = [("exclude", path) for path in section.exclude] + [("overrides", entry.path) for entry in section.overrides]
    for where, path in named:
        if path not in known:
            raise AutoQuantError(f"quantization.{where}: no linear '{path}'{did_you_mean(path, sorted(known))}")

    planned = []
    for linear in config.model.linears:
        for path, layer in _instances(linear):
            names = {linear.path, path}
            chosen = None if names & set(section.exclude) else strategy or section.strategy
            weights, activations = section.weights, section.activations
            for entry in section.overrides:
                of_layer = entry.layers is None or layer in layer_numbers(entry.layers)
                if entry.path in names and of_layer:
                    chosen = entry.strategy
                    weights = entry.weights or section.weights
                    activations = entry.activations or section.activations
            if chosen is not None:
                planned.append(_plan(linear, path, layer, scheme_of(chosen), weights, activations))
    return tuple(planned)


def kv_granularity(config: Config, strategy: Strategy | None = None) -> Granularity | None:
    """Granularity of the key/value cache: that of the model's strategy; None where the cache stays floating-point."""
    return scheme_of(strategy or config.quantization.strategy).kv_cache


def needs_calibration(planned: Sequence[PlannedLinear], kv_cache: Granularity | None) -> bool:
    """True if any scale is static."""
    return any(linear.scheme.is_static for linear in planned) or (kv_cache is not None and kv_cache.is_static)


def _instances(linear: Linear) -> Iterator[tuple[str, int | None]]:
    if linear.layers is None:
        yield linear.path, None
    else:
        yield from ((fill(linear.path, layer), layer) for layer in layer_numbers(linear.layers))


def _plan(
    linear: Linear,
    path: str,
    layer: int | None,
    scheme: Scheme,
    weights: WeightQuantization,
    activations: ActivationQuantization,
) -> PlannedLinear:
    def filled(name: str) -> str:
        return name if layer is None else fill(name, layer)

    return PlannedLinear(
        path=path,
        weight=filled(linear.weight),
        bias=None if linear.bias is None else filled(linear.bias),
        in_features=linear.in_features,
        out_features=linear.out_features,
        stack=linear.stack,
        in_dim=linear.in_dim,
        scheme=scheme,
        weights=weights,
        activations=activations,
    )
