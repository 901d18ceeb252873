"""The rotation rules of products that add over channels: linears read one space and write another, attention sums."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from autoquant.analyzer.axes import Factors, Param
from autoquant.analyzer.interpreter import Known, Rule, Site, Unknown, Value
from autoquant.analyzer.rotation_state import (
    Read,
    RotationAnalysis,
    Vector,
    apply,
    fresh_instances,
    mixed,
    seen_along,
    shape_of,
    varies,
)
from autoquant.analyzer.variables import ZERO
from autoquant.aten import CONVOLUTIONS, NO_ROTATION, einsum_letters
from autoquant.config.format import Norm


def rotation_products(a: RotationAnalysis) -> dict[str, Rule]:
    """The rotation rule of every product."""
    v = a.variables

    def embedding(site: Site, table: Value, indices: Value, *args: Value, **kwargs: Value) -> Value:
        if not isinstance(table, Param) or not table.is_table:
            return a.end(site, [table, indices], "the table is computed")
        labels = a.families.axis(table, 1, "table", site.because("it is an embedding"), stacked=False).expand(
            site.shape
        )
        a.lookups[table.name] += 1
        return Vector(labels, fresh_instances(labels), table=table.name)

    def embedding_bag(
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
            or not isinstance(shares, (Known, Unknown, type(None)))
        ):
            return a.end(site, [table, shares], "it is a maximum of rows" if largest else "the table is computed")
        rows = embedding(site, table, indices)
        return replace(rows, table=None), *a.unknown(site)[1:]  # a norm folded into the table would be of each row

    def product(site: Site, x: Value, w: Value, contracted: int, bias: Value = None, key: int = 0) -> Value:
        if not isinstance(w, Param) or len(w.shape) < 2:
            return a.end(site, [x, w, bias], "it is a product of two activations")
        ndim = len(w.shape)
        output = ndim - 1 if contracted == ndim - 2 else ndim - 2
        weight = replace(w, key=key or w.key)
        found = a.families.factors(weight, contracted, output, site.because("it is a weight"))
        if found is None:
            return a.end(site, [x, w, bias], "rows and columns of the weight are mixed by a reshape")
        columns, rows = (found.columns[0], found.rows[0]) if key else (found.columns, found.rows)
        if isinstance(x, Vector):
            read(site, x, columns, found, w.name, bias)
        else:
            v.fix(columns, site.because("it also reads what is not rotated"))
            a.end(site, [x], NO_ROTATION)
        rows = rows.unsqueeze(-2).expand(site.shape) if rows.ndim > 1 else rows.expand(site.shape)
        if isinstance(bias, Param) and not bias.views and len(bias.full_shape) == 1:
            labels = a.families.leaf(bias, 0, site.because("it is a bias"))
            rows = v.merge(rows, labels, site.order) if labels is not None else rows
        elif bias is not None:
            rows_vector = Vector(rows, fresh_instances(rows))
            return a.end(site, [rows_vector, bias], "a tensor that is not rotated is added")
        out = Vector(rows, fresh_instances(rows))
        if not key and found.rows.ndim > 1:  # a matrix for each part of the input: its rows read that part alone
            lead = found.rows.shape[:-1]
            keys = torch.arange(lead.numel()).view(*lead, 1, 1).expand(site.shape)
            a.split(out, keys, site.because("its channels are made of different vectors"))
        return out

    def read(site: Site, x: Vector, columns: Tensor, found: Factors, weight: str, bias: Value) -> None:
        real = x.coordinates != ZERO
        one = torch.where(real, x.instances, x.instances.amax(-1, keepdim=True))
        if bool((one != one[..., :1]).any()):
            text = "channels of different tokens are read together"
            a.end(site, [x], text)
            v.fix(columns, site.because(text))  # other readings of the weight would rotate them
            return
        summed = [x.coordinates.ndim - 2] if columns.ndim > 1 else range(x.coordinates.ndim - 1)
        labels = v.merge_along(x.coordinates, list(summed), site.order)
        v.equal(columns, labels, site.order)
        if x.gain_index is not None and not bool((x.gain_index == torch.arange(x.gain_index.shape[-1])).all()):
            a.end(site, [x], "the norm's weight is rearranged before it is read")
        order = columns.argsort(-1)  # as they lie in the weight
        a.arrange(site, labels.expand_as(columns).gather(-1, order))
        if x.factors is not None and varies(x.factors, x.factors.ndim - 1):
            a.split(x, x.factors, site.because("channels of different vectors are read together"))
        if x.factors is not None:
            seen = mixed(x.instances, x.factors).flatten(0, -2).sum(0)
            reason = site.because("copies of its channels that saw different factors are read")
            for copies, lie in zip(labels, order, strict=True) if labels.ndim > 1 else [(labels, order)]:
                a.split_copies(copies[lie], seen[lie], reason)
        name = bias.name if isinstance(bias, Param) else None
        bare = Norm(kind="layer", weight=None, bias=None, offset=0, eps=None) if x.centred else None
        a.reads.append(Read(site, weight, name, found.column_dim, x.gain or bare))

    def linear(site: Site, x: Value, w: Value, bias: Value = None) -> Value:
        return product(site, x, w, 1, bias)

    def addmm(site: Site, bias: Value, x: Value, w: Value, **kwargs: Value) -> Value:
        return product(site, x, w, 0, bias)

    def matmul(site: Site, x: Value, y: Value) -> Value:
        if isinstance(y, Param):
            return product(site, x, y, len(y.shape) - 2)
        if isinstance(x, Param) and len(x.shape) == 2 and isinstance(y, Vector):
            return product_from_left(site, x, y)
        if isinstance(y, Vector) and isinstance(x, (Unknown, Known)):
            return summed_over_tokens(site, y)
        return a.end(site, [x, y], "it is a product of two activations")

    def product_from_left(site: Site, w: Param, x: Vector) -> Value:
        """``w @ x``: the columns of ``w`` are summed with the rows of ``x``."""
        found = a.families.factors(w, 1, 0, site.because("it is a weight"))
        if found is None:
            return a.end(site, [w, x], "rows and columns of the weight are mixed by a reshape")
        read(site, apply(x, lambda labels: labels.transpose(-1, -2)), found.columns, found, w.name, None)
        rows = found.rows.unsqueeze(-1).expand(site.shape)
        return Vector(rows, fresh_instances(rows))

    def summed_over_tokens(site: Site, values: Vector) -> Value:
        """Sums of vectors with coefficients per position of the result: every axis but the last has its own."""
        dim = values.coordinates.ndim - 2
        if values.gain is not None or varies(values.coordinates, dim):
            return a.end(site, [values], "its channels are summed")
        labels = v.merge_along(values.coordinates, [dim], site.order, keepdim=True).expand(site.shape)
        # The heads of a token are read together, also where they all look at the same values.
        instances = fresh_instances(labels.narrow(-3, 0, 1) if labels.ndim > 3 else labels).expand(labels.shape)
        out = Vector(labels, instances, factors=seen_along(values, [dim], True, tuple(site.shape)))
        keys = torch.arange(int(np.prod(site.shape[:-1]))).view(*site.shape[:-1], 1).expand(site.shape)
        a.split(out, keys, site.because("heads have attention weights of their own"))
        a.values.append((site, labels))
        return replace(out, factors=out.times(keys + (site.order << 32)))

    def attention(
        site: Site, q: Value, k: Value, value: Value, mask: Value = None, *args: Value, **kwargs: Value
    ) -> Value:
        a.end(site, [q, k, mask], "it enters attention scores")
        if not isinstance(value, Vector):
            return a.end(site, [value], NO_ROTATION)
        if kwargs.get("enable_gqa", len(args) > 3 and args[3]):
            repeats = site.shape[-3] // value.coordinates.shape[-3]
            value = apply(value, lambda labels: labels.repeat_interleave(repeats, -3))
        return summed_over_tokens(site, value)

    def grouped(site: Site, x: Value, w: Value, *args: Value, **kwargs: Value) -> Value:
        if len(getattr(w, "shape", ())) != 3:
            return a.end(site, [x, w], "it is a product of two activations")
        return product(site, x, w, 1, None, key=1)

    def einsum(site: Site, equation: str, operands: Value, **kwargs: Value) -> Value:
        """Attention or a mixture of streams: a sum of vectors with coefficients."""
        found = einsum_letters(equation, [shape_of(operand) for operand in operands])
        vectors = [isinstance(operand, Vector) for operand in operands]
        others = [isinstance(operand, (Known, Unknown)) for operand in operands]
        if found is None or len(operands) != 2 or sum(vectors) != 1 or sum(others) != 1:
            return a.end(site, list(operands), "it is a product of two activations")
        letters, result = found
        at = vectors.index(True)
        values, term, coefficients = operands[at], letters[at], letters[1 - at]
        summed = [d for d, c in enumerate(term) if c not in result]
        if values.gain is not None or any(varies(values.coordinates, d) for d in summed):
            return a.end(site, [values], "its channels are summed")
        kept = [c for c in term if c in result]

        def spread(labels: Tensor) -> Tensor:
            ordered = labels.permute([kept.index(c) for c in result if c in kept])
            return ordered[tuple(slice(None) if c in kept else None for c in result)].expand(site.shape)

        labels = spread(v.merge_along(values.coordinates, summed, site.order))
        factors = None if values.factors is None else spread(values.factors.sum(summed) if summed else values.factors)
        out = Vector(labels, fresh_instances(labels), factors=factors)
        sizes = [size if c in coefficients else 1 for c, size in zip(result, site.shape, strict=True)]
        keys = torch.arange(int(np.prod(sizes))).view(sizes).expand(site.shape)
        a.split(out, keys, site.because("heads have attention weights of their own"))
        a.values.append((site, labels))
        return replace(out, factors=out.times(keys + (site.order << 32)))

    def convolution(site: Site, x: Value, w: Value, bias: Value = None, *args: Value, **kwargs: Value) -> Value:
        """A dense one over pixels or sound, which nothing rotates, writes vectors: one per place."""
        groups = kwargs.get("groups", args[3] if len(args) > 3 else 1)
        if (
            not isinstance(x, (Known, Unknown))
            or not isinstance(w, Param)
            or w.views
            or groups != 1
            or not isinstance(bias, (Param, type(None)))
        ):
            return a.end(site, [x, w, bias], NO_ROTATION)
        rows = a.families.axis(w, 0, "row", site.because("it is a weight"), stacked=False)
        if bias is not None:
            labels = a.families.leaf(bias, 0, site.because("it is a bias"))
            if labels is None or bias.views:
                return a.end(site, [w, bias], NO_ROTATION)
            rows = v.merge(rows, labels, site.order)
        rows = rows.view(-1, *(1,) * CONVOLUTIONS[site.operator]).expand(site.shape)
        return Vector(rows, fresh_instances(rows))

    return {
        "embedding": embedding,
        "embedding_bag": embedding_bag,
        "linear": linear,
        "matmul": matmul,
        "mm": matmul,
        "bmm": matmul,
        "addmm": addmm,
        "einsum": einsum,
        "scaled_dot_product_attention": attention,
        "_grouped_mm": grouped,
        "transformers::grouped_mm_fallback": grouped,
        **dict.fromkeys(CONVOLUTIONS, convolution),
    }
