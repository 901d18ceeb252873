"""Comparisons, ranks, and operators that pick one of several tensors."""

from __future__ import annotations

import math

from torch import Tensor

from autoquant.analyzer.axes import Param
from autoquant.analyzer.interpreter import Constant, Dynamic, Site, Value
from autoquant.analyzer.rotation_state import (
    RotationAnalysis,
    Vector,
)
from autoquant.analyzer.rules.arithmetic import rotate_add, rotate_scaled
from autoquant.analyzer.rules.registry import rotation_rule, scale_rule
from autoquant.analyzer.rules.sentences import (
    PICKS,
)
from autoquant.analyzer.scale_state import ScaleAnalysis, scalar
from autoquant.aten import (
    COMPARISONS,
    SIGNS,
)


@scale_rule(*COMPARISONS, says="compares: both sides carry the same scale, which the result does not show")
def scale_compare(a: ScaleAnalysis, site: Site, x: Value, y: Value) -> Value:
    """What comes out is true or false, and does not change as long as both sides have one scale."""
    for one, other in ((x, y), (y, x)):
        number = scalar(other)
        if number is not None and number != 0 and not math.isinf(number):
            return a.block(site, [one], "it is compared with a number")
    left, right = a.labels(site, x), a.labels(site, y)
    a.meet(site, left, right)
    a.variables.equal(left, right, site.order)
    return Dynamic(site.shape, site.outputs[0].dtype)


@scale_rule(*SIGNS, says="sees signs and zeros alone, which no positive scale changes")
def scale_sign(a: ScaleAnalysis, site: Site, x: Value, *args: Value, **kwargs: Value) -> Value:
    return a.outputs(site, site.because("it is the sign of a number, whatever its scale"))


@scale_rule("argmax argmin", says="ranks: what is compared carries the same scale, which the result does not show")
def scale_place(
    a: ScaleAnalysis, site: Site, x: Value, dim: Value = None, keepdim: Value = False, **kwargs: Value
) -> Value:
    """Where the largest element is, or in which order they are, does not change under one scale for all."""
    labels = a.labels(site, x)
    dims = [dim % max(labels.ndim, 1)] if isinstance(dim, int) and not isinstance(dim, bool) else range(labels.ndim)
    a.mixed(labels)
    a.variables.merge_along(labels, list(dims), site.order)
    return Dynamic(site.shape, site.outputs[0].dtype)


@scale_rule("argsort", says="ranks: what is compared carries the same scale, which the result does not show")
def scale_argsort(a: ScaleAnalysis, site: Site, x: Value, dim: Value = -1, *args: Value, **kwargs: Value) -> Value:
    return scale_place(a, site, x, -1 if isinstance(dim, bool) else dim)


@scale_rule("topk sort", says="ranks: what is compared carries the same scale")
def scale_order(a: ScaleAnalysis, site: Site, x: Value, *args: Value, **kwargs: Value) -> Value:
    """Topk and sort: positions and values under a common scale."""
    labels = a.labels(site, x)
    a.mixed(labels)
    numbers = [n for n in args if isinstance(n, int) and not isinstance(n, bool)]
    dim = kwargs.get("dim", numbers[-1] if len(numbers) > (site.operator == "topk") else -1)
    merged = a.variables.merge_along(labels, [dim % labels.ndim], site.order, keepdim=True)
    return merged.expand(site.shape), Dynamic(tuple(site.outputs[1].shape), site.outputs[1].dtype)


@scale_rule("maximum minimum fmax fmin", says=PICKS)
def scale_larger(a: ScaleAnalysis, site: Site, x: Value, y: Value) -> Value:
    left, right = a.labels(site, x), a.labels(site, y)
    a.meet(site, left, right)
    return a.variables.merge(left, right, site.order).expand(site.shape)


@scale_rule("where", says=PICKS, without="default")
def scale_where(a: ScaleAnalysis, site: Site, condition: Value, x: Value, y: Value) -> Value:
    left, right = a.labels(site, x), a.labels(site, y)
    if isinstance(condition, (Tensor, Param)):
        return a.block(site, [condition, x, y], "it is used as a condition")
    a.meet(site, left, right)
    return a.variables.merge(left, right, site.order).expand(site.shape)


@rotation_rule("where", says="picks one of two vectors: both are rotated alike", without="default")
def rotate_where(a: RotationAnalysis, site: Site, condition: Value, x: Value, y: Value) -> Value:
    """``c x + (1 - c) y`` with ``c`` 0 or 1."""
    if not isinstance(condition, (Constant, Dynamic)) or isinstance(x, Param) or isinstance(y, Param):
        return a.end(site, [condition, x, y], "it is masked")
    sides = [rotate_scaled(a, site, side, condition) if isinstance(side, Vector) else side for side in (x, y)]
    return rotate_add(a, site, *sides)


@scale_rule("masked_fill", says=PICKS)
def scale_masked_fill(a: ScaleAnalysis, site: Site, x: Value, mask: Value, value: Value) -> Value:
    return scale_where(a, site, mask, value, x)


@rotation_rule("masked_fill", says="sets whole vectors to 0, which a rotation does not mind")
def rotate_masked(a: RotationAnalysis, site: Site, x: Value, mask: Value, value: Value) -> Value:
    if isinstance(x, Vector) and scalar(value) == 0.0 and isinstance(mask, (Constant, Dynamic)):
        return rotate_scaled(a, site, x, mask)
    return a.end(site, [x, mask, value], "it is masked")


@scale_rule("fill zero", says="one number everywhere: it has scale 1")
def scale_fill(a: ScaleAnalysis, site: Site, x: Value, value: Value = 0) -> Value:
    return a.labels(site, value).expand(site.shape)
