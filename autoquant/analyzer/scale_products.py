"""The scale rules of products that add over channels: linears, attention, experts, convolutions."""

from __future__ import annotations

import torch
from torch import Tensor

from autoquant.analyzer.axes import Factors, Param
from autoquant.analyzer.interpreter import Known, Rule, Site, Unknown, Value
from autoquant.analyzer.scale_state import ScaleAnalysis, Scores, Use, shape_of
from autoquant.aten import CONVOLUTIONS, NO_RULE, PRODUCTS, einsum_letters, operator_name


def product_rules(a: ScaleAnalysis) -> dict[str, Rule]:
    """The scale rule of every product."""
    v = a.variables

    def embedding(site: Site, table_: Value, indices: Value, *args: Value, **kwargs: Value) -> Value:
        if not isinstance(table_, Param) or not table_.is_table:
            return a.block(site, [table_, indices], "the table is computed")
        labels = a.families.axis(table_, 1, "table", site.because("it is an embedding"), stacked=False)
        return labels.expand(site.shape)

    def embedding_bag(
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
            labels = embedding(site, table_, indices)
        else:
            rows = a.labels(site, table_)
            a.mixed(rows)
            labels = v.merge_along(rows, [0], site.order)
        if isinstance(shares, (Tensor, Param)):
            v.fix(a.labels(site, shares), site.because("it says how much of each row is added"))
        beside = tuple(Unknown(tuple(f.shape), f.dtype) for f in site.outputs[1:])
        return labels.expand(site.shape), *beside

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
        """A weight and an activation, or two activations of which one has no scale: the other's labels come out."""
        found = einsum_letters(equation, [shape_of(operand) for operand in operands])
        weights = [isinstance(operand, Param) for operand in operands]
        if found is None or len(operands) != 2 or all(weights):
            return a.block(site, list(operands), NO_RULE)
        letters, result = found
        if any(weights):
            w = weights.index(True)
            return contraction(site, operands[1 - w], operands[w], letters[1 - w], letters[w], result)
        labels = [a.labels(site, operand) for operand in operands]
        for side in labels:
            a.mixed(side)
        free = [not v.all_fixed(side) for side in labels]
        if all(free):
            return a.block(site, list(operands), "it is a product of two activations")
        chosen = 1 if free[1] else 0
        term = letters[chosen]
        merged = v.merge_along(labels[chosen], [d for d, c in enumerate(term) if c not in result], site.order)
        return spread(merged, "".join(c for c in term if c in result), result).expand(site.shape)

    def contraction(site: Site, x: Value, w: Param, x_term: str, w_term: str, result: str) -> Value:
        """``einsum(f'{x_term},{w_term}->{result}', x, w)`` with one letter summed, and one that only the weight has."""
        summed = [c for c in w_term if c in x_term and c not in result]
        rows = [c for c in w_term if c in result and c not in x_term]
        lost = [c for c in w_term if c not in x_term + result]
        if len(summed) != 1 or len(rows) != 1 or lost or not isinstance(x, (Tensor, Known, Unknown)):
            return a.block(site, [x, w], "it is a product with a weight that is no matrix")
        found = a.families.factors(w, w_term.index(summed[0]), w_term.index(rows[0]), site.because("it is a weight"))
        if found is None:
            return a.block(site, [x, w], "rows and columns of the weight are mixed by a reshape")
        labels = a.labels(site, x)
        a.mixed(labels)
        shared = [c for c in w_term if c in x_term]
        merged = v.merge_along(labels, [d for d, c in enumerate(x_term) if c not in shared], site.order)
        column_term = "".join(c for c in w_term if c != rows[0])
        seen = spread(merged, "".join(c for c in x_term if c in shared), column_term)
        v.equal(found.columns, seen, site.order, ratio=-1.0)
        a.uses.append(_use(site, w, None, found, seen.movedim(column_term.index(summed[0]), -1)))
        return spread(found.rows, "".join(c for c in w_term if c != summed[0]), result).expand(site.shape)

    def spread(labels: Tensor, term: str, result: str) -> Tensor:
        """Dimensions named by ``term`` in the order of ``result``, of size 1 where ``term`` has none."""
        ordered = labels.permute([term.index(c) for c in result if c in term])
        return ordered[tuple(slice(None) if c in term else None for c in result)]

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
        """Over time or space: depthwise, or dense in its channels."""
        dims = CONVOLUTIONS[site.operator]
        if not isinstance(w, Param) or not isinstance(x, (Tensor, Known, Unknown)) or w_ndim(w) != dims + 2:
            return a.block(site, [x, w, bias], "it is a convolution with a computed weight")
        labels = a.labels(site, x)
        a.mixed(labels)
        channel = labels.ndim - dims - 1
        labels = v.merge_along(labels, [d for d in range(labels.ndim) if d != channel], site.order)
        here = site.because("it is a weight")
        if groups == w.shape[0] and w.shape[1] == 1:
            found = a.families.channels(w, here)
            if found is None:
                return a.block(site, [x, w, bias], "the channels of the weight are mixed by a reshape")
            out = v.product(labels, found, site.order)
        elif groups == 1 and not w.views:
            v.equal(a.families.axis(w, 1, "column", here, stacked=False), labels, site.order, ratio=-1.0)
            out = a.families.axis(w, 0, "row", here, stacked=False)
        else:
            return a.block(site, [x, w, bias], "it is a convolution that mixes channels in groups")
        if bias is not None:
            v.equal(out, a.labels(site, bias), site.order)
        return out.view(-1, *(1,) * dims).expand(site.shape)

    return {
        "embedding": embedding,
        "embedding_bag": embedding_bag,
        "linear": linear,
        "matmul": matmul,
        "mm": matmul,
        "bmm": matmul,
        "addmm": addmm,
        "baddbmm": baddbmm,
        "einsum": einsum,
        "scaled_dot_product_attention": attention,
        "_grouped_mm": grouped,
        "transformers::grouped_mm_fallback": grouped,
        **dict.fromkeys(CONVOLUTIONS, convolution),
    }


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
