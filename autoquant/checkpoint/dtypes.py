"""Which number format each tensor of a checkpoint has, so that it is written in the one that it was read in.

A bfloat16 checkpoint may hold float32 routers, decay rates and norms: rounding them with the rest would change the
model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from autoquant.errors import AutoQuantError
from autoquant.executor.apply import check_finite
from autoquant.io.safetensors_stream import Shards
from autoquant.models.locate import WRAPPED
from autoquant.models.structure import FLOATING, ModelStructure, structure_of


@dataclass(frozen=True, slots=True)
class Dtypes:
    """``most``: the floating-point dtype that most elements have, and that of new parameters; ``others``: the stored
    dtype of each parameter that has another.
    """

    most: torch.dtype
    others: Mapping[str, torch.dtype]

    def of(self, name: str) -> torch.dtype:
        """The dtype of a parameter by its name in the model, in a wrapper or not."""
        return self.others.get(name) or self.others.get(name.replace(f".{WRAPPED}.", ".")) or self.most


def stored_dtypes(shards: Shards, names: Mapping[str, str]) -> Dtypes:
    """The dtypes of a checkpoint's parameters; ``names`` are the stored ones by the model's (see ``stored_names``).

    Parameters that transformers makes of several tensors are in no ``names`` and get ``most``. Raises AutoQuantError
    where nothing is in floating point.
    """
    elements: dict[torch.dtype, int] = {}
    for entry in shards.entries.values():
        if entry.dtype in FLOATING:
            elements[entry.dtype] = elements.get(entry.dtype, 0) + torch.Size(entry.shape).numel()
    if not elements:
        raise AutoQuantError(f"{shards.folder}: holds no floating-point weights")
    most = max(elements, key=lambda dtype: elements[dtype])
    found = {name: shards.entries[stored].dtype for name, stored in names.items()}
    return Dtypes(most, {name: dtype for name, dtype in found.items() if dtype in FLOATING and dtype is not most})


def stored_names(inventory: ModelStructure, shards: Shards) -> dict[str, str]:
    """Parameter name -> stored name, for those that are stored under a name that is known.

    Base checkpoints lack the first component ('transformer.'), and of tied parameters one is stored.
    """
    names: dict[str, str] = {}
    for name in inventory.shapes:
        for candidate in (name, name.partition(".")[2]):
            if candidate in shards.entries and shards.entries[candidate].shape == inventory.shapes[name]:
                names[name] = candidate
                break
    for name, first in inventory.canonical.items():
        tied = next((names[n] for n, f in inventory.canonical.items() if f == first and n in names), None)
        if tied is not None:
            names.setdefault(name, tied)
    return names


@torch.no_grad()
def narrow_(model: Any, dtypes: Dtypes) -> None:
    """Round every parameter to its dtype; int8 weights, scales and buffers stay. AutoQuantError where one overflows."""
    for name, parameter in model.named_parameters():
        dtype = dtypes.of(name)
        narrowed = parameter.data.to(dtype)
        check_finite(name, narrowed, f"overflows {dtype}")
        parameter.data = narrowed
    model.config.dtype = dtypes.most


@torch.no_grad()
def restore_dtypes_(model: Any, shards: Shards) -> None:
    """Give every floating-point parameter of a model that was loaded in one dtype its stored dtype and values back."""
    inventory = structure_of(model)
    for name, stored in stored_names(inventory, shards).items():
        parameter, dtype = model.get_parameter(name), shards.entries[stored].dtype
        if dtype in FLOATING and parameter.is_floating_point() and parameter.dtype is not dtype:
            parameter.data = shards.read(stored).to(parameter.device)
