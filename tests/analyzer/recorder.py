"""A capture of small real modules that takes milliseconds: run once, every operator written down as it is called.

``torch.export`` takes a quarter of a second for the same, too long for thousands of programs. What is recorded is what
export's graph holds, ATen before decomposition, with real tensors in place of fake ones; a test compares the findings
of both. Code that mutates has to be made functional first: that is left to export.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode

from autoquant.capture.graph import Captured, GraphInput, Names, Subgraph, names_of
from autoquant.capture.routes import capture

# ``torch.tensor`` calls these on the new constant.
_NOTHING = {"aten::lift_fresh", "aten::detach_"}


class MutationError(Exception):
    """The code writes into a tensor."""


class Recorder(ProxyTorchDispatchMode):
    """Builds a graph from the operators that are called. A subclass, since no other mode may see them undecomposed."""

    def __init__(self, names: Names) -> None:
        super().__init__(None, "real", pre_dispatch=True)  # type: ignore[arg-type]  # the tracer is not used
        self.graph = fx.Graph()
        self.names = names
        self.nodes: dict[int, fx.Node] = {}
        self.alive: list[Tensor] = []  # an identity is used again once its tensor is gone
        self.inputs: dict[str, GraphInput] = {}
        self.constants: dict[str, Tensor] = {}
        self.stack: list[tuple[str, type[nn.Module]]] = [("", nn.Module)]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._schema.name in _NOTHING:
            self.node_of(args[0])
            self.remember(result, self.node_of(args[0]))
            return result
        if func._schema.is_mutable:
            raise MutationError(func._schema.name)
        node = self.graph.call_function(func, self.described(tuple(args)), self.described(kwargs or {}))
        node.meta = {"val": result, "nn_module_stack": {str(i): where for i, where in enumerate(self.stack)}}
        if isinstance(result, Tensor):
            self.remember(result, node)
        elif isinstance(result, (tuple, list)):
            for index, part in enumerate(result):
                item = self.graph.call_function(operator.getitem, (node, index))
                item.meta = {**node.meta, "val": part}
                self.remember(part, item)
        return result

    def remember(self, tensor: Tensor, node: fx.Node) -> None:
        self.nodes[id(tensor)] = node
        self.alive.append(tensor)

    def described(self, arguments: Any) -> Any:
        if isinstance(arguments, Tensor):
            return self.node_of(arguments)
        if isinstance(arguments, (tuple, list)):
            return type(arguments)(self.described(a) for a in arguments)
        if isinstance(arguments, dict):
            return {k: self.described(a) for k, a in arguments.items()}
        return arguments

    def node_of(self, tensor: Tensor) -> fx.Node:
        """The node that made ``tensor``; a placeholder where none did: a parameter, a buffer or a constant."""
        if id(tensor) not in self.nodes:
            name = next(iter(self.names.of_tensor(tensor)), None)
            if name is not None:
                self.placeholder(tensor, "parameter" if isinstance(tensor, nn.Parameter) else "buffer", name)
            else:
                self.placeholder(tensor, "constant", f"constant{len(self.constants)}")
        return self.nodes[id(tensor)]

    def placeholder(self, tensor: Tensor, kind: Any, name: str) -> None:
        first = next(iter(self.graph.nodes), None)
        with self.graph.inserting_before(first) if first is not None else self.graph.inserting_after(None):
            node = self.graph.placeholder(f"p{len(self.inputs)}")
        node.meta = {"val": tensor}
        self.inputs[node.name] = GraphInput(kind, name)
        if kind == "constant" or (kind == "buffer" and not tensor.is_floating_point()):
            self.constants[node.name] = tensor
        self.remember(tensor, node)


@contextmanager
def _places(module: nn.Module, recorder: Recorder) -> Iterator[None]:
    """Tell the recorder which submodule is running."""
    hooks = []
    for name, part in module.named_modules():
        if name:
            where = (name, type(part))
            hooks.append(part.register_forward_pre_hook(lambda *_, where=where: recorder.stack.append(where)))
            hooks.append(part.register_forward_hook(lambda *_: (recorder.stack.pop(), None)[1]))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def record(module: nn.Module, args: Sequence[Tensor]) -> Captured:
    """The graph of ``module(*args)``. Raises MutationError where it writes into a tensor."""
    names, aliases = names_of(module)
    recorder = Recorder(names)
    for index, argument in enumerate(args):
        recorder.placeholder(argument, "input", f"input{index}")
    with torch.no_grad(), _places(module, recorder), enable_python_dispatcher(), recorder:
        results = module(*args)
    results = results if isinstance(results, (tuple, list)) else (results,)
    recorder.graph.output(tuple(recorder.node_of(result) for result in results))
    for node in reversed(recorder.graph.nodes):
        if node.op == "call_function" and not node.users:
            recorder.graph.erase_node(node)
    graph = SimpleNamespace(graph=recorder.graph)  # a GraphModule would write Python code for it, which nobody runs
    subgraph = Subgraph(graph, recorder.inputs, recorder.constants)  # type: ignore[arg-type]
    return Captured("export", (subgraph,), aliases)


def captured(module: nn.Module, args: Sequence[Tensor]) -> Captured:
    """Recorded where that is possible, else exported."""
    try:
        return record(module, args)
    except MutationError:
        return capture(module, args, {}, "export")
