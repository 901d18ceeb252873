"""Where models run."""

from __future__ import annotations

import torch

from autoquant.errors import AutoQuantError


def device_of(name: str) -> torch.device:
    """``auto``: a GPU where there is one. Raises AutoQuantError for one that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise AutoQuantError(f"device '{name}': expected auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise AutoQuantError(f"device '{name}': there is none; {torch.cuda.device_count()} GPUs are seen")
    return device
