"""What a trace did not reach: parts of the model that its inputs, the way to its logits, or Dynamo leaves out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch import nn

from autoquant.analyzer.findings import Findings
from autoquant.capture.graph import Captured
from autoquant.config.format import Blocked


def untraced(
    module: nn.Module, captured: Captured, missing: Mapping[str, str], uncaptured: str | None = None
) -> tuple[Blocked, ...]:
    """The outermost modules none of whose matrices the graphs use, blocked with the reason.

    ``missing``: inputs that could not be made, each with the reason. ``uncaptured``: why the graphs are of text alone.
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
    if uncaptured is not None:
        reason = f"it is not traced: the model is analysed on text alone (with images or sound: {uncaptured})"
    hidden = (
        "it is not traced: code between the pieces that Dynamo compiles uses it, and what feeds or reads it is unseen"
    )
    return tuple(
        Blocked(path=path, what=what, reason=here, operator="forward", at=path)
        for path in _outermost(module, "", used)
        for here in [hidden if any(name.startswith(f"{path}.") for name in captured.hidden) else reason]
        for what in ("smoothing", "rotation")
    )


def without_residual(found: Findings) -> Findings:
    """``found`` on text alone, without rotations of a stream that images or sound write to as well, unseen."""
    kept = tuple(space for space in found.spaces if space.kind != "R1")
    reason = "what images or sound add to the stream is not traced, so that it cannot be rotated with it"
    blocked = tuple(
        Blocked(path=path, what="rotation", reason=reason, operator="R1", at=path)
        for space in found.spaces
        if space not in kept
        for path in [space.writers[0].path.rpartition(".")[0]]
    )
    return replace(found, spaces=kept, blocked=(*found.blocked, *blocked))


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
