"""What a forward may change beside its result, and putting it back.

A module counts its calls, keeps what it has seen in a list, moves an iterator on, or fills a cache; so may an object or
a function that it holds. Two runs of such a module compare only where both start alike. What is outside of the module
(globals, classes, Python's random numbers) stays as a run leaves it: what hangs on that is no function of the inputs.
"""

from __future__ import annotations

import contextlib
import copy
import random
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import CellType, FunctionType, MethodType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)
_NOT_OWN = frozenset({"autoquant", "torch", "transformers", "numpy", *sys.stdlib_module_names}) - {"__main__"}
"""Packages whose objects are no part of a model's state."""


@dataclass(slots=True)
class Kept:
    """``changed``: whether something was put back."""

    changed: bool = False


@contextlib.contextmanager
def kept_state(module: nn.Module) -> Iterator[Kept]:
    """Put back what a call of the module may change: attributes and hooks, what they hold (containers, objects,
    closures, generators of random numbers), and the values of buffers and of other tensors there.

    Plain attributes of a module are left as they are where its parameters were written: one that rescales its weights
    when it first runs notes that beside them.
    """
    attributes = [(part.__dict__, dict(part.__dict__)) for part in module.modules()]
    weights = [parameter for parameter in module.parameters() if not parameter.is_inference()]
    versions = [parameter._version for parameter in weights]
    inside = _Inside(module)
    held = [tensor for tensor in inside.tensors if not (tensor.is_meta or tensor.is_inference())]
    values = [(tensor, tensor._version, tensor.detach().clone()) for tensor in held]
    kept = Kept()
    try:
        yield kept
    finally:
        written = versions != [parameter._version for parameter in weights]
        for now, before in attributes:
            if written:
                before |= {name: value for name, value in now.items() if name in before and _is_number(value)}
            kept.changed |= _refill(now, before)
        kept.changed |= inside.put_back()
        with torch.no_grad():
            for tensor, version, value in values:
                if tensor._version != version:
                    tensor.copy_(value)
                    kept.changed = True


def plain_tensors(part: nn.Module) -> dict[str, torch.Tensor]:
    """Floating-point tensors that are attributes of a module and neither parameters nor buffers of it: caches."""
    return {
        name: value
        for name, value in vars(part).items()
        if isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())
    }


def _is_number(value: object) -> bool:
    return isinstance(value, bool | int | float)


class _Inside:
    """What the attributes of a module's parts lead to, each with what puts it back."""

    def __init__(self, module: nn.Module) -> None:
        self.undo: list[Callable[[], bool]] = []
        self.tensors: list[torch.Tensor] = []
        """Those that are no parameters."""
        self.seen: dict[int, object] = {}  # kept, so that no identity is given twice
        self.queue: list[object] = []
        for part in module.modules():
            self.seen[id(part)] = part
        for part in module.modules():
            self._table(part.__dict__, own=False)
        while self.queue:
            self._look(self.queue.pop())

    def put_back(self) -> bool:
        """True if something had changed."""
        return any([undo() for undo in self.undo])

    def _add(self, values: Iterable[object]) -> None:
        for value in values:
            if isinstance(value, _PLAIN) or id(value) in self.seen:
                continue
            self.seen[id(value)] = value
            if not isinstance(value, torch.Tensor):
                self.queue.append(value)
            elif not isinstance(value, nn.Parameter):
                self.tensors.append(value)

    def _look(self, value: Any) -> None:
        match value:
            case dict():
                self._table(value)
            case list() | deque():
                before = dict(enumerate(map(_saved, value)))
                self.undo.append(lambda: _refill(value, before))
                self._add(value)
            case set():
                self._state(value.copy, partial(_refill_set, value), value.copy())
                self._add(value)
            case tuple() | frozenset():
                self._add(value)
            case Mapping():
                self._add(value.values())
            case FunctionType() if is_own(value.__module__):
                self._function(value)
            case MethodType():
                self._add((value.__self__, value.__func__))
            case np.ndarray() if value.dtype != object:
                self._state(value.tobytes, partial(np.copyto, value), value.copy())
            case random.Random():
                self._state(value.getstate, value.setstate, value.getstate())
            case torch.Generator():
                self._state(lambda: value.get_state().tolist(), value.set_state, value.get_state())
            case np.random.Generator():
                bits = value.bit_generator
                self._state(lambda: repr(bits.state), partial(setattr, bits, "state"), bits.state)
            case partial():
                self._add((value.func, *value.args, *value.keywords.values()))
            case nn.Module() | SimpleNamespace():
                self._table(value.__dict__)
            case _ if is_own(type(value).__module__) and isinstance(getattr(value, "__dict__", None), dict):
                self._table(value.__dict__)

    def _state(self, read: Callable[[], Any], put: Callable[[Any], object], content: Any) -> None:
        """What is put back by ``put(content)`` where ``read()`` is another one than now."""
        before = read()

        def undo() -> bool:
            changed = bool(read() != before)
            if changed:
                put(content)
            return changed

        self.undo.append(undo)

    def _table(self, table: dict[Any, Any], own: bool = True) -> None:
        """``own`` False: of a module, whose attributes are put back by themselves; iterators are not."""
        before = {name: _saved(value) for name, value in table.items()}
        if not own:
            before = {name: value for name, value in before.items() if value is not table[name]}
        if own or before:
            self.undo.append(lambda: _refill(table, before) if own else bool(table.update(before) or before))
        self._add(table.values())

    def _function(self, function: FunctionType) -> None:
        self._table(function.__dict__)
        for cell in function.__closure__ or ():
            with contextlib.suppress(ValueError):  # a name that is not given a value yet
                content = _saved(cell.cell_contents)
                read = partial(_identity, cell) if content is cell.cell_contents else object  # an iterator moves on
                self._state(read, partial(setattr, cell, "cell_contents"), content)
                self._add((cell.cell_contents,))
        self._add((*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()))


def _saved(value: Any) -> Any:
    """What puts ``value`` back: itself, or a copy of an iterator, which a run moves on."""
    if isinstance(value, Iterator) and not isinstance(value, torch.Tensor):
        with contextlib.suppress(Exception), warnings.catch_warnings():  # a generator or a file cannot be copied
            warnings.simplefilter("ignore")
            return copy.copy(value)
    return value


def _refill(now: dict[Any, Any] | list[Any] | deque[Any], before: dict[Any, Any]) -> bool:
    """Give a container what it held, a list by position; True if it held something else."""
    table = now if isinstance(now, dict) else dict(enumerate(now))
    same = list(map(id, table.values())) == list(map(id, before.values())) and list(table) == list(before)
    if not same:
        now.clear()
        if isinstance(now, dict):
            now.update(before)
        else:
            now.extend(before.values())
    return not same


def _refill_set(now: set[Any], before: set[Any]) -> None:
    now.clear()
    now.update(before)


def _identity(cell: CellType) -> int:
    try:
        return id(cell.cell_contents)
    except ValueError:  # deleted
        return 0


def is_own(name: str | None) -> bool:
    """True of a module of Python code that is a person's, not torch's, transformers' or Python's."""
    return (name or "").partition(".")[0] not in _NOT_OWN
