"""Products written as an einsum."""

from __future__ import annotations

from collections.abc import Sequence
from string import ascii_letters

from torch import Tensor

from autoquant.analyzer.axes import Param
from autoquant.analyzer.interpreter import Constant, Dynamic, Site, Value
from autoquant.analyzer.rotation_state import (
    RotationAnalysis,
    Vector,
)
from autoquant.analyzer.rotation_state import shape_of as vector_shape
from autoquant.analyzer.rules.attention import scale_cancel, scale_states, weights_of
from autoquant.analyzer.rules.contractions import (
    combined,
    rotate_contraction,
    rotate_weighted,
    scale_contraction,
    spread,
)
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
    """A weight and an activation, or activations of which one has a scale: its labels come out."""
    found = einsum_letters(equation, [shape_of(operand) for operand in operands])
    weights = [n for n, operand in enumerate(operands) if isinstance(operand, Param)]
    if found is None or len(weights) > 1 or len(weights) == len(operands):
        return a.block(site, list(operands), NO_RULE)
    terms, result = found
    rest = [n for n in range(len(operands)) if n not in weights]
    labels = [a.labels(site, operands[n]) for n in rest]
    free = [n for n, side in zip(rest, labels, strict=True) if not a.variables.all_fixed(side)]
    if len(free) == len(operands) == 2 and not weights:
        return scale_cancelling(a, site, labels, terms, result)
    if len(free) > 1:
        return a.block(site, list(operands), "it is a product of two activations")
    if weights and len(operands) == 2:
        return scale_contraction(
            a, site, operands[rest[0]], operands[weights[0]], terms[rest[0]], terms[weights[0]], result
        )
    chosen, *others = free or rest[:1], *(n for n in rest if n not in (free or rest[:1]))
    x, term = a.labels(site, operands[chosen[0]]), terms[chosen[0]]
    for n in others:
        union = term + "".join(c for c in terms[n] if c not in term)
        sizes = dict(zip(term + terms[n], (*x.shape, *shape_of(operands[n])), strict=True))
        x, term = spread(x, term, union).expand(tuple(sizes[c] for c in union)), union
    if weights:
        return scale_contraction(a, site, x, operands[weights[0]], term, terms[weights[0]], result)
    a.mixed(x)
    merged = a.variables.merge_along(x, [d for d, c in enumerate(term) if c not in result], site.order)
    return spread(merged, "".join(c for c in term if c in result), result).expand(site.shape)


def scale_cancelling(
    a: ScaleAnalysis, site: Site, labels: Sequence[Tensor], terms: Sequence[str], result: str
) -> Value:
    """Queries meet keys: along what is summed, their scales must cancel."""
    for side in labels:
        a.mixed(side)
    stored = scale_states(a, site, labels, terms, result)
    if stored is not None:
        return stored
    (x, y), (left, right) = labels, terms
    summed = [c for c in left if c in right and c not in result]
    if len(summed) != 1 or any(c not in right + result for c in left) or any(c not in left + result for c in right):
        a.variables.fix(x, site.because("it is a product of two activations"))
        a.variables.fix(y, site.because("it is a product of two activations"))
        return a.fixed(site.shape, site.because("it is a product of two activations"))
    both = [c for c in left if c in right and c in result]
    own = [[c for c in term if c not in (*both, *summed)] for term in terms]
    sides = [
        spread(side, term, "".join((*both, *tokens, *summed))).flatten(len(both), len(both) + len(tokens) - 1)
        if tokens
        else spread(side, term, "".join((*both, *summed))).unsqueeze(-2)
        for side, term, tokens in zip((x, y), terms, own, strict=True)
    ]
    scale_cancel(a, site, *sides)
    return a.fixed(site.shape, site.because("it is a product of two activations"))


def dot_equation(x: Sequence[int], y: Sequence[int], dims: Sequence[int], other: Sequence[int]) -> str:
    """``tensordot`` as an einsum: ``dims`` of a tensor of shape ``x``, ``other`` of one of shape ``y`` are summed."""
    left = list(ascii_letters[: len(x)])
    right = list(ascii_letters[len(x) : len(x) + len(y)])
    for one, two in zip(dims, other, strict=True):
        right[two % len(y)] = left[one % len(x)]
    result = [c for c in (*left, *right) if (c in left) != (c in right)]
    return f"{''.join(left)},{''.join(right)}->{''.join(result)}"


@scale_rule("tensordot", says=product_with_weight)
def scale_dot(
    a: ScaleAnalysis, site: Site, x: Value, y: Value, dims: Sequence[int], other: Sequence[int], **kwargs: Value
) -> Value:
    return scale_einsum(a, site, dot_equation(shape_of(x), shape_of(y), dims, other), [x, y])


@rotation_rule("tensordot", says=written_by_weight)
def rotate_dot(
    a: RotationAnalysis, site: Site, x: Value, y: Value, dims: Sequence[int], other: Sequence[int], **kwargs: Value
) -> Value:
    return rotate_einsum(a, site, dot_equation(vector_shape(x), vector_shape(y), dims, other), [x, y])


@scale_rule("inner", says=product_with_weight)
def scale_inner(a: ScaleAnalysis, site: Site, x: Value, y: Value) -> Value:
    """``x @ y.mT``, for tensors of any number of dimensions."""
    return scale_dot(a, site, x, y, [-1], [-1])


@rotation_rule("inner", says=written_by_weight)
def rotate_inner(a: RotationAnalysis, site: Site, x: Value, y: Value) -> Value:
    return rotate_dot(a, site, x, y, [-1], [-1])


@rotation_rule("einsum", says=written_by_weight, without="sublist")
def rotate_einsum(a: RotationAnalysis, site: Site, equation: str, operands: Value, **kwargs: Value) -> Value:
    """A product with a weight; or attention, a mixture of streams: a sum of vectors with coefficients."""
    found = einsum_letters(equation, [vector_shape(operand) for operand in operands])
    if found is None:
        return a.end(site, list(operands), "it is a product of two activations")
    result = found[1]
    operands, letters = combined(a, site, operands, found[0], result)
    vectors = [n for n, operand in enumerate(operands) if isinstance(operand, Vector)]
    weights = [n for n, operand in enumerate(operands) if isinstance(operand, Param)]
    others = [n for n, operand in enumerate(operands) if isinstance(operand, (Constant, Dynamic))]
    if len(operands) == 2 and len(weights) == 1:
        w, x = weights[0], 1 - weights[0]
        return rotate_contraction(a, site, operands[x], operands[w], letters[x], letters[w], result)
    if len(vectors) == 1 and len(operands) == 1 + len(others) <= 2:
        coefficients = letters[others[0]] if others else ""
        return rotate_weighted(a, site, operands[vectors[0]], letters[vectors[0]], coefficients, result)
    for n in vectors if len(vectors) == len(operands) == 2 else ():
        term, coefficients = letters[n], letters[1 - n]
        summed = [d for d, c in enumerate(term) if c not in result]
        if term[-1] == result[-1] and term[-1] not in coefficients and weights_of(site, operands[n], summed):
            a.end(site, [operands[1 - n]], "it is a product of two activations")
            return rotate_weighted(a, site, operands[n], term, coefficients, result)
    return a.end(site, list(operands), "it is a product of two activations")
