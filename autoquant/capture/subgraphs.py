"""Where Dynamo breaks the graph of a module: its subgraphs, and what passes between them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from autoquant.capture.graph import GraphInput, Names, Subgraph, lower
from autoquant.errors import AutoQuantError
from autoquant.library_patches import TorchDispatchMode, compiled_by_dynamo, nonzero_takes_all, pytree


def capture_subgraphs(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], names: Names, *, hidden: list[str]
) -> tuple[Subgraph, ...]:
    """Run ``module`` under Dynamo and lower every subgraph that it runs, in the order of running.

    Where the values decide which way the code goes, the way that these inputs take. On the meta device there are no
    values: what picks tokens by them (those of an expert) picks them all. ``hidden`` is filled with the names of the
    parameters that code outside of the subgraphs uses.
    """
    with nonzero_takes_all():
        return _subgraphs(module, args, kwargs, names, hidden)


def _subgraphs(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], names: Names, hidden: list[str]
) -> tuple[Subgraph, ...]:
    calls: list[tuple[Traced, tuple[Any, ...]]] = []

    def record(traced: Traced, inputs: tuple[Any, ...]) -> Any:
        calls.append((traced, inputs))
        return traced.graph(*inputs)

    compiled(module, record)(*args, **kwargs)
    if not calls:
        raise AutoQuantError("Dynamo found no tensor operation")
    # Dynamo leaves some code to Python altogether (a loop with a break in it). A parameter used there has readers or
    # writers that no subgraph shows, so nothing may be concluded from those that are shown.
    outside = _uses(lambda: module(*args, **kwargs)) - _uses(
        lambda: [traced.graph(*inputs) for traced, inputs in calls]
    )
    storages = {p.untyped_storage()._cdata: names.of_tensor(p) for p in module.parameters()}
    hidden[:] = [name for storage, same in storages.items() if storage in outside for name in same]
    given = {id(leaf): f"input {index}" for index, leaf in enumerate(pytree.tree_leaves((args, kwargs)))}
    first_root: dict[int, str] = {}
    subgraphs = []
    for traced, inputs in calls:
        root = _root(traced, inputs, names)
        traced_root = first_root.setdefault(id(traced), root)
        for node, stack in traced.stacks.items():
            node.meta["nn_module_stack"] = _named_stack(stack, names, traced_root, root)
        program = torch.export.export(traced.graph, inputs, strict=False)
        subgraphs.append(
            lower(program, names, [_describe(value, i, names, given, outside) for i, value in enumerate(inputs)])
        )
    return tuple(subgraphs)


@dataclass(frozen=True, slots=True)
class Traced:
    """A graph that Dynamo compiled."""

    graph: torch.fx.GraphModule
    stacks: Mapping[torch.fx.Node, Mapping[str, tuple[str, Any]]]
    """The modules around each node, outermost first, by the identity of those that were traced."""
    reached: Sequence[str]
    """How the code reaches each input from the module it belongs to ('proj.weight'); empty for other inputs."""


def compiled(module: nn.Module, run: Callable[[Traced, tuple[Any, ...]], Any]) -> Callable[..., Any]:
    """``module`` under Dynamo, with ``run(traced, inputs)`` called for every subgraph.

    When it is called, not when it is compiled: Dynamo reuses the code of one layer for every layer like it.
    """

    def backend(graph: torch.fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        nodes = graph.graph.nodes
        traced = Traced(
            graph,
            {node: dict(node.meta.get("nn_module_stack") or {}) for node in nodes},
            [_reached(node) for node in nodes if node.op == "placeholder"],
        )
        return lambda *inputs: run(traced, inputs)

    return compiled_by_dynamo(module, backend)


def _reached(placeholder: torch.fx.Node) -> str:
    if "grapharg" not in placeholder.meta:
        return ""
    source = placeholder.meta["grapharg"].source.name  # a method in some torch versions, a property in others
    text = source if isinstance(source, str) else source()
    return ".".join(re.findall(r"_(?:modules|parameters|buffers)\['([^']+)'\]", text))


def _root(traced: Traced, inputs: Sequence[Any], names: Names) -> str:
    """The module whose ``forward`` a subgraph belongs to: a parameter's name before the part reached."""
    for reached, value in zip(traced.reached, inputs, strict=True):
        if reached and isinstance(value, torch.Tensor):
            for name in names.of_tensor(value):
                if f".{name}".endswith(f".{reached}"):
                    return name.removesuffix(reached).removesuffix(".")
    return ""


def _named_stack(
    stack: Mapping[str, tuple[str, Any]], names: Names, traced_root: str, root: str
) -> dict[str, tuple[str, Any]]:
    """A Dynamo module stack, keyed by the identity of the traced modules, with the paths of the called ones."""
    named: dict[str, tuple[str, Any]] = {"": (root, nn.Module)}
    for key, (_, kind) in stack.items():
        path = names.modules.get(int(key.partition("@")[0]))
        if path is not None:
            inner = f".{path}".removeprefix(f".{traced_root}" if traced_root else "").removeprefix(".")
            named[key] = (f"{root}.{inner}".strip("."), kind)
    return named


def _describe(value: Any, index: int, names: Names, given: Mapping[int, str], outside: Collection[int]) -> GraphInput:
    """What an argument of a subgraph is, by identity."""
    known = names.of_tensor(value) if isinstance(value, torch.Tensor) else ()
    if known and value.untyped_storage()._cdata in outside:
        return GraphInput("graph break", known[0])
    if known:
        return GraphInput("parameter" if isinstance(value, nn.Parameter) else "buffer", known[0])
    return (
        GraphInput("input", given[id(value)])
        if id(value) in given
        else GraphInput("graph break", f"graph break {index}")
    )


def _uses(run: Callable[[], object]) -> Counter[int]:
    """How often the operators of a run take a tensor of each storage."""
    uses: Counter[int] = Counter()

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            for leaf in pytree.tree_leaves((args, kwargs or {})):
                if isinstance(leaf, torch.Tensor):
                    uses[leaf.untyped_storage()._cdata] += 1
            return func(*args, **(kwargs or {}))

    with Count():  # type: ignore[no-untyped-call]  # torch's __init__
        run()
    return uses
