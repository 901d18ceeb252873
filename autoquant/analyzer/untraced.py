"""What a trace did not reach: parts of the model that its inputs, the way to its logits, or Dynamo leaves out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn

from autoquant.capture.graph import Captured
from autoquant.config.format import Blocked


def untraced(module: nn.Module, captured: Captured, missing: Mapping[str, str]) -> tuple[Blocked, ...]:
    """The outermost modules none of whose matrices the graphs use, blocked with the reason.

    ``missing``: inputs that could not be made, each with the reason.
    """
    used = {
        name
        for subgraph in captured.subgraphs
        for node in subgraph.graph.graph.nodes
        if node.op == "placeholder" and node.users and subgraph.inputs[node.name].kind in ("parameter", "graph break")
        for name in _names(subgraph.inputs[node.name].name, captured)
    }
    reason = "it is not traced: nothing that it computes reaches the logits"
    if missing:
        reason = "it is not traced: " + "; ".join(f"no {name} could be made ({why})" for name, why in missing.items())
    hidden = (
        "it is not traced: code between the pieces that Dynamo compiles uses it, and what feeds or reads it is unseen"
    )
    return tuple(
        Blocked(path=path, what=what, reason=here, operator="forward", at=path)
        for path in _outermost(module, "", used)
        for here in [hidden if any(name.startswith(f"{path}.") for name in captured.hidden) else reason]
        for what in ("smoothing", "rotation")
    )


def _names(name: str, captured: Captured) -> tuple[str, ...]:
    return next((names for names in captured.aliases if name in names), (name,))


def _outermost(module: nn.Module, path: str, used: set[str]) -> Iterator[str]:
    for name, child in module.named_children():
        inner = f"{path}{name}"
        matrices = [f"{inner}.{key}" for key, p in child.named_parameters(remove_duplicate=False) if p.dim() > 1]
        if matrices and not used.intersection(matrices):
            yield inner
        elif matrices:
            yield from _outermost(child, f"{inner}.", used)
