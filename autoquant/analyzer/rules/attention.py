"""Attention: queries meet keys, and values are added up."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import reduce

import numpy as np
import torch
from torch import Tensor, fx

from autoquant.analyzer.axes import Param
from autoquant.analyzer.interpreter import Dynamic, Site, Value
from autoquant.analyzer.rotation_state import (
    RotationAnalysis,
    Vector,
    apart,
    apply,
    fresh_instances,
    seen_along,
    varies,
)
from autoquant.analyzer.rotation_state import shape_of as vector_shape
from autoquant.analyzer.rules.contractions import spread
from autoquant.analyzer.rules.gains import behind_gain
from autoquant.analyzer.rules.registry import rotation_rule, scale_rule
from autoquant.analyzer.scale_state import ScaleAnalysis, Scores, shape_of
from autoquant.aten import (
    ATTENTION,
    NO_ROTATION,
    PRODUCTS,
    operator_name,
)
from autoquant.library_patches import pytree


def attention_sentence(node: fx.Node, carriers: Collection[fx.Node], params: Collection[Param]) -> str:
    """What ``scale_attention`` does at a node."""
    if carriers and node.args[2] in carriers:
        return "attention: every head passes the scale of its values through"
    return "attention: queries meet keys, whose scales must cancel"


@scale_rule("scaled_dot_product_attention", says=attention_sentence)
def scale_attention(
    a: ScaleAnalysis, site: Site, q: Value, k: Value, value: Value, mask: Value = None, *args: Value, **kwargs: Value
) -> Value:
    """softmax(q k^T) v: q and k cancel, v's labels come out, repeated over the query heads."""
    queries, keys, values = (a.labels(site, x) for x in (q, k, value))
    for labels in (queries, keys, values):
        a.mixed(labels)
    if kwargs.get("enable_gqa", len(args) > 3 and args[3]):
        keys = keys.repeat_interleave(queries.shape[-3] // keys.shape[-3], -3)
        values = values.repeat_interleave(queries.shape[-3] // values.shape[-3], -3)
    if isinstance(mask, (Tensor, Param)):
        a.variables.fix(a.labels(site, mask), site.because("it is added to attention scores"))
    scale_cancel(a, site, queries, keys)
    return a.variables.merge_along(values, [values.ndim - 2], site.order, keepdim=True).expand(site.shape)


@rotation_rule(
    "scaled_dot_product_attention", says="attention: adds up the vectors of each head, a rotation per head passes"
)
def rotate_attention(
    a: RotationAnalysis, site: Site, q: Value, k: Value, value: Value, mask: Value = None, *args: Value, **kwargs: Value
) -> Value:
    a.end(site, [q, k, mask], "it enters attention scores")
    if not isinstance(value, Vector):
        return a.end(site, [value], NO_ROTATION)
    if kwargs.get("enable_gqa", len(args) > 3 and args[3]):
        repeats = site.shape[-3] // value.coordinates.shape[-3]
        value = apply(value, lambda labels: labels.repeat_interleave(repeats, -3))
    return rotate_summed_over_tokens(a, site, value)


@scale_rule("flex_attention", says=attention_sentence)
def scale_flex(a: ScaleAnalysis, site: Site, q: Value, k: Value, value: Value, *args: Value, **kwargs: Value) -> Value:
    """Attention whose scores are changed one by one, by code that may hold tensors of its own: these keep scale 1."""
    for held in pytree.tree_leaves((args, kwargs)):
        if isinstance(held, (Tensor, Param)):
            a.variables.fix(a.labels(site, held), site.because("it is used on attention scores"))
    grouped = shape_of(q)[-3] != shape_of(k)[-3]
    out = scale_attention(a, site, q, k, value, enable_gqa=grouped)
    return out, *(Dynamic(tuple(f.shape), f.dtype) for f in site.outputs[1:])


@rotation_rule("flex_attention", says="attention: adds up the vectors of each head, a rotation per head passes")
def rotate_flex(
    a: RotationAnalysis, site: Site, q: Value, k: Value, value: Value, *args: Value, **kwargs: Value
) -> Value:
    a.end(site, pytree.tree_leaves((args, kwargs)), "it is used on attention scores")
    out = rotate_attention(a, site, q, k, value, enable_gqa=vector_shape(q)[-3] != vector_shape(k)[-3])
    return out if isinstance(out, tuple) else (out, *a.unknown(site)[1:])


def scale_cancel(a: ScaleAnalysis, site: Site, queries: Tensor, keys: Tensor) -> None:
    """``sum_d q[.., t, d] k[.., s, d]`` is unchanged when k's scale is one over q's, channel by channel."""
    if is_attention(site.node):
        heads = queries.shape[-3] if queries.ndim > 2 else 1
        kv_heads = len(torch.unique(keys.transpose(0, -3).flatten(1), dim=0)) if keys.ndim > 2 else 1
        a.scores.append(Scores(site, heads, kv_heads, queries.shape[-1]))
    q = a.variables.merge_along(queries, [queries.ndim - 2], site.order)
    k = a.variables.merge_along(keys, [keys.ndim - 2], site.order)
    a.variables.equal(q, k, site.order, ratio=-1.0)
    a.cancelled.append(torch.unique(q))


def scale_states(a: ScaleAnalysis, site: Site, sides: Sequence[Tensor], terms: Sequence[str], result: str) -> Value:
    """A product of two activations that both may have scales and are no scores: ``k v``, which is stored, has both.

    Queries that read it cancel the scales of the keys, and leave those of the values. None for anything else.
    """
    summed = "".join(c for c in dict.fromkeys("".join(terms)) if c not in result)
    both = list(zip(sides, terms, strict=True))
    sizes = [max(n for side, term in both for n in (1, *_varying(side, term, c))) for c in result]
    if is_attention(site.node) or math.prod(sizes) > MAX_STORED:
        return None
    if not any(_varying(side, term, c) for side, term in both for c in summed):  # tokens are summed
        one, other = (_without(a, site, side, term, result) for side, term in both)
        return a.variables.product(one, other, site.order, stored=True).expand(site.shape)
    for (stored, term), (queries, own) in (both, both[::-1]):
        factors = _factors(a, stored)
        keys = [f for f in factors if any(_varying(f, term, c) for c in summed)]
        values = [f for f in factors if not any(_varying(f, term, c) for c in summed)]
        if not keys or not values:
            continue
        union = term + "".join(c for c in own if c not in term)
        met = spread(reduce(lambda x, y: a.variables.product(x, y, site.order), keys), term, union)
        a.variables.equal(spread(queries, own, union), met, site.order, ratio=-1.0)
        a.cancelled.append(torch.unique(queries))
        left = reduce(lambda x, y: a.variables.product(x, y, site.order), values)
        return _without(a, site, left, term, result).expand(site.shape)
    return None


def _varying(labels: Tensor, term: str, letter: str) -> tuple[int, ...]:
    """The size of the dimension that has a letter, if there is one and the labels change along it."""
    return tuple(labels.shape[d] for d, c in enumerate(term) if c == letter and varies(labels, d))


def _without(a: ScaleAnalysis, site: Site, labels: Tensor, term: str, result: str) -> Tensor:
    """Labels of a sum over the dimensions that ``result`` has not, in the order of the others there."""
    merged = a.variables.merge_along(labels, [d for d, c in enumerate(term) if c not in result], site.order)
    return spread(merged, "".join(c for c in term if c in result), result)


def _factors(a: ScaleAnalysis, labels: Tensor) -> list[Tensor]:
    """The labels of all that was multiplied."""
    found = a.variables.factors(labels)
    return [labels] if found is None else [factor for side in found for factor in _factors(a, side)]


MAX_STORED = 1 << 20
"""Most elements of a state whose scales are products of two."""


def rotate_summed_over_tokens(a: RotationAnalysis, site: Site, values: Vector) -> Value:
    """Sums of vectors with coefficients per position of the result: every axis but the last has its own."""
    dim = values.coordinates.ndim - 2
    if apart(values.coordinates, dim):
        if values.gain is not None or not varies(values.coordinates, -1):
            note_lost_values(a, site, values)
            return a.end(site, [values], "its channels are summed")
        # Tokens of several streams, each with values of its own: all are rotated alike.
        shape = (*values.coordinates.shape[:-1], 1)
        keys = torch.arange(math.prod(shape)).view(shape).expand(values.coordinates.shape)
        a.split(values, keys, site.because("its channels are multiplied by different factors"))
        values = a.added_along(site, replace(values, factors=values.times(keys)), [dim])

    def added(values: Vector) -> Vector:
        a.stay_apart(site, values)
        labels = a.variables.merge_along(values.coordinates, [dim], site.order, keepdim=True).expand(site.shape)
        # The heads of a token are read together, also where they all look at the same values.
        instances = fresh_instances(labels.narrow(-3, 0, 1) if labels.ndim > 3 else labels).expand(labels.shape)
        out = Vector(labels, instances, factors=seen_along(values, [dim], True, tuple(site.shape)))
        keys = torch.arange(int(np.prod(site.shape[:-1]))).view(*site.shape[:-1], 1).expand(site.shape)
        a.split(out, keys, site.because("heads have attention weights of their own"))
        a.values.append((site, labels))
        return replace(out, factors=out.times(keys + (site.order << 32)))

    return behind_gain(a, site, values, [dim], added, lambda index: index.expand(site.shape))


def weights_of(site: Site, values: Value, summed: Sequence[int]) -> bool:
    """True if ``values``, which another activation is multiplied with, are vectors along their last axis of which
    whole ones are added along ``summed``: what is stored under keys, or read by queries. Not the scores of attention.
    """
    if not isinstance(values, Vector) or values.coordinates.ndim < 2 or not varies(values.coordinates, -1):
        return False
    return not any(apart(values.coordinates, dim) for dim in summed) and not is_attention(site.node)


def is_attention(node: torch.fx.Node) -> bool:
    """True if the scores go through a softmax before anything else is multiplied by them."""
    queue, seen = [node], {node}
    while queue:
        found = queue.pop()
        if operator_name(found) in ATTENTION | {"softmax", "_softmax"}:
            return True
        users = [user for user in found.users if user not in seen and operator_name(user) not in PRODUCTS]
        seen.update(users)
        queue.extend(users[: MAX_STEPS - len(seen)])
    return False


def note_lost_values(a: RotationAnalysis, site: Site, values: Vector) -> None:
    """Values of attention that end here are said to be lost; of other sums nobody expects a rotation."""
    queue = list(site.node.all_input_nodes)
    for found in queue:
        if operator_name(found) in {"softmax", "_softmax"}:
            a.values.append((site, values.coordinates))
            return
        if operator_name(found) not in PRODUCTS and found.op == "call_function":
            queue += found.all_input_nodes[: MAX_STEPS - len(queue)]


MAX_STEPS = 64
"""How far a softmax is looked for."""
