"""The residual stream as a line over depth: what writes into it and what reads it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from autoquant.config.format import Config, Space
from autoquant.config.layers import LAYER, fill, layer_numbers, module_of
from autoquant.report.diagram import LayerKind


def residual(config: Config, kinds: Sequence[LayerKind]) -> list[dict[str, Any]]:
    """For each residual space: its depth, and writers and readers with where they stand, in layers."""
    within = _positions(kinds)
    return [_stream(space, within, config.model.layers) for space in config.rotation.spaces if space.kind == "R1"]


def _positions(kinds: Sequence[LayerKind]) -> dict[str, float]:
    """How far down in its layer each box stands, 0 to 1, by its name there."""
    found: dict[str, float] = {}
    for kind in kinds:
        last = max((box.row for box in kind.boxes), default=0) + 1
        found.update({box.name: box.row / last for box in kind.boxes})
    return found


def _stream(space: Space, within: dict[str, float], depth: int) -> dict[str, Any]:
    writes = [one for writer in space.writers for one in _places(writer.path, writer.layers or space.layers, within)]
    reads = []
    for read in space.reads:
        norm = read.norm.weight or read.norm.bias if read.norm is not None else None
        for path in (norm,) if norm is not None else tuple(reader.path for reader in read.readers):
            reads += _places(path, read.layers or space.layers, within)
    last = max([depth, *(one["layer"] + 1 for one in (*writes, *reads) if one["layer"] is not None)])
    for end, places in ((-0.6, writes), (last - 0.4, reads)):
        for one in places:
            one["at"] = end if one["at"] is None else one["at"]
    return {"name": space.name, "size": space.size, "depth": last, "writes": writes, "reads": reads}


def _places(path: str, layers: str | None, within: dict[str, float]) -> list[dict[str, Any]]:
    """Where a parameter stands, once for each layer; ``at`` None where it is in none."""
    if LAYER not in path or layers is None:
        return [{"name": module_of(path), "layer": None, "at": None}]
    inside = within.get(module_of(path).partition(f"{LAYER}.")[2], 0.5)
    return [
        {"name": module_of(fill(path, layer)), "layer": layer, "at": round(layer + inside, 3)}
        for layer in layer_numbers(layers)
    ]
