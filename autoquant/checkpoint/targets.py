"""What serves a checkpoint of a format, and what of W8A8 int8 it takes.

The table is ``targets.json``: facts of one version of each, named there. A target refuses before the work, and names
the nearest thing that it takes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from autoquant.config.format import Config, StaticClip, Strategy
from autoquant.config.layers import LAYER, fill, layer_numbers
from autoquant.config.spelling import did_you_mean_or
from autoquant.errors import AutoQuantError
from autoquant.quantizer.strategies import Granularity, PlannedLinear, plan_linears, scheme_of

DEFAULT_TARGET = "vllm"
ANY = "any"
"""What every target of the first one's format takes."""
_TABLE = Path(__file__).with_name("targets.json")


@dataclass(frozen=True, slots=True)
class Target:
    """What one server takes. ``form``: the format of the folders that it reads. ``weights`` and ``activations``: of
    dense linears; the same of experts, empty where it takes no int8 experts. ``float_experts``: it loads those that
    stay in floating point. ``lm_head``: it may be int8. ``readers_alike``: linears of one module that read one
    tensor share a scheme and a static input scale. ``version``: what it was read from. ``head_is_table``: model
    classes whose head is the embedding table even where the folder has another; ``regrouped``: the linear, by model
    class, of which every tensor is regrouped by heads as it is read, so that none may be of one element;
    ``unquantized``: last names of linears that its classes have in floating point alone; ``towers``: it runs int8
    linears that images or sound reach and text does not; ``encoder_decoders``: the classes with an encoder and a
    decoder that it serves, None: all.
    """

    name: str
    version: str
    form: str
    weights: frozenset[str]
    activations: frozenset[Granularity]
    expert_weights: frozenset[str]
    expert_activations: frozenset[Granularity]
    float_experts: bool
    lm_head: bool
    readers_alike: bool
    head_is_table: frozenset[str]
    regrouped: Mapping[str, str]
    unquantized: frozenset[str]
    towers: bool
    encoder_decoders: frozenset[str] | None
    notes: tuple[str, ...]


@cache
def targets() -> Mapping[str, Target]:
    """All targets by their names, ``any`` the last."""
    table = json.loads(_TABLE.read_text(encoding="utf-8"))
    known = {name: _target(name, row) for name, row in table.items()}
    alike = tuple(target for target in known.values() if target.form == known[DEFAULT_TARGET].form)
    return {**known, ANY: _all_of(alike)}


def target_named(name: str) -> Target:
    """A target by its name. Raises AutoQuantError with the nearest name where there is none."""
    known = targets()
    if name not in known:
        raise AutoQuantError(f"no target '{name}'{did_you_mean_or(name, list(known))}")
    return known[name]


def reasons_against(
    name: str,
    config: Config,
    model_class: str | None = None,
    *,
    untied: bool = False,
    in_two: bool = False,
    towers: Sequence[str] = (),
) -> tuple[str, ...]:
    """Why a target does not take what a config makes, a sentence each with the nearest thing that it takes.

    ``untied``: the model's head is no longer the embedding table; ``in_two``: it has an encoder and a decoder;
    ``towers``: linears that are quantized and that text does not reach. Without ``model_class`` facts of classes are
    unasked.
    """
    target, planned = target_named(name), plan_linears(config)
    roles = {linear.weight: linear.role for linear in config.model.linears}
    reasons = []
    stacks = [linear.path for linear in config.model.linears if linear.stack is not None]
    if stacks and not (target.float_experts or target.expert_weights):
        reasons.append(f"{stacks[0]}: {name} ({target.version}) loads no experts; the nearest is the target vllm")
    if untied and model_class in target.head_is_table:
        reasons.append(
            f"lm_head: {name} ({target.version}) takes the head of {model_class} for the embedding table, and a "
            "rotated residual (R1) makes the two differ; the nearest is --transforms smooth+fc_fc, or that space "
            "disabled"
        )
    if in_two and target.encoder_decoders is not None and model_class not in target.encoder_decoders:
        reasons.append(
            f"{name} ({target.version}) is not known to serve {model_class}, an encoder and a decoder; the nearest "
            "is --format native, which runs in autoquant"
        )
    if towers and not target.towers:
        reasons.append(
            f"{towers[0]}: {name} ({target.version}) is not known to run int8 linears that images or sound alone "
            "reach; the nearest is these excluded (quantization.exclude)"
        )
    if not target.lm_head:
        reasons += [
            f"{p.path}: {name} takes no int8 lm_head; exclude it" for p in planned if roles.get(p.weight) == "lm_head"
        ]
    reasons += _scheme_reasons(target, config.quantization.strategy, planned)
    plain = {_last(linear.path): linear.path for linear in planned if _last(linear.path) in target.unquantized}
    reasons += [
        f"{path}: {name} ({target.version}) has it in floating point; the nearest is it excluded (quantization.exclude)"
        for path in plain.values()
    ]
    fused = None if model_class is None else target.regrouped.get(model_class)
    if fused is not None:
        reasons += _regrouped_reasons(target, fused, planned)
    if target.readers_alike:
        reasons += _reader_reasons(target, config, planned)
    return tuple(reasons)


def nearest(strategy: Strategy, target: Target) -> Strategy:
    """The strategy that a target takes and that loses least: finer scales in place of coarser ones, no int8 cache."""
    weight, activation = _scheme_names(strategy)
    weight = weight if weight in target.weights else "per_channel"
    if activation not in target.activations:
        dynamic = Granularity.TOKEN_DYNAMIC in target.activations
        activation = Granularity.TOKEN_DYNAMIC if dynamic else Granularity.TENSOR_STATIC
    if activation is Granularity.TOKEN_DYNAMIC:
        weight = "per_channel"  # the eight have no other with it
    return Strategy(f"w_int8_{weight}_a_int8_{activation.value}")


def _scheme_names(strategy: Strategy) -> tuple[str, Granularity]:
    scheme = scheme_of(strategy)
    return "per_channel" if scheme.weight_per_channel else "per_tensor", scheme.activation


def _scheme_reasons(target: Target, strategy: Strategy, planned: Iterable[PlannedLinear]) -> Iterator[str]:
    """One reason for each scheme that is not taken, naming one of its linears."""
    seen = set()
    for linear in planned:
        weight = "per_channel" if linear.scheme.weight_per_channel else "per_tensor"
        stacked, activation = linear.stack is not None, linear.scheme.activation
        weights, activations = (
            (target.expert_weights, target.expert_activations) if stacked else (target.weights, target.activations)
        )
        if (weight, activation, stacked) in seen or (weight in weights and activation in activations):
            continue
        seen.add((weight, activation, stacked))
        what = f"int8 {'experts' if stacked else 'linears'} {_words(weight)} / {_words(activation.value)}"
        if stacked and weights:
            near = f"{nearest(Strategy.PER_CHANNEL_PER_TOKEN, target).value} for these, by quantization.overrides"
        elif stacked:
            near = "these in floating point, by quantization.exclude"
        else:
            near = nearest(strategy, target).value
        yield f"{linear.path}: {target.name} ({target.version}) takes no {what}; the nearest is {near}"


def _regrouped_reasons(target: Target, name: str, planned: Iterable[PlannedLinear]) -> Iterator[str]:
    """One reason if a linear of this name has a scale of one element, of its weight or of its input."""
    for linear in planned:
        single = linear.scheme.is_static or not linear.scheme.weight_per_channel
        if single and _last(linear.path) == name:
            near = nearest(Strategy.PER_CHANNEL_PER_TOKEN, target).value
            yield (
                f"{linear.path}: {target.name} ({target.version}) regroups each of its tensors by heads, and a scale "
                f"of one element ends in an error there; the nearest is {near} for it, by quantization.overrides"
            )
            return


def _last(path: str) -> str:
    return path.rpartition(".")[2]


def _words(name: str) -> str:
    return name.replace("_", " ")


def _reader_reasons(target: Target, config: Config, planned: Iterable[PlannedLinear]) -> Iterator[str]:
    """One reason for each module whose readers of one tensor differ."""
    by_weight = {linear.weight: linear for linear in planned}
    for weights in readers(config):
        found = [by_weight.get(weight) for weight in weights]
        names = ", ".join(weight.removesuffix(".weight") for weight in weights)
        if len({None if one is None else one.scheme for one in found}) > 1:
            yield f"{names}: {target.name} ({target.version}) makes one module of them; give them one strategy"
        static = [one for one in found if one is not None and one.scheme.is_static]
        clips = {(one.activations.clip, one.activations.percentile) for one in static}
        if len(static) > 1 and (len(clips) > 1 or {clip for clip, _ in clips} == {StaticClip.OUTPUT}):
            yield (
                f"{names}: {target.name} ({target.version}) has one static input scale for them, and clip 'output' or "
                "different clips make several; the nearest is clip 'mse' for all of them"
            )


def readers(config: Config) -> tuple[tuple[str, ...], ...]:
    """Weights of one module's linears that read one tensor, two at least, as far as the config's claims tell."""
    plain = {one.weight for one in config.model.linears if one.stack is None and one.role == "linear"}
    read = [
        (read.layers or space.layers, [r.path for r in read.readers])
        for space in config.rotation.spaces
        for read in space.reads
    ]
    read += [(group.layers, [slot.path for slot in group.targets]) for group in config.smoothing.groups]
    found: dict[tuple[str, ...], None] = {}
    for layers, paths in read:
        parents: dict[str, list[str]] = {}
        for path in paths:
            if path in plain:
                parents.setdefault(path.rpartition(".")[0].rpartition(".")[0], []).append(path)
        for members in parents.values():
            numbers = layer_numbers(layers) if layers is not None else ()
            for layer in numbers if LAYER in members[0] else (None,):
                filled = tuple(sorted({path if layer is None else fill(path, layer) for path in members}))
                if len(filled) > 1:
                    found[filled] = None
    return tuple(found)


def _target(name: str, row: Mapping[str, object]) -> Target:
    def listed(key: str) -> list[str]:
        values = row[key]
        assert isinstance(values, list)
        return [str(value) for value in values]

    versions = row["read_from"]
    regrouped = row["regrouped"]
    assert isinstance(versions, dict) and isinstance(regrouped, dict)
    return Target(
        name,
        ", ".join(f"{package} {version}" for package, version in versions.items()),
        str(row["format"]),
        frozenset(listed("weights")),
        frozenset(map(Granularity, listed("activations"))),
        frozenset(listed("expert_weights")),
        frozenset(map(Granularity, listed("expert_activations"))),
        row["float_experts"] is True,
        row["lm_head"] is True,
        row["readers_alike"] is True,
        frozenset(listed("head_is_table")),
        {str(one): str(linear) for one, linear in regrouped.items()},
        frozenset(listed("unquantized")),
        row["towers"] is True,
        None if row["encoder_decoders"] is None else frozenset(listed("encoder_decoders")),
        tuple(listed("notes")),
    )


def _all_of(every: tuple[Target, ...]) -> Target:
    in_two = [target.encoder_decoders for target in every if target.encoder_decoders is not None]
    return Target(
        ANY,
        ", ".join(target.name for target in every),
        every[0].form,
        frozenset.intersection(*(target.weights for target in every)),
        frozenset.intersection(*(target.activations for target in every)),
        frozenset.intersection(*(target.expert_weights for target in every)),
        frozenset.intersection(*(target.expert_activations for target in every)),
        all(target.float_experts for target in every),
        all(target.lm_head for target in every),
        any(target.readers_alike for target in every),
        frozenset.union(*(target.head_is_table for target in every)),
        {one: linear for target in every for one, linear in target.regrouped.items()},
        frozenset.union(*(target.unquantized for target in every)),
        all(target.towers for target in every),
        frozenset.intersection(*in_two) if in_two else None,
        (),
    )
