"""Rows of embedding tables."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from autoquant.analyzer.axes import Param
from autoquant.analyzer.interpreter import Constant, Dynamic, Site, Value
from autoquant.analyzer.rotation_state import (
    RotationAnalysis,
    Vector,
    fresh_instances,
)
from autoquant.analyzer.rules.registry import rotation_rule, scale_rule
from autoquant.analyzer.scale_state import ScaleAnalysis


@scale_rule("embedding", says="looks up an embedding: each column of the table can take a scale")
def scale_embedding(
    a: ScaleAnalysis, site: Site, table_: Value, indices: Value, *args: Value, **kwargs: Value
) -> Value:
    if not isinstance(table_, Param) or not table_.is_table:
        return a.block(site, [table_, indices], "the table is computed")
    labels = a.axes.axis(table_, 1, "table", site.because("it is an embedding"), stacked=False)
    return labels.expand(site.shape)


@rotation_rule("embedding", says="looks up an embedding: the columns of the table are rotated")
def rotate_embedding(
    a: RotationAnalysis, site: Site, table: Value, indices: Value, *args: Value, **kwargs: Value
) -> Value:
    if not isinstance(table, Param) or not table.is_table:
        return a.end(site, [table, indices], "the table is computed")
    labels = a.axes.axis(table, 1, "table", site.because("it is an embedding"), stacked=False).expand(site.shape)
    a.lookups[table.name] += 1
    return Vector(labels, fresh_instances(labels), table=table.name)


@scale_rule("embedding_bag", says="adds up rows of an embedding: each column of the table can take a scale")
def scale_embedding_bag(
    a: ScaleAnalysis,
    site: Site,
    table_: Value,
    indices: Value,
    offsets: Value,
    by_frequency: Value = False,
    mode: Value = 0,
    sparse: Value = False,
    shares: Value = None,
    *args: Value,
    **kwargs: Value,
) -> Value:
    """Sums, means or maxima of rows of the table."""
    if isinstance(table_, Param) and table_.is_table:
        labels = scale_embedding(a, site, table_, indices)
    else:
        rows = a.labels(site, table_)
        a.mixed(rows)
        labels = a.variables.merge_along(rows, [0], site.order)
    if isinstance(shares, (Tensor, Param)):
        a.variables.fix(a.labels(site, shares), site.because("it says how much of each row is added"))
    beside = tuple(Dynamic(tuple(f.shape), f.dtype) for f in site.outputs[1:])
    return labels.expand(site.shape), *beside


@rotation_rule("embedding_bag", says="adds up rows of an embedding: the columns of the table are rotated")
def rotate_embedding_bag(
    a: RotationAnalysis,
    site: Site,
    table: Value,
    indices: Value,
    offsets: Value,
    by_frequency: Value = False,
    mode: Value = 0,
    sparse: Value = False,
    shares: Value = None,
    *args: Value,
    **kwargs: Value,
) -> Value:
    """Sums of rows of a table, a number for each row."""
    largest = mode == 2
    if (
        largest
        or not isinstance(table, Param)
        or not table.is_table
        or not isinstance(shares, (Constant, Dynamic, type(None)))
    ):
        return a.end(site, [table, shares], "it is a maximum of rows" if largest else "the table is computed")
    rows = rotate_embedding(a, site, table, indices)
    return replace(rows, table=None), *a.unknown(site)[1:]  # a norm folded into the table would be of each row
