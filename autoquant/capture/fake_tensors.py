"""Running a module without its weights, and leaving it as it was.

Tensors on the meta device are replaced by fake ones on the CPU, which have no memory either. Integers whose values are
known stay real: token ids that say where the image goes, the grid of its patches. A model that branches on them is
followed where they lead, and what it computes from them alone is a constant of the graph.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import sys
import warnings
from collections.abc import Iterator
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from autoquant.capture.state import kept_state
from autoquant.library_patches import (
    FakeTensorMode,
    data_as_detached,
    pytree,
    reset_dynamo,
    without_idle_conversions,
    without_inference_mode,
    without_looks_at_masks,
    without_modes,
    without_vmap,
)

_FROM_VALUES = (torch.arange, torch.tensor, torch.as_tensor, torch.asarray, torch.linspace)
_FILLS = (torch.zeros, torch.ones, torch.full, torch.empty)
_FILLS_LIKE = {torch.zeros_like: 0, torch.ones_like: 1, torch.full_like: None}
_WHOLE = (torch.Tensor.bool, torch.Tensor.int, torch.Tensor.long)

_EQUAL = (torch.eq, torch.Tensor.eq, torch.Tensor.__eq__)
_MOVES = (torch.Tensor.to, torch.Tensor.view, torch.Tensor.reshape, torch.Tensor.flatten, torch.Tensor.contiguous)
_SIZED = (
    *(torch.Tensor.view, torch.Tensor.reshape, torch.Tensor.expand, torch.Tensor.repeat, torch.Tensor.unflatten),
    *(torch.split, torch.Tensor.split, torch.reshape, torch.nn.functional.interpolate),
)

WRITES = ("__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__iand__", "__ior__", "__ixor__")

_CHUNK = "chunk_size"
_SHORT_CHUNK = 2


@contextlib.contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, quietly; everything that tracing or running may touch is put back.

    Restored: attributes, training flags, buffers with their values, and hooks of every submodule; grad mode, default
    dtype and RNG state; warning filters and logging threshold. Dynamo's caches are dropped.
    """
    threshold, dtype = logging.root.manager.disable, torch.get_default_dtype()
    fused = torch.backends.mha.get_fastpath_enabled()  # an encoder layer as one operator, of which nothing is known
    try:
        with (
            kept_state(module),
            torch.random.fork_rng(devices=()),
            torch.no_grad(),
            warnings.catch_warnings(),
            contextlib.ExitStack() as quiet,
        ):
            warnings.simplefilter("ignore")
            quiet.enter_context(contextlib.redirect_stdout(io.StringIO()))  # a failing export prints its graph
            quiet.enter_context(contextlib.redirect_stderr(io.StringIO()))
            logging.disable(logging.CRITICAL)
            torch.backends.mha.set_fastpath_enabled(False)
            quiet.enter_context(data_as_detached())
            quiet.enter_context(without_looks_at_masks())
            quiet.enter_context(without_inference_mode())
            quiet.enter_context(without_idle_conversions())
            module.eval()
            yield
    finally:
        reset_dynamo()
        torch.set_default_dtype(dtype)
        torch.backends.mha.set_fastpath_enabled(fused)
        logging.disable(threshold)


def fakeify_(module: nn.Module, inputs: Any) -> tuple[Any, FakeTensorMode]:
    """Replace meta tensors of a module, and of its inputs, by fake ones on the CPU; neither has memory.

    A list used as an index becomes a tensor on the device of what it indexes: on meta, its values would be lost. The
    result is the inputs and the mode that the fake tensors belong to.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    made: dict[int, torch.Tensor] = {}

    def stand_in(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_meta:
            return tensor
        if id(tensor) not in made:
            with mode:
                fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
            made[id(tensor)] = nn.Parameter(fake, False) if isinstance(tensor, nn.Parameter) else fake
        return made[id(tensor)]

    for part in module.modules():
        for table in (part._parameters, part._buffers):
            for name, tensor in table.items():
                if tensor is not None:
                    table[name] = stand_in(tensor)  # type: ignore[assignment]  # a Parameter for a Parameter
    return pytree.tree_map_only(torch.Tensor, stand_in, inputs), mode


@contextlib.contextmanager
def known_values() -> Iterator[None]:
    """Compute for real what depends on plain tensors with values alone, whatever mode traces or fakes the rest.

    What is made of a fill (zeros, ones) in floating point is left to the trace, which knows its scale. What a model is
    given in floating point, pixels, is equal to no number: no image is empty, as one that pads a batch is.
    """
    with without_vmap(is_known), _KnownValues():
        yield


class DataAsDetached(TorchFunctionMode):
    """``x.data`` is ``x.detach()``, which a trace follows. Another tensor's data cannot be followed: RuntimeError."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == torch.Tensor.data.__get__:  # type: ignore[attr-defined]  # a descriptor
            return args[0].detach()
        if func == torch.Tensor.data.__set__:  # type: ignore[attr-defined]
            raise RuntimeError("it gives a tensor the data of another one (.data = ...), which no trace follows")
        return func(*args, **(kwargs or {}))


class _KnownValues(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.computed = WeakIdKeyDictionary()
        self.filled = WeakIdKeyDictionary()
        """Traced tensors that were filled with a number, which is known, to be as large as another."""
        self.viewed: dict[int, torch.Tensor] = {}
        """Known tensors by identity of which there are views, and so two ways to write."""
        self.written: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        """By identity, those that something unknown was written into, each with the traced copy that stands for it."""

    def _written(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.written.get(id(tensor), (tensor, tensor))[1]

    def _takes_copy(self, func: Any, tensor: torch.Tensor) -> bool:
        """Whether a known tensor of its own is written into: as a constant of the trace it could not be."""
        name = getattr(func, "__name__", "")
        writes = name in WRITES or (name.endswith("_") and not name.endswith("__"))
        return writes and is_known(tensor) and tensor._base is None and id(tensor) not in self.viewed

    def _is_given(self, tensor: Any) -> bool:
        """Whether a floating-point tensor was computed from nothing: an input, or a view of one."""
        return isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor not in self.computed

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.written:
            args, kwargs = pytree.tree_map_only(torch.Tensor, self._written, (args, kwargs))
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if all(map(is_known, tensors)) if tensors else _makes_known(func, kwargs):
            with without_modes():
                result = func(*args, **kwargs)
            if tensors and isinstance(result, torch.Tensor) and result._base is tensors[0]:
                self.viewed[id(tensors[0])] = tensors[0]
            return result
        if tensors and args and args[0] is tensors[0] and self._takes_copy(func, args[0]):
            self.written[id(args[0])] = args[0], args[0].clone()
            args = (self._written(args[0]), *args[1:])
        if func is torch.Tensor.expand_as and is_known(args[0]):  # of the other tensor, its shape alone is used
            with without_modes():
                return args[0].expand(args[1].shape)
        if func in _EQUAL and len(args) == 2 and self._is_given(args[0]) and isinstance(args[1], int | float):
            with without_modes():
                return torch.zeros(args[0].shape, dtype=torch.bool)
        filled = [self.filled.pop(tensor) for tensor in tensors if tensor in self.filled]  # it may be written into now
        if filled and func in _WHOLE:
            with without_modes():
                return func(torch.full(args[0].shape, filled[0], dtype=args[0].dtype))
        if func is torch.Tensor.__getitem__ and not is_known(args[0]):
            result = func(args[0], _without_masks(args[1]))
        elif func in _SIZED and args:  # by sizes, which a known tensor may hold
            result = func(args[0], *pytree.tree_map(_number, args[1:]), **pytree.tree_map(_number, kwargs))
        else:
            result = func(*args, **kwargs)
        if func in _FILLS_LIKE and isinstance(result, torch.Tensor):
            number = _FILLS_LIKE[func] if len(args) < 2 else args[1]
            if isinstance(number, int | float):
                self.filled[result] = number
        if func not in _MOVES or not self._is_given(args[0]):
            self.computed.update((leaf, True) for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor))
        return result


def is_known(tensor: torch.Tensor) -> bool:
    """True if it is a plain tensor with values."""
    return type(tensor) is torch.Tensor and not tensor.is_meta


def _makes_known(func: Any, kwargs: Any) -> bool:
    device = kwargs.get("device")
    if device is not None and torch.device(device).type == "meta":
        return False
    dtype = kwargs.get("dtype")  # of torch, or one of Python's types
    floating = dtype.is_floating_point if isinstance(dtype, torch.dtype) else dtype is float
    return func in _FROM_VALUES or (func in _FILLS and dtype is not None and not floating)


def _without_masks(index: Any) -> Any:
    """Masks of known values as the positions that they hold, and ends of slices as numbers: the shape of the result is
    then known too.
    """
    entries = index if isinstance(index, tuple) else (index,)
    made: list[Any] = []
    for entry in entries:
        if isinstance(entry, torch.Tensor) and entry.dtype is torch.bool and is_known(entry):
            with without_modes():
                made.extend(entry.nonzero(as_tuple=True))
        elif isinstance(entry, slice):
            made.append(slice(*map(_number, (entry.start, entry.stop, entry.step))))
        else:
            made.append(entry)
    return tuple(made) if len(made) != 1 or isinstance(index, tuple) else made[0]


def _number(held: Any) -> Any:
    """What a known tensor of one element holds; anything else as it is."""
    if not (isinstance(held, torch.Tensor) and is_known(held) and held.numel() == 1):
        return held
    with without_modes():
        return held.item()


@contextlib.contextmanager
def short_chunks(module: nn.Module) -> Iterator[None]:
    """Let functions that cut a sequence into chunks of a default size cut it into chunks of two tokens.

    A trace unrolls their loops: with 64 tokens in a chunk they are most of the graph, and the state that one chunk
    hands to the next is not in it. How a sequence is cut changes no result, which ``check_against_eager`` confirms
    with the model's own chunks. Only defaults of functions, in the files of the module's classes: a size that a
    configuration sets may bound what attention sees.
    """
    files = {type(part).__module__ for part in module.modules()} & sys.modules.keys()
    found = [value for name in files for value in vars(sys.modules[name]).values() if isinstance(value, FunctionType)]
    before = {}
    for function in map(inspect.unwrap, found):
        if isinstance(function, FunctionType) and function not in before and _chunk(function) is not None:
            before[function] = function.__defaults__
    try:
        for function, defaults in before.items():
            position = _chunk(function)
            assert defaults is not None and position is not None
            function.__defaults__ = (*defaults[:position], _SHORT_CHUNK, *defaults[position + 1 :])
        yield
    finally:
        for function, defaults in before.items():
            function.__defaults__ = defaults


def _chunk(function: FunctionType) -> int | None:
    """Where the defaults of ``function`` hold a size of chunks that is to be shorter, None where they do not."""
    defaults = function.__defaults__ or ()
    positional = function.__code__.co_varnames[: function.__code__.co_argcount]
    names = positional[len(positional) - len(defaults) :]
    if _CHUNK not in names:
        return None
    position = names.index(_CHUNK)
    return position if type(defaults[position]) is int and defaults[position] > _SHORT_CHUNK else None
