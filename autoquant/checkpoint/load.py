"""Runnable models from folders of every format, and from plain checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from autoquant.checkpoint.finite import find_unused
from autoquant.checkpoint.formats import format_of
from autoquant.models.load import load_language_model
from autoquant.models.vocabulary import token_tables


def load(model: str | Path, dtype: torch.dtype | None = None, *, trust_remote_code: bool = False) -> Any:
    """A runnable model in evaluation mode: a folder of ``autoquant quantize``, or any that transformers loads.

    ``dtype`` is that of everything that is not int8; None: the checkpoint's, as transformers loads it. Raises
    AutoQuantError where there is no such model, and where weights are NaN or infinite.
    """
    found = format_of(Path(model))
    if found is not None:
        return found.load(Path(model), dtype, trust_remote_code=trust_remote_code)
    loaded = load_language_model(model, dtype=dtype, trust_remote_code=trust_remote_code, quantized=True)
    parameters = dict(loaded.named_parameters())
    find_unused(Path(model), parameters, parameters.__getitem__, token_tables(loaded))
    return loaded
