"""Products that add over channels: linears, and products of two activations."""

from __future__ import annotations

from dataclasses import replace
from string import ascii_lowercase

import torch
from torch import Tensor

from autoquant.analyzer.axes import Param
from autoquant.analyzer.interpreter import Constant, Dynamic, Site, Value
from autoquant.analyzer.rotation_notes import Product
from autoquant.analyzer.rotation_state import (
    Beside,
    RotationAnalysis,
    Vector,
    apart,
    apply,
    fresh_instances,
    varies,
)
from autoquant.analyzer.rotation_state import shape_of as vector_shape
from autoquant.analyzer.rules.attention import rotate_summed_over_tokens, scale_cancel, scale_states, weights_of
from autoquant.analyzer.rules.contractions import (
    read_apart,
    rotate_contraction,
    rotate_read,
    rotate_weighted,
    scale_contraction,
    use,
)
from autoquant.analyzer.rules.registry import rotation_rule, scale_rule
from autoquant.analyzer.rules.sentences import (
    product_with_weight,
    written_by_weight,
)
from autoquant.analyzer.scale_state import ScaleAnalysis, shape_of
from autoquant.aten import (
    NO_ROTATION,
)


@scale_rule("linear", says=product_with_weight)
def scale_linear(a: ScaleAnalysis, site: Site, x: Value, w: Value, bias: Value = None) -> Value:
    return (
        scale_product(a, site, x, w, 1, bias)
        if isinstance(w, Param)
        else scale_activations(a, site, x, swapped(a, site, w), bias)
    )


@rotation_rule("linear", says=written_by_weight)
def rotate_linear(a: RotationAnalysis, site: Site, x: Value, w: Value, bias: Value = None) -> Value:
    return rotate_product(a, site, x, w, 1, bias)


@scale_rule("matmul mm bmm", says=product_with_weight, without="dtype")
def scale_matmul(a: ScaleAnalysis, site: Site, x: Value, y: Value) -> Value:
    terms = matmul_terms(site, shape_of(x), y)
    if terms is not None:
        return scale_contraction(a, site, x, y, *terms)
    if isinstance(y, Param) and len(y.shape) >= 2:
        return scale_product(a, site, x, y, len(y.shape) - 2)
    if isinstance(x, Param) and len(x.shape) == 2 and isinstance(y, Tensor) and y.ndim >= 2:
        return scale_product_from_left(a, site, x, y)
    terms = matmul_terms(site, shape_of(y), x, from_left=True)
    if terms is not None and isinstance(x, Param):
        return scale_contraction(a, site, y, x, *terms)
    return scale_activations(a, site, x, y)


@rotation_rule("matmul mm bmm", says=written_by_weight, without="dtype")
def rotate_matmul(a: RotationAnalysis, site: Site, x: Value, y: Value) -> Value:
    terms = matmul_terms(site, vector_shape(x), y)
    if terms is not None:
        return rotate_contraction(a, site, x, y, *terms)
    if isinstance(y, Param):
        return rotate_product(a, site, x, y, len(y.shape) - 2)
    if isinstance(x, Param) and len(x.shape) == 2 and isinstance(y, Vector):
        return rotate_product_from_left(a, site, x, y)
    terms = matmul_terms(site, vector_shape(y), x, from_left=True)
    if terms is not None and isinstance(x, Param):
        return rotate_contraction(a, site, y, x, *terms)
    if isinstance(y, Vector) and isinstance(x, (Dynamic, Constant)):
        return rotate_summed_over_tokens(a, site, y)
    if isinstance(x, Vector) and isinstance(y, (Dynamic, Constant)) and lies_before_tokens(x, vector_shape(y)):
        batch = ascii_lowercase[: x.coordinates.ndim - 2]
        own = batch[len(batch) + 2 - len(vector_shape(y)) :]
        return rotate_weighted(a, site, x, f"{batch}yz", f"{own}zx", f"{batch}yx")
    if isinstance(x, Vector) and weights_of(site, y, [-2]):
        a.end(site, [x], "it is a product of two activations")
        return rotate_summed_over_tokens(a, site, y)
    return a.end(site, [x, y], "it is a product of two activations")


def lies_before_tokens(x: Vector, other: tuple[int, ...]) -> bool:
    """True if tokens lie along a vector's last axis, channels along the one before: a product from the right adds whole
    vectors, as where attention is computed on images [B, C, T]. ``other``: the shape of what is multiplied from there.
    """
    shape = tuple(x.coordinates.shape)
    alike = 2 <= len(other) <= len(shape) and other[:-1] == (*shape[len(shape) - len(other) : -2], shape[-1])
    return alike and not apart(x.coordinates, -1) and varies(x.coordinates, -2)


def matmul_terms(site: Site, x: tuple[int, ...], w: Value, *, from_left: bool = False) -> tuple[str, str, str] | None:
    """``x @ w`` as an einsum, where a stack of weights ``w`` is broadcast to ``x``, or ``x`` to it; else None.

    ``from_left``: ``w @ x``, whether or not ``x`` is broadcast to a stack.
    """
    if not isinstance(w, Param) or len(w.shape) < 3 or len(x) < 2:
        return None
    lead = site.shape[:-2]
    if not from_left and x[:-2] == lead == w.shape[:-2]:
        return None
    if from_left and not w.key and 1 in w.shape[:-2]:  # one sequence looks like a stack of one
        return None
    batch = ascii_lowercase[: len(lead)]
    x_term = "".join(
        c if size == full else c.upper()
        for c, size, full in zip(batch[len(lead) - len(x) + 2 :], x[:-2], lead[len(lead) - len(x) + 2 :], strict=True)
    )
    w_term = batch[len(lead) - len(w.shape) + 2 :]
    if w.shape[:-2] != lead[len(lead) - len(w.shape) + 2 :]:
        return None
    if from_left:
        return f"{x_term}zy", f"{w_term}xz", f"{batch}xy"
    return f"{x_term}yz", f"{w_term}zx", f"{batch}yx"


@scale_rule("addmm", says=product_with_weight, without="dtype")
def scale_addmm(a: ScaleAnalysis, site: Site, bias: Value, x: Value, w: Value, **kwargs: Value) -> Value:
    if kwargs.get("beta", 1) != 1 or kwargs.get("alpha", 1) != 1:
        return a.block(site, [bias, x, w], "the product is blended with a bias")
    return scale_product(a, site, x, w, 0, bias) if isinstance(w, Param) else scale_activations(a, site, x, w, bias)


@rotation_rule("addmm", says=written_by_weight, without="dtype")
def rotate_addmm(a: RotationAnalysis, site: Site, bias: Value, x: Value, w: Value, **kwargs: Value) -> Value:
    if isinstance(x, Vector) and x.gain is not None and x.gain.bias is not None and set(kwargs.values()) - {1}:
        return a.end(site, [x, w, bias], f"{x.gain.bias} cannot be folded into a bias that is multiplied")
    return rotate_product(a, site, x, w, 0, bias)


@scale_rule("baddbmm", says=product_with_weight, without="dtype")
def scale_baddbmm(a: ScaleAnalysis, site: Site, bias: Value, x: Value, y: Value, **kwargs: Value) -> Value:
    """``beta * bias + alpha * x @ y``: numbers change no scale, and both terms have the same."""
    return a.variables.merge(scale_matmul(a, site, x, y), a.labels(site, bias), site.order)


def scale_product(a: ScaleAnalysis, site: Site, x: Value, w: Value, contracted: int, bias: Value = None) -> Value:
    """``x @ w`` with a parameter ``w``; ``contracted`` is the dimension of ``w`` that is summed over."""
    if isinstance(x, Param) and site.operator == "linear":
        x = a.labels(site, x)  # learned tokens: what a linear is given is no weight
    if not isinstance(x, (Tensor, Constant, Dynamic)) or not isinstance(w, Param):
        return a.block(site, [x, w, bias], "both factors are parameters")
    output = len(w.shape) - 1 if contracted == len(w.shape) - 2 else len(w.shape) - 2
    found = a.axes.factors(w, contracted, output, site.because("it is a weight"))
    if found is None:
        return a.block(site, [x, w, bias], "rows and columns of the weight are mixed by a reshape")
    columns, rows = found.columns, found.rows
    labels = a.labels(site, x)
    keyed = w.key and len(w.shape) == 3
    if not keyed:
        a.mixed(labels)
    batch = columns.ndim - 1
    if batch and labels.ndim != len(w.shape):
        return a.block(site, [x, w, bias], "a stack of weights is broadcast")
    summed = [labels.ndim - 2] if batch else range(labels.ndim - 1)
    labels = a.variables.merge_along(labels, summed, site.order)
    a.variables.equal(columns, labels, site.order, ratio=-1.0)
    if found.matrix:
        a.uses.append(use(site, w, bias, found, labels))
    rows = rows.unsqueeze(-2).expand(site.shape) if batch else rows.expand(site.shape)
    if bias is not None:
        return a.variables.merge(rows, a.labels(site, bias), site.order)
    return rows


def scale_product_from_left(a: ScaleAnalysis, site: Site, w: Param, x: Tensor) -> Value:
    """``w @ x``: the columns of ``w`` are summed with the rows of ``x``."""
    found = a.axes.factors(w, 1, 0, site.because("it is a weight"))
    if found is None:
        return a.block(site, [w, x], "rows and columns of the weight are mixed by a reshape")
    a.mixed(x)
    labels = a.variables.merge_along(x, [d for d in range(x.ndim) if d != x.ndim - 2], site.order)
    a.variables.equal(found.columns, labels, site.order, ratio=-1.0)
    a.uses.append(use(site, w, None, found, labels))
    return found.rows.unsqueeze(-1).expand(site.shape)


def scale_activations(a: ScaleAnalysis, site: Site, x: Value, y: Value, bias: Value = None) -> Value:
    """A product of two activations: scales along the sum must cancel, unless one side has none."""
    left, right = a.labels(site, x), a.labels(site, y)
    a.mixed(left)
    a.mixed(right)
    reason = site.because(sentence_of_product(site))
    if left.ndim < 2 or right.ndim < 2:
        return a.block(site, [x, y, bias], "it is a product with a vector")
    if a.variables.all_fixed(left):
        out = a.variables.merge_along(right, [right.ndim - 2], site.order, keepdim=True).expand(site.shape)
    elif a.variables.all_fixed(right):
        out = a.variables.merge_along(left, [left.ndim - 1], site.order, keepdim=True).expand(site.shape)
    else:
        batch = ascii_lowercase[: len(site.shape) - 2]
        terms = [batch[len(batch) + 2 - side.ndim :] + own for side, own in ((left, "yz"), (right, "zx"))]
        stored = scale_states(a, site, (left, right), terms, f"{batch}yx")
        if stored is None:
            scale_cancel(a, site, left, right.transpose(-1, -2))
        out = a.fixed(site.shape, reason) if stored is None else stored
    return out if bias is None else a.variables.merge(out, a.labels(site, bias), site.order)


def rotate_product(
    a: RotationAnalysis, site: Site, x: Value, w: Value, contracted: int, bias: Value = None, key: int = 0
) -> Value:
    if not isinstance(w, Param) or len(w.shape) < 2:
        return a.end(site, [x, w, bias], sentence_of_product(site))
    x = a.as_vector(site, x) if site.operator == "linear" else x
    ndim = len(w.shape)
    output = ndim - 1 if contracted == ndim - 2 else ndim - 2
    weight = replace(w, key=key or w.key)
    found = a.axes.factors(weight, contracted, output, site.because("it is a weight"))
    if found is None:
        return a.end(site, [x, w, bias], "rows and columns of the weight are mixed by a reshape")
    columns, rows = (found.columns[0], found.rows[0]) if key else (found.columns, found.rows)
    vector = isinstance(bias, Param) and len(bias.full_shape) == 1
    beside = vector and _lies_beside(a, bias, w, found.row_dim, rows)
    if isinstance(x, Vector):
        if not key and found.rows.ndim > 1:
            read_apart(a, site, x, range(x.coordinates.ndim - 2))
        rotate_read(a, site, x, columns, found, w.name, bias if beside or not vector else None)
    elif isinstance(x, Beside):
        at = 0
        for part in x.parts:
            taken = columns.narrow(-1, at, part.coordinates.shape[-1])
            rotate_read(a, site, part, taken, found, w.name, bias if beside or not vector else None, in_part=True)
            at += taken.shape[-1]
    else:
        a.variables.fix(columns, site.because("it also reads what is not rotated"))
        a.end(site, [x], NO_ROTATION)
    rows = rows.unsqueeze(-2).expand(site.shape) if rows.ndim > 1 else rows.expand(site.shape)
    if isinstance(bias, Param) and beside:
        labels = a.axes.leaf(bias, 0, site.because("it is a bias"))
        rows = a.variables.merge(rows, labels, site.order) if labels is not None else rows
    elif bias is not None:
        rows_vector = Vector(rows, fresh_instances(rows))
        return a.end(site, [rows_vector, bias], "a tensor that is not rotated is added")
    out = Vector(rows, fresh_instances(rows))
    if not weight.key and len(w.full_shape) == 2 and (bias is None or not bias.views):
        a.products[site.node] = Product(w.name, found.row_dim, None if bias is None else bias.name)
    if not key and found.rows.ndim > 1:  # a matrix for each part of the input: its rows read that part alone
        lead = found.rows.shape[:-1]
        keys = torch.arange(lead.numel()).view(*lead, 1, 1).expand(site.shape)
        a.split(out, keys, site.because("its channels are made of different vectors"))
    return out


def _lies_beside(a: RotationAnalysis, bias: Param, w: Param, dim: int, rows: Tensor) -> bool:
    """True if a bias is whole, or the part of one that belongs to the rows: packed queries, keys and values."""
    if not bias.views:
        return True
    place = a.axes.place(w.name, dim, rows)
    return place is not None and torch.equal(place, bias.replay(torch.arange(bias.full_shape[0])))


def sentence_of_product(site: Site) -> str:
    """What a product is whose second factor is no parameter: what a linear multiplies by is a weight all the same."""
    if site.operator in ("linear", "addmm"):
        return "it is multiplied by a computed weight"
    return "it is a product of two activations"


def rotate_product_from_left(a: RotationAnalysis, site: Site, w: Param, x: Vector) -> Value:
    """``w @ x``: the columns of ``w`` are summed with the rows of ``x``."""
    found = a.axes.factors(w, 1, 0, site.because("it is a weight"))
    if found is None:
        return a.end(site, [w, x], "rows and columns of the weight are mixed by a reshape")
    rotate_read(a, site, apply(x, lambda labels: labels.transpose(-1, -2)), found.columns, found, w.name, None)
    rows = found.rows.unsqueeze(-1).expand(site.shape)
    return Vector(rows, fresh_instances(rows))


def swapped(a: ScaleAnalysis, site: Site, value: Value) -> Tensor:
    """Labels of a matrix, the other way round."""
    return a.labels(site, value).transpose(-1, -2)
