"""From a checkpoint folder to a folder that ``autoquant.load`` makes a runnable int8 model of."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autoquant.algorithms.gptq_qronos import needs_values
from autoquant.calibration.processes import Processes, joined
from autoquant.calibration.runner import shared
from autoquant.calibration.windows import examples_and
from autoquant.certificate.claims import ProofNote, as_proved
from autoquant.checkpoint.dtypes import narrow_, stored_dtypes, stored_names
from autoquant.checkpoint.finite import UnusedRows, hide_unused_, show_unused_
from autoquant.checkpoint.formats import NATIVE, Changes, Chosen, Contents, Wish, choose_format, write_checkpoint
from autoquant.checkpoint.formats.native import ready
from autoquant.checkpoint.layerwise import (
    Job,
    LayerCalledAgain,
    Made,
    Place,
    check_streamable,
    lacks_bias,
    quantize_layer_by_layer,
)
from autoquant.checkpoint.provenance import make_provenance
from autoquant.checkpoint.side_files import check_links
from autoquant.checkpoint.streamed import StoredOtherwise, Weights, looked_through, open_weights
from autoquant.config.format import Config, Strategy, edited
from autoquant.errors import AutoQuantError
from autoquant.executor.plan import Plan
from autoquant.io.folders import check_target
from autoquant.io.safetensors_stream import Shards
from autoquant.models.checkpoint_source import open_checkpoint
from autoquant.models.device import device_said
from autoquant.models.load import load_language_model, load_skeleton, load_with_unplaced
from autoquant.models.reading import Batch, Example, check_reads_text, examples_of, texts
from autoquant.models.tokenizer import has_tokenizer, load_tokenizer, processor_files
from autoquant.pipeline.held import InMemory
from autoquant.pipeline.of_text import of_text_said
from autoquant.pipeline.quantize import Quantized, Selected, needs_sweep, quantize_model_, select
from autoquant.pipeline.select import Transforms
from autoquant.pipeline.transform import Progress, depends_on_strategy, prepare_held_, silent
from autoquant.quantizer.kv_cache import check_one_stack
from autoquant.quantizer.strategies import kv_granularity, plan_linears

IN_NATIVE = Wish(NATIVE)
CPU = torch.device("cpu")
WINDOWS_ON_GPU = 8
"""In one forward pass, or more: a GPU is not filled by one."""
TOKENS_ON_GPU = 16_384
PASSES = 16
"""From which on a pass has more windows, up to so many tokens: each has a thread, and a thread on a GPU a cuBLAS of its
own, which takes tens of milliseconds and of megabytes.
"""


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that decides the result. ``calibration``: token ids [1, S] each, and examples; ``seed``: of the
    rotations; ``proof``: how the config's claims stand, which is recorded.
    """

    config: Config
    strategy: Strategy
    transforms: Transforms
    calibration: tuple[Batch, ...] = ()
    seed: int | None = None
    proof: ProofNote | None = None

    @property
    def examples(self) -> tuple[Example, ...]:
        """The images and sounds that calibrate."""
        return examples_of(self.calibration)


@dataclass(frozen=True, slots=True)
class Done:
    """What was done, and the format that it was written in."""

    quantized: Quantized
    chosen: Chosen


@torch.no_grad()
def quantize_checkpoint(
    source: Path,
    target: Path,
    recipe: Recipe,
    options: dict[str, Any],
    *,
    low_memory: bool = False,
    device: torch.device = CPU,
    dtype: torch.dtype | None = None,
    force: bool = False,
    wish: Wish = IN_NATIVE,
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> Done:
    """Rotate, calibrate, smooth and quantize ``source`` and write it to ``target``; returns what was done.

    Rotations are computed in float64 and everything else in float32, on ``device``; ``dtype``: that of the calibration
    sweep, None: bfloat16 on a GPU where most of the checkpoint is stored in it, else float32. What stays in floating
    point is written in its own stored dtype. One decoder layer is in memory at a time, unless something needs the whole
    model: ``low_memory`` refuses that (see ``check_streamable``), else it is loaded in float32. Processes that torchrun
    started run a share of the windows each; the first writes. Raises AutoQuantError, with nothing left behind, where
    anything does not fit.
    """
    with joined(device) as processes:
        if processes.is_first:
            check_target(source, target, force)
        progress("load", 0, 1)
        shards = open_checkpoint(source)
        check_links(source)
        skeleton = load_skeleton(source, trust_remote_code=trust_remote_code)
        if kv_granularity(recipe.config, recipe.strategy) is not None:
            check_one_stack(skeleton)
        used = of_text_said(recipe.config, skeleton, recipe.examples, cached=has_static_cache(recipe))
        recipe = replace(recipe, config=used)
        tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code) if has_tokenizer(source) else None
        trust = trust_remote_code
        opened = _Opened(
            source, target, recipe, options, shards, skeleton, tokenizer, device, processes, wish, force, trust
        )
        weights, selected = _streamable(opened, low_memory)
        if weights is not None and selected is not None:
            return _quantize_streamed(opened, weights, selected, dtype, progress)
        if dtype not in (None, torch.float32):
            raise AutoQuantError(f"dtype {dtype}: what needs the whole model runs in float32; leave the dtype out")
        return _quantize_in_memory(opened, progress)


@dataclass(frozen=True, slots=True)
class _Opened:
    """What was asked for, and a folder that was looked at."""

    source: Path
    target: Path
    recipe: Recipe
    options: dict[str, Any]
    shards: Shards
    skeleton: nn.Module
    tokenizer: Any
    device: torch.device
    processes: Processes
    wish: Wish
    force: bool
    trust_remote_code: bool


def _streamable(opened: _Opened, low_memory: bool) -> tuple[Weights | None, Selected | None]:
    """The parameters and what is done to them, one layer after the other; None where the whole model is needed.

    Raises AutoQuantError in place of that for ``low_memory``.
    """
    recipe = opened.recipe
    try:
        weights = open_weights(opened.source, trust_remote_code=opened.trust_remote_code)
    except StoredOtherwise as error:
        if low_memory:
            raise AutoQuantError(f"{error.message}; go without --low-memory") from error
        return None, None
    selected = select(recipe.config, weights.inventory, recipe.transforms, recipe.seed)
    try:
        check_streamable(recipe.config, recipe.strategy, selected)
    except AutoQuantError:
        if low_memory:
            raise
        return None, None
    return weights, selected


def _sweep_dtype(stored: torch.dtype, device: torch.device) -> torch.dtype:
    return stored if stored is torch.bfloat16 and device.type == "cuda" else torch.float32


def _calibration(opened: _Opened, selected: Selected, unused: UnusedRows | None) -> tuple[Batch, ...]:
    """The windows and examples, none where nothing has to be calibrated."""
    recipe = opened.recipe
    needed = needs_sweep(recipe.config, recipe.strategy, selected)
    if needed and (texts(recipe.calibration) or not recipe.calibration):
        check_reads_text(opened.skeleton)
    elif needed and (needs_values(plan_linears(recipe.config, recipe.strategy)) or depends_on_strategy(recipe.config)):
        raise AutoQuantError(
            "images and sounds calibrate by maxima alone, and the config asks for more (quantization.weights or "
            ".activations, descent, a learned rotation), which takes text: set these back"
        )
    batches = required_calibration(recipe) if needed else ()
    if unused is not None:
        unused.check(batches)
    return batches


def _chosen(opened: _Opened, selected: Selected) -> Chosen:
    """The format, as far as it can be told before the work."""
    used, wish = used_config(opened.recipe), opened.wish
    structure = None if wish.form == NATIVE else opened.skeleton
    return choose_format(wish, used, foreseen(selected, used), structure)


def _quantize_streamed(
    opened: _Opened, weights: Weights, selected: Selected, dtype: torch.dtype | None, progress: Progress
) -> Done:
    device, recipe = opened.device, opened.recipe
    weights = looked_through(weights, all_now=device.type == "cpu")
    dtypes = stored_dtypes(opened.shards, stored_names(weights.inventory, opened.shards))
    config, strategy, cache = recipe.config, recipe.strategy, has_static_cache(recipe)
    exact = needs_values(plan_linears(config, strategy))  # maxima of a pass in float32, as the pass that decides
    place = Place(device, dtype or (torch.float32 if exact else _sweep_dtype(dtypes.most, device)), opened.processes)
    batches = _calibration(opened, selected, weights.unused)
    if device.type != "cpu" and not exact:
        batches = examples_and(batches, windows_on_gpu(texts(batches)))
    job = Job(opened.source, weights, config, strategy, selected, batches, cache, dtypes, place)
    try:
        return _write_streamed(opened, job, progress)
    except LayerCalledAgain:
        return _write_streamed(opened, replace(job, together=True), progress)


def windows_on_gpu(batches: Sequence[Tensor]) -> int:
    """How many of these windows [1, S] go through a GPU at once."""
    longest = max((batch.shape[1] for batch in batches), default=1)
    return max(WINDOWS_ON_GPU, min(TOKENS_ON_GPU // longest, len(batches) // PASSES))


def _write_streamed(opened: _Opened, job: Job, progress: Progress) -> Done:
    chosen = _chosen(opened, job.selected)
    progress("rotate", 0, 1)
    made = quantize_layer_by_layer(job, lambda *at: progress("calibrate", *at))
    return _written(opened, made, job.weights.unplaced, chosen, job.dtypes.most, job.place.dtype)


def _quantize_in_memory(opened: _Opened, progress: Progress) -> Done:
    source, recipe, trust = opened.source, opened.recipe, opened.trust_remote_code
    with warnings.catch_warnings():  # what is to be said of the stored weights was said
        warnings.simplefilter("ignore")
        loaded = load_with_unplaced(source, torch.float32, trust_remote_code=trust)
    unused = hide_unused_(source, loaded.model)
    held = InMemory(loaded.model.to(opened.device), shared(opened.processes))
    dtypes = stored_dtypes(opened.shards, stored_names(held.inventory, opened.shards))
    config, strategy = recipe.config, recipe.strategy
    selected = select(config, held.inventory, recipe.transforms, recipe.seed)
    chosen = _chosen(opened, selected)
    batches = _calibration(opened, selected, unused)
    prepared = prepare_held_(held, selected, config, strategy, batches, cache=has_static_cache(recipe), tell=progress)
    if not opened.processes.is_first:
        return Done(Quantized(), chosen)
    progress("quantize", 0, 1)
    quantized = quantize_model_(
        held.model, config, strategy, prepared.swept, batches, lambda *at: progress("quantize", *at)
    )
    narrow_(held.model, dtypes)
    show_unused_(held.model, unused)
    progress("write", 0, 1)
    made = Made(ready(held.model), prepared.plan, quantized)
    return _written(opened, made, loaded.unplaced, chosen, dtypes.most, torch.float32)


def _written(
    opened: _Opened, made: Made, left: tuple[str, ...], chosen: Chosen, dtype: torch.dtype, swept: torch.dtype
) -> Done:
    """Write what was made; of a stream all is known only when its tensors were taken. ``swept``: in which dtype."""
    used, wish = used_config(opened.recipe), opened.wish
    changes = changes_of(made.plan, made.quantized)
    if chosen.form != NATIVE:  # some biases are found to be needed on the way
        chosen = choose_format(wish, used, changes)
    record: dict[str, Any] = {}

    def note() -> None:
        computed = Computed(device_said(opened.device), str(swept).removeprefix("torch."))
        source, recipe, options = opened.source, opened.recipe, opened.options
        record.update(provenance(source, recipe, made.plan, options, made.quantized, computed, left))

    def tensors() -> Iterator[tuple[str, Tensor]]:
        yield from made.ready.tensors
        note()

    note()
    if not opened.processes.is_first:
        for _ in tensors():
            pass
        return Done(made.quantized, chosen)
    described, further = made.ready.described, made.ready.shared
    beside = opened.tokenizer, processor_files(opened.source)
    contents = Contents(made.ready.model, used, described, tensors(), dtype, further, changes, record, *beside)
    write_checkpoint(opened.target, contents, chosen.form, force=opened.force)
    return Done(made.quantized, chosen)


def foreseen(selected: Selected, config: Config) -> Changes:
    """What of a model's structure will differ from its class, as far as the config tells."""
    tables = [writer.fold_norm for space in selected.resolved.spaces for writer in space.writers]
    owners = [norm.weight or norm.bias for norm in tables if norm is not None]
    corrected = filter(lacks_bias, plan_linears(config))
    rotated = {writer.name for space in selected.resolved.spaces for writer in space.writers}
    return Changes(
        created=tuple(f"{linear.path}.bias" for linear in corrected),
        identities=tuple(name.rpartition(".")[0] for name in owners if name is not None),
        untied=tuple(name for group in config.model.tied if rotated & set(group) for name in group[1:]),
        online=tuple(selected.resolved.online),
    )


def load_float32(source: Path, *, trust_remote_code: bool = False) -> nn.Module:
    """The checkpoint's model in float32 and evaluation mode. Raises AutoQuantError where it cannot be loaded."""
    model: nn.Module = load_language_model(source, dtype=torch.float32, trust_remote_code=trust_remote_code)
    return model


def required_calibration(recipe: Recipe) -> tuple[Batch, ...]:
    """The recipe's calibration windows. Raises AutoQuantError where there are none."""
    if not recipe.calibration:
        raise AutoQuantError(
            f"{recipe.strategy.value} after '{recipe.transforms}' needs --calibration FILE; "
            "only dynamic strategies with --transforms rotation or none go without"
        )
    return recipe.calibration


def has_static_cache(recipe: Recipe) -> bool:
    """True if keys and values have to be observed."""
    granularity = kv_granularity(recipe.config, recipe.strategy)
    return granularity is not None and granularity.is_static


def used_config(recipe: Recipe) -> Config:
    """The config with the strategy that was used, and the certificate of its own claims."""
    section = edited(recipe.config.quantization, strategy=recipe.strategy)
    return edited(as_proved(recipe.config, recipe.proof), quantization=section)


def changes_of(plan: Plan, quantized: Quantized) -> Changes:
    """What of a model's structure differs from its class: biases, norms, online rotations."""
    created = tuple(dict.fromkeys((*plan.created, *quantized.created)))
    return Changes(created, tuple(plan.identities), tuple(plan.online))


@dataclass(frozen=True, slots=True)
class Computed:
    """Where the calibration text went through the model, and in which dtype, as they are recorded."""

    device: str
    dtype: str


def provenance(
    source: Path | str,
    recipe: Recipe,
    plan: Plan,
    options: dict[str, Any],
    quantized: Quantized,
    computed: Computed,
    left: tuple[str, ...] = (),
) -> dict[str, Any]:
    """How a model was made; ``left``: the tensors of its source that the class has no place for."""
    result = {
        "strategy": recipe.strategy.value,
        "output_errors": {name: float(f"{error:.3g}") for name, error in quantized.errors.items()},
        "rounded_to_nearest": list(quantized.nearest),
        "idle_experts": {module: list(numbers) for module, numbers in quantized.idle.items()},
        "left_behind": list(left),
        "device": computed.device,
        "dtype": computed.dtype,
    }
    return make_provenance("quantize", source, recipe.config, options, plan.constructions, result, recipe.proof)


def config_for(model: str, tell: Callable[[str], None], *, trust_remote_code: bool = False) -> Config:
    """The config of ``model``, analysed and proved now."""
    from autoquant.analyzer.analyze import analyze
    from autoquant.certificate.certify import certify
    from autoquant.models.repair import find_source

    source = find_source(model, trust_remote_code=trust_remote_code)
    return certify(analyze(source, progress=tell), source, progress=tell)
