"""Private names of torch: this module is the only one that touches them, and says what for.

Each name was seen in torch 2.11 and 2.13; what one of them lacks is asked for with a default. A name that moves in a
later torch is mended here. What takes long to import (Dynamo) is imported by the function that needs it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils import _pytree as pytree
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

__all__ = [
    "DataDependentOutputException",
    "DynamicOutputShapeException",
    "FakeTensor",
    "FakeTensorMode",
    "OpOverload",
    "TorchDispatchMode",
    "compiled_by_dynamo",
    "constant_in_traces",
    "data_as_detached",
    "device_constructors",
    "gradients_throughout",
    "int_mm",
    "lists_of_traced",
    "marked_as_compiling",
    "nonzero_takes_all",
    "plain_calls",
    "pytree",
    "questions_of_sizes",
    "reset_dynamo",
    "say_sizes",
    "some_rows",
    "without_amx_",
    "without_dynamo",
    "without_idle_conversions",
    "without_inference_mode",
    "without_modes",
    "without_shape_guards",
    "without_vmap",
]

Function = TypeVar("Function", bound=Callable[..., Any])

_SOME = 1009
"""How many rows there are where it is asked whether there are any."""

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
def some_rows() -> Iterator[None]:
    """Decide whether there are none of the rows that the data choose: there are some.

    Code goes on to the next expert where no token chose this one; with no rows it would compute the same.
    """
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, ShapeEnv

    kind: Any = ShapeEnv
    evaluate = kind.evaluate_expr

    def decided(self: Any, expression: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return evaluate(self, expression, *args, **kwargs)
        except GuardOnDataDependentSymNode:
            if getattr(expression, "is_Relational", False):
                between = expression.lhs - expression.rhs  # of two ends of rows, those that lie between
                if between.is_Symbol or (-between).is_Symbol:
                    expression = expression.func(between, 0, evaluate=False)
            symbols: set[Any] = getattr(expression, "free_symbols", set())
            if len(symbols) != 1 or not symbols <= self.size_like or 0 not in getattr(expression, "args", ()):
                raise
            return expression.xreplace(dict.fromkeys(symbols, _SOME))

    kind.evaluate_expr = decided
    try:
        yield
    finally:
        kind.evaluate_expr = evaluate


def say_sizes(sizes: Sequence[Any], total: int | None) -> None:
    """Let a trace know that each of some numbers is 0 or more, and what they add up to."""
    for size in sizes:
        torch._check_is_size(size)
    if total is not None:
        torch._check(sum(sizes) == total)


@contextlib.contextmanager
def without_idle_conversions() -> Iterator[None]:
    """Let ``module.to(dtype)`` do nothing where nothing changes: torch would still swap every parameter for what became
    of it, and refuses where that is a fake tensor.
    """
    kind: Any = nn.Module
    to = kind.to

    def converted(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        device, dtype, _, layout = torch._C._nn._parse_to(*args, **kwargs)
        held = (*self.parameters(), *self.buffers())
        other = any(device not in (None, tensor.device) or _is_cast(tensor, dtype) for tensor in held)
        return to(self, *args, **kwargs) if other or layout is not None else self

    kind.to = converted
    try:
        yield
    finally:
        kind.to = to


def _is_cast(tensor: Tensor, dtype: torch.dtype | None) -> bool:
    return dtype not in (None, tensor.dtype) and (tensor.is_floating_point() or tensor.is_complex())


@contextlib.contextmanager
def lists_of_traced(made: Callable[[Tensor], Any]) -> Iterator[None]:
    """Let ``tolist`` of a traced tensor be what ``made`` says, where it does not say None."""
    kind: Any = FakeTensor
    tolist = kind.tolist

    def answered(self: Any) -> Any:
        answer = made(self)
        return tolist(self) if answer is None else answer

    kind.tolist = answered
    try:
        yield
    finally:
        kind.tolist = tolist


def questions_of_sizes(
    call: Callable[[Any, Any], object], args: Any, kwargs: Any, named: Callable[[Tensor], list[int | None]]
) -> list[Callable[[int, int], bool]]:
    """What ``call(args, kwargs)`` asks of two numbers, each question as a function of them that is true as it is.

    It is true too where it makes no sense, divided by a size that would be 0: code does not come there. ``named``:
    which of the two each size of an input is, 0 or 1, None where it is another one. Nothing is computed.
    """
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    sizes: Any = ShapeEnv(duck_shape=False, specialize_zero_one=False)
    mode = FakeTensorMode(shape_env=sizes, allow_non_fake_inputs=True)
    number_of: dict[Any, int] = {}

    def fake(leaf: Tensor) -> Tensor:
        kinds = named(leaf) or [None] * leaf.dim()
        dims = [DimDynamic.STATIC if kind is None else DimDynamic.DYNAMIC for kind in kinds]
        made: Tensor = mode.from_tensor(leaf, symbolic_context=StatelessSymbolicContext(dynamic_sizes=dims))
        for kind, size in zip(kinds, made.shape, strict=True):
            if kind is not None and isinstance(size, torch.SymInt):
                number_of[size.node._expr] = kind
        return made

    args, kwargs = pytree.tree_map_only(Tensor, fake, (args, kwargs))
    with contextlib.suppress(Exception), mode:  # the model's own code; what it asked until then was asked
        call(args, kwargs)
    found = {guard.expr for guard in sizes.guards}

    def asked(expression: Any) -> Callable[[int, int], bool]:
        def answer(*numbers: int) -> bool:
            try:
                return bool(expression.xreplace({symbol: numbers[k] for symbol, k in number_of.items()}))
            except ZeroDivisionError:
                return True

        return answer

    return [asked(expression) for expression in sorted(found, key=str) if expression.free_symbols <= number_of.keys()]


@contextlib.contextmanager
def data_as_detached() -> Iterator[None]:
    """Let Dynamo take ``x.data`` for ``x.detach()``.

    By its own way what the forward computed becomes a constant of the graph, of which nothing but its shape is known;
    and torch 2.13 dies of a segmentation fault where such a graph writes to it and is made functional.
    """
    _with_dynamo_()
    from torch._dynamo.variables.tensor import TensorVariable

    kind: Any = TensorVariable
    before = kind.method_attr_data
    kind.method_attr_data = lambda self, tx: self.call_method(tx, "detach", [], {})
    try:
        yield
    finally:
        kind.method_attr_data = before


@contextlib.contextmanager
def without_vmap(is_known: Callable[[Tensor], bool]) -> Iterator[None]:
    """Run the steps that ``torch.vmap`` adds to a trace outside of it, where all of their tensors have known values.

    These are: what is done with a tensor before and after it is mapped over, and an index that is mapped over.
    """
    _with_dynamo_()
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
def without_looks_at_masks() -> Iterator[None]:
    """Let torch's encoders take a mask as it is: they compare it with a causal one, for a faster kernel alone."""
    file: Any = importlib.import_module("torch.nn.modules.transformer")
    looks = file._detect_is_causal_mask
    file._detect_is_causal_mask = lambda mask, is_causal=None, size=None: is_causal is True
    try:
        yield
    finally:
        file._detect_is_causal_mask = looks


def without_inference_mode() -> AbstractContextManager[None]:
    """Let ``torch.inference_mode`` do nothing: its tensors cannot be traced, and must not stay behind in a module."""
    return _idle(torch.autograd.grad_mode.inference_mode)


def gradients_throughout() -> AbstractContextManager[None]:
    """Let neither ``torch.inference_mode`` nor ``torch.no_grad`` do anything: a forward may be decorated with them."""
    return _idle(torch.autograd.grad_mode.inference_mode, torch.autograd.grad_mode.no_grad)


@contextlib.contextmanager
def _idle(*kinds: Any) -> Iterator[None]:
    """Contexts of these kinds do nothing."""
    before = [(kind, kind.__enter__, kind.__exit__) for kind in kinds]
    for kind in kinds:
        kind.__enter__, kind.__exit__ = lambda self: None, lambda self, *error: None
    try:
        yield
    finally:
        for kind, enter, leave in before:
            kind.__enter__, kind.__exit__ = enter, leave


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
    _with_dynamo_()
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


def constant_in_traces(function: Function) -> Function:
    """Marked so that torch.compile asks once and goes on; ``torch.compiler.assume_constant_result`` imports Dynamo."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@contextlib.contextmanager
def without_dynamo() -> Iterator[None]:
    """Whatever asks for Dynamo in this context only to keep functions from it, or to name them to it, does without.

    Its import takes seconds. Where it is asked for more it comes, and :func:`_with_dynamo_` makes up for what was left.
    Nothing is done where it is there.
    """
    if _DYNAMO in sys.modules:
        yield
        return
    stand_in, higher_order = ModuleType(_DYNAMO), ModuleType(_HIGHER_ORDER)
    vars(stand_in).update(
        disable=_disabled_later,
        allow_in_graph=_allowed_later,
        assume_constant_result=constant_in_traces,
        __getattr__=functools.partial(_real, _DYNAMO),
        __path__=[],
    )
    vars(higher_order).update(
        TransformGetItemToIndex=_item_to_index, __getattr__=functools.partial(_real, _HIGHER_ORDER)
    )
    sys.modules |= {_DYNAMO: stand_in, _HIGHER_ORDER: higher_order}
    sys.meta_path.insert(0, _DynamoAfterAll())
    try:
        yield
    finally:
        _remove_stand_ins_()


_DYNAMO = "torch._dynamo"
_HIGHER_ORDER = "torch._dynamo._trace_wrapped_higher_order_op"
_allowed: list[Callable[..., Any]] = []
_undone: list[Callable[..., Any]] = []


def _remove_stand_ins_() -> None:
    for name in (_DYNAMO, _HIGHER_ORDER):
        if name in sys.modules and sys.modules[name].__spec__ is None:
            del sys.modules[name]
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _DynamoAfterAll)]


class _DynamoAfterAll(MetaPathFinder, Loader):
    """Finds a submodule of Dynamo that a library imports by name, as torchvision does, in the real one."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if not fullname.startswith(f"{_DYNAMO}."):
            return None
        _with_dynamo_()
        importlib.import_module(fullname)
        # The import that asked goes on with what this returns: were the module still there, it would be executed again.
        self._module = sys.modules.pop(fullname)
        self._spec = self._module.__spec__
        return ModuleSpec(fullname, self)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec


def _real(module: str, name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    _with_dynamo_()
    return getattr(importlib.import_module(module), name)


def _item_to_index() -> Any:
    """A ``TransformGetItemToIndex``."""
    _with_dynamo_()
    return importlib.import_module(_HIGHER_ORDER).TransformGetItemToIndex()


def _allowed_later(function: Function) -> Function:
    """``torch.compiler.allow_in_graph``, done with the rest."""
    _allowed.append(function)
    return function


def _disabled_later(function: Any = None, *given: Any, **options: Any) -> Any:
    """``torch.compiler.disable``: without Dynamo nothing has to be kept from it."""
    if function is None:
        return functools.partial(_disabled_later, **options)
    if options.get("wrapping") is False:  # by torch itself, which keeps the answer beside the function
        _undone.append(function)
        return function

    @functools.wraps(function)
    def later(*arguments: Any, **named: Any) -> Any:
        if _DYNAMO not in sys.modules or sys.modules[_DYNAMO].__spec__ is None:
            return function(*arguments, **named)
        return torch.compiler.disable(function, *given, **options)(*arguments, **named)

    return later


def _with_dynamo_() -> None:
    """Import Dynamo, and put what is its own where :func:`without_dynamo` left other things, which it cannot trace."""
    _remove_stand_ins_()
    real = importlib.import_module(_HIGHER_ORDER).TransformGetItemToIndex
    for module in [*sys.modules.values()]:
        if vars(module).get("TransformGetItemToIndex") is _item_to_index:
            vars(module)["TransformGetItemToIndex"] = real
    while _allowed:
        torch.compiler.allow_in_graph(_allowed.pop())
    while _undone:
        vars(_undone.pop()).pop("__dynamo_disable", None)


def compiled_by_dynamo(module: nn.Module, backend: Callable[..., Any]) -> Callable[..., Any]:
    """``module`` under Dynamo, each graph handed to ``backend(graph, inputs)``; breaks are allowed, sizes are fixed."""
    _with_dynamo_()
    compiled: Callable[..., Any] = torch._dynamo.optimize(backend, dynamic=False)(module)
    return compiled


def reset_dynamo() -> None:
    """Drop what Dynamo has compiled and counted."""
    _with_dynamo_()
    torch._dynamo.reset()


def int_mm(a_MK: Tensor, b_KN: Tensor) -> Tensor:
    """int8 [M, K] @ int8 [K, N] in int32, by the device's own kernel. Raises RuntimeError where it has none."""
    return torch._int_mm(a_MK, b_KN)


def without_amx_() -> None:
    """Let this process find no AMX: kernels chosen by it round inputs in a way of their own."""
    torch.cpu._is_amx_tile_supported = lambda: False
