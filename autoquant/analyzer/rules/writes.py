"""Operators that write into a tensor: what was there and what is written must agree where they may meet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from autoquant.analyzer.axes import Param
from autoquant.analyzer.interpreter import Constant, Dynamic, Site, Value
from autoquant.analyzer.rotation_state import (
    RotationAnalysis,
    Vector,
    apply,
    broadcast,
    fresh_instances,
    mixed,
    seen_along,
    varies,
    whole_rows,
)
from autoquant.analyzer.rotation_state import shape_of as vector_shape
from autoquant.analyzer.rules.choices import rotate_masked
from autoquant.analyzer.rules.registry import rotation_rule, scale_rule
from autoquant.analyzer.rules.sentences import (
    WRITES,
)
from autoquant.analyzer.scale_state import ScaleAnalysis, scalar, shape_of
from autoquant.aten import NO_ROTATION, NO_RULE

COPIES = "t Dict_str Dict_int Dict_bool Dict_float Dict_complex Dict_Tensor"
"""Overloads of copy that are for no tensors."""


@scale_rule(
    "copy",
    says="replaces a tensor: the scale of what is copied passes",
    without=COPIES,
)
def scale_copy(a: ScaleAnalysis, site: Site, x: Value, source: Value, *args: Value) -> Value:
    return a.labels(site, source).expand(site.shape)


@rotation_rule("copy", says="replaces a tensor: the vectors that are copied pass", without=COPIES)
def rotate_copy(a: RotationAnalysis, site: Site, x: Value, source: Value, *args: Value) -> Value:
    if not isinstance(source, Vector):
        return a.end(site, [x, source], NO_ROTATION)
    return broadcast(source, site.shape)


@rotation_rule("slice_scatter", says="replaces whole vectors: both are rotated alike")
def rotate_write_slice(
    a: RotationAnalysis, site: Site, x: Value, source: Value, dim: int = 0, *args: Value, **kwargs: Value
) -> Value:
    """Some rows are replaced, wherever they are: those that stay and those that are written are rotated alike."""
    empty = isinstance(x, Constant) and not bool(x.value.any())
    vectors = [side for side in (x, source) if isinstance(side, Vector)]
    last = dim % len(site.shape) == len(site.shape) - 1
    if not isinstance(source, Vector) or not (empty or isinstance(x, Vector)) or last:
        return a.end(site, [x, source], "it is written to something else")
    if any(vector.gain is not None or vector.factors is not None for vector in vectors):
        return a.end(site, [x, source], "it is written to something else")
    dim %= len(site.shape)
    a.stay_apart(site, *vectors)
    a.arrange(site, *(vector.coordinates for vector in vectors))
    labels = a.variables.merge_along(source.coordinates, [dim], site.order, keepdim=True).expand(site.shape)
    if isinstance(x, Vector):
        labels = a.variables.merge(
            a.variables.merge_along(x.coordinates, [dim], site.order, keepdim=True), labels, site.order
        )
    labels = labels.expand(site.shape)
    return Vector(labels, fresh_instances(labels))


@scale_rule("slice_scatter select_scatter", says=WRITES)
def scale_write_slice(a: ScaleAnalysis, site: Site, x: Value, source: Value, *args: Value, **kwargs: Value) -> Value:
    labels, written = a.labels(site, x), a.labels(site, source)
    a.mixed(labels)
    a.mixed(written)
    return run(site, labels, written.expand(shape_of(source)), *args, **kwargs)


@scale_rule("index_add index_copy index_fill", says=WRITES)
def scale_write_rows(
    a: ScaleAnalysis, site: Site, x: Value, dim: int, index: Value, source: Value, **kwargs: Value
) -> Value:
    """index_add, index_copy, index_fill."""
    labels, written = a.labels(site, x), a.labels(site, source)
    if written.ndim == 0 < labels.ndim:  # one number everywhere
        written = written.expand((1,) * labels.ndim)
    return written_along(a, site, labels, written, dim % max(labels.ndim, 1))


@rotation_rule("scatter_add", says="adds whole vectors to rows: both are rotated alike")
def rotate_scatter_add(a: RotationAnalysis, site: Site, x: Value, dim: int, index: Value, source: Value) -> Value:
    """Position by position; where the place is one for all channels, whole vectors are added."""
    whole = isinstance(index, (Constant, Dynamic)) and whole_rows(site.node.args[2], index)
    if not whole or shape_of(index) != vector_shape(source) or dim % len(site.shape) == len(site.shape) - 1:
        return a.end(site, [x, source], "it is added to something else")
    return rotate_index_add(a, site, x, dim, index, source)


@rotation_rule("scatter_reduce", says="adds whole vectors to rows: both are rotated alike")
def rotate_scatter_reduce(
    a: RotationAnalysis, site: Site, x: Value, dim: int, index: Value, source: Value, reduce: str, **kwargs: Value
) -> Value:
    """Sums alone: of whole vectors, each channel's own largest or product is no vector."""
    if reduce != "sum":
        return a.end(site, [x, source], NO_ROTATION)
    return rotate_scatter_add(a, site, x, dim, index, source)


@rotation_rule("index_add index_copy", says="adds whole vectors to rows, or replaces rows: both are rotated alike")
def rotate_index_add(
    a: RotationAnalysis, site: Site, x: Value, dim: int, index: Value, source: Value, **kwargs: Value
) -> Value:
    """Whole vectors are added to any of the rows, or replace them."""
    empty = isinstance(x, Constant) and not bool(x.value.any())
    into = x if isinstance(x, Vector) else None
    if (
        not (empty or into)
        or not isinstance(source, Vector)
        or source.gain is not None
        or (into is not None and (into.gain is not None or varies(into.coordinates, dim)))
        or dim % source.coordinates.ndim == source.coordinates.ndim - 1
        or kwargs.get("alpha", 1) != 1
    ):
        return a.end(site, [x, source], "it is added to something else")
    dim %= source.coordinates.ndim
    a.stay_apart(site, source, *([] if into is None else [into]))
    a.arrange(site, source.coordinates)  # rows of several experts, whose coordinates are one from here on
    labels = a.variables.merge_along(source.coordinates, [dim], site.order, keepdim=True).expand(site.shape)
    if into is not None:
        labels = a.variables.merge(into.coordinates, labels, site.order)
    factors = seen_along(source, [dim], True, site.shape)
    if into is not None and into.factors is not None:
        factors = into.factors if factors is None else mixed(into.factors, factors)
    return Vector(labels, fresh_instances(labels), factors=factors)


@scale_rule("scatter scatter_add scatter_reduce", says=WRITES)
def scale_scatter(
    a: ScaleAnalysis, site: Site, x: Value, dim: int, index: Value, source: Value, *args: Value, **kwargs: Value
) -> Value:
    """Position by position along ``dim``: the other coordinates of what is written stay."""
    labels, written = a.labels(site, x), a.labels(site, source)
    dim %= max(labels.ndim, 1)
    if isinstance(index, (Tensor, Param)) or "prod" in args or kwargs.get("reduce") in ("prod", "multiply"):
        return a.block(site, [x, index, source], NO_RULE)
    if isinstance(index, Constant) and site.operator == "scatter" and not kwargs:
        a.mixed(labels)
        a.mixed(written)
        return run(site, labels, dim, index.value, written if written.ndim else int(written))
    sizes = shape_of(index)
    if any(size != labels.shape[d] for d, size in enumerate(sizes) if d != dim):
        return a.block(site, [x, source], "it is written to part of a tensor")
    for d, size in enumerate(sizes if written.ndim else ()):
        written = written.narrow(d, 0, size)
    return written_along(a, site, labels, written if written.ndim else written.expand((1,) * labels.ndim), dim)


@scale_rule("index_put", says=WRITES)
def scale_index_put(
    a: ScaleAnalysis, site: Site, x: Value, indices: Sequence[Value], values: Value, accumulate: bool = False
) -> Value:
    """``x[indices] = values``, or ``+=``."""
    labels, written = a.labels(site, x), a.labels(site, values)
    a.mixed(labels)
    a.mixed(written)
    if any(isinstance(index, (Tensor, Param)) for index in indices):
        return a.block(site, [x, *indices, values], "it is used as an index")
    if not accumulate and all(index is None or isinstance(index, Constant) for index in indices):
        return run(site, labels, [None if index is None else index.value for index in indices], written)
    if written.numel() == 1:
        return a.variables.merge(labels, written.reshape(()), site.order).expand(site.shape)
    found = written_places(indices, labels.shape, written.shape)
    if found is None:
        return a.block(site, [x, values], "it is written to places that the data choose")
    dims, chosen = found
    first, last = labels.shape[: dims[0]], labels.shape[dims[-1] + 1 :]
    places = written.expand(*first, *chosen, *last)
    row = a.variables.merge_along(places, list(range(dims[0], dims[0] + len(chosen))), site.order)
    base = a.variables.merge_along(labels, dims, site.order)
    return a.variables.merge(base, row, site.order).reshape(*first, *(1,) * len(dims), *last).expand(site.shape)


@rotation_rule("index_put", says="writes whole vectors to rows: both are rotated alike")
def rotate_index_put(
    a: RotationAnalysis, site: Site, x: Value, indices: Sequence[Value], values: Value, accumulate: bool = False
) -> Value:
    """Whole vectors are added to some of the rows, or replace them, wherever these are; a mask may set some to 0."""
    mask = indices[0]
    if len(indices) == 1 and isinstance(mask, Constant) and _is_mask(mask) and scalar(values) == 0.0 and not accumulate:
        rows = mask.value[(..., *[None] * (len(site.shape) - mask.value.ndim))]
        return rotate_masked(a, site, x, replace(mask, value=rows), 0.0)
    plain = all(isinstance(index, (Constant, Dynamic, type(None))) for index in indices)
    found = written_places(indices, site.shape, vector_shape(values)) if plain and isinstance(values, Vector) else None
    empty = isinstance(x, Constant) and not bool(x.value.any())
    into = x if isinstance(x, Vector) else None
    if found is None or not (empty or into) or not isinstance(values, Vector) or values.gain is not None:
        return a.end(site, [x, values], "it is written to something else")
    dims, chosen = found
    first, last = site.shape[: dims[0]], site.shape[dims[-1] + 1 :]
    values = broadcast(values, (*first, *chosen, *last))
    places = list(range(dims[0], dims[0] + len(chosen)))
    if not last or (into is not None and (into.gain is not None or any(varies(into.coordinates, d) for d in dims))):
        return a.end(site, [x, values], "its channels are chosen by the data")
    a.stay_apart(site, values, *([] if into is None else [into]))
    a.arrange(site, values.coordinates)

    def spread(labels: Tensor) -> Tensor:
        return labels.reshape(*first, *(1,) * len(dims), *last).expand(site.shape)

    labels = spread(a.variables.merge_along(values.coordinates, places, site.order))
    if into is not None:
        labels = a.variables.merge(into.coordinates, labels, site.order)
    factors = None if values.factors is None else spread(values.factors.sum(places))
    if into is not None and into.factors is not None:
        factors = into.factors if factors is None else mixed(into.factors, factors)
    return Vector(labels, fresh_instances(labels), factors=factors)


def written_places(
    indices: Sequence[Value], shape: Sequence[int], written: Sequence[int]
) -> tuple[list[int], tuple[int, ...]] | None:
    """The consecutive dimensions that indices (or a mask) choose from, and the shape of what they choose.

    A mask chooses as many places as are ``written``, the shape of the values.
    """
    dims = [d for d, index in enumerate(indices) if index is not None]
    if len(dims) == 1 and _is_mask(indices[dims[0]]):
        covered = list(range(dims[0], dims[0] + len(shape_of(indices[dims[0]]))))
        if not covered or covered[-1] >= len(shape):
            return None
        place = len(written) - (len(shape) - covered[-1])
        return covered, (written[place] if place >= 0 else 1,)
    if not dims or dims != list(range(dims[0], dims[-1] + 1)) or any(_is_mask(indices[d]) for d in dims):
        return None
    return dims, tuple(torch.broadcast_shapes(*(shape_of(indices[d]) for d in dims)))


@scale_rule("masked_scatter", says=WRITES)
def scale_masked_scatter(a: ScaleAnalysis, site: Site, x: Value, mask: Value, source: Value) -> Value:
    """The elements of ``source`` in order, where the mask is true."""
    labels, written = a.labels(site, x), a.labels(site, source)
    a.mixed(labels)
    a.mixed(written)
    if isinstance(mask, Constant):
        return run(site, labels, mask.value, written)
    if isinstance(mask, (Tensor, Param)):
        return a.block(site, [x, mask, source], "it is used as a condition")
    written = written.reshape(-1, labels.shape[-1]) if _in_one_row(labels, written) else written
    rows = whole_rows(site.node.args[1], mask) and labels.shape[-1:] == written.shape[-1:]
    row = a.variables.merge_along(written, range(written.ndim - rows), site.order)
    base = a.variables.merge_along(labels, range(labels.ndim - rows), site.order)
    return a.variables.merge(base, row, site.order).expand(site.shape)


@rotation_rule("masked_scatter", says="replaces whole vectors: both are rotated alike")
def rotate_masked_scatter(a: RotationAnalysis, site: Site, x: Value, mask: Value, source: Value) -> Value:
    """Some whole vectors of ``x`` are replaced, in order, by those of ``source`` (pictures among words)."""
    if isinstance(x, Vector) and isinstance(source, Vector) and _in_one_row(x.coordinates, source.coordinates):
        size = x.coordinates.shape[-1]
        source = cast(Vector, apply(source, lambda labels: labels.reshape(-1, size)))
    if (
        not isinstance(x, Vector)
        or not isinstance(source, Vector)
        or not whole_rows(site.node.args[1], mask)
        or x.gain is not None
        or source.gain is not None
        or source.coordinates.shape[-1] != x.coordinates.shape[-1]
    ):
        gained = any(isinstance(part, Vector) and part.gain is not None for part in (x, source))
        return a.end(site, [x, mask, source], "a norm's gains are on what it writes" if gained else "it is masked")
    a.stay_apart(site, x, source)
    a.arrange(site, x.coordinates, source.coordinates)
    row = a.variables.merge_along(source.coordinates, range(source.coordinates.ndim - 1), site.order)
    labels = a.variables.merge(x.coordinates, row, site.order)
    factors = seen_along(source, range(source.coordinates.ndim - 1), False, tuple(row.shape))
    if factors is not None or x.factors is not None:
        none = torch.zeros(1, dtype=torch.int64)
        parts = [none if part is None else part for part in (x.factors, factors)]
        factors = mixed(parts[0], parts[1]).expand(site.shape)
    return Vector(labels, fresh_instances(labels), factors=factors)


def run(site: Site, *args: Value, **kwargs: Value) -> Tensor:
    """The operator itself, on labels."""
    target: Callable[..., Tensor] = site.node.target  # type: ignore[assignment]  # a call_function node
    return target(*args, **kwargs)


def written_along(a: ScaleAnalysis, site: Site, labels: Tensor, written: Tensor, dim: int) -> Value:
    """Rows of ``written`` go anywhere along ``dim``: all that is there takes their scale."""
    a.mixed(labels)
    a.mixed(written)
    row = a.variables.merge_along(written, [dim], site.order, keepdim=True)
    return a.variables.merge(a.variables.merge_along(labels, [dim], site.order, keepdim=True), row, site.order).expand(
        site.shape
    )


def _is_mask(index: Value) -> bool:
    dtype = index.value.dtype if isinstance(index, Constant) else index.dtype
    return bool(dtype in (torch.bool, torch.uint8))


def _in_one_row(labels: Tensor, written: Tensor) -> bool:
    """Whether whole vectors are written that lie one behind the other."""
    return written.ndim == 1 and labels.ndim > 1 and written.numel() > 0 and written.numel() % labels.shape[-1] == 0
