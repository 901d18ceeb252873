"""A checkpoint's own weights as a module to compare logits on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from autoquant.errors import AutoQuantError
from autoquant.models.auto_classes import auto_class, kinds_of
from autoquant.models.build import with_inputs
from autoquant.models.reduce import failure_of
from autoquant.models.source import LoadedModel, one_line, quiet

BATCH, TOKENS = 2, 16


def load_weights(
    folder: Path, dtype: torch.dtype = torch.float64, seed: int = 0, *, trust_remote_code: bool = False
) -> LoadedModel:
    """The checkpoint in ``folder``, by its own auto class, on the CPU and in evaluation mode.

    Inputs are random: token ids [2, 16], or one such sequence with an image or a sound.

    Raises AutoQuantError where it cannot be loaded or run, and where a parameter is missing from it or has another
    shape there: transformers would give it random values.
    """
    model = load_checkpoint(folder, dtype, trust_remote_code=trust_remote_code)
    model.config.use_cache = False
    made = with_inputs(model, torch.device("cpu"), dtype, (BATCH, TOKENS), seed)
    failure = None
    # Grouped matrix products, the default for experts, have no float64 kernel everywhere.
    for experts in (None, "batched_mm", "eager"):
        model.set_experts_implementation(experts)
        failure = failure_of(made)
        if failure is None:
            return made
    raise AutoQuantError(f"{folder}: cannot be run in {dtype}: {one_line(failure)}") from failure


def load_checkpoint(folder: Path, dtype: torch.dtype | str, *, trust_remote_code: bool = False) -> Any:
    """The checkpoint's model by its own auto class, in evaluation mode; ``dtype`` "auto": as stored.

    Raises AutoQuantError where it cannot be loaded, and where a parameter is missing or has another shape.
    """
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        with quiet():
            loaded: Any = class_of(folder, trust_remote_code=trust_remote_code).from_pretrained(
                folder, dtype=dtype, output_loading_info=True, trust_remote_code=trust_remote_code
            )
    except Exception as error:  # the checkpoint's format, its configuration, or the architecture's own code
        raise AutoQuantError(f"{folder}: cannot be loaded: {one_line(error)}") from error
    model, info = loaded
    if absent := sorted(str(key) for key in {*info["missing_keys"], *info["mismatched_keys"]}):
        raise AutoQuantError(f"{folder}: {absent[0]} is missing or of another shape")
    return model.eval()


def class_of(model: str | Path, *, trust_remote_code: bool = False) -> Any:
    """The auto class that builds a checkpoint: a folder or a hub id."""
    from transformers import AutoConfig

    with quiet():
        config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    return auto_class((kinds_of(config) or ("causal-lm",))[0])
