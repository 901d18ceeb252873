"""Sizes that the data decide, and the axes along which they choose."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from autoquant.aten import operator_name
from autoquant.capture.routes import Captured
from autoquant.library_patches import pytree

EXTENTS = (3, 5)
"""Sizes that stand for those that depend on the data. What holds for any number of rows is found for both."""


def sized(fake: Tensor, extent: int) -> Tensor:
    """A tensor of which the data say how many rows it has, with so many; any other as it is."""
    if all(isinstance(size, int) for size in fake.shape):
        return fake
    sizes = [size_of(size, extent) for size in fake.shape]
    return fake if None in sizes else torch.empty(sizes, dtype=fake.dtype, device="meta")  # type: ignore[arg-type]  # no None is left


def size_of(size: Any, extent: int) -> int | None:
    """A size as a number, ``extent`` in place of what the data say; None where that is no number of rows."""
    if isinstance(size, int):
        return size
    found = size.node.expr.subs(dict.fromkeys(size.node.expr.free_symbols, extent))
    return int(found) if found.is_integer and found > 0 else None


def data_sized(captured: Captured) -> bool:
    """True if the data say how large some tensor of the graphs is."""
    return any(
        isinstance(value, Tensor) and not all(isinstance(size, int) for size in value.shape)
        for subgraph in captured.subgraphs
        for node in subgraph.graph.graph.nodes
        for value in pytree.tree_leaves(node.meta.get("val"))
    )


def by_number(node: fx.Node) -> bool:
    """True if an ``index_select`` takes rows of which the data say how many there are: any may have any number."""
    x, dim = node.args[0], node.args[1]
    return isinstance(x, fx.Node) and isinstance(dim, int) and not isinstance(x.meta["val"].shape[dim], int)


ALONG_ONE = frozenset(["slice", "narrow", "slice_scatter", "index_copy", "index_add", "index_select", "select_scatter"])
"""Operators that read or write along the dimension that they are given."""


def indexed_dims(node: fx.Node) -> frozenset[int]:
    """The dimensions of a state along which the graph chooses what it writes and reads: sequences, places in them."""
    found: set[int] = set()
    queue, seen = [node], {node}
    while queue:
        for user in queue.pop().users:
            name = operator_name(user) if user.op == "call_function" else ""
            if name in (
                "slice",
                "narrow",
                "slice_scatter",
                "index_copy",
                "index_add",
                "index_select",
                "select_scatter",
            ):
                place = 2 if name in ("slice_scatter", "select_scatter") else 1
                dim = user.args[place] if len(user.args) > place else user.kwargs.get("dim", 0)
                found.update([dim % node.meta["val"].ndim] if isinstance(dim, int) else [])
            elif name in ("index", "index_put"):
                indices: Any = user.args[1]
                found.update(d for d, index in enumerate(indices) if index is not None)
            else:
                continue
            if user not in seen and user.meta["val"].ndim == node.meta["val"].ndim:
                seen.add(user)
                queue.append(user)
    return frozenset(found)
