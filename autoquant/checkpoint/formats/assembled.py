"""A runnable model of a built one and the tensors of a folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autoquant.checkpoint.formats.checked import check_tensors
from autoquant.errors import AutoQuantError


def fill_(model: Any, tensors: Mapping[str, Tensor], shared: Mapping[str, str], directory: Path) -> Any:
    """Put all tensors in and go to evaluation mode; ``shared`` maps further names to those that are stored.

    Raises AutoQuantError where names or shapes differ, and for what :func:`check_tensors` refuses.
    """
    check_tensors(directory, model, tensors)
    try:
        also = {name: tensors[source] for name, source in shared.items()}
        model.load_state_dict({**tensors, **also}, assign=True)
        for name, source in shared.items():  # one parameter again, not two that share memory
            path, _, last = name.rpartition(".")
            setattr(model.get_submodule(path), last, model.get_parameter(source))
    except (RuntimeError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise AutoQuantError(f"{directory}: its tensors do not fit its config: {reason}") from error
    return model.eval()


def as_loaded_(model: Any, dtype: torch.dtype | None) -> Any:
    """Give every parameter ``dtype``, or for None what transformers loads it as."""
    # Buffers are left alone: rotary frequencies stay float32, as transformers has it.
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(dtype or _loaded_dtype(model, name, parameter))
    return model


def _loaded_dtype(model: Any, name: str, parameter: Tensor) -> torch.dtype:
    """What transformers loads a parameter as: the checkpoint's dtype, whatever the tensor's own, since the code around
    may take one dtype only; its own where the class keeps the module in float32.
    """
    kept = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
    own: torch.dtype = parameter.dtype
    wanted: torch.dtype = model.config.dtype
    return own if kept.intersection(name.split(".")) or not own.is_floating_point else wanted
