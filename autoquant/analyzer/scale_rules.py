"""How each operator carries scales: the scale column of the operator table.

A rule takes the site and the operator's arguments, with labels (int64 tensors of the real shape) in place of
activations, adds the equations that the operator demands and returns the labels of its result. What has no rule fixes
everything that it touches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from autoquant.analyzer.families import Factors, Families, Param
from autoquant.analyzer.interpret import Known, Rule, Site, Unknown, Value
from autoquant.analyzer.variables import ONE, ZERO, Reason, Variables


@dataclass(frozen=True, slots=True)
class Use:
    """A product of an activation with a weight: who reads which labels."""

    site: Site
    weight: str
    bias: str | None
    contracted_dim: int
    stack: int | None
    in_features: int
    out_features: int
    labels: Tensor
    """[in_features]: the labels that arrive at the columns."""


@dataclass(frozen=True, slots=True)
class Scores:
    """A place where queries meet keys."""

    site: Site
    heads: int
    kv_heads: int
    head_size: int


@dataclass(slots=True)
class ScaleAnalysis:
    """The state of the scale analysis: variables, parameter axes, and the linears met so far."""

    variables: Variables = field(default_factory=Variables)
    families: Families = field(init=False)
    uses: list[Use] = field(default_factory=list)
    grouped_by: dict[int, int] = field(default_factory=dict)
    scores: list[Scores] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.families = Families(self.variables)

    # --- what arguments become ---------------------------------------------------------------------------------

    def labels(self, site: Site, value: Value, offset: int = 0) -> Tensor:
        """The labels of any argument."""
        if isinstance(value, Tensor):
            return value
        if isinstance(value, Param):
            found = self.families.leaf(value, offset, site.because("it is a parameter"))
            if found is not None:
                return found
            return self.fixed(value.shape, site.because("a large parameter is used as a tensor"))
        if isinstance(value, Known):
            # 0 and the infinities of a mask stay what they are under any scale.
            anything = (value.value == 0) | value.value.isinf() if value.value.dtype.is_floating_point else value.value == 0
            return torch.where(anything, torch.tensor(ZERO), torch.tensor(ONE))
        if isinstance(value, Unknown):
            return torch.full(value.shape, ONE)
        return torch.tensor(ZERO if value == 0 or (isinstance(value, float) and math.isinf(value)) else ONE)

    def fixed(self, shape: Sequence[int], reason: Reason) -> Tensor:
        return torch.full(tuple(shape), self.variables.fixed(reason))

    # --- results ------------------------------------------------------------------------------------------------

    def block(self, site: Site, values: Sequence[Value], text: str) -> Value:
        """The operator allows no scale on anything it touches."""
        reason = site.because(text)
        for value in values:
            if isinstance(value, (Tensor, Param)):
                self.mixed(self.labels(site, value))
                self.variables.fix(self.labels(site, value), reason)
        return self.outputs(site, reason)

    def outputs(self, site: Site, reason: Reason) -> Value:
        made = tuple(
            self.fixed(f.shape, reason) if f.is_floating_point() else Unknown(tuple(f.shape), f.dtype) for f in site.outputs
        )
        return made if isinstance(site.node.meta.get("val"), (tuple, list)) else made[0] if made else None

    def mixed(self, labels: Tensor) -> None:
        if self.variables.tagged:
            self.variables.mix(labels)

    def no_rule(self, site: Site, values: Sequence[Value]) -> Value:
        return self.block(site, values, NO_RULE)

    def crossing(self, site: Site) -> Value:
        return self.fixed(site.shape, site.because("it crosses a graph break"))

    def finish(self, site: Site, values: Sequence[Value]) -> None:
        for value in values:
            if isinstance(value, (Tensor, Param)):
                self.mixed(self.labels(site, value))
                self.variables.fix(self.labels(site, value), site.because("it is an output of the model"))

    # --- data movement ------------------------------------------------------------------------------------------

    def move(self, site: Site, function: Callable[..., Value], args: tuple[Value, ...], kwargs: dict[str, Value]) -> Value:
        """Run the operator on the labels; indices that depend on the data could pick any row."""
        if site.operator in ("index", "index_select", "gather", "take_along_dim") and not isinstance(args[-1], Known):
            return self._pick(site, args, function)
        moved = function(*_to_labels(self, site, args), **kwargs)
        results = moved if isinstance(moved, (tuple, list)) else (moved,)
        if self.variables.tagged and not self._keeps_rows(site, function, args, kwargs):
            for value in args:
                for labels in value if isinstance(value, (tuple, list)) else (value,):
                    if isinstance(labels, Tensor):
                        self.mixed(labels)
        return tuple(results) if isinstance(moved, (tuple, list)) else moved

    def _keeps_rows(self, site: Site, function: Callable[..., Value], args: tuple[Value, ...], kwargs: dict[str, Value]) -> bool:
        """Is every row (dimension 0) of the result made of the same row of the argument?"""
        if not isinstance(args[0], Tensor) or args[0].ndim == 0:
            return False
        rows = torch.arange(args[0].shape[0]).view(-1, *(1,) * (args[0].ndim - 1)).expand(args[0].shape)
        moved = function(rows, *args[1:], **kwargs)
        for result in moved if isinstance(moved, (tuple, list)) else (moved,):
            if result.ndim == 0 or result.shape[0] != args[0].shape[0]:
                return False
            if not bool((result == torch.arange(result.shape[0]).view(-1, *(1,) * (result.ndim - 1))).all()):
                return False
        return True

    def _pick(self, site: Site, args: tuple[Value, ...], function: Callable[..., Value]) -> Value:
        """``x[i]`` with unknown ``i``: the rows it chooses from must agree, and then it does not matter which."""
        source = args[0]
        indices = args[1] if site.operator == "index" else args[2]
        if site.operator != "index":
            indices = [None] * (args[1] % max(len(_shape(source)), 1)) + [indices]
        dims = [d for d, i in enumerate(indices) if i is not None]
        if isinstance(source, Param) and dims == [0] and len(source.shape) > 1 and isinstance(indices[0], Unknown) and not source.views:
            key = self.grouping(site.node.args[1][0])  # type: ignore[index, arg-type]  # the same indices, as nodes
            return Param(source.name, source.full_shape, (_rows(site.shape),), site.shape, key)
        labels = self.labels(site, source)
        self.mixed(labels)
        if any(isinstance(i, Tensor) for i in indices):
            return self.block(site, [source, *indices], "it is used as an index")
        if site.operator in ("gather", "take_along_dim"):
            merged = self.variables.merge_along(labels, dims, site.order, keepdim=True)
            shape = list(labels.shape)
            shape[dims[0]] = site.shape[dims[0]]
            return merged.expand(shape).contiguous() if tuple(shape) == site.shape else self.block(site, [source], NO_RULE)
        merged = self.variables.merge_along(labels, dims, site.order, keepdim=True)
        known = [
            None if i is None else i.value if isinstance(i, Known) and d not in dims else torch.zeros(_shape(i), dtype=torch.int64)
            for d, i in enumerate(indices)
        ]
        return torch.ops.aten.index.Tensor(merged, known)

    def grouping(self, node: object) -> int:
        """A number for the way in which ``node`` (token counts, offsets or indices per expert) groups the rows."""
        while isinstance(node, torch.fx.Node) and _name(node) in _GROUPING and isinstance(node.args[0], torch.fx.Node):
            node = node.args[0]
        return self.grouped_by.setdefault(id(node), len(self.grouped_by) + 1)


_GROUPING = frozenset({"cumsum", "histc", "bincount", "to", "_to_copy", "clamp", "clamp_max", "clamp_min", "reshape", "view", "contiguous"})
NO_RULE = "the operator has no rule"


def _name(node: torch.fx.Node) -> str:
    target = node.target
    return target._schema.name.split("::")[1] if isinstance(target, torch._ops.OpOverload) else str(target)


def _rows(shape: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    """Any row for every position of the index: keyed labels are the same for all rows."""
    return lambda labels: labels[:1].expand(shape) if labels.ndim == len(shape) else labels[0].expand(shape)


def _shape(value: Value) -> tuple[int, ...]:
    if isinstance(value, (Param, Unknown)):
        return value.shape
    return tuple(value.value.shape) if isinstance(value, Known) else tuple(value.shape)


def _to_labels(analysis: ScaleAnalysis, site: Site, args: tuple[Value, ...]) -> list[Value]:
    """Arguments for running a movement on labels: data become labels, indices their values."""
    first = args[0]
    if isinstance(first, (tuple, list)):
        data: Value = [analysis.labels(site, v) for v in first]
        if site.operator in ("cat", "concat", "concatenate"):
            data = [d for d, v in zip(data, first, strict=True) if d.numel() or len(first) == 1]
    else:
        data = analysis.labels(site, first)
    rest = [_index(v) for v in args[1:]]
    if site.operator in ("constant_pad_nd", "pad"):
        fill = rest[-1] if len(rest) > 1 and isinstance(rest[-1], (int, float)) else 0
        return [data, rest[0], ZERO if fill == 0 else ONE]
    return [data, *rest]


def _index(value: Value) -> Value:
    if isinstance(value, (tuple, list)):
        return [_index(v) for v in value]
    return value.value if isinstance(value, Known) else value


# --- the rules ----------------------------------------------------------------------------------------------------


def rules(a: ScaleAnalysis) -> dict[str, Rule]:
    """The scale rule of every operator that is not data movement."""
    v = a.variables
    table: dict[str, Rule] = {}

    def elementwise(site: Site, *operands: Tensor) -> None:
        """Tokens of different experts do not meet as long as row stays on row."""
        if v.tagged and any(o.ndim not in (0, len(site.shape)) or (o.ndim and o.shape[0] != site.shape[0]) for o in operands):
            for operand in operands:
                a.mixed(operand)

    def passes(site: Site, x: Value, *args: Value, **kwargs: Value) -> Value:
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
                normalises = any(_name(user) in ("rsqrt", "sqrt", "pow", "reciprocal") for user in site.node.users)
                return a.block(site, [one], "it is normalised" if normalises else "a constant is added")
        left, right = a.labels(site, x), a.labels(site, y)
        elementwise(site, left, right)
        return v.merge(left, right, site.order).contiguous()

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
        return a.block(site, [*args, *kwargs.values()], "it is not proportional to its input")

    def reduce(site: Site, x: Value, dim: Value = None, keepdim: Value = False, **kwargs: Value) -> Value:
        labels = a.labels(site, x)
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

    def order(site: Site, x: Value, *args: Value, **kwargs: Value) -> Value:
        """topk and sort: positions and values under a common scale."""
        labels = a.labels(site, x)
        a.mixed(labels)
        numbers = [n for n in args if isinstance(n, int) and not isinstance(n, bool)]
        dim = kwargs.get("dim", numbers[-1] if len(numbers) > (site.operator == "topk") else -1)
        merged = v.merge_along(labels, [dim % labels.ndim], site.order, keepdim=True)
        return merged.expand(site.shape).contiguous(), Unknown(tuple(site.outputs[1].shape), site.outputs[1].dtype)

    def running(site: Site, x: Value, dim: int, **kwargs: Value) -> Value:
        labels = a.labels(site, x)
        a.mixed(labels)
        return v.merge_along(labels, [dim % labels.ndim], site.order, keepdim=True).expand(labels.shape).contiguous()

    def where(site: Site, condition: Value, x: Value, y: Value) -> Value:
        left, right = a.labels(site, x), a.labels(site, y)
        if isinstance(condition, (Tensor, Param)):
            return a.block(site, [condition, x, y], "it is used as a condition")
        elementwise(site, left, right)
        return v.merge(left, right, site.order).expand(site.shape).contiguous()

    def masked_fill(site: Site, x: Value, mask: Value, value: Value) -> Value:
        return where(site, mask, value, x)

    def norm(site: Site, x: Value, shape: Value, weight: Value = None, bias: Value = None, *args: Value, **kwargs: Value) -> Value:
        a.mixed(a.labels(site, x))
        reason = site.because("it is normalised" if weight is not None else "it is normalised by a norm without a weight")
        v.fix(a.labels(site, x), reason)
        if weight is None:
            return a.fixed(site.shape, reason)
        out = a.labels(site, weight)
        if bias is not None:
            v.equal(out, a.labels(site, bias), site.order)
        return out.expand(site.shape).contiguous()

    def embedding(site: Site, table_: Value, indices: Value, *args: Value, **kwargs: Value) -> Value:
        if not isinstance(table_, Param) or table_.views or len(table_.full_shape) != 2:
            return a.block(site, [table_, indices], "the table is computed")
        labels = a.families.axis(table_, 1, "table", site.because("it is an embedding"), stacked=False)
        return labels.expand(site.shape).contiguous()

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
            return v.merge(rows, a.labels(site, bias), site.order).contiguous()
        return rows.contiguous()

    def linear(site: Site, x: Value, w: Value, bias: Value = None) -> Value:
        return product(site, x, w, 1, bias) if isinstance(w, Param) else activations(site, x, _swapped(a, site, w), bias)

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
        return found.rows.unsqueeze(-1).expand(site.shape).contiguous()

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
        if bool(v.is_fixed(left).all()):
            out = v.merge_along(right, [right.ndim - 2], site.order, keepdim=True).expand(site.shape).contiguous()
        elif bool(v.is_fixed(right).all()):
            out = v.merge_along(left, [left.ndim - 1], site.order, keepdim=True).expand(site.shape).contiguous()
        else:
            cancel(site, left, right.transpose(-1, -2))
            out = a.fixed(site.shape, reason)
        return out if bias is None else v.merge(out, a.labels(site, bias), site.order).contiguous()

    def cancel(site: Site, queries: Tensor, keys: Tensor) -> None:
        """``sum_d q[.., t, d] k[.., s, d]`` is unchanged when the scale of k is one over that of q, channel by channel."""
        heads = queries.shape[-3] if queries.ndim > 2 else 1
        kv_heads = len(torch.unique(keys.transpose(0, -3).flatten(1), dim=0)) if keys.ndim > 2 else 1
        a.scores.append(Scores(site, heads, kv_heads, queries.shape[-1]))
        q = v.merge_along(queries, [queries.ndim - 2], site.order)
        k = v.merge_along(keys, [keys.ndim - 2], site.order)
        v.equal(q, k, site.order, ratio=-1.0)

    def attention(site: Site, q: Value, k: Value, value: Value, mask: Value = None, *args: Value, **kwargs: Value) -> Value:
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
        return v.merge_along(values, [values.ndim - 2], site.order, keepdim=True).expand(site.shape).contiguous()

    def grouped(site: Site, x: Value, w: Value, offsets: Value = None, *args: Value, **kwargs: Value) -> Value:
        """Rows of ``x`` in runs, one run per matrix of ``w`` [experts, in, out]."""
        if not isinstance(w, Param) or not isinstance(x, (Tensor, Known, Unknown)) or w_ndim(w) != 3 or len(_shape(x)) != 2:
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
        return rows.expand(site.shape).contiguous()

    def convolution(site: Site, x: Value, w: Value, bias: Value = None, stride: Value = 1, padding: Value = 0, dilation: Value = 1, groups: int = 1) -> Value:
        """conv1d over time: depthwise, or dense in its channels."""
        if not isinstance(w, Param) or w.views or not isinstance(x, Tensor) or len(w.full_shape) != 3:
            return a.block(site, [x, w, bias], NO_RULE)
        out_channels, per_group, _ = w.full_shape
        here = site.because("it is a weight")
        if groups == out_channels and per_group == 1:
            rows = columns = a.families.axis(w, 0, "row", here, stacked=False)
        else:
            return a.block(site, [x, w, bias], "it is a convolution that mixes channels")
        a.mixed(x)
        labels = v.merge_along(x, [d for d in range(x.ndim) if d != x.ndim - 2], site.order)
        # One family serves input and output: y = w * x per channel, so the weight can take the ratio of their scales.
        out = v.product(labels, columns, site.order)
        if bias is not None:
            v.equal(out, a.labels(site, bias), site.order)
        return out.unsqueeze(-1).expand(site.shape).contiguous() if rows.numel() else a.fixed(site.shape, here)

    def put(site: Site, x: Value, *args: Value, **kwargs: Value) -> Value:
        """Writes some elements of a tensor: wherever they go, they must agree with what they meet along those axes."""
        values = [arg for arg in args if isinstance(arg, (Tensor, Param))]
        labels = a.labels(site, x)
        for labels_ in (labels, *(a.labels(site, value) for value in values)):
            a.mixed(labels_)
        if len(values) != 1 or site.operator not in ("index_add", "index_copy", "scatter_add", "slice_scatter", "select_scatter", "copy"):
            return a.block(site, [x, *values], NO_RULE)
        written = a.labels(site, values[0])
        if site.operator == "copy":
            return written.expand(site.shape).contiguous()
        if site.operator in ("slice_scatter", "select_scatter"):
            target: Callable[..., Tensor] = site.node.target  # type: ignore[assignment]  # a call_function node
            return target(labels, written, *args[1:], **kwargs)
        dim = int(args[0]) % labels.ndim
        row = v.merge_along(written, [dim], site.order, keepdim=True)
        base = v.merge_along(labels, [dim], site.order, keepdim=True)
        return v.merge(base, row, site.order).expand(site.shape).contiguous()

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
        (("sum", "mean", "amax", "amin", "max", "min", "linalg_vector_norm"), reduce),
        (("topk", "sort"), order),
        (("cumsum",), running),
        (("where",), where),
        (("masked_fill",), masked_fill),
        (("layer_norm", "rms_norm"), norm),
        (("embedding",), embedding),
        (("linear",), linear),
        (("matmul", "mm", "bmm"), matmul),
        (("addmm",), addmm),
        (("scaled_dot_product_attention",), attention),
        (("_grouped_mm", "transformers::grouped_mm_fallback"), grouped),
        (("conv1d",), convolution),
        (("index_add", "index_copy", "scatter_add", "slice_scatter", "select_scatter", "copy", "index_put", "scatter"), put),
    ):
        for name in names:
            table[name] = rule
    return table


PASSES = (
    "to", "_to_copy", "type_as", "dropout", "feature_dropout", "alpha_dropout", "neg", "relu", "leaky_relu", "abs", "_assert_tensor_metadata",
    "identity", "float", "conj", "real", "positive", "native_dropout",
)  # fmt: skip
"""f(s x) = s f(x) for every s > 0."""

NONLINEAR = (
    "silu", "gelu", "tanh", "sigmoid", "softmax", "_softmax", "log_softmax", "softplus", "exp", "exp2", "expm1", "log", "log1p", "log2", "erf", "sin", "cos",
    "elu", "selu", "celu", "mish", "hardswish", "hardsigmoid", "logsigmoid", "log_sigmoid_forward", "logsumexp", "round", "floor", "ceil", "glu",
    "relu6", "softsign", "argmax", "argmin", "sign", "sgn", "tan", "atan", "atan2", "cumprod", "prod", "isnan", "isinf", "nan_to_num",
    "eq", "ne", "gt", "ge", "lt", "le", "floor_divide", "remainder", "fmod", "var", "std", "var_mean", "group_norm", "batch_norm", "logaddexp",
    "maximum", "minimum", "any", "all", "logical_not", "logical_and", "logical_or", "bucketize", "histc", "bincount", "nonzero", "one_hot",
)  # fmt: skip
"""Operators that are understood, and allow no scale."""


def w_ndim(w: Param) -> int:
    return len(w.shape)


def scalar(value: Value) -> float | None:
    """The number that ``value`` is, if it is one."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, Known) and value.value.numel() == 1:
        return float(value.value)
    return None


def _swapped(a: ScaleAnalysis, site: Site, value: Value) -> Tensor:
    return a.labels(site, value).transpose(-1, -2)


def _use(site: Site, w: Param, bias: Value, found: Factors, labels: Tensor) -> Use:
    name = bias.name if isinstance(bias, Param) else None
    stack = int(torch.Size(w.full_shape[:-2]).numel()) if len(w.full_shape) > 2 else None
    sizes = w.full_shape[found.column_dim], w.full_shape[found.row_dim]
    return Use(site, w.name, name, found.column_dim, stack, *sizes, labels)
