"""A checkpoint quantized layer by layer, in one pass: read, rotate, calibrate, smooth, quantize, write.

The model is built without weights and run by :class:`autoquant.calibration.runner.LayerByLayer`: a layer's tensors are
read, rotated and put in, all calibration windows pass, and what they showed is enough to smooth and quantize the layer
and to give it to the writer. So each tensor is read and rotated once and no more than a layer is in memory, on the CPU
or on a GPU. What ties layers together (a smoothing group over two of them) is left for the end and read again.

Linears that are decided in sequence (GPTQ, Qronos, clipped scales, corrected biases) want the smoothed model: what the
pass showed smooths all of it, and in a second one, in float32, each layer is read again, decided and written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autoquant.algorithms.gptq_qronos import Run, decide_linear, missed, needs_values, visiting, windows_twice
from autoquant.calibration.idle_experts import idle_experts
from autoquant.calibration.observers import CachedStates, LinearInputs, Sweep
from autoquant.calibration.processes import ALONE, Processes
from autoquant.calibration.runner import LayerByLayer, Progress, headless, layer_paths
from autoquant.checkpoint.dtypes import Dtypes
from autoquant.checkpoint.formats.native import Ready
from autoquant.checkpoint.read_ahead import read_ahead, to_host
from autoquant.checkpoint.streamed import Weights
from autoquant.config.format import Config, SmoothingMethod, Strategy
from autoquant.errors import AutoQuantError
from autoquant.executor.apply import check_finite
from autoquant.executor.online import check_installable, install_
from autoquant.executor.pieces import execute
from autoquant.executor.plan import Plan, Scales
from autoquant.executor.resolved import Resolved, ResolvedGroup, check_not_learned
from autoquant.models.caches import layers_share_cache
from autoquant.models.device import computing_dtype
from autoquant.models.load import build_empty
from autoquant.models.locate import WRAPPED
from autoquant.models.reading import Batch, texts
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
from autoquant.quantizer.kv_cache import MODULE, empty_kv_scales, kv_scales
from autoquant.quantizer.kv_cache import install_ as install_kv_cache_
from autoquant.quantizer.linear import Rounded, int8_weights, quantize_weight, replace_with_empty_, static_scale
from autoquant.quantizer.prefix import Prefix, install_prefix_
from autoquant.quantizer.strategies import PlannedLinear, kv_granularity, plan_linears
from autoquant.threads import one_arena_


def check_streamable(config: Config, strategy: Strategy, selected: Selected, *, further: bool = False) -> None:
    """Raise AutoQuantError for what cannot be done with one layer in memory, each with its reason; ``further``: there
    are passes through the smoothed model, and nothing is written.
    """
    if config.quantization.prefix and not further:  # its keys and values are those of the smoothed model
        raise AutoQuantError(
            "quantization.prefix: --low-memory cannot compute a prefix, which takes a pass through the smoothed model; "
            "set it to [] or go without --low-memory"
        )
    for linear in plan_linears(config, strategy):  # which linears a pass reaches is known when it is over
        if lacks_bias(linear) and not further:
            raise AutoQuantError(
                f"quantization.weights.bias_correction: --low-memory cannot make the bias that {linear.path} lacks; "
                "set it to false or go without --low-memory"
            )
    check_not_learned(selected.resolved)  # each step takes gradients through the whole model
    for group in linear_groups(selected).groups:
        if group.method is SmoothingMethod.DESCENT and not further:
            raise AutoQuantError(
                f"{group.name}: --low-memory cannot find scales by descent, which takes a pass through the smoothed "
                "model; set its method to smoothquant or go without it"
            )


def lacks_bias(linear: PlannedLinear) -> bool:
    """True if a bias has to be made for a correction."""
    return linear.weights.bias_correction and linear.bias is None and linear.stack is None


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
    batches: Sequence[Batch]
    cache: bool
    dtypes: Dtypes
    place: Place = field(default_factory=Place)
    together: bool = False

    @property
    def planned(self) -> tuple[PlannedLinear, ...]:
        """The linears that are quantized."""
        return plan_linears(self.config, self.strategy)

    @property
    def in_sequence(self) -> bool:
        """True if linears are decided one after the other, which takes a pass of its own."""
        return bool(self.batches) and needs_values(self.planned)


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
    model = _built(job.source, final, torch.float32)
    granularity = kv_granularity(job.config, job.strategy)
    replace_with_empty_(model, job.planned)
    names = _written_names(model, plan)
    values = [f"{linear.weight}.values" for linear in job.planned]
    assert {f"{name}.values" for name in int8_weights(model)} == {names.get(name, name) for name in values}
    if granularity is not None:
        install_kv_cache_(model, empty_kv_scales(model, granularity))
    model.config.dtype = job.dtypes.most
    described: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    shared: dict[str, str] = {}
    first: dict[str, str] = {}
    plain = {written: name for name, written in names.items()}
    state: Mapping[str, Tensor] = {plain.get(n, n): one for n, one in model.state_dict(keep_vars=True).items()}
    for name, tensor in state.items():
        is_parameter = name in final.inventory.shapes
        stored_as = first.setdefault(final.inventory.canonical[name], name) if is_parameter else name
        if stored_as != name:
            shared[name] = stored_as
        else:
            wanted = job.dtypes.of(name) if is_parameter and tensor.is_floating_point() else tensor.dtype
            described[name] = (wanted, tuple(tensor.shape))
    written = {names.get(name, name): one for name, one in described.items()}
    made = Made(Ready(model, written, {names.get(n, n): names.get(one, one) for n, one in shared.items()}, ()), plan)
    run = Stream(job, rotated, final, described, list(layer_paths(model)))
    tensors = ((names.get(name, name), tensor) for name, tensor in run.tensors(made, state, progress))
    made.ready = dataclasses.replace(made.ready, tensors=to_host(tensors))
    return made


def _written_names(model: nn.Module, plan: Plan) -> dict[str, str]:
    """The names in the model's state of what is inside the wrappers of online rotations, by the name without them."""
    paths = {one.path: f"{one.path}.{WRAPPED}" for one in plan.online if one.kind != "R3"}
    return {
        f"{path}.{last}": f"{inside}.{last}"
        for path, inside in paths.items()
        for last in model.get_submodule(inside).state_dict(keep_vars=True)
    }


def _built(source: Path, weights: Weights, dtype: torch.dtype) -> Any:
    """The checkpoint's model with its parameters on the meta device and its buffers real, its structure as planned."""
    model = build_empty(source, dtype, trust_remote_code=weights.trust_remote_code)
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
        check_installable(model, plan.online)
        install_(model, plan.online)
    return model


def runnable(
    source: Path,
    weights: Weights,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    cache: bool = False,
    prefix: Prefix | None = None,
) -> Any:
    """A model for :class:`LayerByLayer`: its parameters on the meta device, its buffers on ``device``; ``cache``: what
    it stores of keys and values is looked at; ``prefix``: what it begins with.
    """
    model = _built(source, weights, dtype)
    if not (cache or layers_share_cache(model.config)):  # it would grow with every layer
        model.config.use_cache = False
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)
    if prefix is not None:
        install_prefix_(model, prefix)
    return model


def _local(groups: Iterable[ResolvedGroup], layers: Sequence[str]) -> dict[str, tuple[ResolvedGroup, ...]]:
    """The groups by the layer that all of their members are in; those of no or several layers are left out."""
    found: dict[str, list[ResolvedGroup]] = {}
    for group in groups:
        homes = {home_of(slot.name, layers) for slot in (*group.sources, *group.targets)}
        if len(homes) == 1 and (home := homes.pop()) is not None:
            found.setdefault(home, []).append(group)
    return {path: tuple(local) for path, local in found.items()}


def home_of(name: str, layers: Iterable[str]) -> str | None:
    """The layer that a parameter is in."""
    return next((path for path in layers if name.startswith(f"{path}.")), None)


def _only(selected: Selected, groups: Sequence[ResolvedGroup]) -> Selected:
    return dataclasses.replace(selected, resolved=Resolved((), tuple(groups), ()))


class Seen:
    """The observers of a sweep; what they saw fills ``swept``."""

    def __init__(self, weights: Iterable[str]) -> None:
        self.inputs, self.stored = LinearInputs(weights), CachedStates()
        self.swept = Sweep(self.inputs.maxima, self.stored.maxima)


@dataclass(slots=True, eq=False)
class Stream:
    """A checkpoint on its way through memory. ``rotated``: the parameters as the sweep sees them; ``final``: their
    names as they are written; ``local``: groups by the layer that holds all of their members; ``late``: the parameters
    that no layer decides alone; ``held``: those of the present layer, in float32; ``decided``: linears that are not
    written yet; ``prefix``: what passes begin with. Mutable, and gone with its tensors.
    """

    job: Job
    rotated: Weights
    final: Weights
    described: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    layers: Sequence[str]
    local: dict[str, tuple[ResolvedGroup, ...]] = field(init=False)
    planned: dict[str, PlannedLinear] = field(init=False)
    by_bias: dict[str, PlannedLinear] = field(init=False)
    late: frozenset[str] = field(init=False)
    held: dict[str, Tensor] = field(default_factory=dict)
    scales: dict[Any, Tensor] = field(default_factory=dict)
    written: set[str] = field(default_factory=set)
    decided: dict[str, Rounded] = field(default_factory=dict)
    prefix: Prefix | None = None

    def __post_init__(self) -> None:
        groups = self.job.selected.resolved.groups
        self.local = _local(groups, self.layers)
        self.planned = {linear.weight: linear for linear in self.job.planned}
        self.by_bias = {linear.bias: linear for linear in self.job.planned if linear.bias is not None}
        finished = {id(group) for local in self.local.values() for group in local}
        late = {slot.name for group in groups if id(group) not in finished for slot in (*group.sources, *group.targets)}
        for tied in self.final.inventory.ties:
            if len({home_of(name, self.layers) for name in tied}) > 1:
                late |= set(tied)
        self.late = frozenset(late)

    def tensors(self, made: Made, state: Mapping[str, Tensor], progress: Progress) -> Iterator[tuple[str, Tensor]]:
        """Every described tensor once."""
        job, weights = self.job, self.rotated
        inside = [n for path in self.layers for n in weights.inventory.shapes if n.startswith(f"{path}.")]
        with read_ahead(weights, dict.fromkeys((*inside, *weights.inventory.shapes)), job.place.device) as self.rotated:
            swept = Sweep()
            if job.batches:
                seen = Seen(swept_weights(job.config, job.selected))
                swept = seen.swept
                at_once = job.place.processes.is_first and not job.together and not job.in_sequence
                for path in self._each_once(self.sweep(seen, progress)):
                    if at_once:
                        yield from self._layer(path, swept)
            if not job.place.processes.is_first:
                return
            weights, swept = self.smoothed(swept)
            made.quantized = Quantized()
            if job.in_sequence:
                made.quantized = yield from self.in_sequence(weights, swept, progress)
            yield from self._rest(weights, swept)
        made.quantized = dataclasses.replace(made.quantized, idle=idle_experts(job.planned, swept.inputs))
        granularity = kv_granularity(job.config, job.strategy)
        if granularity is not None and granularity.is_static:
            found = kv_scales(made.ready.model, granularity, swept.cache)
            assert found.key is not None and found.value is not None
            yield from ((f"{MODULE}.key", found.key), (f"{MODULE}.value", found.value))
        for name in self.described:
            if name not in self.final.inventory.shapes and not state[name].is_meta and not name.startswith(MODULE):
                yield name, state[name]

    def sweep(self, seen: Seen, progress: Progress) -> Iterator[str]:
        """A pass of all windows; yields the layers behind them, one after the other, each held for :meth:`read`."""
        place, model = self.job.place, self._model()
        runner = LayerByLayer(self.rotated.inventory, self._for_sweep(model), place.device, place.processes)
        observers = (seen.inputs, seen.stored) if self.sees_cache else (seen.inputs,)
        with headless(model, seen.inputs.names):
            for path in runner.steps(model, self.job.batches, observers, progress):
                yield path
                self.held.clear()

    @property
    def sees_cache(self) -> bool:
        """True if a sweep observes keys and values."""
        return self.job.cache or bool(query_key_groups(self.job.selected))

    def _each_once(self, paths: Iterable[str]) -> Iterator[str]:
        """The layers as they are passed. Raises LayerCalledAgain where one is twice, unless nothing was finished."""
        passed: set[str] = set()
        for path in paths:
            if path in passed and not self.job.together:
                raise LayerCalledAgain(path)
            passed.add(path)
            yield path

    def _model(self) -> Any:
        """The model that the text goes through."""
        place, cache = self.job.place, self.sees_cache
        return runnable(self.job.source, self.rotated, place.device, place.dtype, cache, self.prefix)

    def _for_sweep(self, model: Any) -> Callable[[str], Tensor]:
        """A function that gives a parameter as the sweep wants it and keeps it as it is."""

        def read(name: str) -> Tensor:
            dtype = computing_dtype(model, name, self.job.place.dtype)
            if home_of(name, self.layers) is None:
                return self.rotated.rounded(name, dtype)
            tensor = self.held[self.rotated.inventory.canonical[name]] = self.rotated.read(name)
            return tensor.to(dtype)

        return read

    def read(self, name: str) -> Tensor:
        """A parameter as it is rotated, float32."""
        held = self.held.get(self.rotated.inventory.canonical[name])
        return self.rotated.read(name) if held is None else held

    def _layer(self, path: str, swept: Sweep) -> Iterator[tuple[str, Tensor]]:
        """What of a layer is final now."""
        names = [name for name in self.final.inventory.shapes if name.startswith(f"{path}.")]
        here = _only(self.job.selected, self.local.get(path, ()))
        scales = smoothing_scales(here, swept, self.read)
        plan = smoothing_plan(here, self.rotated.inventory, self.read, scales)
        after = smoothed(here, swept, scales)
        self.scales |= scales
        for name in names:
            if name in self.late or self.final.inventory.canonical[name] != name:
                continue
            tensor = self.read(name)
            if operations := plan.operations.get(name, ()):
                tensor = execute(operations, tensor)
                check_finite(name, tensor, "overflows float32 when transformed")
            yield from self.finished(name, tensor, after)

    def smoothed(self, swept: Sweep, known: dict[Any, Tensor] | None = None) -> tuple[Weights, Sweep]:
        """The parameters behind all smoothing, and the maxima of the smoothed model; ``known`` as of
        :func:`smoothing_scales`.
        """
        selected, weights = self.job.selected, self.rotated
        left = [g for g in selected.resolved.groups if (g.name, g.layer) not in self.scales]
        scales: Scales = self.scales | smoothing_scales(_only(selected, left), swept, weights.read, known)
        if selected.resolved.groups:
            weights = weights.planned(smoothing_plan(selected, weights.inventory, weights.read, scales))
            swept = smoothed(selected, swept, scales)
        return weights, swept

    def in_sequence(
        self, weights: Weights, swept: Sweep, progress: Progress
    ) -> Generator[tuple[str, Tensor], None, Quantized]:
        """A pass in which linears are decided in the order in which they are called; what of each layer is final."""
        job, errors = self.job, dict[str, float]()
        runs: dict[str, Run] = {}
        twice = windows_twice(texts(job.batches))
        model = runnable(job.source, weights, job.place.device, prefix=self.prefix)

        def read(name: str) -> Tensor:
            tensor = weights.read(name)
            if home_of(name, self.layers) is not None:
                self.held[weights.inventory.canonical[name]] = tensor
            return tensor

        def visit(entry: PlannedLinear, exact: Tensor, noisy: Tensor, weight: Tensor, bias: Tensor | None) -> Run:
            self.decided[entry.weight], runs[entry.weight] = decide_linear(entry, exact, noisy, weight, bias)
            errors[entry.weight] = self.decided[entry.weight].error
            return partial(_run_of, runs, entry.weight)

        runner = LayerByLayer(weights.inventory, read, job.place.device)
        with (
            headless(model, [linear.weight for linear in job.planned]),
            visiting(model, job.planned, len(twice) // 2, visit, to_the_end=True) as visited,
        ):
            for path in self._each_once(runner.steps(model, [twice], progress=progress)):
                if not job.together:
                    names = [name for name in self.final.inventory.shapes if name.startswith(f"{path}.")]
                    for name in names:
                        if self.final.inventory.canonical[name] == name and not self._is_tied_beyond(name):
                            yield from self.finished(name, self.held[name], swept)
                    for name in set(names) & self.written:
                        self.decided.pop(name, None)
                        runs.pop(name, None)
                self.held.clear()
        return Quantized(errors=errors, nearest=missed(job.planned, visited))

    def _is_tied_beyond(self, name: str) -> bool:
        """True if a parameter is one with another of another layer."""
        homes = {home_of(one, self.layers) for tied in self.final.inventory.ties if name in tied for one in tied}
        return len(homes) > 1

    def _rest(self, weights: Weights, swept: Sweep) -> Iterator[tuple[str, Tensor]]:
        """All that is not written yet."""
        for name in weights.inventory.shapes:
            if name not in self.written and weights.inventory.canonical[name] == name:
                linear = name in self.planned
                tensor = weights.read(name) if linear else weights.rounded(name, self.described[name][0])
                yield from self.finished(name, tensor, swept)

    def finished(self, name: str, tensor: Tensor, swept: Sweep) -> Iterator[tuple[str, Tensor]]:
        """A parameter as it is written."""
        self.written.add(name)
        linear = self.planned.get(name)
        if linear is None:
            dtype, _ = self.described[name]
            tensor = self._corrected(name, tensor).to(dtype)
            check_finite(name, tensor, f"overflows {dtype}")
            unused = self.rotated.unused
            yield name, tensor if unused is None else unused.restored(name, tensor)
            return
        check_finite(name, tensor)
        rounded = self.decided.get(name)
        if rounded is None:
            input_scale = static_scale(linear, swept.inputs)
            values, scale = quantize_weight(tensor, linear.in_dim, linear.scheme, linear.weights.clip)
        else:
            values, scale, input_scale = rounded.values, rounded.scale, rounded.input_scale
        yield f"{name}.values", values
        yield f"{name}.scale", scale
        if input_scale is not None:
            yield f"{name}.input_scale", input_scale
        if lacks_bias(linear):
            made = None if rounded is None else rounded.bias
            yield f"{linear.path}.bias", scale.new_zeros(linear.out_features) if made is None else made

    def _corrected(self, name: str, tensor: Tensor) -> Tensor:
        """A bias as it was decided with its linear, everything else as it is."""
        linear = self.by_bias.get(name)
        if linear is None or linear.weight not in self.decided:
            return tensor
        bias = self.decided[linear.weight].bias
        return tensor if bias is None else bias


def _run_of(runs: Mapping[str, Run], weight: str, x: Tensor) -> Tensor:
    """A decided linear of a layer that is not finished."""
    if weight not in runs:
        raise LayerCalledAgain(weight)
    return runs[weight](x)
