"""A checkpoint's model with one decoder layer in memory: ``autoquant quantize --low-memory``.

The model is built without weights and run layer by layer (:class:`autoquant.calibration.runner.LayerByLayer`): a
layer's tensors are read, rotated and put in, all calibration windows pass, and they are dropped. What lies outside of
the layers (embeddings, head) stays in memory. Afterwards the tensors are read again one by one, rotated, smoothed,
quantized and written.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autoquant.algorithms.gptq_qronos import needs_values
from autoquant.calibration.observers import Sweep, sweep
from autoquant.calibration.runner import LayerByLayer, Progress, silent
from autoquant.checkpoint.apply import match_names
from autoquant.checkpoint.dtypes import Dtypes
from autoquant.checkpoint.finite import UnusedRows, find_unused
from autoquant.checkpoint.formats.native import Ready
from autoquant.checkpoint.unplaced import buffer_names, unplaced
from autoquant.config.format import Config, SmoothingMethod, Strategy
from autoquant.errors import AutoQuantError
from autoquant.executor.apply import check_finite
from autoquant.executor.pieces import execute
from autoquant.executor.plan import Plan
from autoquant.executor.resolved import check_not_learned
from autoquant.io.safetensors_stream import Shards
from autoquant.io.safetensors_writer import Described
from autoquant.models.checkpoint_source import open_checkpoint
from autoquant.models.load import build_empty, listed, load_skeleton
from autoquant.models.structure import ModelStructure, record_untied_, structure_of
from autoquant.models.vocabulary import token_tables
from autoquant.pipeline.quantize import Selected, linear_groups
from autoquant.quantizer.kv_cache import install_, kv_scales
from autoquant.quantizer.linear import int8_weights, quantize_weight, replace_with_empty_, static_scale
from autoquant.quantizer.strategies import PlannedLinear, kv_granularity, plan_linears


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


@dataclass(slots=True)
class Streamed:
    """A checkpoint's model, its parameters computed from the folder when asked for; what the pipeline asks of one."""

    source: Path
    weights: Weights

    @property
    def inventory(self) -> ModelStructure:
        return self.weights.inventory

    def read(self, name: str) -> Tensor:
        return self.weights.read(name)

    def execute_(self, plan: Plan) -> None:
        self.weights = self.weights.planned(plan)

    def prefixed(self, tokens: Sequence[int]) -> AbstractContextManager[None]:
        assert not tokens  # check_streamable
        return nullcontext()

    def sweep(
        self, weights: Iterable[str], batches: Sequence[Tensor], *, cache: bool, progress: Progress = silent
    ) -> Sweep:
        runner = LayerByLayer(self.weights.inventory, self.weights.read)
        model = _build(self.source, self.weights)
        return sweep(model, weights, batches, cache=cache, runner=runner, progress=progress)

    def module(self) -> nn.Module:
        raise AssertionError("check_streamable refuses what needs the whole model")


@dataclass(frozen=True, slots=True)
class Weights:
    """A checkpoint's parameters in float32 with plans carried out, computed when asked for.

    ``inventory`` describes them as they are after the plans; ``unplaced`` are stored tensors without a place.
    """

    shards: Shards
    stored: Mapping[str, str]
    inventory: ModelStructure
    plans: tuple[Plan, ...] = ()
    inventories: tuple[ModelStructure, ...] = field(default=())
    unused: UnusedRows = field(default_factory=UnusedRows)
    unplaced: tuple[str, ...] = ()
    trust_remote_code: bool = False

    def read(self, name: str) -> Tensor:
        """One parameter, float32."""
        return self._read(name, len(self.plans))

    def _read(self, name: str, plans: int) -> Tensor:
        if not plans:
            return self.unused.hidden(name, self.shards.read(self.stored[name]).float())
        plan, before = self.plans[plans - 1], self.inventories[plans - 1]
        if name in plan.created:
            tensor = torch.zeros(before.shapes[plan.created[name]][0])
        else:
            name = name if name in plan.untied else before.canonical[name]
            tensor = self._read(name, plans - 1)
        operations = plan.operations.get(name, ())
        if operations:
            tensor = execute(operations, tensor)
            check_finite(name, tensor, "overflows float32 when transformed")
        return tensor

    def planned(self, plan: Plan) -> Weights:
        """The same with one more plan."""
        before = self.inventory
        gone = tuple(f"{path}." for path in plan.identities)
        shapes = {n: s for n, s in before.shapes.items() if not (gone and n.startswith(gone))}
        shapes |= {bias: before.shapes[weight][:1] for bias, weight in plan.created.items()}
        canonical = {n: n if n in plan.untied or n in plan.created else before.canonical[n] for n in shapes}
        after = ModelStructure(
            shapes,
            dict.fromkeys(shapes, torch.float32),
            canonical,
            before.modules,
            before.shared_modules,
            before.growable - set(plan.created),
        )
        return dataclasses.replace(
            self, inventory=after, plans=(*self.plans, plan), inventories=(*self.inventories, before)
        )


def open_weights(source: Path, *, trust_remote_code: bool = False) -> Weights:
    """The parameters of a checkpoint folder. Warns of tensors that are not used, and as ``find_unused`` does.

    Raises AutoQuantError where their names are not the model's own, and where they are not finite.
    """
    shards = open_checkpoint(source)
    skeleton = load_skeleton(source, trust_remote_code=trust_remote_code)
    inventory = structure_of(skeleton)
    stored = match_names(inventory, shards)
    if stored is None:
        raise AutoQuantError(f"{source}: transformers renames its tensors on loading; go without --low-memory")
    left = unplaced(shards, {*stored.values(), *buffer_names(skeleton)})
    if left:
        warnings.warn(f"{source}: the model's class has no place for {listed(left)}: not loaded", stacklevel=2)
    first = [name for name in inventory.shapes if inventory.canonical[name] == name]
    unused = find_unused(source, first, lambda name: shards.read(stored[name]), token_tables(skeleton))
    float32 = dataclasses.replace(inventory, dtypes=dict.fromkeys(inventory.shapes, torch.float32))
    unused = unused.tied(inventory.canonical)
    return Weights(shards, stored, float32, unused=unused, unplaced=left, trust_remote_code=trust_remote_code)


def _build(source: Path, weights: Weights) -> Any:
    """The checkpoint's model with its parameters on the meta device and its buffers real, its structure as planned."""
    model = build_empty(source, torch.float32, trust_remote_code=weights.trust_remote_code)
    for name, buffer in model.named_buffers():
        if name in weights.shards.entries:
            buffer.copy_(weights.shards.read(name))
    for plan in weights.plans:
        for path in plan.identities:
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, nn.Identity())
        for name in plan.created:
            owner, _, last = name.rpartition(".")
            empty = torch.empty(weights.inventory.shapes[name], device="meta")
            model.get_submodule(owner)._parameters[last] = nn.Parameter(empty, requires_grad=False)
        if plan.untied:
            record_untied_(model)
    return model


def quantize_streamed(
    held: Streamed, config: Config, strategy: Strategy, swept: Sweep, dtypes: Dtypes, progress: Progress
) -> Ready:
    """What a quantized model in memory would give to the writer, computed parameter by parameter when written."""
    weights, model = held.weights, _build(held.source, held.weights)
    planned = plan_linears(config, strategy)
    scales = {linear.weight: static_scale(linear, swept.inputs) for linear in planned}
    replace_with_empty_(model, planned)
    granularity = kv_granularity(config, strategy)
    if granularity is not None:
        install_(model, kv_scales(model, granularity, swept.cache))
    model.config.dtype = dtypes.most
    described: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    shared: dict[str, str] = {}
    first: dict[str, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        is_parameter = name in weights.inventory.shapes
        stored_as = first.setdefault(weights.inventory.canonical[name], name) if is_parameter else name
        if stored_as != name:
            shared[name] = stored_as
        else:
            wanted = dtypes.of(name) if is_parameter and tensor.is_floating_point() else tensor.dtype
            described[name] = (wanted, tensor.shape)
    return Ready(model, described, shared, _tensors(model, weights, planned, scales, described, progress))


def _tensors(
    model: nn.Module,
    weights: Weights,
    planned: Sequence[PlannedLinear],
    scales: Mapping[str, Tensor | None],
    described: Described,
    progress: Progress,
) -> Iterator[tuple[str, Tensor]]:
    """Every described tensor once, one parameter at a time."""
    state = model.state_dict()
    assert set(int8_weights(model)) == set(scales)
    for done, linear in enumerate(planned, 1):
        parameter = weights.read(linear.weight)
        check_finite(linear.weight, parameter)
        values, scale = quantize_weight(parameter, linear.in_dim, linear.scheme, linear.weights.clip)
        yield f"{linear.weight}.values", values
        yield f"{linear.weight}.scale", scale
        input_scale = scales[linear.weight]
        if input_scale is not None:
            yield f"{linear.weight}.input_scale", input_scale
        progress(done, len(planned))
    for name, (dtype, _) in described.items():
        if name in weights.inventory.shapes:
            tensor = weights.read(name).to(dtype)
            check_finite(name, tensor, f"overflows {dtype}")
            yield name, weights.unused.restored(name, tensor)
        elif not state[name].is_meta:
            yield name, state[name]
