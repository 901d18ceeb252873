"""How each operator carries scales: the scale column of the operator table.

A rule takes the site and the operator's arguments, with labels (int64 tensors of the real shape) in place of
activations, adds the equations that the operator demands and returns the labels of its result. What has no rule fixes
everything that it touches.
"""

from __future__ import annotations

import math

from torch import Tensor

from autoquant.analyzer.axes import Param
from autoquant.analyzer.interpreter import Known, Rule, Site, Unknown, Value
from autoquant.analyzer.scale_products import product_rules
from autoquant.analyzer.scale_state import ScaleAnalysis, scalar
from autoquant.analyzer.scale_writes import write_rules
from autoquant.aten import COMPARISONS, NONLINEAR, PASSES, POOLS, SIGNS, base_name


def rules(a: ScaleAnalysis) -> dict[str, Rule]:
    """The scale rule of every operator that is not data movement."""
    v = a.variables

    def passes(site: Site, x: Value, *args: Value, **kwargs: Value) -> Value:
        if site.outputs and not (site.outputs[0].is_floating_point() or site.outputs[0].is_complex()):
            return a.block(site, [x], "it is rounded")
        if site.operator == "alpha_dropout" and kwargs.get("train", args[1] if len(args) > 1 else False):
            return a.block(site, [x], "a constant is added")  # to what is dropped
        return a.labels(site, x)

    def add(site: Site, x: Value, y: Value, *args: Value, **kwargs: Value) -> Value:
        if kwargs.get("alpha", args[0] if args else 1) == 0:
            return a.labels(site, x)
        for one, other in ((x, y), (y, x)):
            number = scalar(other)
            if number == 0.0:
                return a.labels(site, one).expand(site.shape)
            if number == 1.0 and isinstance(one, Param) and site.operator == "add":
                return a.labels(site, one, offset=1).expand(site.shape)
            if number is not None and isinstance(one, (Tensor, Param)):
                normalises = any(base_name(user) in ("rsqrt", "sqrt", "pow", "reciprocal") for user in site.node.users)
                return a.block(site, [one], "it is normalised" if normalises else "a constant is added")
        left, right = a.labels(site, x), a.labels(site, y)
        a.meet(site, left, right)
        return v.merge(left, right, site.order)

    def multiply(site: Site, x: Value, y: Value, **kwargs: Value) -> Value:
        left, right = a.labels(site, x), a.labels(site, y)
        a.meet(site, left, right)
        return v.product(left, right, site.order)

    def divide(site: Site, x: Value, y: Value, **kwargs: Value) -> Value:
        if kwargs.get("rounding_mode") is not None:
            return a.block(site, [x, y], "it is rounded")
        left, right = a.labels(site, x), a.labels(site, y)
        a.meet(site, left, right)
        return v.product(left, v.power(right, -1.0, site.order), site.order)

    def power(exponent: float) -> Rule:
        return lambda site, x: v.power(a.labels(site, x), exponent, site.order)

    def pow_(site: Site, x: Value, exponent: Value) -> Value:
        number = scalar(exponent)
        if number is None or number == 0:
            return a.block(site, [x, exponent], "it is raised to a power that is not a constant")
        return v.power(a.labels(site, x), number, site.order)

    def clamp(site: Site, x: Value, low: Value = None, high: Value = None) -> Value:
        if all(bound is None or scalar(bound) == 0.0 for bound in (low, high)):
            return a.labels(site, x)
        return a.block(site, [x, low, high], "it is clamped")

    def compare(site: Site, x: Value, y: Value) -> Value:
        """What comes out is true or false, and does not change as long as both sides have one scale."""
        for one, other in ((x, y), (y, x)):
            number = scalar(other)
            if number is not None and number != 0 and not math.isinf(number):
                return a.block(site, [one], "it is compared with a number")
        left, right = a.labels(site, x), a.labels(site, y)
        a.meet(site, left, right)
        v.equal(left, right, site.order)
        return Unknown(site.shape, site.outputs[0].dtype)

    def sign(site: Site, x: Value, *args: Value, **kwargs: Value) -> Value:
        return a.outputs(site, site.because("it is the sign of a number, whatever its scale"))

    def place(site: Site, x: Value, dim: Value = None, keepdim: Value = False, **kwargs: Value) -> Value:
        """Where the largest element is, or in which order they are, does not change under one scale for all."""
        labels = a.labels(site, x)
        dims = [dim % max(labels.ndim, 1)] if isinstance(dim, int) and not isinstance(dim, bool) else range(labels.ndim)
        a.mixed(labels)
        v.merge_along(labels, list(dims), site.order)
        return Unknown(site.shape, site.outputs[0].dtype)

    def argsort(site: Site, x: Value, dim: Value = -1, *args: Value, **kwargs: Value) -> Value:
        return place(site, x, -1 if isinstance(dim, bool) else dim)

    def glu(site: Site, x: Value, dim: int = -1) -> Value:
        """``value * sigmoid(gate)``, the two halves of ``x``."""
        labels = a.labels(site, x)
        if dim % labels.ndim == 0:
            a.mixed(labels)
        value, gate = labels.chunk(2, dim)
        v.fix(gate, site.because("its gate half goes through a sigmoid"))
        return value

    def prelu(site: Site, x: Value, weight: Value) -> Value:
        v.fix(a.labels(site, weight), site.because("it is the slope of an activation"))
        return a.labels(site, x)

    def nonlinear(site: Site, *args: Value, **kwargs: Value) -> Value:
        name = site.operator.rpartition("::")[2]
        return a.block(site, [*args, *kwargs.values()], f"{name}(s x) is not s {name}(x)")

    def reduce(site: Site, x: Value, dim: Value = None, keepdim: Value = False, **kwargs: Value) -> Value:
        if isinstance(dim, (Tensor, Param, Known, Unknown)):  # max and min of two tensors
            return larger(site, x, dim)
        return with_positions(site, along(site, x, dim, keepdim))

    def along(site: Site, x: Value, dim: Value, keepdim: Value) -> Tensor:
        """Labels that agree along ``dim``: a number, a list, or all dimensions."""
        labels = a.labels(site, x)
        if isinstance(dim, bool) or dim is None or dim == []:
            dims = list(range(labels.ndim))
        else:
            dims = [d % max(labels.ndim, 1) for d in ([dim] if isinstance(dim, int) else dim)]
        if 0 in dims:
            a.mixed(labels)
        return v.merge_along(labels, dims, site.order, bool(keepdim))

    def larger(site: Site, x: Value, y: Value) -> Value:
        left, right = a.labels(site, x), a.labels(site, y)
        a.meet(site, left, right)
        return v.merge(left, right, site.order).expand(site.shape)

    def variance(
        site: Site, x: Value, dim: Value = None, unbiased: Value = True, keepdim: Value = False, **kwargs: Value
    ) -> Value:
        merged = along(site, x, dim, keepdim)
        squared = merged if site.operator == "std" else v.power(merged, 2.0, site.order)
        return (squared, merged) if site.operator == "var_mean" else squared

    def pooled(site: Site, x: Value, *args: Value, **kwargs: Value) -> Value:
        labels = a.labels(site, x)
        a.mixed(labels)
        dims = range(labels.ndim - POOLS[site.operator], labels.ndim)
        merged = v.merge_along(labels, list(dims), site.order, keepdim=True).expand(site.shape)
        return with_positions(site, merged)

    def sampled(site: Site, x: Value, places: Value, *args: Value) -> Value:
        """Sums over the spatial dimensions, all but the first two: the places say which."""
        labels = a.labels(site, x)
        a.mixed(labels)
        if isinstance(places, (Tensor, Param)):
            v.fix(a.labels(site, places), site.because("it says where another tensor is read"))
        return v.merge_along(labels, range(2, labels.ndim), site.order, keepdim=True).expand(site.shape)

    def as_complex(site: Site, x: Value) -> Value:
        """Two numbers become one: they have one scale."""
        labels = a.labels(site, x)
        if labels.ndim == 1:
            a.mixed(labels)
        return v.merge_along(labels, [labels.ndim - 1], site.order)

    def as_real(site: Site, x: Value) -> Value:
        return a.labels(site, x).unsqueeze(-1).expand(site.shape)

    def weight_norm(site: Site, direction: Value, length: Value, *args: Value) -> Value:
        """The length of each row is a parameter: its columns can take no scale, and what its rows take ends here."""
        return a.block(site, [direction, length], "it is a weight that is normalised before it is used")

    def with_positions(site: Site, values: Tensor) -> Value:
        """A maximum alone, or with its positions, which do not depend on a common scale."""
        if len(site.outputs) == 1:
            return values
        return values, Unknown(tuple(site.outputs[1].shape), site.outputs[1].dtype)

    def length(
        site: Site, x: Value, order: Value = 2, dim: Value = None, keepdim: Value = False, **kwargs: Value
    ) -> Value:
        if order == 0:
            return a.block(site, [x], "its non-zero elements are counted")
        return reduce(site, x, dim, keepdim)

    def order(site: Site, x: Value, *args: Value, **kwargs: Value) -> Value:
        """Topk and sort: positions and values under a common scale."""
        labels = a.labels(site, x)
        a.mixed(labels)
        numbers = [n for n in args if isinstance(n, int) and not isinstance(n, bool)]
        dim = kwargs.get("dim", numbers[-1] if len(numbers) > (site.operator == "topk") else -1)
        merged = v.merge_along(labels, [dim % labels.ndim], site.order, keepdim=True)
        return merged.expand(site.shape), Unknown(tuple(site.outputs[1].shape), site.outputs[1].dtype)

    def running(site: Site, x: Value, dim: int, **kwargs: Value) -> Value:
        labels = a.labels(site, x)
        a.mixed(labels)
        merged = v.merge_along(labels, [dim % labels.ndim], site.order, keepdim=True).expand(labels.shape)
        return with_positions(site, merged)

    def lerp(site: Site, x: Value, y: Value, weight: Value) -> Value:
        """``x + weight * (y - x)``."""
        left, right, share = a.labels(site, x), a.labels(site, y), a.labels(site, weight)
        a.meet(site, left, right, share)
        v.fix(share, site.because("it is the share of two tensors that are blended"))
        return v.merge(left, right, site.order).expand(site.shape)

    def add_product(site: Site, x: Value, y: Value, z: Value, *, value: Value = 1) -> Value:
        """``x + value * y * z``, or ``y / z``."""
        start, left, right = a.labels(site, x), a.labels(site, y), a.labels(site, z)
        a.meet(site, start, left, right)
        if site.operator == "addcdiv":
            right = v.power(right, -1.0, site.order)
        return v.merge(start, v.product(left, right, site.order), site.order).expand(site.shape)

    def fill(site: Site, x: Value, value: Value = 0) -> Value:
        return a.labels(site, value).expand(site.shape)

    def where(site: Site, condition: Value, x: Value, y: Value) -> Value:
        left, right = a.labels(site, x), a.labels(site, y)
        if isinstance(condition, (Tensor, Param)):
            return a.block(site, [condition, x, y], "it is used as a condition")
        a.meet(site, left, right)
        return v.merge(left, right, site.order).expand(site.shape)

    def masked_fill(site: Site, x: Value, mask: Value, value: Value) -> Value:
        return where(site, mask, value, x)

    def norm(
        site: Site, x: Value, shape: Value, weight: Value = None, bias: Value = None, *args: Value, **kwargs: Value
    ) -> Value:
        if site.operator == "rms_norm":
            bias = None  # it has none: what stands there is epsilon
        a.mixed(a.labels(site, x))
        reason = site.because(
            "it is normalised" if weight is not None else "it is normalised by a norm without a weight"
        )
        v.fix(a.labels(site, x), reason)
        if weight is None:
            return a.fixed(site.shape, reason)
        out = a.labels(site, weight)
        if bias is not None:
            v.equal(out, a.labels(site, bias), site.order)
        return out.expand(site.shape)

    def channel_norm(site: Site, x: Value, *args: Value, **kwargs: Value) -> Value:
        """batch_norm, group_norm, instance_norm: normalised somehow, then an affine map per channel (dimension 1)."""
        first = 1 if site.operator == "group_norm" else 0  # behind the number of groups
        weight, bias = (*args, None, None)[first : first + 2]  # a graph leaves out what is at its default
        a.mixed(a.labels(site, x))
        reason = site.because("it is normalised")
        v.fix(a.labels(site, x), reason)
        if weight is None:
            return a.outputs(site, reason)
        out = a.labels(site, weight)
        if bias is not None:
            v.equal(out, a.labels(site, bias), site.order)
        spread = out.view(-1, *(1,) * (len(site.shape) - 2)).expand(site.shape)
        statistics = tuple(Unknown(tuple(f.shape), f.dtype) for f in site.outputs[1:])
        return (spread, *statistics) if statistics else spread

    table: dict[str, Rule] = product_rules(a) | write_rules(a)
    for names, rule in (
        (PASSES, passes),
        (("add", "sub", "rsub"), add),
        (("mul",), multiply),
        (("div",), divide),
        (("addcmul", "addcdiv"), add_product),
        (("lerp",), lerp),
        (("pow", "float_power"), pow_),
        (("square",), power(2.0)),
        (("sqrt",), power(0.5)),
        (("rsqrt",), power(-0.5)),
        (("reciprocal",), power(-1.0)),
        (("clamp", "clamp_min", "clamp_max", "hardtanh", "threshold"), clamp),
        (NONLINEAR, nonlinear),
        (COMPARISONS, compare),
        (SIGNS, sign),
        (("argmax", "argmin"), place),
        (("argsort",), argsort),
        (("glu",), glu),
        (("prelu",), prelu),
        (("sum", "nansum", "mean", "amax", "amin", "max", "min"), reduce),
        (("maximum", "minimum", "fmax", "fmin"), larger),
        (("var", "std", "var_mean"), variance),
        (("linalg_vector_norm",), length),
        (("topk", "sort"), order),
        (("cumsum", "cummax", "cummin"), running),
        (POOLS, pooled),
        (("grid_sampler",), sampled),
        (("view_as_complex",), as_complex),
        (("view_as_real",), as_real),
        (("_weight_norm",), weight_norm),
        (("where",), where),
        (("masked_fill",), masked_fill),
        (("fill", "zero"), fill),
        (("layer_norm", "rms_norm"), norm),
        (("batch_norm", "_native_batch_norm_legit_no_training", "group_norm", "instance_norm"), channel_norm),
    ):
        for name in names:
            table[name] = rule
    return table
