"""The order of work on one model: untie, fold, rotate -> one calibration sweep -> smooth -> fix prefix -> quantize.

Each step is a function of its own, so that many strategies can share what they have in common. Rotation comes before
the sweep because static scales must be those of the rotated activations; smoothing comes after it because what it does
to a maximum follows by arithmetic. The sweep runs behind the prefix of the rotated model; the one that is kept is that
of the smoothed model, whose keys and values differ.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from autoquant.algorithms.gptq_qronos import needs_values, round_in_sequence
from autoquant.algorithms.query_key import key_scales, scaled_keys
from autoquant.algorithms.scale_search import Chosen
from autoquant.algorithms.smoothquant import group_scales
from autoquant.calibration.group_maxima import group_maxima
from autoquant.calibration.idle_experts import IdleExperts, idle_experts
from autoquant.calibration.observers import Sweep
from autoquant.config.format import Config, RotationMethod, SmoothingKind, Strategy
from autoquant.errors import AutoQuantError
from autoquant.executor.plan import Plan, Scales, make_plan
from autoquant.executor.resolve import resolve
from autoquant.executor.resolved import Resolved, ResolvedGroup, ResolvedSpace, check_not_learned
from autoquant.models.fit import check_structure
from autoquant.models.reading import Batch, texts
from autoquant.models.structure import ModelStructure, structure_of
from autoquant.pipeline.held import InMemory
from autoquant.pipeline.select import Transforms, resolve_transforms
from autoquant.quantizer.kv_cache import quantize_cache_
from autoquant.quantizer.linear import Rounded, quantize_
from autoquant.quantizer.strategies import kv_granularity, needs_calibration, plan_linears


@dataclass(frozen=True, slots=True)
class Selected:
    """What is done before quantization. ``value_heads``: the per-head value spaces, rotated or not."""

    resolved: Resolved
    value_heads: tuple[ResolvedSpace, ...] = ()


def select(config: Config, inventory: ModelStructure, transforms: Transforms, seed: int | None = None) -> Selected:
    """The spaces, groups and online rotations that ``transforms`` asks for, among those that the config enables.

    Left out are groups that serve no quantized linear and groups of linears that are rotated online, whose inputs
    need no smoothing. Raises AutoQuantError where the config does not fit the model.
    """
    if not transforms.rotates and not transforms.alphas:
        check_structure(config, inventory)
        return Selected(Resolved((), (), ()))
    resolved = resolve_transforms(config, inventory, transforms, seed, keys=True)
    quantized = {linear.weight for linear in plan_linears(config)}
    wrapped = tuple(f"{rotation.path}." for rotation in resolved.online if rotation.kind != "R3")

    def wanted(group: ResolvedGroup) -> bool:
        members = [slot.name for slot in (*group.sources, *group.targets)]
        serves = group.kind is SmoothingKind.QUERY_KEY or any(slot.name in quantized for slot in group.targets)
        return serves and not any(name.startswith(wrapped) for name in members if wrapped)

    groups = tuple(group for group in resolved.groups if wanted(group))
    heads = [space.name for space in config.rotation.spaces if space.kind == "R2"]
    value_heads = resolve(config, inventory, only=heads).spaces if heads else ()
    return Selected(dataclasses.replace(resolved, groups=groups), value_heads)


def rotation_plan(
    selected: Selected, inventory: ModelStructure, read: Callable[[str], Tensor], *, learned_later: bool = False
) -> Plan:
    """The plan of everything that comes before the sweep.

    A space whose rotation is to be learned gets the Hadamard rotation that learning starts from. Raises AutoQuantError
    for one unless the caller says, by ``learned_later``, that it goes on with ``learn_rotations_``.
    """
    resolved = selected.resolved
    if not learned_later:
        check_not_learned(resolved)
    return make_plan(Resolved(resolved.spaces, (), resolved.online), inventory, read, None)


def smoothing_plan(
    selected: Selected, inventory: ModelStructure, read: Callable[[str], Tensor], scales: Scales
) -> Plan:
    """The plan of what comes after the sweep; ``inventory`` and ``read`` are those of the rotated model."""
    return make_plan(Resolved((), selected.resolved.groups, ()), inventory, read, scales)


@torch.no_grad()
def rotate_(model: nn.Module, selected: Selected, *, learned_later: bool = False) -> Plan:
    """Untie, fold and rotate a model in place; online rotations are installed. ``learned_later`` as above."""
    plan = rotation_plan(selected, structure_of(model), model.get_parameter, learned_later=learned_later)
    InMemory(model).execute_(plan)
    return plan


def swept_weights(config: Config, selected: Selected) -> tuple[str, ...]:
    """Names of the weights whose inputs a sweep has to see, for any strategy."""
    names = [linear.weight for linear in plan_linears(config)]
    names += [slot.name for group in linear_groups(selected).groups for slot in group.targets]
    return tuple(dict.fromkeys(names))


def smoothing_scales(
    selected: Selected, swept: Sweep, read: Callable[[str], Tensor], known: dict[Any, Tensor] | None = None
) -> dict[Any, Tensor]:
    """Scales of every selected group; ``read`` gives the rotated model's parameters, ``known`` what of their maxima
    was found before, as of :func:`autoquant.algorithms.smoothquant.group_scales`.

    Those of query-key groups come from the cached keys. Raises AutoQuantError where these were not observed, or are
    rotated online.
    """
    resolved = linear_groups(selected)
    with warnings.catch_warnings():  # dead channels keep scale 1: nothing that a caller could act on
        warnings.simplefilter("ignore", UserWarning)
        scales = group_scales(resolved, group_maxima(resolved, swept.inputs), read, known=known)
    for group in query_key_groups(selected):
        where = f"{group.name} (layer {group.layer})"
        if any(online.kind == "R3" for online in selected.resolved.online):
            raise AutoQuantError(f"{where}: R3 rotates what the group scales: enable one of the two")
        keys = swept.cache.get("key", {})
        if group.layer is None or group.layer not in keys:
            raise AutoQuantError(f"{where}: no cached keys were observed, which query_key groups need")
        scales[group.name, group.layer] = key_scales(group, keys[group.layer])
    return scales


def with_found(selected: Selected, chosen: Mapping[tuple[str, int | None], Chosen]) -> tuple[Selected, Scales]:
    """The groups for which further scales were found on a smoothed model, and these scales."""
    groups = tuple(group for group in selected.resolved.groups if (group.name, group.layer) in chosen)
    found = dataclasses.replace(selected, resolved=Resolved((), groups, ()))
    return found, {key: one.scales.cpu() for key, one in chosen.items()}


def query_key_groups(selected: Selected) -> tuple[ResolvedGroup, ...]:
    """The selected groups that scale cached keys; a sweep has to observe the cache for them."""
    return tuple(group for group in selected.resolved.groups if group.kind is SmoothingKind.QUERY_KEY)


def linear_groups(selected: Selected) -> Resolved:
    """The groups whose targets are columns of linears."""
    groups = tuple(group for group in selected.resolved.groups if group.kind is not SmoothingKind.QUERY_KEY)
    return Resolved((), groups, ())


def smoothed(selected: Selected, swept: Sweep, scales: Scales) -> Sweep:
    """What a sweep of the smoothed model would find: each channel's maximum times the scale of its source."""
    inputs = dict(swept.inputs)
    cache = {kind: dict(maxima) for kind, maxima in swept.cache.items()}
    values = cache.get("value", {})
    for group in query_key_groups(selected):
        assert group.layer is not None  # or there would be no scales
        cache["key"][group.layer] = scaled_keys(group, scales[group.name, group.layer], cache["key"][group.layer])
    for group in linear_groups(selected).groups:
        s = scales[group.name, group.layer].double().cpu()
        for slot in group.targets:
            factors = slot.axis.gather(s**slot.power, 1.0).to(inputs[slot.name].device)
            maximum = inputs[slot.name]
            inputs[slot.name] = (maximum.double() * factors.reshape(-1, maximum.shape[-1])).view(maximum.shape).float()
        if values and group.kind is SmoothingKind.LINEAR_LINEAR and group.layer in values:
            values[group.layer] = _smoothed_values(selected, group, s, values[group.layer])
    return Sweep(inputs, cache)


def _smoothed_values(selected: Selected, group: ResolvedGroup, s: Tensor, maximum_HD: Tensor) -> Tensor:
    """The maxima of a layer's cached values after a group scaled their rows, or as they were if it scaled others.

    A per-head space tells which row makes which channel of which head.
    """
    sources = {slot.name: slot for slot in group.sources}
    for space in selected.value_heads:
        for writer in space.writers if space.layer == group.layer else ():
            slot = sources.get(writer.name)
            if slot is None or slot.axis.dim != writer.axis.dim:
                continue
            positions = (slot.axis.channels >= 0) & (writer.axis.channels >= 0)
            factors = torch.ones(maximum_HD.numel(), dtype=torch.float64)
            factors[writer.axis.channels[positions]] = s[slot.axis.channels[positions]] ** slot.power
            return (maximum_HD.double() * factors.view(maximum_HD.shape).to(maximum_HD.device)).float()
    if group.channels == maximum_HD.numel():
        raise AutoQuantError(
            f"{group.name} (layer {group.layer}): may scale the cached values, and no per-head space of the config "
            "tells which: choose a strategy without a static cache, or disable the group"
        )
    return maximum_HD


def smooth_(model: nn.Module, selected: Selected, swept: Sweep) -> Sweep:
    """Smooth a rotated model in place; returns the maxima as they are afterwards."""
    return smooth_held_(InMemory(model), selected, swept)


@torch.no_grad()
def smooth_held_(held: InMemory, selected: Selected, swept: Sweep) -> Sweep:
    """What :func:`smooth_` does, wherever the parameters are."""
    if not selected.resolved.groups:
        return swept
    scales = smoothing_scales(selected, swept, held.read)
    held.execute_(smoothing_plan(selected, held.inventory, held.read, scales))
    return smoothed(selected, swept, scales)


@dataclass(frozen=True, slots=True)
class Quantized:
    """What quantization did beyond replacing linears: biases made for a correction, the output error of each linear
    that was decided in sequence (a share of the squared output), the weights that fell back to maxima, and the experts
    that no calibration token reached.
    """

    created: tuple[str, ...] = ()
    errors: Mapping[str, float] = field(default_factory=dict)
    nearest: tuple[str, ...] = ()
    idle: IdleExperts = field(default_factory=dict)


@torch.no_grad()
def quantize_model_(
    model: nn.Module,
    config: Config,
    strategy: Strategy,
    swept: Sweep,
    batches: Sequence[Batch] = (),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Quantized:
    """Replace a prepared model's linears, and its cache where the strategy has one, by int8.

    Windows of text among ``batches`` are needed where the config asks for more than maxima: clipped scales, rounding
    against the output error, bias correction. Raises AutoQuantError without them.
    """
    planned = plan_linears(config, strategy)
    rounded: Mapping[str, Rounded] = {}
    missed: tuple[str, ...] = ()
    if needs_values(planned):
        if not texts(batches):
            raise AutoQuantError("quantization.weights and .activations ask for calibration text: there is none")
        rounded, missed = round_in_sequence(model, planned, texts(batches), progress)
    quantize_(model, planned, swept.inputs, rounded)
    granularity = kv_granularity(config, strategy)
    if granularity is not None:
        quantize_cache_(model, granularity, swept.cache)
    corrected = [entry for entry in planned if entry.weight in rounded and entry.weights.bias_correction]
    created = tuple(f"{entry.path}.bias" for entry in corrected if entry.bias is None)
    errors = {name: one.error for name, one in rounded.items()}
    return Quantized(created, errors, missed, idle_experts(planned, swept.inputs))


def needs_sweep(config: Config, strategy: Strategy, selected: Selected) -> bool:
    """True if anything has to be calibrated."""
    planned = plan_linears(config, strategy)
    static = needs_calibration(planned, kv_granularity(config, strategy))
    learned = any(space.method is RotationMethod.LEARNED for space in selected.resolved.spaces)
    return static or learned or needs_values(planned) or bool(selected.resolved.groups)
