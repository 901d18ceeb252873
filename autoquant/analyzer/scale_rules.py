"""How each operator carries scales: the scale column of the operator table.

A rule takes the site and the operator's arguments, with labels (int64 tensors of the real shape) in place of
activations, adds the equations that the operator demands and returns the labels of its result. What has no rule fixes
everything that it touches.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from autoquant.analyzer.families import Factors, Param
from autoquant.analyzer.interpret import Known, Rule, Site, Unknown, Value
from autoquant.analyzer.operators import NO_RULE, NONLINEAR, PASSES, PRODUCTS, base_name, operator_name
from autoquant.analyzer.scale_analysis import ScaleAnalysis, Scores, Use, scalar, shape_of


def rules(a: ScaleAnalysis) -> dict[str, Rule]:
    """The scale rule of every operator that is not data movement."""
    v = a.variables
    table: dict[str, Rule] = {}

    def elementwise(site: Site, *operands: Tensor) -> None:
        """Tokens of different experts do not meet as long as row stays on row."""
        if v.tagged and any(
            o.ndim not in (0, len(site.shape)) or (o.ndim and o.shape[0] != site.shape[0]) for o in operands
        ):
            for operand in operands:
                a.mixed(operand)

    def passes(site: Site, x: Value, *args: Value, **kwargs: Value) -> Value:
        if site.outputs and not site.outputs[0].is_floating_point():
            return a.block(site, [x], "it is rounded")
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
        elementwise(site, left, right)
        return v.merge(left, right, site.order)

    def multiply(site: Site, x: Value, y: Value, **kwargs: Value) -> Value:
        left, right = a.labels(site, x), a.labels(site, y)
        elementwise(site, left, right)
        return v.product(left, right, site.order)

    def divide(site: Site, x: Value, y: Value, **kwargs: Value) -> Value:
        if kwargs.get("rounding_mode") is not None:
            return a.block(site, [x, y], "it is rounded")
        left, right = a.labels(site, x), a.labels(site, y)
        elementwise(site, left, right)
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

    def nonlinear(site: Site, *args: Value, **kwargs: Value) -> Value:
        name = site.operator.rpartition("::")[2]
        return a.block(site, [*args, *kwargs.values()], f"{name}(s x) is not s {name}(x)")

    def reduce(site: Site, x: Value, dim: Value = None, keepdim: Value = False, **kwargs: Value) -> Value:
        labels = a.labels(site, x)
        if isinstance(dim, (Tensor, Param, Known, Unknown)):  # max and min of two tensors
            other = a.labels(site, dim)
            elementwise(site, labels, other)
            return v.merge(labels, other, site.order).expand(site.shape)
        if isinstance(dim, bool) or dim is None or dim == []:
            dims, keep = list(range(labels.ndim)), bool(keepdim)
        else:
            dims, keep = [d % max(labels.ndim, 1) for d in ([dim] if isinstance(dim, int) else dim)], bool(keepdim)
        if 0 in dims:
            a.mixed(labels)
        merged = v.merge_along(labels, dims, site.order, keep)
        val = site.node.meta.get("val")
        if isinstance(val, (tuple, list)):  # values and positions: the positions do not depend on a common scale
            return (merged, Unknown(tuple(site.outputs[1].shape), site.outputs[1].dtype))
        if not site.outputs[0].is_floating_point():
            return Unknown(site.shape, site.outputs[0].dtype)
        return merged

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
        return v.merge_along(labels, [dim % labels.ndim], site.order, keepdim=True).expand(labels.shape)

    def where(site: Site, condition: Value, x: Value, y: Value) -> Value:
        left, right = a.labels(site, x), a.labels(site, y)
        if isinstance(condition, (Tensor, Param)):
            return a.block(site, [condition, x, y], "it is used as a condition")
        elementwise(site, left, right)
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

    def embedding(site: Site, table_: Value, indices: Value, *args: Value, **kwargs: Value) -> Value:
        if not isinstance(table_, Param) or table_.views or len(table_.full_shape) != 2:
            return a.block(site, [table_, indices], "the table is computed")
        labels = a.families.axis(table_, 1, "table", site.because("it is an embedding"), stacked=False)
        return labels.expand(site.shape)

    def product(site: Site, x: Value, w: Value, contracted: int, bias: Value = None) -> Value:
        """``x @ w`` with a parameter ``w``; ``contracted`` is the dimension of ``w`` that is summed over."""
        if not isinstance(x, (Tensor, Known, Unknown)) or not isinstance(w, Param):
            return a.block(site, [x, w, bias], "both factors are parameters")
        output = w_ndim(w) - 1 if contracted == w_ndim(w) - 2 else w_ndim(w) - 2
        found = a.families.factors(w, contracted, output, site.because("it is a weight"))
        if found is None:
            return a.block(site, [x, w, bias], "rows and columns of the weight are mixed by a reshape")
        columns, rows = found.columns, found.rows
        labels = a.labels(site, x)
        keyed = w.key and w_ndim(w) == 3
        if not keyed:
            a.mixed(labels)
        batch = columns.ndim - 1
        if batch and labels.ndim != w_ndim(w):
            return a.block(site, [x, w, bias], "a stack of weights is broadcast")
        summed = [labels.ndim - 2] if batch else range(labels.ndim - 1)
        labels = v.merge_along(labels, summed, site.order)
        v.equal(columns, labels, site.order, ratio=-1.0)
        a.uses.append(_use(site, w, bias, found, labels))
        rows = rows.unsqueeze(-2).expand(site.shape) if batch else rows.expand(site.shape)
        if bias is not None:
            return v.merge(rows, a.labels(site, bias), site.order)
        return rows

    def linear(site: Site, x: Value, w: Value, bias: Value = None) -> Value:
        return (
            product(site, x, w, 1, bias) if isinstance(w, Param) else activations(site, x, _swapped(a, site, w), bias)
        )

    def matmul(site: Site, x: Value, y: Value) -> Value:
        if isinstance(y, Param) and w_ndim(y) >= 2:
            return product(site, x, y, w_ndim(y) - 2)
        if isinstance(x, Param) and w_ndim(x) == 2 and isinstance(y, Tensor) and y.ndim >= 2:
            swapped = product_from_left(site, x, y)
            return swapped
        return activations(site, x, y)

    def product_from_left(site: Site, w: Param, x: Tensor) -> Value:
        """``w @ x``: the columns of ``w`` are summed with the rows of ``x``."""
        found = a.families.factors(w, 1, 0, site.because("it is a weight"))
        if found is None:
            return a.block(site, [w, x], "rows and columns of the weight are mixed by a reshape")
        a.mixed(x)
        labels = v.merge_along(x, [d for d in range(x.ndim) if d != x.ndim - 2], site.order)
        v.equal(found.columns, labels, site.order, ratio=-1.0)
        a.uses.append(_use(site, w, None, found, labels))
        return found.rows.unsqueeze(-1).expand(site.shape)

    def addmm(site: Site, bias: Value, x: Value, w: Value, **kwargs: Value) -> Value:
        if kwargs.get("beta", 1) != 1 or kwargs.get("alpha", 1) != 1:
            return a.block(site, [bias, x, w], "the product is blended with a bias")
        return product(site, x, w, 0, bias) if isinstance(w, Param) else activations(site, x, w, bias)

    def activations(site: Site, x: Value, y: Value, bias: Value = None) -> Value:
        """A product of two activations: scales along the sum must cancel, unless one side has none."""
        left, right = a.labels(site, x), a.labels(site, y)
        a.mixed(left)
        a.mixed(right)
        reason = site.because("it is a product of two activations")
        if left.ndim < 2 or right.ndim < 2:
            return a.block(site, [x, y, bias], "it is a product with a vector")
        if v.all_fixed(left):
            out = v.merge_along(right, [right.ndim - 2], site.order, keepdim=True).expand(site.shape)
        elif v.all_fixed(right):
            out = v.merge_along(left, [left.ndim - 1], site.order, keepdim=True).expand(site.shape)
        else:
            cancel(site, left, right.transpose(-1, -2))
            out = a.fixed(site.shape, reason)
        return out if bias is None else v.merge(out, a.labels(site, bias), site.order)

    def baddbmm(site: Site, bias: Value, x: Value, y: Value, **kwargs: Value) -> Value:
        """``beta * bias + alpha * x @ y``: numbers change no scale."""
        if isinstance(bias, (Tensor, Param)):
            return a.block(site, [bias, x, y], "a product is blended with an activation")
        return v.merge(matmul(site, x, y), a.labels(site, bias), site.order)

    def einsum(site: Site, equation: str, operands: Value, **kwargs: Value) -> Value:
        """A sum of products of two activations of which one has no scale: the other's labels come out."""
        terms, arrow, result = equation.replace(" ", "").partition("->")
        letters = terms.split(",")
        plain = arrow and "." not in equation and all(len(set(term)) == len(term) for term in (*letters, result))
        if not plain or len(operands) != 2 or any(isinstance(operand, Param) for operand in operands):
            return a.block(site, list(operands), NO_RULE)
        labels = [a.labels(site, operand) for operand in operands]
        for side in labels:
            a.mixed(side)
        free = [not v.all_fixed(side) for side in labels]
        if all(free):
            return a.block(site, list(operands), "it is a product of two activations")
        chosen = 1 if free[1] else 0
        term = letters[chosen]
        summed = [dim for dim, letter in enumerate(term) if letter not in result]
        merged = v.merge_along(labels[chosen], summed, site.order)
        kept = [letter for letter in term if letter in result]
        ordered = merged.permute([kept.index(letter) for letter in result if letter in kept])
        return ordered[tuple(slice(None) if letter in kept else None for letter in result)].expand(site.shape)

    def cancel(site: Site, queries: Tensor, keys: Tensor) -> None:
        """``sum_d q[.., t, d] k[.., s, d]`` is unchanged when k's scale is one over q's, channel by channel."""
        if _is_attention(site.node):
            heads = queries.shape[-3] if queries.ndim > 2 else 1
            kv_heads = len(torch.unique(keys.transpose(0, -3).flatten(1), dim=0)) if keys.ndim > 2 else 1
            a.scores.append(Scores(site, heads, kv_heads, queries.shape[-1]))
        q = v.merge_along(queries, [queries.ndim - 2], site.order)
        k = v.merge_along(keys, [keys.ndim - 2], site.order)
        v.equal(q, k, site.order, ratio=-1.0)
        a.cancelled.append(torch.unique(q))

    def attention(
        site: Site, q: Value, k: Value, value: Value, mask: Value = None, *args: Value, **kwargs: Value
    ) -> Value:
        """softmax(q k^T) v: q and k cancel, v's labels come out, repeated over the query heads."""
        queries, keys, values = (a.labels(site, x) for x in (q, k, value))
        for labels in (queries, keys, values):
            a.mixed(labels)
        if kwargs.get("enable_gqa", len(args) > 3 and args[3]):
            keys = keys.repeat_interleave(queries.shape[-3] // keys.shape[-3], -3)
            values = values.repeat_interleave(queries.shape[-3] // values.shape[-3], -3)
        if isinstance(mask, (Tensor, Param)):
            v.fix(a.labels(site, mask), site.because("it is added to attention scores"))
        cancel(site, queries, keys)
        return v.merge_along(values, [values.ndim - 2], site.order, keepdim=True).expand(site.shape)

    def grouped(site: Site, x: Value, w: Value, offsets: Value = None, *args: Value, **kwargs: Value) -> Value:
        """Rows of ``x`` in runs, one run per matrix of ``w`` [experts, in, out]."""
        if (
            not isinstance(w, Param)
            or not isinstance(x, (Tensor, Known, Unknown))
            or w_ndim(w) != 3
            or len(shape_of(x)) != 2
        ):
            return a.block(site, [x, w], "it is a grouped product of two activations")
        where_ = site.node.args[2] if len(site.node.args) > 2 else site.node.kwargs.get("offs")
        key = a.grouping(where_)
        keyed = Param(w.name, w.full_shape, w.views, w.shape, key)
        found = a.families.factors(keyed, 1, 2, site.because("it is a weight"))
        if found is None:
            return a.block(site, [x, w], "rows and columns of the weight are mixed by a reshape")
        columns, rows = found.columns[0], found.rows[0]
        labels = a.labels(site, x)
        foreign = labels[(v.tags(labels) != 0) & (v.tags(labels) != key)]
        a.mixed(foreign)
        merged = v.merge_along(labels, [0], site.order)
        v.equal(columns, merged, site.order, ratio=-1.0)
        a.uses.append(_use(site, keyed, None, found, merged))
        return rows.expand(site.shape)

    def convolution(
        site: Site,
        x: Value,
        w: Value,
        bias: Value = None,
        stride: Value = 1,
        padding: Value = 0,
        dilation: Value = 1,
        groups: int = 1,
    ) -> Value:
        """conv1d over time: depthwise, or dense in its channels."""
        if not isinstance(w, Param) or not isinstance(x, Tensor):
            return a.block(site, [x, w, bias], "it is a convolution with a computed weight")
        if w_ndim(w) != 3 or groups != w.shape[0] or w.shape[1] != 1:
            return a.block(site, [x, w, bias], "it is a convolution that mixes channels")
        channels = a.families.channels(w, site.because("it is a weight"))
        if channels is None:
            return a.block(site, [x, w, bias], "the channels of the weight are mixed by a reshape")
        a.mixed(x)
        labels = v.merge_along(x, [d for d in range(x.ndim) if d != x.ndim - 2], site.order)
        out = v.product(labels, channels, site.order)
        if bias is not None:
            v.equal(out, a.labels(site, bias), site.order)
        return out.unsqueeze(-1).expand(site.shape)

    def put(site: Site, x: Value, *args: Value, **kwargs: Value) -> Value:
        """Writes some elements of a tensor: wherever they go, they must agree with what they meet along those axes."""
        values = [arg for arg in args if isinstance(arg, (Tensor, Param))]
        labels = a.labels(site, x)
        for labels_ in (labels, *(a.labels(site, value) for value in values)):
            a.mixed(labels_)
        if len(values) != 1 or site.operator not in (
            "index_add",
            "index_copy",
            "scatter_add",
            "slice_scatter",
            "select_scatter",
            "copy",
        ):
            return a.block(site, [x, *values], NO_RULE)
        written = a.labels(site, values[0])
        if site.operator == "copy":
            return written.expand(site.shape)
        if site.operator in ("slice_scatter", "select_scatter"):
            target: Callable[..., Tensor] = site.node.target  # type: ignore[assignment]  # a call_function node
            return target(labels, written, *args[1:], **kwargs)
        dim = int(args[0]) % labels.ndim
        row = v.merge_along(written, [dim], site.order, keepdim=True)
        base = v.merge_along(labels, [dim], site.order, keepdim=True)
        return v.merge(base, row, site.order).expand(site.shape)

    for names, rule in (
        (PASSES, passes),
        (("add", "sub", "rsub"), add),
        (("mul",), multiply),
        (("div", "true_divide"), divide),
        (("pow",), pow_),
        (("square",), power(2.0)),
        (("sqrt",), power(0.5)),
        (("rsqrt",), power(-0.5)),
        (("reciprocal",), power(-1.0)),
        (("clamp", "clamp_min", "clamp_max", "hardtanh", "threshold"), clamp),
        (NONLINEAR, nonlinear),
        (("sum", "mean", "amax", "amin", "max", "min"), reduce),
        (("linalg_vector_norm",), length),
        (("topk", "sort"), order),
        (("cumsum",), running),
        (("where",), where),
        (("masked_fill",), masked_fill),
        (("layer_norm", "rms_norm"), norm),
        (("embedding",), embedding),
        (("linear",), linear),
        (("matmul", "mm", "bmm"), matmul),
        (("addmm",), addmm),
        (("baddbmm",), baddbmm),
        (("einsum",), einsum),
        (("scaled_dot_product_attention",), attention),
        (("_grouped_mm", "transformers::grouped_mm_fallback"), grouped),
        (("conv1d",), convolution),
        (
            (
                "index_add",
                "index_copy",
                "scatter_add",
                "slice_scatter",
                "select_scatter",
                "copy",
                "index_put",
                "scatter",
            ),
            put,
        ),
    ):
        for name in names:
            table[name] = rule
    return table


def _is_attention(node: torch.fx.Node) -> bool:
    """Do the scores go through a softmax before anything else is multiplied by them?"""
    queue, seen = [node], {node}
    while queue:
        found = queue.pop()
        if operator_name(found) in ("scaled_dot_product_attention", "softmax", "_softmax"):
            return True
        users = [user for user in found.users if user not in seen and operator_name(user) not in PRODUCTS]
        seen.update(users)
        queue.extend(users[: MAX_STEPS - len(seen)])
    return False


MAX_STEPS = 64
"""How far a softmax is looked for."""


def w_ndim(w: Param) -> int:
    """Dimensions of the weight as it is seen."""
    return len(w.shape)


def _swapped(a: ScaleAnalysis, site: Site, value: Value) -> Tensor:
    return a.labels(site, value).transpose(-1, -2)


def _use(site: Site, w: Param, bias: Value, found: Factors, labels: Tensor) -> Use:
    name = bias.name if isinstance(bias, Param) else None
    stack = int(torch.Size(w.full_shape[:-2]).numel()) if len(w.full_shape) > 2 else None
    sizes = w.full_shape[found.column_dim], w.full_shape[found.row_dim]
    return Use(site, w.name, name, found.column_dim, stack, *sizes, labels)
