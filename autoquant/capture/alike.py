"""What makes two blocks of a model alike, as far as it can be read off their modules.

:mod:`~autoquant.capture.executed` says what it cannot: what they do when they run.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import is_dataclass
from enum import Enum
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from autoquant.capture.executed import values_of

# An attribute that points at a layer: layer_idx, kv_shared_layer_index.
POINTER = re.compile(r"layer_?(idx|index|id|number|num)$")

MODULE_FIELDS = frozenset(vars(nn.Module()))

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_DEEPEST = 8
"""Containers within containers, and objects within objects, that are looked into."""

Attributes = dict[tuple[str, str], object]
"""By path of the submodule and name."""


def describe_block(block: nn.Module, configs: list[object]) -> tuple[object, Attributes]:
    """Classes, tensors and ties of a block, and its attributes and hooks, hashable.

    ``configs``: the settings met so far, by which equal ones are told; it grows.
    """
    seen: dict[int, str] = {}
    structure: list[object] = []
    attributes: Attributes = {}
    describe = Describe(configs, {id(part): path for path, part in block.named_modules()})
    for path, module in block.named_modules(remove_duplicate=False):
        structure.append((path, type(module), seen.setdefault(id(module), path)))
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None:
                continue
            tie = seen.setdefault(id(tensor), f"{path}.{name}")
            structure.append((name, tuple(tensor.shape), tensor.dtype, tie if name in module._parameters else ""))
            if not (tensor.is_floating_point() or tensor.is_complex()):  # an index: part of what is computed
                structure.append(values_of(tensor))
        for name, value in vars(module).items():
            if name not in MODULE_FIELDS:
                attributes[path, name] = describe(value)
        for name in _HOOKS:
            if hooks := vars(module).get(name):
                attributes[path, name] = tuple(describe(hook) for hook in hooks.values())
    return tuple(structure), attributes


class Describe:
    """Describes attributes, hashable: equal where the values are equal for all that a forward could do.

    What cannot be looked into is equal to itself alone.
    """

    def __init__(self, configs: list[object], modules: Mapping[int, str]) -> None:
        self.configs, self.modules = configs, modules

    def __call__(self, value: object, depth: int = 0) -> object:
        if value is None or isinstance(value, bool | int | float | str | bytes | complex | Enum):
            return type(value), value if value == value else "nan"
        if isinstance(value, torch.dtype | torch.device | torch.Size | torch.layout | slice | range | type):
            return type(value), str(value)
        if isinstance(value, Tensor):
            return Tensor, values_of(value)
        if isinstance(value, nn.Module):
            return "module", self.modules.get(id(value), id(value))
        if depth > _DEEPEST:
            return "deep", id(value)
        inner = functools.partial(self.__call__, depth=depth + 1)
        if isinstance(value, list | tuple | set | frozenset):
            items = sorted(value, key=repr) if isinstance(value, set | frozenset) else value
            return type(value), tuple(map(inner, items))
        if isinstance(value, Mapping):
            return type(value), tuple((repr(key), inner(item)) for key, item in value.items())
        if is_config(value):
            return "config", self._config(value)
        return self._callable(value, inner) if callable(value) else self._fields(value, inner)

    def _callable(self, value: Any, inner: Callable[[object], object]) -> object:
        if isinstance(value, functools.partial):
            return "partial", inner(value.func), inner(value.args), inner(value.keywords)
        if isinstance(value, MethodType):
            return "method", inner(value.__func__), inner(value.__self__)
        if isinstance(value, FunctionType):
            held = inner(_closure(value)), inner(value.__defaults__), inner(value.__kwdefaults__)
            return "function", value.__module__, value.__qualname__, value.__code__, held
        if hasattr(value, "__qualname__"):
            return "function", value.__module__, value.__qualname__, inner(getattr(value, "__wrapped__", None))
        return self._fields(value, inner)

    def _fields(self, value: Any, inner: Callable[[object], object]) -> object:
        fields = getattr(value, "__dict__", None)
        slots = any(getattr(kind, "__slots__", ()) for kind in type(value).__mro__)
        if fields is None or slots or type(value).__flags__ & _HEAP_TYPE == 0:
            return type(value), id(value)
        return type(value), inner(dict(fields))

    def _config(self, value: object) -> int:
        for number, other in enumerate(self.configs):
            if other is value or vars(other) == vars(value):
                return number
        self.configs.append(value)
        return len(self.configs) - 1


_HEAP_TYPE = 1 << 9
"""Of a class that is written in Python: all that an object of it holds stands in its fields."""


def _closure(function: FunctionType) -> tuple[object, ...]:
    found = []
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # not assigned yet
            found.append(cell.cell_contents)
    return tuple(found)


def is_config(value: object) -> bool:
    """Anything with fields that a module keeps as its settings."""
    if isinstance(value, type | nn.Module) or not hasattr(value, "__dict__"):
        return False
    return is_dataclass(value) or callable(getattr(value, "to_dict", None))


def position_attributes(layers: Sequence[Mapping[tuple[str, str], object]]) -> dict[tuple[str, str], int]:
    """Attributes that are a function of the layer's position and nothing else, with the step of those that count.

    An integer that goes up by one over three or more layers is the layer's number; with fewer layers or a larger step
    (two attentions in each) its name has to say so. A float that only rises or only falls over all layers (drop path
    rates, 1 / depth) is a schedule, and no symmetry depends on the value of a factor.
    """
    found: dict[tuple[str, str], int] = {}
    for key in dict.fromkeys(key for layer in layers for key in layer):
        values = [(i, layer[key]) for i, layer in enumerate(layers) if key in layer]
        numbers = [value[1] for _, value in values if isinstance(value, tuple) and value[0] in (int, float)]
        if len(numbers) < len(values):
            continue
        if all(isinstance(number, int) for number in numbers):
            step = _step([i for i, _ in values], numbers)
            if (step == 1 and len(numbers) > 2) or (step > 0 and POINTER.search(key[1])):
                found[key] = step
        elif len(layers) == len(numbers) > 2:
            rises = [a < b for a, b in itertools.pairwise(numbers)]
            falls = [a > b for a, b in itertools.pairwise(numbers)]
            if all(rises) or all(falls):
                found[key] = 0
    return found


def _step(positions: Sequence[int], numbers: Sequence[int]) -> int:
    """How much ``numbers`` go up from one position to the next, 0 where that is not the same everywhere."""
    if len(numbers) == 1:
        return int(numbers == positions)
    step = (numbers[1] - numbers[0]) // (positions[1] - positions[0])
    offsets = {number - step * position for position, number in zip(positions, numbers, strict=True)}
    return step if len(offsets) == 1 else 0


def shared_parameters(blocks: Sequence[nn.Module], outside: Sequence[nn.Module]) -> tuple[set[int], str | None]:
    """Layers that share parameters with one another, each of which stands for itself; and what is shared first.

    All of them where one shares a parameter with the rest of the model.
    """
    owner: dict[int, int | None] = {id(p): None for m in outside for p in m._parameters.values() if p is not None}
    tied: set[int] = set()
    reason = None
    for i, block in enumerate(blocks):
        for name, parameter in block.named_parameters():
            other = owner.setdefault(id(parameter), i)
            if other == i:
                continue
            if other is None:
                return set(range(len(blocks))), f"layer {i} and the model share the parameter {name}"
            tied |= {i, other}
            reason = reason or f"layer {i} and layer {other} share the parameter {name}"
    return tied, reason


def points_elsewhere(
    layers: Sequence[Mapping[tuple[str, str], object]], position: Mapping[tuple[str, str], int]
) -> str | None:
    """Which layer holds the number of another one, None where none does."""
    for i, layer in enumerate(layers):
        for (path, name), value in layer.items():
            if (path, name) in position or not POINTER.search(name) or value == (int, -1):
                continue  # -1 is the last layer, or none: the same with fewer of them
            if isinstance(value, tuple) and value[0] is int:
                return f"layer {i} refers to layer {value[1]} ({path}.{name})"
    return None
