"""Where models run."""

from __future__ import annotations

import os
from typing import Any

import torch

from autoquant.errors import AutoQuantError


def device_of(name: str) -> torch.device:
    """``auto``: a GPU where there is one; ``auto`` and ``cuda``: of several processes that torchrun started each its
    own. Raises AutoQuantError for one that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and (own := os.environ.get("LOCAL_RANK")) is not None:
        name = f"cuda:{own}"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise AutoQuantError(f"device '{name}': expected auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise AutoQuantError(f"device '{name}': there is none; {torch.cuda.device_count()} GPUs are seen")
    return device


def device_said(device: torch.device) -> str:
    """A device as a record has it: 'cpu', or 'cuda' and the card's name."""
    return f"cuda: {torch.cuda.get_device_name(device)}" if device.type == "cuda" else device.type


def computing_dtype(model: Any, name: str, dtype: torch.dtype) -> torch.dtype:
    """What a model of transformers that runs in ``dtype`` keeps a floating-point parameter in: some stay float32."""
    kept = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
    return torch.float32 if kept.intersection(name.split(".")) else dtype
