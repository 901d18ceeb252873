"""A checkpoint quantized layer by layer, in one pass: read, rotate, calibrate, smooth, quantize, write.

The model is built without weights and run by :class:`autoquant.calibration.runner.LayerByLayer`: a layer's tensors are
read, rotated and put in, all calibration windows pass, and what they showed is enough to smooth and quantize the layer
and to give it to the writer. So each tensor is read and rotated once and no more than a layer is in memory, on the CPU
or on a GPU. What ties layers together (a smoothing group over two of them) is left for the end and read again.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autoquant.algorithms.gptq_qronos import needs_values
from autoquant.calibration.idle_experts import idle_experts
from autoquant.calibration.observers import CachedStates, LinearInputs, Sweep
from autoquant.calibration.processes import ALONE, Processes
from autoquant.calibration.runner import LayerByLayer, Progress, headless, layer_paths
from autoquant.checkpoint.dtypes import Dtypes
from autoquant.checkpoint.formats.native import Ready
from autoquant.checkpoint.read_ahead import reading_ahead, to_host
from autoquant.checkpoint.streamed import Weights
from autoquant.config.format import Config, SmoothingMethod, Strategy
from autoquant.errors import AutoQuantError
from autoquant.executor.apply import check_finite
from autoquant.executor.pieces import execute
from autoquant.executor.plan import Plan, Scales
from autoquant.executor.resolved import Resolved, ResolvedGroup, check_not_learned
from autoquant.models.caches import layers_share_cache
from autoquant.models.device import computing_dtype
from autoquant.models.load import build_empty
from autoquant.models.structure import record_untied_
from autoquant.pipeline.quantize import (
    Quantized,
    Selected,
    linear_groups,
    query_key_groups,
    rotation_plan,
    smoothed,
    smoothing_plan,
    smoothing_scales,
    swept_weights,
)
from autoquant.quantizer.kv_cache import MODULE, empty_kv_scales, install_, kv_scales
from autoquant.quantizer.linear import int8_weights, quantize_weight, replace_with_empty_, static_scale
from autoquant.quantizer.strategies import PlannedLinear, kv_granularity, plan_linears
from autoquant.threads import one_arena_


def check_streamable(config: Config, strategy: Strategy, selected: Selected) -> None:
    """Raise AutoQuantError for what cannot be done with one layer in memory, each with its reason."""
    if config.quantization.prefix:  # its keys and values are those of the smoothed model, after the only sweep
        raise AutoQuantError(
            "quantization.prefix: --low-memory cannot compute a prefix, which takes a pass through the smoothed model; "
            "set it to [] or go without --low-memory"
        )
    if selected.resolved.online:  # parameters are put in and dropped by name, and a wrapper changes names
        path = selected.resolved.online[0].path
        raise AutoQuantError(f"{path}: --low-memory cannot put in online rotations; disable them or go without it")
    if needs_values(plan_linears(config, strategy)):  # what is decided in sequence is kept: as much as the model
        raise AutoQuantError(
            "quantization: --low-memory takes scales from maxima and rounds to the nearest value; set activations.clip "
            "to absmax, weights.rounding to nearest and bias_correction to false, or go without it"
        )
    check_not_learned(selected.resolved)  # each step takes gradients through the whole model
    for group in linear_groups(selected).groups:  # a further pass through the smoothed model
        if group.method is SmoothingMethod.DESCENT:
            raise AutoQuantError(
                f"{group.name}: --low-memory cannot find scales by descent, which takes a pass through the smoothed "
                "model; set its method to smoothquant or go without it"
            )


@dataclass(frozen=True, slots=True)
class Place:
    """Where the sweep runs, in which dtype and in how many processes, the first of which finishes what was calibrated;
    all else is computed there in float32, rotations in float64.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    processes: Processes = ALONE


@dataclass(frozen=True, slots=True)
class Job:
    """What is to be done with one checkpoint. ``weights``: as stored; ``batches``: none where nothing is calibrated;
    ``cache``: keys and values are observed; ``together``: nothing is finished before the last layer.
    """

    source: Path
    weights: Weights
    config: Config
    strategy: Strategy
    selected: Selected
    batches: Sequence[Tensor]
    cache: bool
    dtypes: Dtypes
    place: Place = field(default_factory=Place)
    together: bool = False

    @property
    def planned(self) -> tuple[PlannedLinear, ...]:
        """The linears that are quantized."""
        return plan_linears(self.config, self.strategy)


class LayerCalledAgain(Exception):
    """A layer ran again after it was finished: its maxima were not all there."""


@dataclass(slots=True)
class Made:
    """What is written, and what only is known when all of its tensors were taken."""

    ready: Ready
    plan: Plan
    quantized: Quantized = field(default_factory=Quantized)


def quantize_layer_by_layer(job: Job, progress: Progress) -> Made:
    """A rotated, smoothed and quantized checkpoint, computed while its tensors are taken.

    ``progress`` is told of layers. Raises AutoQuantError, also while tensors are taken, where anything does not fit,
    and LayerCalledAgain for a model that has to be done ``together``.
    """
    one_arena_()
    plan = rotation_plan(job.selected, job.weights.inventory, job.weights.read)
    rotated = job.weights.planned(plan)
    ones = {(group.name, group.layer): torch.ones(group.channels) for group in job.selected.resolved.groups}
    final = rotated.planned(smoothing_plan(job.selected, rotated.inventory, rotated.read, ones))
    model = _built(job, final, torch.float32)
    granularity = kv_granularity(job.config, job.strategy)
    replace_with_empty_(model, job.planned)
    assert set(int8_weights(model)) == {linear.weight for linear in job.planned}
    if granularity is not None:
        install_(model, empty_kv_scales(model, granularity))
    model.config.dtype = job.dtypes.most
    described: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    shared: dict[str, str] = {}
    first: dict[str, str] = {}
    state: Mapping[str, Tensor] = model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        is_parameter = name in final.inventory.shapes
        stored_as = first.setdefault(final.inventory.canonical[name], name) if is_parameter else name
        if stored_as != name:
            shared[name] = stored_as
        else:
            wanted = job.dtypes.of(name) if is_parameter and tensor.is_floating_point() else tensor.dtype
            described[name] = (wanted, tuple(tensor.shape))
    made = Made(Ready(model, described, shared, ()), plan)
    layers = list(layer_paths(model))
    run = _Run(job, rotated, final, described, layers)
    made.ready = dataclasses.replace(made.ready, tensors=to_host(run.tensors(made, state, progress)))
    return made


def _built(job: Job, weights: Weights, dtype: torch.dtype) -> Any:
    """The checkpoint's model with its parameters on the meta device and its buffers real, its structure as planned."""
    model = build_empty(job.source, dtype, trust_remote_code=weights.trust_remote_code)
    for name, buffer in model.named_buffers():
        if name in weights.shards.entries:
            buffer.copy_(weights.shards.read(name))
    for plan in weights.plans:
        for path in plan.identities:
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, nn.Identity())
        for name in plan.created:
            owner, _, last = name.rpartition(".")
            empty = torch.empty(weights.inventory.shapes[name], dtype=dtype, device="meta")
            model.get_submodule(owner)._parameters[last] = nn.Parameter(empty, requires_grad=False)
        if plan.untied:
            record_untied_(model)
    return model


def _local(groups: Iterable[ResolvedGroup], layers: Sequence[str]) -> dict[str, tuple[ResolvedGroup, ...]]:
    """The groups by the layer that all of their members are in; those of no or several layers are left out."""
    found: dict[str, list[ResolvedGroup]] = {}
    for group in groups:
        homes = {_home(slot.name, layers) for slot in (*group.sources, *group.targets)}
        if len(homes) == 1 and (home := homes.pop()) is not None:
            found.setdefault(home, []).append(group)
    return {path: tuple(local) for path, local in found.items()}


def _home(name: str, layers: Sequence[str]) -> str | None:
    """The layer that a parameter is in."""
    return next((path for path in layers if name.startswith(f"{path}.")), None)


def _only(selected: Selected, groups: Sequence[ResolvedGroup]) -> Selected:
    return dataclasses.replace(selected, resolved=Resolved((), tuple(groups), ()))


@dataclass(slots=True, eq=False)
class _Run:
    """One pass. ``rotated``: the parameters as the sweep sees them; ``final``: their names as they are written;
    ``local``: groups by the layer that holds all of their members; ``late``: the parameters that no layer decides
    alone; ``held``: those of the present layer, in float32. Mutable, and gone with its tensors.
    """

    job: Job
    rotated: Weights
    final: Weights
    described: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    layers: Sequence[str]
    local: dict[str, tuple[ResolvedGroup, ...]] = field(init=False)
    planned: dict[str, PlannedLinear] = field(init=False)
    late: frozenset[str] = field(init=False)
    held: dict[str, Tensor] = field(default_factory=dict)
    scales: dict[Any, Tensor] = field(default_factory=dict)
    written: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        groups = self.job.selected.resolved.groups
        self.local = _local(groups, self.layers)
        self.planned = {linear.weight: linear for linear in self.job.planned}
        finished = {id(group) for local in self.local.values() for group in local}
        late = {slot.name for group in groups if id(group) not in finished for slot in (*group.sources, *group.targets)}
        for tied in self.final.inventory.ties:
            if len({_home(name, self.layers) for name in tied}) > 1:
                late |= set(tied)
        self.late = frozenset(late)

    def tensors(self, made: Made, state: Mapping[str, Tensor], progress: Progress) -> Iterator[tuple[str, Tensor]]:
        """Every described tensor once."""
        job, weights = self.job, self.rotated
        inside = [n for path in self.layers for n in weights.inventory.shapes if n.startswith(f"{path}.")]
        names = dict.fromkeys((*inside, *weights.inventory.shapes))
        parts = [part.name for name in names for part in weights.stored.get(name, ())]
        entries = {part: weights.shards.entries[part] for part in parts}
        sizes = {name: math.prod(entry.shape) * entry.dtype.itemsize for name, entry in entries.items()}
        with reading_ahead(weights.fetch or weights.shards.read, sizes, job.place.device) as fetch:
            self.rotated = dataclasses.replace(weights, fetch=fetch, device=job.place.device)
            swept = Sweep()
            if job.batches:
                inputs, stored_states = LinearInputs(swept_weights(job.config, job.selected)), CachedStates()
                swept = Sweep(inputs.maxima, stored_states.maxima)
                observers = (inputs, stored_states) if self._sees_cache else (inputs,)
                model = self._model()
                runner = LayerByLayer(weights.inventory, self._for_sweep(model), job.place.device, job.place.processes)
                with headless(model, inputs.names):
                    passed: set[str] = set()
                    for path in runner.steps(model, job.batches, observers, progress):
                        if path in passed and not job.together:
                            raise LayerCalledAgain(path)
                        passed.add(path)
                        if job.place.processes.is_first and not job.together:
                            yield from self._layer(path, swept)
                        self.held.clear()
            if not job.place.processes.is_first:
                return
            swept = yield from self._rest(swept)
        made.quantized = Quantized(idle=idle_experts(job.planned, swept.inputs))
        granularity = kv_granularity(job.config, job.strategy)
        if granularity is not None and granularity.is_static:
            found = kv_scales(made.ready.model, granularity, swept.cache)
            assert found.key is not None and found.value is not None
            yield from ((f"{MODULE}.key", found.key), (f"{MODULE}.value", found.value))
        for name in self.described:
            if name not in self.final.inventory.shapes and not state[name].is_meta and not name.startswith(MODULE):
                yield name, state[name]

    @property
    def _sees_cache(self) -> bool:
        return self.job.cache or bool(query_key_groups(self.job.selected))

    def _model(self) -> Any:
        """The model that the text goes through."""
        model = _built(self.job, self.rotated, self.job.place.dtype)
        if not (self._sees_cache or layers_share_cache(model.config)):  # it would grow with every layer
            model.config.use_cache = False
        for module in model.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(self.job.place.device)
        return model

    def _for_sweep(self, model: Any) -> Callable[[str], Tensor]:
        """A function that gives a parameter as the sweep wants it and keeps it as it is."""

        def read(name: str) -> Tensor:
            dtype = computing_dtype(model, name, self.job.place.dtype)
            if _home(name, self.layers) is None:
                return self.rotated.rounded(name, dtype)
            tensor = self.held[self.rotated.inventory.canonical[name]] = self.rotated.read(name)
            return tensor.to(dtype)

        return read

    def _read(self, name: str) -> Tensor:
        held = self.held.get(self.rotated.inventory.canonical[name])
        return self.rotated.read(name) if held is None else held

    def _layer(self, path: str, swept: Sweep) -> Iterator[tuple[str, Tensor]]:
        """What of a layer is final now."""
        names = [name for name in self.final.inventory.shapes if name.startswith(f"{path}.")]
        here = _only(self.job.selected, self.local.get(path, ()))
        scales = smoothing_scales(here, swept, self._read)
        plan = smoothing_plan(here, self.rotated.inventory, self._read, scales)
        after = smoothed(here, swept, scales)
        self.scales |= scales
        for name in names:
            if name in self.late or self.final.inventory.canonical[name] != name:
                continue
            tensor = self._read(name)
            if operations := plan.operations.get(name, ()):
                tensor = execute(operations, tensor)
                check_finite(name, tensor, "overflows float32 when transformed")
            yield from self._finished(name, tensor, after)

    def _rest(self, swept: Sweep) -> Generator[tuple[str, Tensor], None, Sweep]:
        """All that is not written yet; returns the maxima of the smoothed model."""
        selected, weights = self.job.selected, self.rotated
        left = [g for g in selected.resolved.groups if (g.name, g.layer) not in self.scales]
        scales: Scales = self.scales | smoothing_scales(_only(selected, left), swept, weights.read)
        if selected.resolved.groups:
            weights = weights.planned(smoothing_plan(selected, weights.inventory, weights.read, scales))
            swept = smoothed(selected, swept, scales)
        for name in weights.inventory.shapes:
            if name not in self.written and weights.inventory.canonical[name] == name:
                linear = name in self.planned
                tensor = weights.read(name) if linear else weights.rounded(name, self.described[name][0])
                yield from self._finished(name, tensor, swept)
        return swept

    def _finished(self, name: str, tensor: Tensor, swept: Sweep) -> Iterator[tuple[str, Tensor]]:
        """A parameter as it is written."""
        self.written.add(name)
        linear = self.planned.get(name)
        if linear is None:
            dtype, _ = self.described[name]
            tensor = tensor.to(dtype)
            check_finite(name, tensor, f"overflows {dtype}")
            unused = self.rotated.unused
            yield name, tensor if unused is None else unused.restored(name, tensor)
            return
        check_finite(name, tensor)
        input_scale = static_scale(linear, swept.inputs)
        values, scale = quantize_weight(tensor, linear.in_dim, linear.scheme, linear.weights.clip)
        yield f"{name}.values", values
        yield f"{name}.scale", scale
        if input_scale is not None:
            yield f"{name}.input_scale", input_scale
