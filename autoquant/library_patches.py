"""Private names of torch: this module is the only one that touches them, and says what for.

Each name was seen in torch 2.11 and 2.13; what one of them lacks is asked for with a default. A name that moves in a
later torch is mended here. What takes long to import (Dynamo) is imported by the function that needs it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

__all__ = [
    "DataDependentOutputException",
    "FakeTensor",
    "FakeTensorMode",
    "OpOverload",
    "TorchDispatchMode",
    "compiled_by_dynamo",
    "device_constructors",
    "int_mm",
    "marked_as_compiling",
    "nonzero_takes_all",
    "plain_calls",
    "pytree",
    "reset_dynamo",
    "without_amx_",
    "without_modes",
    "without_shape_guards",
    "without_vmap",
]

OpOverload = torch._ops.OpOverload
"""The type of an ATen operator in a graph: its schema names it."""

without_modes: Callable[[], AbstractContextManager[Any]] = _disable_current_modes
"""Computes for real in the midst of tracing or faking."""

device_constructors: Callable[[], set[Any]] = _device_constructors
"""The functions of torch that make tensors on a device that they are told."""


@contextlib.contextmanager
def plain_calls() -> Iterator[None]:
    """Call modules and operators as outside of any trace: it takes no part in them."""
    traced = nn.Module.__call__
    nn.Module.__call__ = torch.fx._symbolic_trace._orig_module_call  # type: ignore[method-assign]
    try:
        with _disable_current_modes(), torch._C.DisableTorchFunction(), torch._C._DisablePythonDispatcher():
            yield
    finally:
        nn.Module.__call__ = traced  # type: ignore[method-assign]


def nonzero_takes_all() -> AbstractContextManager[Any]:
    """Let fake tensors take every element of a ``nonzero`` for one: the size of its result is then known."""
    settings: Any = torch.fx.experimental._config  # its functions are made at run time
    context: AbstractContextManager[Any] = settings.patch(meta_nonzero_assume_all_nonzero=True)
    return context


@contextlib.contextmanager
def without_vmap(is_known: Callable[[Tensor], bool]) -> Iterator[None]:
    """Run the steps that ``torch.vmap`` adds to a trace outside of it, where all of their tensors have known values.

    These are: what is done with a tensor before and after it is mapped over, and an index that is mapped over.
    """
    from torch._dynamo import _trace_wrapped_higher_order_op as higher_order
    from torch._functorch import vmap

    def step(function: Any, *args: Any) -> Any:
        tensors = [leaf for leaf in pytree.tree_leaves(args) if isinstance(leaf, Tensor)]
        if not all(map(is_known, tensors)):
            return function(*args)
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            return function(*args)

    places = ((vmap, "_add_batch_dim"), (vmap, "_remove_batch_dim"), (higher_order, "mod_index"))
    before = [(file, name, getattr(file, name)) for file, name in places if hasattr(file, name)]
    try:
        for file, name, function in before:
            setattr(file, name, functools.partial(step, function))
        yield
    finally:
        for file, name, function in before:
            setattr(file, name, function)


@contextlib.contextmanager
def marked_as_compiling() -> Iterator[None]:
    """Let the library's code take the way that it takes while it is traced: ``torch.compiler.is_compiling()``."""
    before = torch.compiler._is_compiling_flag
    torch.compiler._is_compiling_flag = True
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag = before


@contextlib.contextmanager
def without_shape_guards() -> Iterator[None]:
    """Without the check of dynamic shapes, where torch has it in a function of its own.

    It writes one guard for every size of every parameter, a third of the time of an export. No shape is dynamic here.
    """
    from torch._dynamo import functional_export

    name = "_suggest_or_raise_constraint_violation"
    check = getattr(functional_export, name, None)
    if check is None:
        yield
        return
    setattr(functional_export, name, lambda *args, **kwargs: None)
    try:
        yield
    finally:
        setattr(functional_export, name, check)


def compiled_by_dynamo(module: nn.Module, backend: Callable[..., Any]) -> Callable[..., Any]:
    """``module`` under Dynamo, each graph handed to ``backend(graph, inputs)``; breaks are allowed, sizes are fixed."""
    compiled: Callable[..., Any] = torch._dynamo.optimize(backend, dynamic=False)(module)
    return compiled


def reset_dynamo() -> None:
    """Drop what Dynamo has compiled and counted."""
    torch._dynamo.reset()


def int_mm(a_MK: Tensor, b_KN: Tensor) -> Tensor:
    """int8 [M, K] @ int8 [K, N] in int32, by the device's own kernel. Raises RuntimeError where it has none."""
    return torch._int_mm(a_MK, b_KN)


def without_amx_() -> None:
    """Let this process find no AMX: kernels chosen by it round inputs in a way of their own."""
    torch.cpu._is_amx_tile_supported = lambda: False
