"""Grouped products with the experts' weights."""

from __future__ import annotations

from torch import Tensor

from autoquant.analyzer.axes import Param
from autoquant.analyzer.interpreter import Constant, Dynamic, Site, Value
from autoquant.analyzer.rotation_state import (
    RotationAnalysis,
)
from autoquant.analyzer.rules.contractions import use
from autoquant.analyzer.rules.products import rotate_product
from autoquant.analyzer.rules.registry import rotation_rule, scale_rule
from autoquant.analyzer.rules.sentences import (
    written_by_weight,
)
from autoquant.analyzer.scale_state import ScaleAnalysis, shape_of


@scale_rule(
    "_grouped_mm transformers::grouped_mm_fallback",
    says="grouped product with the experts' weights: each row can take a scale, in every expert its own",
)
def scale_grouped(
    a: ScaleAnalysis, site: Site, x: Value, w: Value, offsets: Value = None, *args: Value, **kwargs: Value
) -> Value:
    """Rows of ``x`` in runs, one run per matrix of ``w`` [experts, in, out]."""
    if (
        not isinstance(w, Param)
        or not isinstance(x, (Tensor, Constant, Dynamic))
        or len(w.shape) != 3
        or len(shape_of(x)) != 2
    ):
        return a.block(site, [x, w], "it is a grouped product of two activations")
    where_ = site.node.args[2] if len(site.node.args) > 2 else site.node.kwargs.get("offs")
    key = a.grouping(where_, w.full_shape[0])
    keyed = Param(w.name, w.full_shape, w.views, w.shape, key)
    found = a.axes.factors(keyed, 1, 2, site.because("it is a weight"))
    if found is None:
        return a.block(site, [x, w], "rows and columns of the weight are mixed by a reshape")
    columns, rows = found.columns[0], found.rows[0]
    labels = a.labels(site, x)
    foreign = labels[(a.variables.tags(labels) != 0) & (a.variables.tags(labels) != key)]
    a.mixed(foreign)
    merged = a.variables.merge_along(labels, [0], site.order)
    a.variables.equal(columns, merged, site.order, ratio=-1.0)
    a.uses.append(use(site, keyed, None, found, merged))
    return rows.expand(site.shape)


@rotation_rule("_grouped_mm transformers::grouped_mm_fallback", says=written_by_weight)
def rotate_grouped(a: RotationAnalysis, site: Site, x: Value, w: Value, *args: Value, **kwargs: Value) -> Value:
    if len(getattr(w, "shape", ())) != 3:
        return a.end(site, [x, w], "it is a product of two activations")
    return rotate_product(a, site, x, w, 1, None, key=1)
