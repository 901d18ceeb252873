"""Whether a quantized folder's files can be what their writer wrote, told before a model computes with them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autoquant.errors import AutoQuantError
from autoquant.models.structure import FLOATING
from autoquant.models.vocabulary import token_tables

_SCALES = ("scale", "input_scale")


def check_tensors(directory: Path, model: Any, tensors: Mapping[str, Tensor]) -> None:
    """Raise AutoQuantError for a tensor of a kind that the model cannot compute with: other integers, scales that are
    not positive float32, numbers that are not finite outside of rows that a token table has for itself.
    """
    wanted = model.state_dict()
    tables = token_tables(model)
    for name, tensor in tensors.items():
        if name not in wanted:
            continue  # told with the others that do not fit
        kinds = FLOATING if wanted[name].dtype in FLOATING else {wanted[name].dtype}
        if tensor.dtype not in kinds:
            raise AutoQuantError(f"{directory}: damaged: {name} is {tensor.dtype}, not {wanted[name].dtype}")
        if f"{name.rpartition('.')[0]}.values" in wanted and name.endswith(_SCALES):
            _check_scale(directory, name, tensor)
        elif tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            rows = int((~tensor.isfinite()).any(-1).sum())
            if name not in tables or 2 * rows >= len(tensor):
                raise AutoQuantError(f"{directory}: damaged: {name} holds a NaN or an infinity")


def _check_scale(directory: Path, name: str, scale: Tensor) -> None:
    if scale.dtype is not torch.float32 or not bool((scale.isfinite() & (scale > 0)).all()):
        raise AutoQuantError(f"{directory}: damaged: {name} is not positive and finite in float32")
