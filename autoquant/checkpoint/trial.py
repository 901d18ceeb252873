"""A checkpoint quantized by one config after the other, layer by layer, to see what windows of text become in it.

Nothing is written, and no more than a layer is in memory, on the CPU or on a GPU: a layer's tensors are read, rotated,
smoothed and quantized, all windows pass through the int8 layer side by side, and it goes. What depends on the rotation
alone is found once for all configs that rotate alike: the maxima of the calibration sweep, and those of the weights
that smoothing divides by. A prefix takes a pass of its own through the rotated and through the smoothed model. The int8
layers are those that a model in memory gets, bit for bit on a CPU.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autoquant.algorithms.gptq_qronos import needs_values
from autoquant.algorithms.scale_search import Chosen, descend
from autoquant.algorithms.smoothquant import weight_maxima_once
from autoquant.calibration.observers import Sweep
from autoquant.calibration.runner import LayerByLayer, Runner, layer_paths
from autoquant.calibration.windows import together
from autoquant.checkpoint.dtypes import Dtypes
from autoquant.checkpoint.layerwise import (
    Job,
    LayerCalledAgain,
    Place,
    Seen,
    Stream,
    check_streamable,
    home_of,
    lacks_bias,
    runnable,
)
from autoquant.checkpoint.quantize import windows_on_gpu
from autoquant.checkpoint.read_ahead import read_ahead
from autoquant.checkpoint.streamed import StoredOtherwise, Weights, looked_through, open_weights
from autoquant.config.format import Config, SmoothingKind, SmoothingMethod, Strategy
from autoquant.errors import AutoQuantError
from autoquant.executor.resolved import Resolved
from autoquant.models.caches import Cache
from autoquant.models.load import load_skeleton
from autoquant.models.locate import locate
from autoquant.models.structure import ModelStructure
from autoquant.pipeline.quantize import (
    Quantized,
    Selected,
    linear_groups,
    needs_sweep,
    rotation_plan,
    select,
    smoothed,
    smoothing_plan,
    swept_weights,
    with_found,
)
from autoquant.pipeline.select import EVERYTHING
from autoquant.quantizer.kv_cache import install_, kv_scales
from autoquant.quantizer.linear import int8_weights, replace_with_empty_
from autoquant.quantizer.prefix import Prefix, Through, compute_prefix
from autoquant.quantizer.strategies import PlannedLinear, kv_granularity, plan_linears
from autoquant.steps import Progress
from autoquant.threads import one_arena_

EASE = 16
"""Bytes of memory for each parameter, four times what it takes in float32: as many a model in memory takes at ease."""
Outputs = Callable[[int, Any], None]
"""Told what the model returns for a batch, by the batch's number, while the model's head is there."""
Around = Callable[[Any], AbstractContextManager[Outputs]]
"""Given the model that windows are about to go through, makes a context around their passes."""


class WholeModel(Exception):
    """A config for which the whole model has to be in memory."""


@dataclass(slots=True, eq=False)
class Rotated:
    """A rotation carried out, with a prefix or without: the parameters, what sweeps showed of them, by the weights that
    they watched and whether they saw the cache, the largest weights by smoothing group, scales that descent found, by
    all that they depend on, and the prefix of the rotated model. Mutable: what is not known is found when needed.
    """

    weights: Weights
    sweeps: dict[tuple[frozenset[str], bool], Sweep] = field(default_factory=dict)
    largest: dict[Any, Tensor] = field(default_factory=dict)
    descents: dict[Any, Mapping[tuple[str, int | None], Chosen]] = field(default_factory=dict)
    prefix: Prefix | None = None

    def known(self, watched: Iterable[str], cache: bool) -> Sweep | None:
        """A sweep that watched all of these."""
        wanted = set(watched)
        for (names, with_cache), swept in self.sweeps.items():
            if wanted <= names and with_cache >= cache:
                return swept
        return None


@dataclass(frozen=True, slots=True)
class Layered:
    """A model, and how text goes through it: windows, and the tokens of a prefix; ``selected``: what a config does."""

    model: Any
    runner: Runner
    through: Through
    selected: Selected = field(default_factory=lambda: Selected(Resolved((), (), ())))


@dataclass(frozen=True, slots=True, eq=False)
class Trials:
    """The checkpoint. ``layers``: paths; ``fit``: token ids [1, S] each, that calibrate; ``rotated``: what was found,
    by the rotation and the prefix.
    """

    source: Path
    weights: Weights
    layers: tuple[str, ...]
    strategy: Strategy
    fit: tuple[Tensor, ...]
    device: torch.device
    rotated: dict[tuple[str, tuple[int, ...]], Rotated] = field(default_factory=dict)

    @torch.no_grad()
    def run_float(self, batches: Sequence[Tensor], around: Around, progress: Progress, said: str) -> None:
        """Batches [B, S] through the float model. ``progress`` is told of its layers as the step ``said``."""
        with read_ahead(self.weights, self.weights.inventory.shapes, self.device) as weights:
            model = runnable(self.source, weights, self.device)
            with around(model) as outputs:
                runner = LayerByLayer(weights.inventory, weights.read, self.device, outputs=outputs)
                runner(model, batches, progress=lambda *at: progress(said, *at))

    @torch.no_grad()
    def run(
        self, config: Config, batches: Sequence[Tensor], around: Around, progress: Progress, said: str
    ) -> Quantized:
        """Batches [B, S] through the model that is quantized by ``config``; returns what quantization did.

        ``progress`` is told of layers as steps that begin with ``said``. Raises WholeModel where the model has to be in
        memory, and AutoQuantError where the config does not fit it.
        """
        stream, rotated, swept = self._prepared(config, progress, said)
        weights, swept = self._smoothed(stream, rotated, swept, lambda *at: progress(f"{said}: descend", *at))
        with self._reading(weights) as weights:
            stream.final, stream.rotated = weights, dataclasses.replace(weights, unused=None)
            stream.described = {name: (torch.float32, shape) for name, shape in weights.inventory.shapes.items()}
            planned, granularity = stream.job.planned, kv_granularity(config, self.strategy)
            model = runnable(self.source, weights, self.device, prefix=stream.prefix)
            for linear in filter(lacks_bias, planned):
                empty = torch.empty(linear.out_features, device="meta")
                locate(model, linear.weight).owner.register_parameter("bias", nn.Parameter(empty, requires_grad=False))
            replace_with_empty_(model, planned)
            if granularity is not None:
                install_(model, kv_scales(model, granularity, swept.cache))
            inventory, parameters = _int8_inventory(weights.inventory, planned)
            made = _Made(stream, weights, swept, parameters)
            try:
                with closing(made), around(model) as outputs:
                    runner = LayerByLayer(inventory, made.read, self.device, outputs=outputs)
                    for path in runner.steps(model, batches, progress=lambda *at: progress(f"{said}: judge", *at)):
                        for weight in int8_weights(model.get_submodule(path)).values():
                            weight.forget()
                    return made.ended()
            except LayerCalledAgain as error:
                raise WholeModel from error

    @contextmanager
    def float_model(self) -> Iterator[Layered]:
        """The float model as it is."""
        with self._reading(self.weights) as weights:
            yield self._layered(weights, None)

    @contextmanager
    def rotated_model(self, config: Config) -> Iterator[Layered]:
        """The model that is rotated by ``config``, behind its prefix. Raises WholeModel as :meth:`run` does, and where
        a smoothing group has members in several layers.
        """
        job = self._job(config)
        rotated = self._rotated(job)
        stream = self._stream(job, rotated.weights)
        _check_local(stream)
        with self._reading(rotated.weights) as weights:
            yield dataclasses.replace(self._layered(weights, rotated.prefix), selected=job.selected)

    @contextmanager
    def smoothed_model(self, config: Config, progress: Progress, said: str) -> Iterator[Layered]:
        """The model that is rotated and smoothed by ``config``, behind its prefix. Raises WholeModel as :meth:`run`
        does.
        """
        stream, rotated, swept = self._prepared(config, progress, said)
        weights, _ = self._smoothed(stream, rotated, swept, lambda *at: progress(f"{said}: descend", *at))
        with self._reading(weights) as weights:
            yield self._layered(weights, stream.prefix)

    def _job(self, config: Config) -> Job:
        inventory, planned = self.weights.inventory, plan_linears(config, self.strategy)
        selected = select(config, inventory, EVERYTHING)
        try:
            check_streamable(config, self.strategy, selected, further=True)
        except AutoQuantError as error:
            raise WholeModel from error
        tied = {name for names in inventory.ties for name in names}
        if any(linear.weight in tied for linear in planned):  # one weight is several modules
            raise WholeModel
        if needs_values(planned) and any(home_of(linear.weight, self.layers) is None for linear in planned):
            raise WholeModel  # it is decided on the way to a layer, and wanted before
        batches = self.fit if needs_sweep(config, self.strategy, selected) else ()
        if self.device.type != "cpu":
            batches = together(batches, windows_on_gpu(batches))
        cache = kv_granularity(config, self.strategy) is not None
        dtypes, place = Dtypes(torch.float32, {}), Place(self.device)
        return Job(self.source, self.weights, config, self.strategy, selected, batches, cache, dtypes, place)

    def _stream(self, job: Job, weights: Weights) -> Stream:
        return Stream(job, weights, weights, {}, self.layers)

    def _prepared(self, config: Config, progress: Progress, said: str) -> tuple[Stream, Rotated, Sweep]:
        """What is done by a config, the rotation, and what the windows that calibrate show of the rotated model."""
        job = self._job(config)
        rotated = self._rotated(job)
        swept = self._swept(job, rotated, lambda *at: progress(f"{said}: calibrate", *at))
        return self._stream(job, rotated.weights), rotated, swept

    def _rotated(self, job: Job) -> Rotated:
        prefix = job.config.quantization.prefix
        key = job.config.rotation.model_dump_json(), prefix
        if key not in self.rotated:
            weights = self.weights.planned(rotation_plan(job.selected, self.weights.inventory, self.weights.read))
            self.rotated[key] = Rotated(weights, prefix=self._prefix(weights, prefix))
        return self.rotated[key]

    def _swept(self, job: Job, rotated: Rotated, progress: Callable[[int, int], None]) -> Sweep:
        if not job.batches:
            return Sweep()
        seen = Seen(swept_weights(job.config, job.selected))
        stream = self._stream(job, rotated.weights)
        stream.prefix = rotated.prefix
        if (known := rotated.known(seen.inputs.names, stream.sees_cache)) is not None:
            return known
        inside = [name for name in rotated.weights.inventory.shapes if home_of(name, stream.layers) is not None]
        with read_ahead(rotated.weights, inside, self.device) as stream.rotated:
            for path in stream.sweep(seen, progress):
                for group in stream.local.get(path, ()):
                    if group.kind is not SmoothingKind.QUERY_KEY:
                        weight_maxima_once(group, stream.read, rotated.largest)
        rotated.sweeps[frozenset(seen.inputs.names), stream.sees_cache] = seen.swept
        return seen.swept

    def _smoothed(
        self, stream: Stream, rotated: Rotated, swept: Sweep, progress: Callable[[int, int], None]
    ) -> tuple[Weights, Sweep]:
        """The parameters behind all smoothing, and the maxima of the smoothed model, whose prefix the stream gets."""
        tokens = stream.job.config.quantization.prefix
        with read_ahead(rotated.weights, (), self.device) as stream.rotated:
            weights, swept = stream.smoothed(swept, rotated.largest)
        weights = dataclasses.replace(weights, fetch=rotated.weights.fetch)
        stream.prefix = rotated.prefix
        if stream.job.selected.resolved.groups:
            stream.prefix = self._prefix(weights, tokens)
        if chosen := self._descended(stream, rotated, weights, progress):
            found, scales = with_found(stream.job.selected, chosen)
            weights = weights.planned(smoothing_plan(found, weights.inventory, weights.read, scales))
            swept = smoothed(found, swept, scales)
            stream.prefix = self._prefix(weights, tokens)
        return weights, swept

    def _descended(
        self, stream: Stream, rotated: Rotated, weights: Weights, progress: Callable[[int, int], None]
    ) -> Mapping[tuple[str, int | None], Chosen]:
        """Further scales of the groups whose method is descent, found on the smoothed model; rounding and corrected
        biases do not matter to them.
        """
        job = stream.job
        groups = [one for one in linear_groups(job.selected).groups if one.method is SmoothingMethod.DESCENT]
        if not groups:
            return {}
        _check_local(stream)
        looked_at = tuple((one.weight, one.scheme, one.weights.clip, one.activations) for one in job.planned)
        key = job.config.smoothing.model_dump_json(), looked_at
        if key not in rotated.descents:
            with self._reading(weights) as there:
                layered = self._layered(there, stream.prefix)
                rotated.descents[key] = descend(layered.model, groups, job.planned, self.fit, progress, layered.runner)
        return rotated.descents[key]

    def _prefix(self, weights: Weights, tokens: tuple[int, ...]) -> Prefix | None:
        """The prefix of the model with these parameters; None without tokens."""
        if not tokens:
            return None
        with self._reading(weights) as there:
            layered = self._layered(there, None)
            return compute_prefix(layered.model, tokens, layered.through)

    def _reading(self, weights: Weights) -> AbstractContextManager[Weights]:
        return read_ahead(weights, weights.inventory.shapes, self.device)

    def _layered(self, weights: Weights, prefix: Prefix | None) -> Layered:
        runner = LayerByLayer(weights.inventory, weights.read, self.device)
        model = runnable(self.source, weights, self.device, prefix=prefix)
        return Layered(model, runner, partial(_through, runner))


def _check_local(stream: Stream) -> None:
    """Raise WholeModel where a smoothing group has members in several layers."""
    if sum(map(len, stream.local.values())) < len(stream.job.selected.resolved.groups):
        raise WholeModel


@torch.no_grad()
def _through(runner: LayerByLayer, model: nn.Module, ids: Tensor, cache: Cache) -> Tensor:
    """The logits of token ids [1, P], whose keys and values are stored in ``cache``."""
    found: list[Tensor] = []

    def storing(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "past_key_values": cache, "use_cache": True}

    handle = model.register_forward_pre_hook(storing, with_kwargs=True)
    try:
        dataclasses.replace(runner, outputs=lambda _, output: found.append(output.logits))(model, [ids])
    finally:
        handle.remove()
    return found[0]


def open_trials(
    source: Path,
    strategy: Strategy,
    fit: Sequence[Tensor],
    device: torch.device,
    *,
    small_too: bool = True,
    trust_remote_code: bool = False,
) -> Trials | None:
    """What tries configs of the checkpoint; None where it has to be loaded whole to be understood and, unless
    ``small_too``, where a machine without a GPU holds it with ease, which is quicker: a layer's tensors are made one
    after the other, a model's on all cores.

    Warns and raises AutoQuantError as of :func:`looked_through`, of the token tables.
    """
    one_arena_()
    try:
        opened = open_weights(source, trust_remote_code=trust_remote_code)
    except StoredOtherwise:
        return None
    if not small_too and device.type == "cpu" and EASE * opened.inventory.parameters <= _memory():
        return None
    layers = layer_paths(load_skeleton(source, trust_remote_code=trust_remote_code))
    return Trials(source, looked_through(opened, all_now=False), tuple(layers), strategy, tuple(fit), device)


def _memory() -> int:
    """Bytes of the machine's memory; 0 where the system does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return 0


@dataclass(slots=True, eq=False)
class _Made:
    """The tensors of the int8 model, made when they are asked for; ``parameters``: what each is made of, by name.

    Linears that are decided in sequence come in the order of that pass, a layer at a time. Mutable.
    """

    stream: Stream
    weights: Weights
    swept: Sweep
    parameters: Mapping[str, str]
    ready: dict[str, Tensor] = field(default_factory=dict)
    sequence: Generator[tuple[str, Tensor], None, None] | None = None
    quantized: Quantized = field(default_factory=Quantized)

    def __post_init__(self) -> None:
        if self.stream.job.in_sequence:
            self.sequence = self._in_sequence()

    def _in_sequence(self) -> Generator[tuple[str, Tensor], None, None]:
        self.quantized = yield from self.stream.in_sequence(self.weights, self.swept, lambda *at: None)

    def read(self, name: str) -> Tensor:
        """A parameter, or values or scales of an int8 weight. Raises LayerCalledAgain for one that was decided before
        and given away.
        """
        parameter = self.parameters[name]
        wanted = name if parameter in self.stream.planned else parameter
        if self.sequence is None or home_of(parameter, self.stream.layers) is None:
            if wanted not in self.ready:
                self.ready.update(self.stream.finished(parameter, self.weights.read(parameter), self.swept))
            return self.ready.pop(wanted)
        while wanted not in self.ready:
            found = next(self.sequence, None)
            if found is None:
                raise LayerCalledAgain(name)
            self.ready[found[0]] = found[1]
        return self.ready.pop(wanted)

    def close(self) -> None:
        """End the pass in which linears are decided, wherever it is."""
        if self.sequence is not None:
            self.sequence.close()

    def ended(self) -> Quantized:
        """What was done, when all windows have passed."""
        for _ in self.sequence or ():
            pass
        return self.quantized


def _int8_inventory(
    inventory: ModelStructure, planned: Sequence[PlannedLinear]
) -> tuple[ModelStructure, dict[str, str]]:
    """What LayerByLayer has to know of the int8 model, and by the name of each tensor the parameter it is made of."""
    linears = {linear.weight: linear for linear in planned}
    shapes: dict[str, tuple[int, ...]] = {}
    canonical: dict[str, str] = {}
    parameters: dict[str, str] = {}
    for name, shape in inventory.shapes.items():
        first = inventory.canonical[name]
        if name not in linears:
            shapes[name], canonical[name], parameters[name] = shape, first, first
            continue
        linear = linears[name]
        stack = () if linear.stack is None else (linear.stack,)
        rows = linear.out_features if linear.scheme.weight_per_channel else 1
        made = {"values": (*stack, linear.out_features, linear.in_features), "scale": (*stack, rows, 1)}
        if linear.scheme.is_static:
            made["input_scale"] = stack
        tensors = {f"{name}.{last}": size for last, size in made.items()}
        if lacks_bias(linear):
            tensors[f"{linear.path}.bias"] = (linear.out_features,)
        for full, size in tensors.items():
            shapes[full], canonical[full], parameters[full] = size, full, name
    return dataclasses.replace(inventory, shapes=shapes, canonical=canonical), parameters
