"""Models transformed and quantized, and the way back from a folder to a runnable one."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoquant.api.arguments import IMPORTING, batches_of, config_of, proof_of, steps_of, transforms_of
from autoquant.config.strategies import parse_strategy
from autoquant.errors import AutoQuantError
from autoquant.steps import Progress, silent

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from autoquant.config.format import Config
    from autoquant.pipeline.select import Transforms

ALL_TRANSFORMS = "smooth+fc_fc+rotation"
"""Everything that the config enables."""


def apply(
    module: nn.Module,
    config: str | Path | Config,
    *,
    transforms: str | Transforms = ALL_TRANSFORMS,
    calibration: str | Path | Sequence[Tensor] | None = None,
    tokenizer: Any = None,
    sequences: int = 16,
    length: int = 512,
    seed: int | None = None,
    inplace: bool = False,
    example_inputs: Any = None,
    unproved: bool = False,
    progress: Progress = silent,
) -> nn.Module:
    """A module rotated and smoothed by a config, its function unchanged; a copy unless ``inplace``.

    ``calibration``: batches of token ids [1, S], or a text with the ``tokenizer`` that reads it; only smoothing needs
    one. Claims that were edited since they were proved are proved again, on a small model of what ``example_inputs``
    call (as for :func:`analyze`); ``unproved`` goes on without. Raises AutoQuantError where the config does not fit or
    is not proved, and where smoothing has nothing to calibrate on.
    """
    loaded, chosen = config_of(config), transforms_of(transforms)
    from autoquant.models.structure import structure_of
    from autoquant.pipeline.quantize import select
    from autoquant.pipeline.transform import prepare_

    batches = batches_of(calibration, tokenizer, sequences, length, seed)
    selected = select(loaded, structure_of(module), chosen, seed)
    if selected.resolved.groups and not batches:
        raise AutoQuantError("smoothing needs calibration; the transforms 'rotation' and 'none' go without")
    proof_of(loaded, module, example_inputs, unproved, progress)
    changed = module if inplace else copy.deepcopy(module)
    prepare_(changed, loaded, loaded.quantization.strategy, chosen, batches, seed, cache=False, tell=progress)
    return changed


def quantize(
    model: str | Path | nn.Module,
    config: str | Path | Config | None = None,
    output: str | Path | None = None,
    *,
    strategy: str | None = None,
    transforms: str | Transforms = ALL_TRANSFORMS,
    calibration: str | Path | Sequence[Tensor] | None = None,
    tokenizer: Any = None,
    sequences: int = 16,
    length: int = 512,
    seed: int | None = None,
    low_memory: bool = False,
    inplace: bool = False,
    force: bool = False,
    example_inputs: Any = None,
    unproved: bool = False,
    progress: Progress = silent,
) -> Any:
    """Rotate, smooth and quantize to int8: a folder to the folder ``output``, or a module in memory.

    Of a folder the result says what was written (``load`` makes a runnable model of it); of a module it is the changed
    module, a copy unless ``inplace``, whose ``save_pretrained`` writes such a folder. Without a ``config`` a folder is
    analyzed first. Claims that were edited since they were proved are proved again, of a module on what
    ``example_inputs`` call; ``unproved`` goes on without, which is recorded. Raises AutoQuantError, with nothing
    written, where anything does not fit or is not proved.
    """
    chosen, used = transforms_of(transforms), None if strategy is None else parse_strategy(strategy)
    progress(IMPORTING, 0, 0)
    from autoquant.checkpoint.quantize import Recipe, config_for, quantize_checkpoint

    if not isinstance(model, str | Path):
        if config is None or output is not None:
            raise AutoQuantError("a module in memory needs a config and takes no output; save_pretrained writes it")
        loaded = config_of(config)
        batches = batches_of(calibration, tokenizer, sequences, length, seed)
        proof = proof_of(loaded, model, example_inputs, unproved, progress)
        recipe = Recipe(loaded, used or loaded.quantization.strategy, chosen, batches, seed, proof)
        from autoquant.checkpoint.in_memory import quantize_module_

        return quantize_module_(model if inplace else copy.deepcopy(model), recipe, progress)
    if output is None:
        raise AutoQuantError(f"{model}: a folder needs an output")
    from autoquant.calibration.idle_experts import idle_text
    from autoquant.io.folders import check_target
    from autoquant.models.tokenizer import load_tokenizer
    from autoquant.report.results import Written

    source, target = Path(model), Path(output)
    check_target(source, target, force)
    loaded = config_of(config) if config is not None else config_for(str(source), None, steps_of(progress))
    reads = isinstance(calibration, str | Path)
    batches = batches_of(calibration, load_tokenizer(source) if reads else None, sequences, length, seed)
    proof = proof_of(loaded, source, None, unproved, progress)
    recipe = Recipe(loaded, used or loaded.quantization.strategy, chosen, batches, seed, proof)
    options = {
        "strategy": recipe.strategy.value,
        "transforms": str(chosen),
        "seed": seed,
        "sequences": sequences,
        "length": length,
        "calibration": Path(calibration).name if isinstance(calibration, str | Path) else None,
    }
    done = quantize_checkpoint(source, target, recipe, options, low_memory=low_memory, force=force, progress=progress)
    before, after = (sum(path.stat().st_size for path in folder.glob("*.safetensors")) for folder in (source, target))
    said = f"{target}: {recipe.strategy.value} after {chosen}, {before / 1e6:.2f} MB -> {after / 1e6:.2f} MB"
    idle = (idle_text(done.idle),) if done.idle else ()
    facts = {"bytes_before": before, "bytes_after": after, "idle_experts": dict(done.idle)}
    return Written(target, (said, *idle), {**options, **facts})


def load(model: str | Path, dtype: str | torch.dtype | None = None, *, device: str = "cpu") -> Any:
    """A runnable model from a folder of :func:`quantize`, or any causal LM that transformers loads.

    ``dtype`` is that of everything that is not int8, None or 'auto': as stored. ``save_pretrained`` of a quantized one
    writes such a folder again. Raises AutoQuantError where there is no such model.
    """
    import torch

    from autoquant.checkpoint.in_memory import saved_again_
    from autoquant.checkpoint.load import load as read
    from autoquant.models.device import device_of

    named = None if dtype == "auto" else getattr(torch, dtype) if isinstance(dtype, str) else dtype
    loaded = read(model, named).to(device_of(device))
    saved_again_(loaded, Path(model))
    return loaded
