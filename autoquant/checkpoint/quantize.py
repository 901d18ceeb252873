"""From a checkpoint folder to a folder that ``autoquant.load`` makes a runnable int8 model of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autoquant.calibration.texts import read_text
from autoquant.calibration.windows import calibration_batches, cut_windows, tokenize
from autoquant.checkpoint.formats.native import save_quantized
from autoquant.config.file import load_config
from autoquant.config.format import Config, Strategy, edited
from autoquant.errors import AutoQuantError
from autoquant.executor.apply import check_finite
from autoquant.executor.plan import Plan
from autoquant.io.safetensors_stream import open_shards
from autoquant.models.inventory import FLOATING, take_inventory
from autoquant.pipeline.quantize import Quantized, needs_sweep, quantize_model_, select
from autoquant.pipeline.select import Transforms
from autoquant.pipeline.transform import Progress, prepare_
from autoquant.quantizer.strategies import kv_granularity
from autoquant.version import __version__


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that decides the result. ``calibration``: token ids [1, S] each; ``seed``: of the rotations."""

    config: Config
    strategy: Strategy
    transforms: Transforms
    calibration: tuple[Tensor, ...] = ()
    seed: int | None = None


@torch.no_grad()
def quantize_checkpoint(
    source: Path,
    target: Path,
    recipe: Recipe,
    options: dict[str, Any],
    *,
    force: bool = False,
    progress: Progress = lambda step, done, total: None,
) -> None:
    """Rotate, calibrate, smooth and quantize ``source`` in memory and write it to ``target``.

    Rotations are computed in float64 and everything else in float32; what stays in floating point is written in the
    checkpoint's own dtype. Raises AutoQuantError, with nothing left behind, where anything does not fit.
    """
    dtype = stored_dtype(source)
    progress("load", 0, 1)
    model = load_float32(source)
    selected = select(recipe.config, take_inventory(model), recipe.transforms, recipe.seed)
    batches = required_calibration(recipe) if needs_sweep(recipe.config, recipe.strategy, selected) else ()
    prepared = prepare_(
        model,
        recipe.config,
        recipe.strategy,
        recipe.transforms,
        batches,
        recipe.seed,
        cache=has_static_cache(recipe),
        tell=progress,
    )
    progress("quantize", 0, 1)
    quantized = quantize_model_(
        model, recipe.config, recipe.strategy, prepared.swept, batches, lambda *at: progress("quantize", *at)
    )
    narrow_(model, dtype)
    progress("write", 0, 1)
    facts = provenance(recipe, prepared.plan, options, quantized)
    save_quantized(model, target, used_config(recipe), facts, load_tokenizer(source), force=force)


def load_float32(source: Path) -> nn.Module:
    """The checkpoint's model in float32 and evaluation mode. Raises AutoQuantError where it cannot be loaded."""
    from transformers import AutoModelForCausalLM

    try:
        model: nn.Module = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    except (OSError, ValueError, RuntimeError) as error:
        raise AutoQuantError(f"{source}: cannot be loaded: {' '.join(str(error).split())[:300]}") from error
    return model


def stored_dtype(source: Path) -> torch.dtype:
    """The floating-point dtype that most elements of a checkpoint have."""
    elements: dict[torch.dtype, int] = {}
    for entry in open_shards(source).entries.values():
        if entry.dtype in FLOATING:
            elements[entry.dtype] = elements.get(entry.dtype, 0) + torch.Size(entry.shape).numel()
    if not elements:
        raise AutoQuantError(f"{source}: holds no floating-point weights")
    return max(elements, key=lambda dtype: elements[dtype])


def narrow_(model: Any, dtype: torch.dtype) -> None:
    """Round every parameter to ``dtype``; int8 weights, scales and buffers stay. AutoQuantError where one overflows."""
    for name, parameter in model.named_parameters():
        narrowed = parameter.data.to(dtype)
        check_finite(name, narrowed, f"overflows {dtype}")
        parameter.data = narrowed
    model.config.dtype = dtype


def required_calibration(recipe: Recipe) -> tuple[Tensor, ...]:
    """The recipe's calibration windows. Raises AutoQuantError where there are none."""
    if not recipe.calibration:
        raise AutoQuantError(
            f"{recipe.strategy.value} after '{recipe.transforms}' needs --calibration FILE; "
            "only dynamic strategies with --smooth none go without"
        )
    return recipe.calibration


def has_static_cache(recipe: Recipe) -> bool:
    """Whether keys and values have to be observed."""
    granularity = kv_granularity(recipe.config, recipe.strategy)
    return granularity is not None and granularity.is_static


def used_config(recipe: Recipe) -> Config:
    """The config with the strategy that was used."""
    section = edited(recipe.config.quantization, strategy=recipe.strategy)
    return edited(recipe.config, quantization=section)


def provenance(
    recipe: Recipe, plan: Plan, options: dict[str, Any], quantized: Quantized | None = None
) -> dict[str, Any]:
    """How a model was made, and what of its structure differs from its class: biases, norms, online rotations."""
    quantized = quantized or Quantized()
    return {
        "versions": {"autoquant": __version__, "torch": torch.__version__, "transformers": version("transformers")},
        "options": options,
        "rotations": plan.constructions,
        "created": list(dict.fromkeys((*plan.created, *quantized.created))),
        "identities": list(plan.identities),
        "output_errors": {name: float(f"{error:.3g}") for name, error in quantized.errors.items()},
        "rounded_to_nearest": list(quantized.nearest),
        "online": [{"kind": o.kind, "path": o.path, "size": o.size} for o in plan.online],
    }


def load_tokenizer(source: Path | str) -> Any:
    """The model's tokenizer. Raises AutoQuantError where there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise AutoQuantError(f"{source}: no tokenizer: {' '.join(str(error).split())}") from error


def calibration_windows(
    tokenizer: Any, calibration: Path, sequences: int, length: int, seed: int | None
) -> tuple[Tensor, ...]:
    """``sequences`` windows [1, S] of ``length`` tokens, each behind BOS: the first, or random by ``seed``."""
    ids = tokenize(tokenizer, read_text(calibration))
    return tuple(calibration_batches(cut_windows(ids, length, tokenizer.bos_token_id), sequences, seed))


def config_for(model: str, path: Path | None, tell: Callable[[str], None]) -> Config:
    """The config in a file, or that of ``model``, analysed and proved now."""
    if path is not None:
        return load_config(path)
    from autoquant.analyzer.analyze import analyze
    from autoquant.certificate.certify import certify
    from autoquant.models.repair import resolve

    source = resolve(model)
    return certify(analyze(source, progress=tell), source, progress=tell)
