"""ATen graphs that know what their inputs are and where their operators stand."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import CellType, FunctionType, MethodType
from typing import Any, Literal

import torch
from torch import nn
from torch.export.graph_signature import InputKind, OutputKind

from autoquant.aten import rescales
from autoquant.capture.identity import grouped, identity, ties_of
from autoquant.errors import AutoQuantError
from autoquant.library_patches import OpOverload, pytree

How = Literal["dynamo", "export", "dynamo-pieces"]

LOGITS = "logits"
"""What models call the scores that they return."""

_DEEPEST = 4
"""Containers within containers that are searched for modules held by reference."""


@dataclass(frozen=True, slots=True)
class GraphInput:
    """What a placeholder stands for.

    ``graph break`` is a tensor that comes from outside of the subgraph and that nothing is known about: another
    subgraph made it, or it is a parameter that code between the subgraphs uses too.
    """

    kind: Literal["parameter", "buffer", "constant", "input", "graph break"]
    name: str
    """Fully qualified name of a parameter or buffer; otherwise a name for messages."""


@dataclass(frozen=True, slots=True)
class Subgraph:
    """One ATen graph. ``node.meta['val']`` of every placeholder and call holds its fake value (shape, dtype)."""

    graph: torch.fx.GraphModule
    inputs: Mapping[str, GraphInput]
    """By placeholder name, in the order of the graph's arguments."""
    constants: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Tensors made while tracing, by placeholder name."""
    mutated: int = 0
    """How many of the graph's outputs, the first ones, are new values of its inputs and not results."""
    written: tuple[str, ...] = ()
    """The placeholders that these are new values of, in the same order."""
    logits: int | None = None
    """Which of the results that follow are the logits, where the module names one so."""


@dataclass(frozen=True, slots=True)
class Captured:
    """A module as ATen graphs.

    Parameters are told apart by identity, never by value. One that several modules share goes by its first name in
    ``named_parameters()``; ``aliases`` lists all the names of each shared one, that first.
    """

    how: How
    subgraphs: tuple[Subgraph, ...]
    aliases: tuple[tuple[str, ...], ...]
    known: tuple[str, ...] = ()
    """Inputs that became constants."""
    first: bool = False
    """Whether the first floating-point output is the only one."""
    untraceable: tuple[Any, ...] = ()
    """Calls of modules that could not be traced (``untraceable.UntraceableCall``): one operator of the graph each."""
    inseparable: bool = False
    """Whether the model would compute something else once parameters are untied (:func:`asks_for_ties`)."""
    hidden: tuple[str, ...] = ()
    """Parameters, by all of their names, that code outside of the subgraphs uses."""
    spare: Mapping[str, Any] = field(default_factory=dict)
    """Inputs that were added, without which it could not be traced."""
    by_position: bool = False
    """Whether code was followed by the values of positions: what is constant then is so for these lengths alone."""


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


@dataclass(frozen=True, slots=True)
class Names:
    """Names of a module's tensors and submodules, by identity."""

    tensors: Mapping[tuple[Any, ...], tuple[str, ...]]
    modules: Mapping[int, str]
    canonical: Mapping[str, str]

    def of_tensor(self, tensor: torch.Tensor) -> tuple[str, ...]:
        """All names of a parameter or buffer, the canonical one first; none for any other tensor."""
        return self.tensors.get(identity(tensor), ())


def names_of(module: nn.Module) -> tuple[Names, tuple[tuple[str, ...], ...]]:
    """The names in ``module``, and the groups of parameter names that stand for one and the same tensor."""
    named = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    tensors = grouped(named)
    modules = {id(part): name for name, part in module.named_modules()}
    found = Names(tensors, modules, {name: names[0] for names in tensors.values() for name in names})
    return found, ties_of(module)


def asks_for_ties(module: nn.Module) -> bool:
    """True if a model computes something else, or cannot be told where, once its parameters are untied.

    A forward pass may read ``tie_word_embeddings``: some rescale what a tied linear reads, and no other. Untying has to
    be recorded in that field. Or a module reads a tied parameter through another module that it holds by reference,
    beside its own submodules: a copy under its own name is read by nobody.
    """
    return _read_by_reference(module) or any(
        getattr(getattr(part, "config", None), "tie_word_embeddings", False)
        and "tie_word_embeddings" in _names_in(inspect.unwrap(type(part).forward))
        for part in module.modules()
    )


def _read_by_reference(module: nn.Module) -> bool:
    """True if a plain attribute of a submodule holds a tied parameter, or a module that owns one."""
    tied = {name for group in ties_of(module) for name in group}
    owners = {id(module.get_submodule(name.rpartition(".")[0])) for name in tied} - {id(module)}
    tied_ids = {id(module.get_parameter(name)) for name in tied}
    own = vars(nn.Module()).keys()
    return bool(tied) and any(
        id(held) in owners or id(held) in tied_ids
        for part in module.modules()
        for name, value in vars(part).items()
        if name not in own
        for held in _held(value)
    )


def _held(value: object, depth: int = 0) -> Iterator[object]:
    """``value``, and what its containers, bound arguments and closures hold."""
    yield value
    if depth > _DEEPEST:
        return
    inside: list[object] = []
    if isinstance(value, list | tuple | set | frozenset):
        inside = list(value)
    elif isinstance(value, Mapping):
        inside = list(value.values())
    elif isinstance(value, functools.partial):
        inside = [value.func, *value.args, *value.keywords.values()]
    elif isinstance(value, MethodType):
        inside = [value.__self__, value.__func__]
    elif isinstance(value, FunctionType):
        inside = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
    for one in inside:
        yield from _held(one, depth + 1)


def _is_filled(cell: CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # not assigned yet
        return False


def _names_in(function: Any) -> tuple[str, ...]:
    return getattr(getattr(function, "__code__", None), "co_names", ())


def lower(
    program: torch.export.ExportedProgram, names: Names, described: Sequence[GraphInput] | None = None
) -> Subgraph:
    """An exported program as a subgraph: functional, without dead nodes, autocast and no-grad regions inlined."""
    mutating = any(_mutates(node) for part in program.graph_module.modules() for node in _nodes(part))
    if mutating or _maps(program.graph_module):
        # No decomposition, but every in-place operator made functional, and those under a vmap made ones of a batch.
        program = program.run_decompositions({})
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
                held = program.state_dict.get(str(spec.target), program.constants.get(str(spec.target)))
                if kind == "buffer" and isinstance(held, torch.Tensor) and not held.is_floating_point():
                    constants[placeholder] = held  # an index: which channels it picks is part of the structure
            case InputKind.CONSTANT_TENSOR:
                inputs[placeholder] = GraphInput("constant", str(spec.target))
                constants[placeholder] = program.constants[str(spec.target)]
            case InputKind.USER_INPUT:
                inputs[placeholder] = described[users] if described else GraphInput("input", placeholder)
                users += 1
            case _:
                raise AutoQuantError(f"graph input {placeholder}: {spec.kind.name} is not supported")
    held_by = {str(spec.target): spec.arg.name for spec in signature.input_specs if spec.target is not None}
    written = [str(spec.target) for spec in signature.output_specs if spec.kind is not OutputKind.USER_OUTPUT]
    kept = _forget_rescaling(graph, [held_by.get(target, target) for target in written])
    return Subgraph(graph, inputs, constants, len(kept), kept, _place_of_logits(program))


def _place_of_logits(program: torch.export.ExportedProgram) -> int | None:
    results = program.call_spec.out_spec
    if results is None:
        return None
    numbered = pytree.tree_unflatten(range(results.num_leaves), results)
    place = getattr(numbered, LOGITS, None)
    return place if type(place) is int else None


def _forget_rescaling(graph: torch.fx.GraphModule, written: Sequence[str]) -> tuple[str, ...]:
    """Leave out new values of inputs that are a number times the old ones, and return what is left of ``written``.

    ``written``: the placeholder that each of the first outputs is a new value of. Some models divide weights by powers
    of two when they first run. Where products alone read the scaled weight, and nothing the other one, any scaling
    of rows and columns that holds of one holds of the other, before and after.
    """
    output = graph.graph.output_node()
    results: Any = output.args[0]
    kept = [
        (name, result)
        for name, result in zip(written, results, strict=False)
        if not (isinstance(result, torch.fx.Node) and _rescales(result, name))
    ]
    output.args = ((*(result for _, result in kept), *results[len(written) :]),)
    graph.recompile()
    return tuple(name for name, _ in kept)


def _rescales(node: torch.fx.Node, name: str) -> bool:
    old = node.args[0] if node.op == "call_function" and rescales(node) else None
    return isinstance(old, torch.fx.Node) and old.name == name and set(old.users) == {node}


def first_output(subgraph: Subgraph) -> Subgraph:
    """The same graph without what a model returns behind its logits, or behind its first floating-point result where
    it names no logits: states, which matter to nobody.
    """
    graph: Any = subgraph.graph
    output = graph.graph.output_node()
    results = output.args[0]
    own = results[subgraph.mutated :]
    count = 1 if subgraph.logits is None else len(own)
    own = own[: None if subgraph.logits is None else subgraph.logits + 1]
    floating = [r for r in own if isinstance(r, torch.fx.Node) and _is_floating(r.meta.get("val"))]
    output.args = ((*results[: subgraph.mutated], *floating[:count]),)
    _remove_dead(graph)
    return replace(subgraph, logits=None)


def main_result(output: object) -> list[torch.Tensor]:
    """What :func:`first_output` leaves of what a model returned; nothing where there is no floating-point tensor."""
    leaves = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]
    floating = [leaf for leaf in leaves if leaf.is_floating_point()]
    named = getattr(output, LOGITS, None)
    places = [place for place, leaf in enumerate(floating) if leaf is named]
    return floating[: places[0] + 1 if places else 1]


def _is_floating(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _nodes(part: nn.Module) -> Iterable[torch.fx.Node]:
    return part.graph.nodes if isinstance(part, torch.fx.GraphModule) else ()


def _mutates(node: torch.fx.Node) -> bool:
    return isinstance(node.target, OpOverload) and node.target._schema.is_mutable


def _maps(graph: torch.fx.GraphModule) -> bool:
    """True if an output depends on what a vmap made: within it, tensors have one dimension more than is written."""
    queue, seen = [graph.graph.output_node()], set()
    while queue:
        node = queue.pop()
        if node not in seen:
            seen.add(node)
            queue += node.all_input_nodes
    return any(getattr(node.target, "__name__", "") == "_remove_batch_dim" for node in seen)


def _remove_dead(graph: torch.fx.GraphModule) -> None:
    """Drop what no output depends on, and export's assertions. Nothing mutates any more, so no other node matters."""
    for node in reversed(graph.graph.nodes):
        if node.op in ("call_function", "get_attr") and not node.users:
            graph.graph.erase_node(node)
    graph.recompile()


def _inline_regions(graph: torch.fx.GraphModule) -> None:
    """Put the bodies of no-grad and disabled-autocast regions in their places: they change no value."""
    for node in list(graph.graph.nodes):
        body: Any
        operands: Any
        if node.target is torch.ops.higher_order.wrap_with_set_grad_enabled:
            body, operands = node.args[1], node.args[2:]
        elif node.target is torch.ops.higher_order.wrap_with_autocast and node.args[2] is False:
            body, operands = node.args[4], node.args[5:]
        else:
            continue
        inner: Any = graph.get_submodule(body.target)
        _inline_regions(inner)
        places = dict(zip(inner.graph.find_nodes(op="placeholder"), operands, strict=True))
        with graph.graph.inserting_before(node):
            results: Any = graph.graph.graph_copy(inner.graph, places)
        for user in list(node.users):
            user.replace_all_uses_with(results[user.args[1]])
            graph.graph.erase_node(user)
        graph.graph.erase_node(node)
    graph.recompile()
