"""From a checkpoint folder to a folder that ``autoquant.load`` makes a runnable int8 model of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autoquant.calibration.idle_experts import idle_experts
from autoquant.certificate.claims import ProofNote
from autoquant.checkpoint.dtypes import narrow_, stored_dtypes, stored_names
from autoquant.checkpoint.finite import hide_unused_, show_unused_
from autoquant.checkpoint.formats import NATIVE, Changes, Chosen, Contents, Wish, choose_format, write_checkpoint
from autoquant.checkpoint.formats.native import ready
from autoquant.checkpoint.provenance import make_provenance
from autoquant.checkpoint.side_files import check_links
from autoquant.checkpoint.streamed import Streamed, check_streamable, open_weights, quantize_streamed
from autoquant.config.format import Config, Strategy, edited
from autoquant.errors import AutoQuantError
from autoquant.executor.plan import Plan
from autoquant.io.folders import check_target
from autoquant.models.checkpoint_source import open_checkpoint
from autoquant.models.load import load_causal_lm, load_skeleton, load_with_unplaced
from autoquant.models.tokenizer import has_tokenizer, load_tokenizer
from autoquant.pipeline.held import InMemory
from autoquant.pipeline.quantize import Quantized, Selected, needs_sweep, quantize_model_, select
from autoquant.pipeline.select import Transforms
from autoquant.pipeline.transform import Progress, prepare_held_, silent
from autoquant.quantizer.strategies import kv_granularity, plan_linears

IN_NATIVE = Wish(NATIVE)


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that decides the result. ``calibration``: token ids [1, S] each; ``seed``: of the rotations;
    ``proof``: how the config's claims stand, which is recorded.
    """

    config: Config
    strategy: Strategy
    transforms: Transforms
    calibration: tuple[Tensor, ...] = ()
    seed: int | None = None
    proof: ProofNote | None = None


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
    force: bool = False,
    wish: Wish = IN_NATIVE,
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> Done:
    """Rotate, calibrate, smooth and quantize ``source`` and write it to ``target``; returns what was done.

    Rotations are computed in float64 and everything else in float32; what stays in floating point is written in its own
    stored dtype. ``low_memory``: one decoder layer is in memory at a time; the same bytes are written. Raises
    AutoQuantError, with nothing left behind, where anything does not fit; in low memory also for what needs the whole
    model at once (see ``check_streamable``) and for checkpoints whose tensors transformers renames on loading.
    """
    check_target(source, target, force)
    progress("load", 0, 1)
    shards = open_checkpoint(source)
    check_links(source)
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code) if has_tokenizer(source) else None
    held: Streamed | InMemory
    if low_memory:
        weights = open_weights(source, trust_remote_code=trust_remote_code)
        held, left, unused = Streamed(source, weights), weights.unplaced, weights.unused
    else:
        loaded = load_with_unplaced(source, "causal-lm", torch.float32, trust_remote_code=trust_remote_code)
        held, left, unused = InMemory(loaded.model), loaded.unplaced, hide_unused_(source, loaded.model)
    dtypes = stored_dtypes(shards, stored_names(held.inventory, shards))
    config, strategy = recipe.config, recipe.strategy
    selected = select(config, held.inventory, recipe.transforms, recipe.seed)
    used = used_config(recipe)
    structure = None if wish.form == NATIVE else load_skeleton(source, trust_remote_code=trust_remote_code)
    chosen = choose_format(wish, used, foreseen(selected, used), structure)
    if low_memory:
        check_streamable(config, strategy, selected)
    batches = required_calibration(recipe) if needs_sweep(config, strategy, selected) else ()
    unused.check(batches)
    prepared = prepare_held_(held, selected, config, strategy, batches, cache=has_static_cache(recipe), tell=progress)
    if isinstance(held, Streamed):
        quantized = Quantized(idle=idle_experts(plan_linears(config, strategy), prepared.swept.inputs))
        made = quantize_streamed(held, config, strategy, prepared.swept, dtypes, lambda *at: progress("write", *at))
    else:
        progress("quantize", 0, 1)
        quantized = quantize_model_(
            held.model, config, strategy, prepared.swept, batches, lambda *at: progress("quantize", *at)
        )
        narrow_(held.model, dtypes)
        show_unused_(held.model, unused)
        made = ready(held.model)
    progress("write", 0, 1)
    changes = changes_of(prepared.plan, quantized)
    if chosen.form != NATIVE:  # some biases are found to be needed on the way
        chosen = choose_format(wish, used, changes)
    contents = Contents(
        made.model,
        used,
        made.described,
        made.tensors,
        dtypes.most,
        made.shared,
        changes,
        provenance(source, recipe, prepared.plan, options, quantized, left),
        tokenizer,
    )
    write_checkpoint(target, contents, chosen.form, force=force)
    return Done(quantized, chosen)


def foreseen(selected: Selected, config: Config) -> Changes:
    """What of a model's structure will differ from its class, as far as the config tells."""
    tables = [writer.fold_norm for space in selected.resolved.spaces for writer in space.writers]
    owners = [norm.weight or norm.bias for norm in tables if norm is not None]
    corrected = [one for one in plan_linears(config) if one.weights.bias_correction and one.bias is None]
    rotated = {writer.name for space in selected.resolved.spaces for writer in space.writers}
    return Changes(
        created=tuple(f"{linear.path}.bias" for linear in corrected),
        identities=tuple(name.rpartition(".")[0] for name in owners if name is not None),
        untied=tuple(name for group in config.model.tied if rotated & set(group) for name in group[1:]),
        online=tuple(selected.resolved.online),
    )


def load_float32(source: Path, *, trust_remote_code: bool = False) -> nn.Module:
    """The checkpoint's model in float32 and evaluation mode. Raises AutoQuantError where it cannot be loaded."""
    model: nn.Module = load_causal_lm(source, dtype=torch.float32, trust_remote_code=trust_remote_code)
    return model


def required_calibration(recipe: Recipe) -> tuple[Tensor, ...]:
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
    """The config with the strategy that was used."""
    section = edited(recipe.config.quantization, strategy=recipe.strategy)
    return edited(recipe.config, quantization=section)


def changes_of(plan: Plan, quantized: Quantized) -> Changes:
    """What of a model's structure differs from its class: biases, norms, online rotations."""
    created = tuple(dict.fromkeys((*plan.created, *quantized.created)))
    return Changes(created, tuple(plan.identities), tuple(plan.online))


def provenance(
    source: Path | str,
    recipe: Recipe,
    plan: Plan,
    options: dict[str, Any],
    quantized: Quantized,
    left: tuple[str, ...] = (),
) -> dict[str, Any]:
    """How a model was made; ``left``: the tensors of its source that the class has no place for."""
    result = {
        "strategy": recipe.strategy.value,
        "output_errors": {name: float(f"{error:.3g}") for name, error in quantized.errors.items()},
        "rounded_to_nearest": list(quantized.nearest),
        "idle_experts": {module: list(numbers) for module, numbers in quantized.idle.items()},
        "left_behind": list(left),
    }
    return make_provenance("quantize", source, recipe.config, options, plan.constructions, result, recipe.proof)


def config_for(model: str, tell: Callable[[str], None], *, trust_remote_code: bool = False) -> Config:
    """The config of ``model``, analysed and proved now."""
    from autoquant.analyzer.analyze import analyze
    from autoquant.certificate.certify import certify
    from autoquant.models.repair import find_source

    source = find_source(model, trust_remote_code=trust_remote_code)
    return certify(analyze(source, progress=tell), source, progress=tell)
