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
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from autoquant.errors import AutoQuantError

How = Literal["dynamo", "export", "dynamo-pieces"]

_MODULE_TABLES = tuple(key for key, value in nn.Module().__dict__.items() if isinstance(value, dict))
_KINDS: Mapping[InputKind, Literal["parameter", "buffer", "constant", "input"]] = {
    InputKind.PARAMETER: "parameter",
    InputKind.BUFFER: "buffer",
    InputKind.CONSTANT_TENSOR: "constant",
    InputKind.USER_INPUT: "input",
}


@dataclass(frozen=True, slots=True)
class GraphInput:
    """What a placeholder stands for.

    ``crossing`` is a tensor that comes from outside of the piece and that nothing is known about: another piece made
    it, or it is a parameter that code between the pieces uses too.
    """

    kind: Literal["parameter", "buffer", "constant", "input", "crossing"]
    name: str
    """Fully qualified name of a parameter or buffer; otherwise a name for messages."""


@dataclass(frozen=True, slots=True)
class Piece:
    """One ATen graph. ``node.meta['val']`` of every placeholder and call holds its fake value (shape, dtype)."""

    graph: torch.fx.GraphModule
    inputs: Mapping[str, GraphInput]
    """By placeholder name, in the order of the graph's arguments."""
    constants: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Tensors made while tracing, by placeholder name."""
    mutated: int = 0
    """How many of the graph's outputs, the first ones, are new values of its inputs and not results."""


@dataclass(frozen=True, slots=True)
class Captured:
    """A module as ATen graphs.

    Parameters are told apart by identity, never by value. One that several modules share goes by its first name in
    ``named_parameters()``; ``aliases`` lists all the names of each shared one, that first.
    """

    how: How
    pieces: tuple[Piece, ...]
    aliases: tuple[tuple[str, ...], ...]


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
        "auto": (("dynamo", _strict), ("export", _non_strict), ("dynamo-pieces", _pieces)),
        "dynamo": (("dynamo", _strict), ("dynamo-pieces", _pieces)),
        "export": (("export", _non_strict),),
    }
    if how not in routes:
        raise AutoQuantError(f"capture: expected one of {', '.join(routes)}, got {how!r}")
    failures = []
    names, aliases = _names(module)
    for route, run in routes[how]:
        try:
            with undisturbed(module):
                return Captured(route, run(module, tuple(args), dict(kwargs), names), aliases)
        except Exception as error:  # Tracing runs the model's own code: whatever it raises means "not this way".
            failures.append(f"{route}: {_first_line(error)}")
    raise AutoQuantError(f"cannot capture {type(module).__name__}: " + "; ".join(failures))


def module_path(node: torch.fx.Node) -> str:
    """The innermost module that ``node`` was traced in: ``'model.layers.0.mlp'``; ``''`` for the root."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path, _ = list(stack.values())[-1]
    return re.sub(r"@\d+", "", path)  # '@1' marks the second call of the same module


def shape(node: torch.fx.Node) -> tuple[int, ...]:
    """Shape of the tensor that ``node`` makes."""
    value = node.meta["val"]
    if not isinstance(value, torch.Tensor):
        raise AutoQuantError(
            f"{node.target} at {module_path(node) or 'the root'}: expected one tensor, got {type(value).__name__}"
        )
    return tuple(int(size) for size in value.shape)


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

    Restored: attributes, training flags, parameters, buffers (values too) and hooks of every submodule; grad mode,
    default dtype and RNG state; warning filters and logging threshold. Dynamo's caches are dropped.
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


def _strict(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], names: _Names) -> tuple[Piece, ...]:
    return (_lower(torch.export.export(module, args, kwargs, strict=True), names),)


def _non_strict(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], names: _Names) -> tuple[Piece, ...]:
    return (_lower(torch.export.export(module, args, kwargs, strict=False), names),)


def _pieces(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], names: _Names) -> tuple[Piece, ...]:
    calls: list[tuple[_Traced, tuple[Any, ...]]] = []

    def record(traced: _Traced, inputs: tuple[Any, ...]) -> Any:
        calls.append((traced, inputs))
        return traced.graph(*inputs)

    _compiled(module, record)(*args, **kwargs)
    if not calls:
        raise AutoQuantError("Dynamo found no tensor operation")
    # Dynamo leaves some code to Python altogether (a loop with a break in it). A parameter used there has readers or
    # writers that no piece shows, so nothing may be concluded from those that are shown.
    hidden = _uses(lambda: module(*args, **kwargs)) - _uses(lambda: [traced.graph(*inputs) for traced, inputs in calls])
    given = {id(leaf): f"input {index}" for index, leaf in enumerate(pytree.tree_leaves((args, kwargs)))}
    first_root: dict[int, str] = {}
    pieces = []
    for traced, inputs in calls:
        root = _root(traced, inputs, names)
        traced_root = first_root.setdefault(id(traced), root)
        for node, stack in traced.stacks.items():
            node.meta["nn_module_stack"] = _named_stack(stack, names, traced_root, root)
        program = torch.export.export(traced.graph, inputs, strict=False)
        pieces.append(_lower(program, names, [_describe(value, i, names, given, hidden) for i, value in enumerate(inputs)]))
    return tuple(pieces)


@dataclass(frozen=True, slots=True)
class _Traced:
    """A graph that Dynamo compiled."""

    graph: torch.fx.GraphModule
    stacks: Mapping[torch.fx.Node, Mapping[str, tuple[str, Any]]]
    """The modules around each node, outermost first, by the identity of those that were traced."""
    reached: Sequence[str]
    """How the code reaches each input from the module it belongs to ('proj.weight'); empty for other inputs."""


def _compiled(module: nn.Module, run: Callable[[_Traced, tuple[Any, ...]], Any]) -> Callable[..., Any]:
    """``module`` under Dynamo, with ``run(traced, inputs)`` called for every piece.

    When it is called, not when it is compiled: Dynamo reuses the code of one layer for every layer like it.
    """

    def backend(graph: torch.fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        nodes = graph.graph.nodes
        traced = _Traced(
            graph,
            {node: dict(node.meta.get("nn_module_stack") or {}) for node in nodes},
            [_reached(node) for node in nodes if node.op == "placeholder"],
        )
        return lambda *inputs: run(traced, inputs)

    return torch._dynamo.optimize(backend, dynamic=False)(module)  # type: ignore[no-any-return]  # torch is untyped here


def _reached(placeholder: torch.fx.Node) -> str:
    if "grapharg" not in placeholder.meta:
        return ""
    source = placeholder.meta["grapharg"].source.name  # a method in some torch versions, a property in others
    text = source if isinstance(source, str) else source()
    return ".".join(re.findall(r"_(?:modules|parameters|buffers)\['([^']+)'\]", text))


def _root(traced: _Traced, inputs: Sequence[Any], names: _Names) -> str:
    """The module whose ``forward`` a piece belongs to: what is left of a parameter's name before the part reached."""
    for reached, value in zip(traced.reached, inputs, strict=True):
        if reached and isinstance(value, torch.Tensor):
            for name in names.of_tensor(value):
                if f".{name}".endswith(f".{reached}"):
                    return name.removesuffix(reached).removesuffix(".")
    return ""


def _named_stack(
    stack: Mapping[str, tuple[str, Any]], names: _Names, traced_root: str, root: str
) -> dict[str, tuple[str, Any]]:
    """A Dynamo module stack, keyed by the identity of the traced modules, with the paths of the called ones."""
    named: dict[str, tuple[str, Any]] = {"": (root, nn.Module)}
    for key, (_, kind) in stack.items():
        path = names.modules.get(int(key.partition("@")[0]))
        if path is not None:
            inner = f".{path}".removeprefix(f".{traced_root}" if traced_root else "").removeprefix(".")
            named[key] = (f"{root}.{inner}".strip("."), kind)
    return named


def _describe(
    value: Any, index: int, names: _Names, given: Mapping[int, str], hidden: Mapping[int, int]
) -> GraphInput:
    """What an argument of a piece is, by identity."""
    known = names.of_tensor(value) if isinstance(value, torch.Tensor) else ()
    if known and value.untyped_storage()._cdata in hidden:
        return GraphInput("crossing", known[0])
    if known:
        return GraphInput("parameter" if isinstance(value, nn.Parameter) else "buffer", known[0])
    return GraphInput("input", given[id(value)]) if id(value) in given else GraphInput("crossing", f"crossing {index}")


def _uses(run: Callable[[], object]) -> Counter[int]:
    """How often the operators of a run take a tensor of each storage."""
    uses: Counter[int] = Counter()

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            for leaf in pytree.tree_leaves((args, kwargs or {})):
                if isinstance(leaf, torch.Tensor):
                    uses[leaf.untyped_storage()._cdata] += 1
            return func(*args, **(kwargs or {}))

    with Count():
        run()
    return uses


def _lower(
    program: torch.export.ExportedProgram, names: _Names, described: Sequence[GraphInput] | None = None
) -> Piece:
    """An exported program as a piece: functional, without dead nodes, autocast and no-grad regions inlined."""
    if any(_mutates(node) for node in program.graph.nodes):
        program = program.run_decompositions({})  # no decomposition, but every in-place operator made functional
    graph = program.graph_module
    _inline_regions(graph)
    _remove_dead(graph)
    signature = program.graph_signature
    inputs, constants, users = {}, {}, 0
    for spec in signature.input_specs:
        placeholder = spec.arg.name
        match spec.kind:
            case InputKind.PARAMETER | InputKind.BUFFER:
                kind: Literal["parameter", "buffer"] = "parameter" if spec.kind is InputKind.PARAMETER else "buffer"
                inputs[placeholder] = GraphInput(kind, names.canonical.get(str(spec.target), str(spec.target)))
            case InputKind.CONSTANT_TENSOR:
                inputs[placeholder] = GraphInput("constant", str(spec.target))
                constants[placeholder] = program.constants[str(spec.target)]
            case InputKind.USER_INPUT:
                inputs[placeholder] = described[users] if described else GraphInput("input", placeholder)
                users += 1
            case _:
                raise AutoQuantError(f"graph input {placeholder}: {spec.kind.name} is not supported")
    mutated = sum(spec.kind is not OutputKind.USER_OUTPUT for spec in signature.output_specs)
    return Piece(graph, inputs, constants, mutated)


def _mutates(node: torch.fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _remove_dead(graph: torch.fx.GraphModule) -> None:
    """Drop what no output depends on, and export's assertions. Nothing mutates any more, so no other node matters."""
    for node in reversed(graph.graph.nodes):
        if node.op in ("call_function", "get_attr") and not node.users:
            graph.graph.erase_node(node)
    graph.recompile()


def _inline_regions(graph: torch.fx.GraphModule) -> None:
    """Put the bodies of no-grad and disabled-autocast regions in their places: they change no value."""
    for node in list(graph.graph.nodes):
        if node.target is torch.ops.higher_order.wrap_with_set_grad_enabled:
            body, operands = node.args[1], node.args[2:]
        elif node.target is torch.ops.higher_order.wrap_with_autocast and node.args[2] is False:
            body, operands = node.args[4], node.args[5:]
        else:
            continue
        inner = graph.get_submodule(body.target)
        _inline_regions(inner)
        places = dict(zip(inner.graph.find_nodes(op="placeholder"), operands, strict=True))
        with graph.graph.inserting_before(node):
            results = graph.graph.graph_copy(inner.graph, places)
        for user in list(node.users):
            user.replace_all_uses_with(results[user.args[1]])
            graph.graph.erase_node(user)
        graph.graph.erase_node(node)
    graph.recompile()


@dataclass(frozen=True, slots=True)
class _Names:
    """Names of a module's tensors and submodules, by identity."""

    tensors: Mapping[tuple[Any, ...], tuple[str, ...]]
    modules: Mapping[int, str]
    canonical: Mapping[str, str]

    def of_tensor(self, tensor: torch.Tensor) -> tuple[str, ...]:
        """All names of a parameter or buffer, the canonical one first; none for any other tensor."""
        return self.tensors.get(_identity(tensor), ())


def _identity(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Equal for two tensors exactly if they are the same elements of the same storage (``meta`` has storages too)."""
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tuple(tensor.shape), tensor.stride()


def _names(module: nn.Module) -> tuple[_Names, tuple[tuple[str, ...], ...]]:
    tensors: dict[tuple[Any, ...], list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        tensors.setdefault(_identity(parameter), []).append(name)
    aliases = tuple(tuple(names) for names in tensors.values() if len(names) > 1)
    for name, buffer in module.named_buffers(remove_duplicate=False):
        tensors.setdefault(_identity(buffer), []).append(name)
    found = _Names(
        {identity: tuple(names) for identity, names in tensors.items()},
        {id(part): name for name, part in module.named_modules()},
        {name: names[0] for names in tensors.values() for name in names},
    )
    return found, aliases


def _run_whole(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], piece: Piece) -> list[Any]:
    given = iter(pytree.tree_leaves((tuple(args), dict(kwargs))))
    values = []
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

    def run(_: _Traced, inputs: tuple[Any, ...]) -> Any:
        piece = next(remaining)
        given = iter(inputs)
        values = [piece.constants[name] if name in piece.constants else next(given) for name in piece.inputs]
        return tuple(piece.graph(*values))[piece.mutated :]

    return _tensors(_compiled(module, run)(*args, **kwargs))


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
