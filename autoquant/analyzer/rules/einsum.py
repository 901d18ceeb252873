"""Products written as an einsum."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from autoquant.analyzer.axes import Param
from autoquant.analyzer.interpreter import Constant, Dynamic, Site, Value
from autoquant.analyzer.rotation_state import (
    RotationAnalysis,
    Vector,
    fresh_instances,
    varies,
)
from autoquant.analyzer.rotation_state import shape_of as vector_shape
from autoquant.analyzer.rules.products import use
from autoquant.analyzer.rules.registry import rotation_rule, scale_rule
from autoquant.analyzer.rules.sentences import (
    product_with_weight,
    written_by_weight,
)
from autoquant.analyzer.scale_state import ScaleAnalysis, shape_of
from autoquant.aten import (
    NO_RULE,
    einsum_letters,
)


@scale_rule("einsum", says=product_with_weight, without="sublist")
def scale_einsum(a: ScaleAnalysis, site: Site, equation: str, operands: Value, **kwargs: Value) -> Value:
    """A weight and an activation, or two activations of which one has no scale: the other's labels come out."""
    found = einsum_letters(equation, [shape_of(operand) for operand in operands])
    weights = [isinstance(operand, Param) for operand in operands]
    if found is None or len(operands) != 2 or all(weights):
        return a.block(site, list(operands), NO_RULE)
    letters, result = found
    if any(weights):
        w = weights.index(True)
        return scale_contraction(a, site, operands[1 - w], operands[w], letters[1 - w], letters[w], result)
    labels = [a.labels(site, operand) for operand in operands]
    for side in labels:
        a.mixed(side)
    free = [not a.variables.all_fixed(side) for side in labels]
    if all(free):
        return a.block(site, list(operands), "it is a product of two activations")
    chosen = 1 if free[1] else 0
    term = letters[chosen]
    merged = a.variables.merge_along(labels[chosen], [d for d, c in enumerate(term) if c not in result], site.order)
    return spread(merged, "".join(c for c in term if c in result), result).expand(site.shape)


@rotation_rule("einsum", says=written_by_weight, without="sublist")
def rotate_einsum(a: RotationAnalysis, site: Site, equation: str, operands: Value, **kwargs: Value) -> Value:
    """Attention or a mixture of streams: a sum of vectors with coefficients."""
    found = einsum_letters(equation, [vector_shape(operand) for operand in operands])
    vectors = [isinstance(operand, Vector) for operand in operands]
    others = [isinstance(operand, (Constant, Dynamic)) for operand in operands]
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

    labels = spread(a.variables.merge_along(values.coordinates, summed, site.order))
    factors = None if values.factors is None else spread(values.factors.sum(summed) if summed else values.factors)
    out = Vector(labels, fresh_instances(labels), factors=factors)
    sizes = [size if c in coefficients else 1 for c, size in zip(result, site.shape, strict=True)]
    keys = torch.arange(int(np.prod(sizes))).view(sizes).expand(site.shape)
    a.split(out, keys, site.because("heads have attention weights of their own"))
    a.values.append((site, labels))
    return replace(out, factors=out.times(keys + (site.order << 32)))


def scale_contraction(a: ScaleAnalysis, site: Site, x: Value, w: Param, x_term: str, w_term: str, result: str) -> Value:
    """``einsum(f'{x_term},{w_term}->{result}', x, w)`` with one letter summed, and one that only the weight has."""
    summed = [c for c in w_term if c in x_term and c not in result]
    rows = [c for c in w_term if c in result and c not in x_term]
    lost = [c for c in w_term if c not in x_term + result]
    if len(summed) != 1 or len(rows) != 1 or lost or not isinstance(x, (Tensor, Constant, Dynamic)):
        return a.block(site, [x, w], "it is a product with a weight that is no matrix")
    found = a.axes.factors(w, w_term.index(summed[0]), w_term.index(rows[0]), site.because("it is a weight"))
    if found is None:
        return a.block(site, [x, w], "rows and columns of the weight are mixed by a reshape")
    labels = a.labels(site, x)
    a.mixed(labels)
    shared = [c for c in w_term if c in x_term]
    merged = a.variables.merge_along(labels, [d for d, c in enumerate(x_term) if c not in shared], site.order)
    column_term = "".join(c for c in w_term if c != rows[0])
    seen = spread(merged, "".join(c for c in x_term if c in shared), column_term)
    a.variables.equal(found.columns, seen, site.order, ratio=-1.0)
    a.uses.append(use(site, w, None, found, seen.movedim(column_term.index(summed[0]), -1)))
    return spread(found.rows, "".join(c for c in w_term if c != summed[0]), result).expand(site.shape)


def spread(labels: Tensor, term: str, result: str) -> Tensor:
    """Dimensions named by ``term`` in the order of ``result``, of size 1 where ``term`` has none."""
    ordered = labels.permute([term.index(c) for c in result if c in term])
    return ordered[tuple(slice(None) if c in term else None for c in result)]
