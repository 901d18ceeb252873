"""Layers that do something of their own by their number, or hold code that cannot be compared with another's."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from autoquant.models.source import LoadedModel, quiet

_NUMBER = re.compile(r"layer_?(idx|index|id|number|num)$|^(idx|depth|level)$")
_COMPARED = ["eq", "ne", "lt", "le", "gt", "ge", "bool", "hash"]
_RECKONED = [
    "mod",
    "add",
    "radd",
    "sub",
    "rsub",
    "mul",
    "rmul",
    "floordiv",
    "truediv",
    "and",
    "rand",
    "pow",
    "xor",
    "or",
]
DEEP = 8
"""Layers of each kind where what a layer does may hang on its number."""


def hangs_on_depth(loaded: LoadedModel) -> bool:
    """True if a forward compares or reckons with the number of its layer, or a layer has code of its own: hooks, a
    forward that was put in its place, functions and objects that are called.
    """
    layers = [part for part in loaded.module.modules() if _numbers_its_parts(part)]
    inside = {id(part): part for stack in layers for part in stack.modules()}
    if any(_has_own_code(part) for part in inside.values()):
        return True
    asked: list[str] = []
    with _numbers_that_tell(inside.values(), asked), quiet(), torch.no_grad(), torch.random.fork_rng(devices=()):
        try:
            loaded.module(*loaded.args, **loaded.kwargs)
        except Exception:  # the architecture's code, which the stand-ins for its numbers may not suit
            return True
    return bool(asked)


def _numbers_its_parts(part: nn.Module) -> bool:
    return isinstance(part, nn.ModuleList) or (isinstance(part, nn.ModuleDict) and "0" in part)


def _has_own_code(part: nn.Module) -> bool:
    hooks = part._forward_hooks or part._forward_pre_hooks
    values = [value for name, value in vars(part).items() if not name.startswith("_")]
    return bool(hooks) or "forward" in vars(part) or any(map(_may_differ, values))


def _may_differ(value: object) -> bool:
    """True for code that holds values of its own: a partial, a closure, an object with a call."""
    if isinstance(value, nn.Module | type | torch.Tensor | torch.dtype) or not callable(value):
        return False
    if isinstance(value, functools.partial):
        return True
    closure: Any = getattr(value, "__closure__", None)
    return bool(closure) or not hasattr(value, "__qualname__")


@contextmanager
def _numbers_that_tell(parts: Any, asked: list[str]) -> Iterator[None]:
    """Within it, the layers' numbers note every comparison and every sum that is made of them."""
    kind = _telling_int(asked)
    changed = []
    for part in parts:
        for name, value in list(vars(part).items()):
            if type(value) is int and _NUMBER.search(name):
                changed.append((part, name, value))
                vars(part)[name] = kind(value)
    try:
        yield
    finally:
        for part, name, value in changed:
            vars(part)[name] = value


def _telling_int(asked: list[str]) -> type[int]:
    def telling(name: str) -> Callable[..., Any]:
        method = getattr(int, name)

        def tell(self: int, *others: Any) -> Any:
            asked.append(name)
            return method(self, *others)

        return tell

    names = [f"__{question}__" for question in (*_COMPARED, *_RECKONED)]
    return type("Number", (int,), {name: telling(name) for name in names})
