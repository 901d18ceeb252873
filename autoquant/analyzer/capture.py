"""From a module to ATen graphs, by Dynamo or by non-strict export.

The graphs are lowered to ATen *before* decomposition: ``aten.linear``, ``aten.scaled_dot_product_attention``,
``aten.layer_norm``, ``aten.rms_norm`` and ``aten.embedding`` stay whole. In-place operators are functionalised, dead
nodes removed. Every placeholder says what it is, by its fully qualified name where it is a parameter or a buffer.

Capturing leaves the module and torch's global state as they were.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from autoquant.analyzer.graph import Captured, GraphInput, How, Names, Piece, lower, module_path, names_of, shape
from autoquant.analyzer.pieces import Traced, capture_pieces, compiled
from autoquant.errors import AutoQuantError

__all__ = [
    "Captured",
    "GraphInput",
    "How",
    "Piece",
    "capture",
    "check_against_eager",
    "module_path",
    "shape",
    "undisturbed",
]

_VALUES = re.compile("data-dependent|unbacked|meta tensor")
_BY_VALUES = "its code takes one way or another by the values of activations, and there are none on the meta device: "

_MODULE_TABLES = tuple(key for key, value in nn.Module().__dict__.items() if isinstance(value, dict))


def capture(
    module: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    how: Literal["auto", "dynamo", "export"] = "auto",
) -> Captured:
    """Capture ``module(*args, **kwargs)`` in evaluation mode, on any device, ``meta`` included.

    ``dynamo`` takes the whole graph where Dynamo can, else the pieces between its graph breaks; ``export`` is
    ``torch.export`` without Dynamo; ``auto`` tries whole-graph Dynamo, export, and Dynamo's pieces, in this order.

    Raises :class:`AutoQuantError` where none of them gets through, with the first line of what each of them said.
    """
    routes: dict[str, tuple[tuple[How, Callable[..., tuple[Piece, ...]]], ...]] = {
        "auto": (("dynamo", _strict), ("export", _non_strict), ("dynamo-pieces", capture_pieces)),
        "dynamo": (("dynamo", _strict), ("dynamo-pieces", capture_pieces)),
        "export": (("export", _non_strict),),
    }
    if how not in routes:
        raise AutoQuantError(f"capture: expected one of {', '.join(routes)}, got {how!r}")
    failures = []
    names, aliases = names_of(module)
    for route, run in routes[how]:
        try:
            with undisturbed(module):
                inputs = tuple(args), dict(kwargs)
                if route != "dynamo-pieces":  # Dynamo compiles no function of fake tensors
                    inputs = _stand_ins_(module, inputs)
                return Captured(route, run(module, *inputs, names), aliases)
        except Exception as error:  # Tracing runs the model's own code: whatever it raises means "not this way".
            failures.append(f"{route}: {_first_line(error)}")
    why = _BY_VALUES if any(_VALUES.search(failure) for failure in failures) else ""
    raise AutoQuantError(f"cannot capture {type(module).__name__}: {why}" + "; ".join(failures))


def check_against_eager(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], captured: Captured) -> float:
    """Largest difference between the captured graphs and ``module`` itself, relative to the largest eager value.

    ``captured`` comes from this module, which holds real tensors.
    """
    with undisturbed(module):
        expected = _tensors(module(*args, **kwargs))
        if captured.how == "dynamo-pieces":
            actual = _run_pieces(module, args, kwargs, captured.pieces)
        else:
            actual = _tensors(_run_whole(module, args, kwargs, captured.pieces[0]))
    if [tensor.shape for tensor in expected] != [tensor.shape for tensor in actual]:
        raise AutoQuantError(
            f"captured graph of {type(module).__name__}: expected outputs {[tuple(t.shape) for t in expected]}, "
            f"got {[tuple(t.shape) for t in actual]}"
        )
    return max((_difference(a, b) for a, b in zip(actual, expected, strict=True)), default=0.0)


@contextlib.contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, quietly; everything that tracing or running may touch is put back.

    Restored: attributes, training flags, buffers with their values, and hooks of every submodule; grad mode, default
    dtype and RNG state; warning filters and logging threshold. Dynamo's caches are dropped.
    """
    attributes = [(part.__dict__, dict(part.__dict__)) for part in module.modules()]
    tables = [(now[key], dict(now[key])) for now, _ in attributes for key in _MODULE_TABLES]
    buffers = [(buffer, buffer._version, buffer.clone()) for buffer in module.buffers() if not buffer.is_meta]
    threshold, dtype = logging.root.manager.disable, torch.get_default_dtype()
    try:
        with (
            torch.random.fork_rng(devices=()),
            torch.no_grad(),
            warnings.catch_warnings(),
            contextlib.ExitStack() as quiet,
        ):
            warnings.simplefilter("ignore")
            quiet.enter_context(contextlib.redirect_stdout(io.StringIO()))  # a failing export prints its graph
            quiet.enter_context(contextlib.redirect_stderr(io.StringIO()))
            logging.disable(logging.CRITICAL)
            module.eval()
            yield
    finally:
        torch._dynamo.reset()
        torch.set_default_dtype(dtype)
        logging.disable(threshold)
        for now, before in attributes + tables:
            if list(map(id, now.values())) != list(map(id, before.values())) or list(now) != list(before):
                now.clear()
                now.update(before)
        with torch.no_grad():
            for buffer, version, value in buffers:
                if buffer._version != version:
                    buffer.copy_(value)


def _stand_ins_(module: nn.Module, inputs: tuple[Any, Any]) -> tuple[Any, Any]:
    """Replace meta tensors of a module, and of its inputs, by fake ones on the CPU; neither has memory.

    A list used as an index becomes a tensor on the device of what it indexes: on meta, its values would be lost.
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
    changed: tuple[Any, Any] = pytree.tree_map_only(torch.Tensor, stand_in, inputs)
    return changed


def _strict(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], names: Names) -> tuple[Piece, ...]:
    with _no_guards():
        program = torch.export.export(module, args, kwargs, strict=True)
    return (lower(program, names),)


@contextlib.contextmanager
def _no_guards() -> Iterator[None]:
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


def _non_strict(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], names: Names) -> tuple[Piece, ...]:
    return (lower(torch.export.export(module, args, kwargs, strict=False), names),)


def _run_whole(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], piece: Piece) -> list[Any]:
    given = iter(pytree.tree_leaves((tuple(args), dict(kwargs))))
    values: list[Any] = []
    for placeholder, source in piece.inputs.items():
        match source.kind:
            case "parameter":
                values.append(module.get_parameter(source.name))
            case "buffer":
                values.append(module.get_buffer(source.name))
            case "constant":
                values.append(piece.constants[placeholder])
            case _:
                values.append(next(given))
    return list(piece.graph(*values))[piece.mutated :]


def _run_pieces(
    module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], pieces: Sequence[Piece]
) -> list[torch.Tensor]:
    remaining = iter(pieces)

    def run(_: Traced, inputs: tuple[Any, ...]) -> Any:
        piece = next(remaining)
        given = iter(inputs)
        values = [piece.constants[name] if name in piece.constants else next(given) for name in piece.inputs]
        return tuple(piece.graph(*values))[piece.mutated :]

    return _tensors(compiled(module, run)(*args, **kwargs))


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    if not expected.numel():
        return 0.0
    scale = expected.double().abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    return float((actual.double() - expected.double()).abs().max() / scale)


def _first_line(error: BaseException) -> str:
    """What tracing said, in one line: the message's first line and the line of model code it points at."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    sites = re.findall(r'File "([^"]+)", line (\d+), in (\w+)', str(error))
    site = f" (at {sites[-1][0].rpartition('/')[2]}:{sites[-1][1]} in {sites[-1][2]})" if sites else ""
    return (lines[0] if lines else type(error).__name__) + site
