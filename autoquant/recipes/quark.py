"""AMD Quark's algorithm configs as JSON: ``scaling_layers`` of SmoothQuant, AWQ and the rotation.

Quark names what is in one decoder layer and takes it to stand in all of them; a rotation's modules by ``layer_id`` and
``pre_layer_id``. Of grouped queries it repeats the scales itself.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from autoquant.config.format import Config
from autoquant.config.layers import LAYER
from autoquant.errors import AutoQuantError
from autoquant.quantizer.strategies import scheme_of
from autoquant.recipes.pairs import Refusal, ScalePair, scale_pairs
from autoquant.recipes.spaces import WholeSpace, whole_spaces
from autoquant.recipes.unpaired import in_float

ALGORITHMS = ("smoothquant", "awq", "autosmoothquant")
_NAMES = {"smoothquant": "smooth", "awq": "awq", "autosmoothquant": "autosmoothquant"}


def recipe(config: Config, algorithm: str = "smoothquant") -> tuple[str, list[Refusal]]:
    """The config of Quark's algorithms as JSON, and what of ``config`` it cannot say.

    Raises AutoQuantError for an unknown ``algorithm``.
    """
    if algorithm not in ALGORITHMS:
        raise AutoQuantError(f"algorithm '{algorithm}': Quark's configs have {', '.join(ALGORITHMS)}")
    pairs, refused = scale_pairs(config, repeats=True)
    inside, outside = _by_layer(config, pairs)
    spaces, others = whole_spaces(config)
    rotation, unsaid = _rotation(config, spaces)
    sections: list[dict[str, Any]] = [rotation] if rotation else []
    for alpha in dict.fromkeys(pair.alpha for pair in inside):
        section: dict[str, Any] = {"name": _NAMES[algorithm], "scaling_layers": []}
        if algorithm == "smoothquant":
            section["alpha"] = alpha
        section["model_decoder_layers"] = _decoder_layers(inside[0].smooth)
        section["scaling_layers"] = [_scaling(pair) for pair in inside if pair.alpha == alpha]
        sections.append(section)
    content = {
        "algo_config": sections,
        "global_quant_config": _scheme(config),
        "exclude": [path.replace(LAYER, "*") for path in in_float(config)],
    }
    return json.dumps(content, indent=2) + "\n", [*refused, *outside, *others, *unsaid]


def _by_layer(config: Config, pairs: Sequence[ScalePair]) -> tuple[list[ScalePair], list[Refusal]]:
    """The pairs that stand in every decoder layer, and the others."""
    found: list[ScalePair] = []
    refused: list[Refusal] = []
    every = tuple(range(config.model.layers))
    for pair in pairs:
        prefix = _decoder_layers(pair.smooth)
        paths = (pair.smooth, *pair.balance)
        if LAYER not in pair.smooth or any(not path.startswith(f"{prefix}.{LAYER}.") for path in paths):
            refused.append(Refusal(pair.group, "is not within one decoder layer"))
        elif pair.layers != every:
            refused.append(Refusal(pair.group, "does not stand in every decoder layer, or not with one alpha"))
        elif found and _decoder_layers(found[0].smooth) != prefix:
            refused.append(Refusal(pair.group, "stands in other layers than the first group"))
        else:
            found.append(pair)
    return found, refused


def _decoder_layers(path: str) -> str:
    return path.partition(f".{LAYER}")[0]


def _scaling(pair: ScalePair) -> dict[str, Any]:
    start = len(f"{_decoder_layers(pair.smooth)}.{LAYER}.")
    smooth, balance = pair.smooth[start:], [path[start:] for path in pair.balance]
    scaling: dict[str, Any] = {"prev_op": smooth, "layers": balance, "inp": balance[0]}
    if len(balance) > 1:
        parents = [path.rpartition(".")[0] for path in balance]
        scaling["module2inspect"] = parents[0] if len(set(parents)) == 1 else ""
    return scaling


def _rotation(config: Config, spaces: Sequence[WholeSpace]) -> tuple[dict[str, Any], list[Refusal]]:
    """Quark's RotationConfig: R1 over the residual, R2 over the values."""
    refused: list[Refusal] = []
    section: dict[str, Any] = {}
    every = tuple(range(config.model.layers))
    for space in spaces:
        name = f"{space.kind} {space.name}"
        if space.kind == "R1" and not section.get("r1"):
            reason = _not_sequential(space, every)
            if reason is None:
                section |= {"r1": True, **_residual(space)}  # in place of what R2 alone names
                continue
        elif space.kind == "R2" and not section.get("r2"):
            (value, layers), readers = space.writers[0], space.reads[0].linears
            reason = None
            if len(space.writers) > 1 or len(space.reads) > 1 or len(readers) > 1 or layers != every:
                reason = "is not one projection into another in every layer"
            else:
                start = len(f"{_decoder_layers(value)}.{LAYER}.")
                section |= {"r2": True, "v_proj": value[start:], "o_proj": readers[0][start:]}
                section.setdefault("scaling_layers", _named(value))
                continue
        else:
            reason = "a second space of its kind"
        refused.append(Refusal(name, reason))
    if not section:
        return {}, refused
    return {"name": "rotation", "r1": False, "r2": False} | section, refused


def _named(value: str) -> dict[str, Any]:
    """Scaling layers for R2 alone: Quark refuses those that match no module, and does nothing with these."""
    inner = [{"target_modules": [value.replace(LAYER, "layer_id")]}]
    return {"first_layer": inner, "middle_layers": inner, "last_layer": [{"target_modules": []}]}


def _not_sequential(space: WholeSpace, every: tuple[int, ...]) -> str | None:
    """Why the residual is not one of equal layers with an embedding before and one norm behind them."""
    inner = [read for read in space.reads if read.layers]
    outer = [read for read in space.reads if not read.layers]
    if any(read.norm is None for read in space.reads):
        return "a linear reads it behind no norm"
    if any(layers not in ((), every) for _, layers in space.writers) or any(read.layers != every for read in inner):
        return "its layers are not all alike"
    if len(outer) != 1 or not inner:
        return "it is not read by one norm behind the layers"
    return None


def _residual(space: WholeSpace) -> dict[str, Any]:
    """Each writer once, before the norm that reads it next; each norm with all that is behind it."""
    inner = [read for read in space.reads if read.layers]
    outer = next(read for read in space.reads if not read.layers)
    before = [path for path, layers in space.writers if not layers]
    within = [path for path, layers in space.writers if layers]
    between, rest = within[: len(inner) - 1], within[len(inner) - 1 :]

    def pattern(previous: Sequence[str], number: str, norm: str | None, linears: Sequence[str]) -> dict[str, Any]:
        return {
            "prev_modules": [path.replace(LAYER, number) for path in previous],
            "norm_module": str(norm).replace(LAYER, "layer_id"),
            "next_modules": [path.replace(LAYER, "layer_id") for path in linears],
        }

    later = [pattern(between[at : at + 1], "layer_id", read.norm, read.linears) for at, read in enumerate(inner[1:])]
    first = inner[0]
    return {
        "model_decoder_layers": _decoder_layers(str(first.norm)),
        "scaling_layers": {
            "first_layer": [pattern(before, "layer_id", first.norm, first.linears), *later],
            "middle_layers": [pattern(rest, "pre_layer_id", first.norm, first.linears), *later],
            "last_layer": [pattern(rest, "layer_id", outer.norm, outer.linears)],
        },
    }


def _scheme(config: Config) -> dict[str, Any]:
    """Quark's names for the strategy's granularities."""
    scheme = scheme_of(config.quantization.strategy)
    weight: dict[str, Any] = {
        "dtype": "int8",
        "qscheme": "per_channel" if scheme.weight_per_channel else "per_tensor",
        "symmetric": True,
    }
    if scheme.weight_per_channel:
        weight["ch_axis"] = 0
    activation: dict[str, Any] = {"dtype": "int8", "symmetric": True, "is_dynamic": not scheme.activation.is_static}
    activation["qscheme"] = "per_token" if "token" in scheme.activation.value else "per_tensor"
    return {"weight": weight, "input_tensors": activation}
