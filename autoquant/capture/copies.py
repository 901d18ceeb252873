"""Deep copies of modules whose functions hold the module, or parts of it, in their closures.

``copy.deepcopy`` takes a function for a value. A forward that was patched by a closure over the original bound method
(``part.forward = lambda x: old(x).tanh()``), or a hook of that kind, would go on calling the module it was made for.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any, TypeVar

from torch import Tensor, nn

_Module = TypeVar("_Module", bound=nn.Module)


def copied(module: _Module, memo: dict[int, Any] | None = None) -> _Module:
    """A deep copy with functions that call the copy where those of ``module`` call it. ``memo``: as for deepcopy."""
    memo = {} if memo is None else memo
    for part in module.modules():
        # What a module computed from its weights when it was made, as torch's older weight_norm does, has a history.
        memo |= {id(v): v.detach().clone() for v in vars(part).values() if isinstance(v, Tensor) and not v.is_leaf}
    held = _Held(module)
    fresh = {id(function): _hollow(function, held) for function in held.functions.values()}
    memo |= fresh
    made = copy.deepcopy(module, memo)
    for cell, other in held.cells:
        other.cell_contents = copy.deepcopy(cell.cell_contents, memo)
    for number, function in held.functions.items():
        fresh[number].__defaults__ = copy.deepcopy(function.__defaults__, memo)
        fresh[number].__kwdefaults__ = copy.deepcopy(function.__kwdefaults__, memo)
    return made


class _Held:
    """The functions of a module that hold parts of it, by identity, and the cells that do, each with its new one."""

    def __init__(self, module: nn.Module) -> None:
        self.parts = {id(part) for part in module.modules()}
        self.parts |= {id(tensor) for tensor in (*module.parameters(), *module.buffers())}
        self.functions: dict[int, FunctionType] = {}
        self.cells: list[tuple[CellType, CellType]] = []
        self.seen: set[int] = set()
        while True:  # a function may hold another that turns out to hold a part
            before = len(self.functions)
            self.seen.clear()
            for part in module.modules():
                for value in vars(part).values():
                    self.holds(value)
            if len(self.functions) == before:
                break

    def holds(self, value: object) -> bool:
        """True if a part of the module is reached from ``value``; functions by which it is are noted."""
        if isinstance(value, nn.Module | Tensor):
            return id(value) in self.parts
        if isinstance(value, FunctionType):
            if id(value) not in self.seen:
                self.seen.add(id(value))
                if any([self.holds(inner) for inner in _held_by(value)]):
                    self.functions[id(value)] = value
            return id(value) in self.functions
        if isinstance(value, MethodType):
            return self.holds(value.__self__)
        if isinstance(value, partial):
            return any([self.holds(inner) for inner in (value.func, *value.args, *value.keywords.values())])
        if isinstance(value, Mapping):
            return id(value) not in self.seen and self._any(value, value.values())
        if isinstance(value, list | tuple | set):
            return id(value) not in self.seen and self._any(value, value)
        return False

    def _any(self, container: object, values: Any) -> bool:
        self.seen.add(id(container))
        found = any([self.holds(inner) for inner in values])
        self.seen.discard(id(container))
        return found


def _held_by(function: FunctionType) -> Iterator[object]:
    yield from (cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell))
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()


def _hollow(function: FunctionType, held: _Held) -> FunctionType:
    """The function with new, empty cells in place of those that hold a part of the module."""
    made = {id(cell): other for cell, other in held.cells}
    closure = []
    for cell in function.__closure__ or ():
        if id(cell) not in made and _is_filled(cell) and held.holds(cell.cell_contents):
            made[id(cell)] = CellType()
            held.cells.append((cell, made[id(cell)]))
        closure.append(made.get(id(cell), cell))
    fresh = FunctionType(function.__code__, function.__globals__, function.__name__, None, tuple(closure))
    fresh.__dict__.update(function.__dict__)
    fresh.__qualname__, fresh.__module__, fresh.__doc__ = function.__qualname__, function.__module__, function.__doc__
    return fresh


def _is_filled(cell: CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:  # a name that is not given a value yet
        return False
