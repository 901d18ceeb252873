"""What a model is made of, without its weights: parameter names, shapes, dtypes and ties."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

FLOATING = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})
"""Parameters that can be folded. Narrower floats carry scales of their own and are refused."""


def take_inventory(model: nn.Module) -> Inventory:
    """The inventory of a module on any device, the meta device included. Names are those of ``state_dict``."""
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, torch.dtype] = {}
    canonical: dict[str, str] = {}
    shared_modules: set[str] = set()
    first_name: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        shapes[name] = tuple(parameter.shape)
        dtypes[name] = parameter.dtype
        canonical[name] = first_name.setdefault(_identity(parameter), name)
        if canonical[name] != name and _owner(model, name) is _owner(model, canonical[name]):
            shared_modules.add(name)
    return Inventory(shapes, dtypes, canonical, frozenset(shared_modules), _growable(model))


def _identity(parameter: nn.Parameter) -> int:
    """The same number for parameters that share their storage from its beginning (meta tensors have no storage to
    compare).
    """
    if parameter.is_meta or parameter.numel() == 0:
        return id(parameter)
    return parameter.data_ptr()


def _owner(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])


def _growable(model: nn.Module) -> frozenset[str]:
    """Bias names that do not exist yet but could: a plain ``nn.Linear`` built without one adds it when it is there."""
    names: set[str] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear) and module.bias is None and type(module).forward is nn.Linear.forward:
            names.add(f"{name}.bias" if name else "bias")
    return frozenset(names)


@dataclass(frozen=True, slots=True)
class Inventory:
    """``canonical`` maps each name to the first name of the same storage; ``shared_modules`` are the names whose whole
    module is shared, so that they can never be untied; ``growable`` are absent biases that can be created.
    """

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    canonical: dict[str, str]
    shared_modules: frozenset[str]
    growable: frozenset[str]

    def ties(self) -> tuple[tuple[str, ...], ...]:
        """Groups of names that share storage, canonical name first."""
        groups: dict[str, list[str]] = {}
        for name, first in self.canonical.items():
            groups.setdefault(first, []).append(name)
        return tuple(tuple(group) for group in groups.values() if len(group) > 1)

    def parameters(self) -> int:
        """Number of elements, tied ones counted once."""
        total = 0
        for name, first in self.canonical.items():
            if name == first:
                total += torch.Size(self.shapes[name]).numel()
        return total
