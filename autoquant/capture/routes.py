"""From a module to ATen graphs, by Dynamo or by non-strict export.

The graphs are lowered to ATen *before* decomposition: ``aten.linear``, ``aten.scaled_dot_product_attention``,
``aten.layer_norm``, ``aten.rms_norm`` and ``aten.embedding`` stay whole. In-place operators are functionalised, dead
nodes removed. Every placeholder says what it is, by its fully qualified name where it is a parameter or a buffer.

Capturing leaves the module and torch's global state as they were.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import nn
from torch.jit import ScriptModule

from autoquant.capture.attributes import attributes_as_buffers
from autoquant.capture.fake_tensors import (
    DataAsDetached,
    fakeify_,
    known_values,
    short_chunks,
    undisturbed,
)
from autoquant.capture.graph import (
    Captured,
    GraphInput,
    How,
    Names,
    Subgraph,
    asks_for_ties,
    first_output,
    lower,
    main_result,
    module_path,
    names_of,
    shape,
)
from autoquant.capture.occurring import EachOccurs
from autoquant.capture.subgraphs import Traced, capture_subgraphs, compiled
from autoquant.capture.untraceable import UntraceableCall, culprit, untraceable_
from autoquant.errors import AutoQuantError
from autoquant.library_patches import FakeTensor, pytree, some_rows, without_shape_guards

Run = Callable[..., tuple[Subgraph, ...]]

__all__ = [
    "Captured",
    "GraphInput",
    "How",
    "Subgraph",
    "capture",
    "check_against_eager",
    "module_path",
    "shape",
]


@dataclass(frozen=True, slots=True)
class Route:
    """One way of capturing, with inputs that are added for it."""

    name: How
    run: Run
    added: Mapping[str, Any] = field(default_factory=dict)
    after: re.Pattern[str] | None = None
    """What one of those before it must have failed by."""


_VALUES = re.compile("data-dependent|unbacked|meta tensor")
_STRANGE = re.compile("in output, which is not a known type")
_BY_VALUES = "its code takes one way or another by the values of activations, and there are none on the meta device: "


def capture(
    module: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    how: Literal["auto", "dynamo", "export"] = "auto",
    *,
    known: Collection[str] = (),
    first: bool = False,
    spare: Mapping[str, Any] = MappingProxyType({}),
) -> Captured:
    """Capture ``module(*args, **kwargs)`` in evaluation mode, on any device, ``meta`` included.

    ``dynamo`` takes the whole graph where Dynamo can, else the subgraphs between its graph breaks; ``export`` is
    ``torch.export`` without Dynamo, where need be with single modules left untraced (``untraceable``); ``auto`` tries
    whole-graph Dynamo, export, and Dynamo's subgraphs, in this order.

    ``known``: optional inputs whose values are part of what is captured, such as the token ids that say where an image
    goes. Export takes them as constants, and comes first then; to Dynamo they are inputs as any other. ``first``: of
    what the model returns, nothing matters behind the logits, or behind the first floating-point tensor where none are
    named so; subgraphs keep everything. ``spare``: inputs with which export is tried again where it fails without,
    since the model then computes what they say by values or not at all (masks).

    Raises :class:`AutoQuantError` where none of them gets through, with the first line of what each of them said.
    """
    non_strict = partial(_non_strict, known=known)
    calls, hidden = list[UntraceableCall](), list[str]()
    dynamo, export = Route("dynamo", _strict), Route("export", non_strict)
    untraceable = Route("export", partial(_around_untraceable, run=non_strict, calls=calls))
    by_position = Route("export", _by_position, after=_VALUES)
    counted = [] if known else [by_position]  # the positions have values where any input has
    alone = [Route("export", partial(_logits_alone, run=non_strict), after=_STRANGE)] if first else []
    subgraphs = Route("dynamo-pieces", partial(capture_subgraphs, hidden=hidden))
    more = [replace(route, added=spare) for route in (export, untraceable) if spare]
    routes: dict[str, list[Route]] = {
        "auto": [
            *((export, dynamo) if known else (dynamo, export)),
            *alone,
            *more[:1],
            *counted,
            untraceable,
            *more[1:],
            subgraphs,
        ],
        "dynamo": [dynamo, subgraphs],
        "export": [export, *alone, *more[:1], *counted, untraceable, *more[1:]],
    }
    if how not in routes:
        raise AutoQuantError(f"capture: expected one of {', '.join(routes)}, got {how!r}")
    _check_is_python(module)
    failures: list[str] = []
    with attributes_as_buffers(module, args, kwargs):
        names, aliases = names_of(module)
        inseparable = asks_for_ties(module)  # before tensors that are held by reference are others than the parameters
        for route in routes[how]:
            if route.after is not None and not any(map(route.after.search, failures)):
                continue
            try:
                with undisturbed(module), short_chunks(module):
                    inputs = tuple(args), {**kwargs, **route.added}
                    if route.name != "dynamo-pieces":  # Dynamo compiles no function of fake tensors
                        inputs, _ = fakeify_(module, inputs)
                    made = route.run(module, *inputs, names)
                    only = first and route.name != "dynamo-pieces"
                    return Captured(
                        route.name,
                        tuple(map(first_output, made)) if only else made,
                        aliases,
                        tuple(known) if route.name == "export" else (),
                        only,
                        tuple(calls) if route.run is untraceable.run else (),
                        inseparable,
                        tuple(hidden),
                        route.added,
                        route is by_position,
                    )
            except Exception as error:  # Tracing runs the model's own code: whatever it raises means "not this way".
                failure = f"{route.name}: {_first_line(error)}"
                failures += [failure] if failure not in failures else []
    why = _BY_VALUES if any(_VALUES.search(failure) for failure in failures) else ""
    raise AutoQuantError(f"cannot capture {type(module).__name__}: {why}" + "; ".join(failures))


def _check_is_python(module: nn.Module) -> None:
    compiled_before = next((path for path, part in module.named_modules() if isinstance(part, ScriptModule)), None)
    if compiled_before is not None:
        raise AutoQuantError(
            f"cannot capture {type(module).__name__}: {compiled_before or 'it'} is compiled by TorchScript, whose code "
            "no trace enters; build the model without torch.jit"
        )


def check_against_eager(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], captured: Captured) -> float:
    """Largest difference between the captured graphs and ``module`` itself, relative to the largest eager value.

    ``captured`` comes from this module, which holds real tensors. Raises AutoQuantError where the graphs cannot be run.
    """
    kwargs = {**kwargs, **captured.spare}
    with attributes_as_buffers(module, args, kwargs), undisturbed(module):
        output = module(*args, **kwargs)
        expected = main_result(output) if captured.first else _tensors(output)
        try:
            if captured.how == "dynamo-pieces":
                actual = _run_pieces(module, args, kwargs, captured.subgraphs)
            else:
                given = {name: value for name, value in kwargs.items() if name not in captured.known}
                actual = _tensors(_run_whole(module, args, given, captured.subgraphs[0]))
        except RuntimeError as error:  # of torch.vmap a graph keeps the steps inside, not the level that they belong to
            raise AutoQuantError(
                f"captured graph of {type(module).__name__}: it cannot be run, so it cannot be shown to be that of the "
                f"model: {_first_line(error)}"
            ) from error
    if [tensor.shape for tensor in expected] != [tensor.shape for tensor in actual]:
        raise AutoQuantError(
            f"captured graph of {type(module).__name__}: expected outputs {[tuple(t.shape) for t in expected]}, "
            f"got {[tuple(t.shape) for t in actual]}"
        )
    return max((_difference(a, b) for a, b in zip(actual, expected, strict=True)), default=0.0)


def _strict(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], names: Names) -> tuple[Subgraph, ...]:
    with some_rows():
        with without_shape_guards():
            program = torch.export.export(module, args, kwargs, strict=True)
        return (lower(program, names),)


def _non_strict(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], names: Names, known: Collection[str] = ()
) -> tuple[Subgraph, ...]:
    if not known:
        with some_rows():
            with EachOccurs(), DataAsDetached():
                program = torch.export.export(module, args, kwargs, strict=False)
            return (lower(program, names),)
    constants = {name: kwargs[name] for name in known}
    given = {name: value for name, value in kwargs.items() if name not in constants}
    module.register_forward_pre_hook(lambda _, args, kwargs: (args, {**kwargs, **constants}), with_kwargs=True)
    with some_rows():
        with known_values(), EachOccurs(), DataAsDetached():
            program = torch.export.export(module, args, given, strict=False)
        return (lower(program, names),)


def _by_position(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], names: Names
) -> tuple[Subgraph, ...]:
    """Where code decides by the largest position: the positions that it counts itself have values."""
    with some_rows():
        with known_values(), EachOccurs():
            program = torch.export.export(module, args, kwargs, strict=False)
        return (lower(program, names),)


def _logits_alone(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], names: Names, *, run: Run
) -> tuple[Subgraph, ...]:
    """Where a model returns behind its logits what no trace can, such as a cache: without."""
    module.register_forward_hook(lambda _, args, output: tuple(main_result(output)))
    (subgraph,) = run(module, args, kwargs, names)
    results: Any = subgraph.graph.graph.output_node().args[0]
    return (replace(subgraph, logits=len(results) - subgraph.mutated - 1),)


def _around_untraceable(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    names: Names,
    *,
    run: Run,
    calls: list[UntraceableCall],
) -> tuple[Subgraph, ...]:
    """Capture with as few classes of submodules left untraced as possible, those in whose forward tracing fails.

    ``calls`` is filled with the calls of these modules. Raises what tracing said where it fails elsewhere.
    """
    reasons: dict[type, str] = {}
    tensors = [*pytree.tree_leaves((args, kwargs)), *module.parameters(), *module.buffers()]
    has_values = not any(isinstance(t, FakeTensor) or getattr(t, "is_meta", False) for t in tensors)
    eager = partial(module, *args, **kwargs) if has_values else None
    while True:
        calls.clear()
        try:
            with undisturbed(module), untraceable_(module, reasons, calls, names, eager):
                return run(module, args, kwargs, names)
        except Exception as error:  # Tracing runs the model's own code: whatever it raises means "not this way".
            failing = culprit(error, names, reasons)
            if failing is None:
                raise
            reasons[type(failing)] = _first_line(error)


def _run_whole(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], subgraph: Subgraph) -> list[Any]:
    given = iter(pytree.tree_leaves((tuple(args), dict(kwargs))))
    values: list[Any] = []
    for placeholder, source in subgraph.inputs.items():
        match source.kind:
            case "parameter":
                values.append(module.get_parameter(source.name))
            case "buffer":
                values.append(module.get_buffer(source.name))
            case "constant":
                values.append(subgraph.constants[placeholder])
            case _:
                values.append(next(given))
    return list(subgraph.graph(*values))[subgraph.mutated :]


def _run_pieces(
    module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], subgraphs: Sequence[Subgraph]
) -> list[torch.Tensor]:
    remaining = iter(subgraphs)

    def run(_: Traced, inputs: tuple[Any, ...]) -> Any:
        subgraph = next(remaining, None)
        if subgraph is None:
            raise AutoQuantError(
                f"captured graph of {type(module).__name__}: run again, its code goes another way and on after the "
                f"{len(subgraphs)} subgraphs that were captured"
            )
        given = iter(inputs)
        values = [subgraph.constants[name] if name in subgraph.constants else next(given) for name in subgraph.inputs]
        return tuple(subgraph.graph(*values))[subgraph.mutated :]

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
