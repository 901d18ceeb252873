"""Quantized models in memory, and their ``save_pretrained``: transformers' own writes tensors that nothing can read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from autoquant.checkpoint.formats import COMPRESSED_TENSORS, NATIVE, Changes, format_of
from autoquant.checkpoint.formats.native import read_config, read_facts, save_quantized
from autoquant.checkpoint.provenance import CONFIG, read_provenance
from autoquant.checkpoint.quantize import (
    Computed,
    Recipe,
    changes_of,
    has_static_cache,
    provenance,
    required_calibration,
    used_config,
)
from autoquant.config.file import load_config
from autoquant.config.format import Config
from autoquant.errors import AutoQuantError
from autoquant.models.device import device_said
from autoquant.models.structure import structure_of
from autoquant.pipeline.of_text import of_text_said
from autoquant.pipeline.quantize import needs_sweep, quantize_model_, select
from autoquant.pipeline.transform import prepare_
from autoquant.steps import Progress


def quantize_module_(model: nn.Module, recipe: Recipe, progress: Progress) -> nn.Module:
    """Rotate, smooth and quantize a module in memory. Raises AutoQuantError where anything does not fit."""
    cache = has_static_cache(recipe)
    recipe = replace(recipe, config=of_text_said(recipe.config, model, recipe.examples, cached=cache))
    config, strategy = recipe.config, recipe.strategy
    first = next(model.parameters())
    computed = Computed(device_said(first.device), str(first.dtype).removeprefix("torch."))
    selected = select(config, structure_of(model), recipe.transforms, recipe.seed)
    batches = required_calibration(recipe) if needs_sweep(config, strategy, selected) else ()
    prepared = prepare_(model, config, strategy, recipe.transforms, batches, recipe.seed, cache=cache, tell=progress)
    done = quantize_model_(model, config, strategy, prepared.swept, batches, lambda *at: progress("quantize", *at))
    options = {"strategy": strategy.value, "transforms": str(recipe.transforms), "seed": recipe.seed}
    made = provenance(type(model).__name__, recipe, prepared.plan, options, done, computed)
    saveable_(model, used_config(recipe), changes_of(prepared.plan, done), made)
    return model


def saveable_(model: nn.Module, config: Config, changes: Changes, made: Mapping[str, Any], form: str = NATIVE) -> None:
    """Let ``save_pretrained(folder, tokenizer=None, format=None, force=False)`` write a folder that ``autoquant.load``
    reads, of the format ``form`` or of another that can hold the model.

    Models without ``save_pretrained``, which have no configuration to build them anew from, are left as they are.
    """
    if hasattr(model, "save_pretrained"):
        saving: Any = partial(_save, model, config, changes, made, form)
        model.save_pretrained = saving


def saved_again_(model: nn.Module, folder: Path) -> None:
    """The same for a model that was loaded from ``folder``, in the format of that; AutoQuantError where it says too
    little of itself, as another tool's does.
    """
    found = format_of(folder)
    if found is None:
        return
    if found.name == NATIVE:
        saveable_(model, read_config(folder), read_facts(folder).changes, read_provenance(folder))
    elif (folder / CONFIG).is_file():
        saveable_(model, load_config(folder / CONFIG), Changes(), read_provenance(folder), found.name)
    elif found.name == COMPRESSED_TENSORS:
        refusing: Any = partial(_refuse, folder)
        model.save_pretrained = refusing


def _save(
    model: nn.Module,
    config: Config,
    changes: Changes,
    made: Mapping[str, Any],
    form: str,
    save_directory: str | Path,
    *,
    tokenizer: Any = None,
    format: str | None = None,
    force: bool = False,
) -> None:
    form = form if format is None else format
    save_quantized(model, Path(save_directory), config, made, tokenizer, changes=changes, form=form, force=force)


def _refuse(folder: Path, *_: Any, **__: Any) -> None:
    raise AutoQuantError(f"{folder}: has no {CONFIG}, so that a copy of it cannot be written; copy the folder")
