"""Which names of a module stand for one and the same tensor."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

Identity = tuple[Any, ...]


def identity(tensor: torch.Tensor) -> Identity:
    """Equal for two tensors exactly if they are the same elements of the same storage (``meta`` has storages too)."""
    if tensor.layout is not torch.strided:  # it has none
        return (id(tensor),)
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tuple(tensor.shape), tensor.stride()


def grouped(named: Iterable[tuple[str, torch.Tensor]]) -> dict[Identity, tuple[str, ...]]:
    """The names of each tensor, in the order in which they come."""
    names: dict[Identity, list[str]] = {}
    for name, tensor in named:
        names.setdefault(identity(tensor), []).append(name)
    return {key: tuple(group) for key, group in names.items()}


def ties_of(module: nn.Module) -> tuple[tuple[str, ...], ...]:
    """Groups of parameter names of one tensor, in the module's order."""
    groups = grouped(module.named_parameters(remove_duplicate=False))
    return tuple(names for names in groups.values() if len(names) > 1)
