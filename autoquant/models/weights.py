"""A checkpoint's own weights as a module to compare logits on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from autoquant.errors import AutoQuantError
from autoquant.models.reduction import failure_of
from autoquant.models.source import LoadedModel, one_line, quiet

BATCH, TOKENS = 2, 16


def load_weights(
    folder: Path, dtype: torch.dtype = torch.float64, seed: int = 0, *, trust_remote_code: bool = False
) -> LoadedModel:
    """The checkpoint in ``folder``, on the CPU and in evaluation mode, with random token ids [2, 16].

    Raises AutoQuantError where it cannot be loaded or run, and where a parameter is missing from it or has another
    shape there: transformers would give it random values.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        with quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, output_loading_info=True, trust_remote_code=trust_remote_code
            )
    except Exception as error:  # the checkpoint's format, its configuration, or the architecture's own code
        raise AutoQuantError(f"{folder}: cannot be loaded: {one_line(error)}") from error
    model, info = loaded
    if absent := sorted(str(key) for key in {*info["missing_keys"], *info["mismatched_keys"]}):
        raise AutoQuantError(f"{folder}: {absent[0]} is missing or of another shape")
    model.eval()
    model.config.use_cache = False
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(model.config.get_text_config().vocab_size, (BATCH, TOKENS), generator=generator)
    made = LoadedModel(model, (), {model.main_input_name: ids}, model.config)
    failure = None
    # Grouped matrix products, the default for experts, have no float64 kernel everywhere.
    for experts in (None, "batched_mm", "eager"):
        model.set_experts_implementation(experts)
        failure = failure_of(made)
        if failure is None:
            return made
    raise AutoQuantError(f"{folder}: cannot be run in {dtype}: {one_line(failure)}") from failure
