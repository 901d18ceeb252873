"""Sums of products of an activation with a parameter that has any number of axes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from autoquant.analyzer.axes import Factors, Param
from autoquant.analyzer.interpreter import Constant, Dynamic, Site, Value
from autoquant.analyzer.rotation_notes import Read
from autoquant.analyzer.rotation_state import (
    RotationAnalysis,
    Vector,
    anew,
    apart,
    apply,
    fresh_instances,
    mixed,
    varies,
)
from autoquant.analyzer.rotation_state import shape_of as vector_shape
from autoquant.analyzer.rules.gains import behind_gain
from autoquant.analyzer.scale_state import ScaleAnalysis, Use
from autoquant.analyzer.variables import ZERO, Ints, Reason
from autoquant.aten import NO_ROTATION
from autoquant.config.format import Norm


def rotate_weighted(
    a: RotationAnalysis, site: Site, values: Vector, term: str, coefficients: str, result: str
) -> Value:
    """A sum of vectors with coefficients."""
    summed = [d for d, c in enumerate(term) if c not in result]
    kept = "".join(c for c in term if c in result)
    several = any(apart(values.coordinates, d) for d in summed)
    if several and (term[-1] not in result or values.gain is not None):
        return a.end(site, [values], "its channels are summed")

    def added(values: Vector) -> Vector:
        a.stay_apart(site, values)
        if several:
            keys = torch.arange(values.coordinates.numel()).view(values.coordinates.shape)
            for d, c in enumerate(term):
                keys = keys if c in coefficients else keys.narrow(d, 0, 1)
            keys = keys.expand(values.coordinates.shape)
            a.split(values, keys, site.because("its channels are multiplied by different factors"))
            values = a.added_along(site, replace(values, factors=values.times(keys)), summed)
        merged = a.variables.merge_along(values.coordinates, summed, site.order)
        labels = spread(merged, kept, result).expand(site.shape)
        factors = values.factors
        if factors is not None:
            factors = spread(factors.sum(summed) if summed else factors, kept, result).expand(site.shape)
        out = Vector(labels, fresh_instances(labels), factors=factors)
        sizes = [size if c in coefficients else 1 for c, size in zip(result, site.shape, strict=True)]
        keys = torch.arange(int(np.prod(sizes))).view(sizes).expand(site.shape)
        a.split(out, keys, site.because("heads have attention weights of their own"))
        a.values.append((site, labels))
        return replace(out, factors=out.times(keys + (site.order << 32)))

    def placed(index: Tensor) -> Tensor:
        return spread(index.squeeze(summed), kept, result).expand(site.shape)

    return behind_gain(a, site, values, summed, added, placed)


def scale_contraction(a: ScaleAnalysis, site: Site, x: Value, w: Param, x_term: str, w_term: str, result: str) -> Value:
    """``einsum(f'{x_term},{w_term}->{result}', x, w)``: a product with a weight, or with coefficients of streams."""
    letters = Letters(x_term, w_term, result)
    if letters.lost or not isinstance(x, (Tensor, Constant, Dynamic)):
        return a.block(site, [x, w], "it is a product with a weight that is no matrix")
    labels = a.labels(site, x)
    lead = len(w.shape) - len(w.full_shape) + 1  # of a stack from which the data chose: the axes of their choice
    a.mixed(labels[a.variables.tags(labels) != w.key] if w.key and letters.meets(lead) else labels)
    if letters.mixes(labels):
        a.mixed(labels)  # tokens of different experts are added
        a.axes.other_use(w, site.because("it is a number"), "a number")
        merged = a.variables.merge_along(labels, letters.dims(x_term, letters.only_x), site.order)
        return spread(merged, letters.without(x_term, letters.only_x), result).expand(site.shape)
    if not letters.summed:
        return a.block(site, [x, w], "it is a product with a weight that is no matrix")
    found = a.axes.contraction(w, letters.dims(w_term, letters.summed), letters.dims(w_term, letters.rows), here(site))
    if found is None:
        return a.block(site, [x, w], _elsewhere(w))
    merged = a.variables.merge_along(labels, [d for d, c in enumerate(x_term) if c not in w_term], site.order)
    seen = spread(merged, "".join(c for c in x_term if c in w_term), w_term)
    a.variables.equal(found.columns, seen, site.order, ratio=-1.0)
    order = [d for d, c in enumerate(w_term) if c not in letters.summed]
    read = seen.permute(*order, *letters.dims(w_term, letters.summed)).flatten(len(order))
    if found.matrix:
        a.uses.append(use(site, w, None, found, read))
    rows = a.variables.merge_along(found.rows, letters.dims(w_term, letters.summed), site.order)
    if not result.startswith(w_term[:lead]):
        a.mixed(rows)
    return spread(rows, letters.without(w_term, letters.summed), result).expand(site.shape)


def rotate_contraction(
    a: RotationAnalysis, site: Site, x: Value, w: Param, x_term: str, w_term: str, result: str
) -> Value:
    """A product with a weight, which reads the vectors that are summed, or coefficients of whole vectors."""
    letters = Letters(x_term, w_term, result)
    if isinstance(x, Vector) and letters.mixes(x.coordinates):
        a.axes.other_use(w, site.because("it is a number"), "a number")
        return rotate_weighted(a, site, x, x_term, w_term, result)
    contracted, kept = letters.dims(w_term, letters.summed), letters.dims(w_term, letters.rows)
    if letters.lost or not letters.summed:
        return a.end(site, [x, w], "it is a product with a weight that is no matrix")
    found = a.axes.contraction(w, contracted, kept, here(site))
    if found is None:
        return a.end(site, [x, w], _elsewhere(w))
    outer = [d for d in range(len(w_term)) if d not in contracted]
    sizes = [w.shape[d] if c in x_term else found.columns.shape[d] for d, c in enumerate(w_term)]
    columns = found.columns.expand(sizes).permute(*outer, *contracted).flatten(len(outer))
    if isinstance(x, Vector):
        order = [x_term.index(c) for c in x_term if c not in letters.summed]
        order += [x_term.index(w_term[d]) for d in contracted]
        own = [c for c in x_term if c not in letters.summed]
        flat = apply(x, lambda labels: labels.permute(order).flatten(len(own)))
        tokens = [d for d, c in enumerate(own) if c not in w_term]
        labels = a.variables.merge_along(flat.coordinates, tokens, site.order)
        lie = [w_term[d] for d in outer]
        labels = spread(labels, "".join(c for c in own if c in w_term) + "*", "".join(lie) + "*")
        read_apart(a, site, x, [x_term.index(w_term[d]) for d in outer if w_term[d] in x_term])
        rotate_read(a, site, flat, columns, found, w.name, None, labels=labels)
    else:
        a.variables.fix(columns, site.because("it also reads what is not rotated"))
        a.end(site, [x], NO_ROTATION)
    rows = a.variables.merge_along(found.rows, contracted, site.order)
    rows = spread(rows, letters.without(w_term, letters.summed), result).expand(site.shape)
    out = Vector(rows, fresh_instances(rows))
    parts = [size if c in w_term and c in x_term else 1 for c, size in zip(result, site.shape, strict=True)]
    if any(size > 1 for size in parts):  # a matrix for each part of the input: its rows read that part alone
        keys = torch.arange(int(np.prod(parts))).view(parts).expand(site.shape)
        a.split(out, keys, site.because("its channels are made of different vectors"))
    return out


def combined(
    a: RotationAnalysis, site: Site, operands: Sequence[Value], terms: Sequence[str], result: str
) -> tuple[list[Value], list[str]]:
    """The operands with the coefficients (what no rotation reaches) multiplied into the only vector among them."""
    vectors = [n for n, operand in enumerate(operands) if isinstance(operand, Vector)]
    factors = [n for n, operand in enumerate(operands) if isinstance(operand, (Constant, Dynamic))]
    if len(operands) > 2 and not vectors and len(factors) == len(operands) - 1:  # coefficients of a weight
        sizes = {c: s for n in factors for c, s in zip(terms[n], vector_shape(operands[n]), strict=True)}
        weight = next(n for n in range(len(operands)) if n not in factors)
        product = Dynamic(tuple(sizes.values()), site.outputs[0].dtype)
        return [operands[weight], product], [terms[weight], "".join(sizes)]
    if len(operands) < 3 or len(vectors) != 1:
        return list(operands), list(terms)
    vector, term = operands[vectors[0]], terms[vectors[0]]
    for n in factors:
        sizes = dict(zip(term + terms[n], (*vector.coordinates.shape, *vector_shape(operands[n])), strict=True))
        union = "".join(c for c in terms[n] if c not in term) + term  # the channels stay last
        shape = tuple(sizes[c] for c in union)

        def wide(labels: Tensor, term: str = term, union: str = union, shape: tuple[int, ...] = shape) -> Tensor:
            return spread(labels, term, union).expand(shape)

        vector = apply(vector, wide)
        parts = [sizes[c] if c in terms[n] else 1 for c in union]
        keys = torch.arange(int(np.prod(parts))).view(parts).expand(shape)
        a.split(vector, keys, site.because("its channels are multiplied by different factors"))
        vector = anew(replace(vector, table=None, factors=vector.times(keys + (site.order << 32) + n)))
        term = union
    rest = [n for n in range(len(operands)) if n not in (*vectors, *factors)]
    return [vector, *(operands[n] for n in rest)], [term, *(terms[n] for n in rest)]


def _elsewhere(w: Param) -> str:
    """Why a weight's columns and rows are not its last two dimensions."""
    if len(w.full_shape) == 2:
        return "rows and columns of the weight are mixed by a reshape"
    return f"what is read and what is written of the weight {list(w.full_shape)} are not its last two dimensions"


def here(site: Site) -> Reason:
    """Why a weight takes part."""
    return site.because("it is a weight")


@dataclass(frozen=True, slots=True)
class Letters:
    """The letters of a product of an activation with a parameter, by what becomes of them."""

    x: str
    w: str
    result: str

    @property
    def summed(self) -> str:
        """Those that both have and the result has not."""
        return "".join(c for c in self.w if c in self.x and c not in self.result)

    @property
    def rows(self) -> str:
        """Those that the parameter brings in."""
        return "".join(c for c in self.w if c not in self.x and c in self.result)

    @property
    def lost(self) -> str:
        """Those that the parameter alone has: it is summed before it is multiplied."""
        return "".join(c for c in self.w if c not in self.x and c not in self.result)

    @property
    def only_x(self) -> str:
        """Those of the activation that the result has not."""
        return "".join(c for c in self.x if c not in self.result)

    def mixes(self, labels: Tensor) -> bool:
        """True if the parameter holds coefficients: channels lie where it has no axis, along the last axis in doubt."""
        several = any(varies(labels, d) for d, c in enumerate(self.x) if c in self.result and c not in self.w)
        read = any(varies(labels, d) for d, c in enumerate(self.x) if c in self.summed)
        return several and (not read or self.x[-1] in self.result)

    def meets(self, lead: int) -> bool:
        """True if the rows that chose the experts are the first ones of both factors, in the same order."""
        return self.x.startswith(self.w[:lead])

    @staticmethod
    def dims(term: str, letters: str) -> list[int]:
        """Where some letters stand."""
        return [d for d, c in enumerate(term) if c in letters]

    @staticmethod
    def without(term: str, letters: str) -> str:
        """The other letters of a term."""
        return "".join(c for c in term if c not in letters)


def spread(labels: Tensor, term: str, result: str) -> Tensor:
    """Dimensions named by ``term`` in the order of ``result``, of size 1 where ``term`` has none."""
    ordered = labels.permute([term.index(c) for c in result if c in term])
    return ordered[tuple(slice(None) if c in term else None for c in result)]


def rotate_read(
    a: RotationAnalysis,
    site: Site,
    x: Vector,
    columns: Tensor,
    found: Factors,
    weight: str,
    bias: Value,
    labels: Tensor | None = None,
    *,
    in_part: bool = False,
) -> None:
    """The columns of a weight, ``[..., in]``, read vectors along their last axis; ``in_part``: some of its columns do.

    ``labels``: the coordinates that each row of ``columns`` reads; else those of all tokens, or of all that have one
    place along the axis before it.
    """
    if found.column_dim < 0:
        a.end(site, [x], f"what is read of {weight} lies along several of its dimensions")
        return
    many = [d for d in range(x.coordinates.ndim) if varies(x.coordinates, d)]
    if labels is None and columns.ndim == 1 and columns.shape[0] > 1 and many and x.coordinates.ndim - 1 not in many:
        text = "its tokens are read together, each channel by itself"
        a.end(site, [x], text)
        a.variables.fix(columns, site.because(text))
        return
    real = x.coordinates != ZERO
    one = torch.where(real, x.instances, x.instances.amax(-1, keepdim=True))
    if bool((one != one[..., :1]).any()):
        pattern = pattern_along_rows(x.instances, real)
        if pattern is None:
            text = "channels of different tokens are read together, and not the same ones for each token"
            a.end(site, [x], text)
            a.variables.fix(columns, site.because(text))  # other readings of the weight would rotate them
            return
        # Heads, or neighbours in time, side by side: copies of the channels, each of a vector of its own.
        rows = torch.arange(one[..., 0].numel()).view(*one.shape[:-1], 1).expand(one.shape)
        x = replace(x, instances=rows, factors=x.times(pattern.expand(one.shape)))
    if labels is None:
        summed = [x.coordinates.ndim - 2] if columns.ndim > 1 else range(x.coordinates.ndim - 1)
        labels = a.variables.merge_along(x.coordinates, list(summed), site.order)
    a.variables.equal(columns, labels, site.order)
    if x.gain is not None and x.gain_index is not None:
        channels = x.gain_index.shape[-1]
        size = a.gain_sizes.get(x.gain.weight or "", channels)
        placed = (x.gain_index == torch.arange(channels) % size) | (x.coordinates == ZERO)
        if channels < size:
            a.end(site, [x], f"{channels} of the {size} channels that {x.gain.weight} multiplies are read alone")
        elif channels % size or not bool(placed.all()):
            a.end(site, [x], "the norm's weight is rearranged before it is read")
    order = columns.argsort(-1)  # as they lie in the weight
    for lie in order.flatten(0, -2).unique(dim=0) if order.ndim > 1 else [order]:
        a.arrange(site, x.coordinates, order=lie)  # of each token: channels of two that are one may have other company
    if x.factors is not None and varies(x.factors, x.factors.ndim - 1):
        a.split(x, x.factors, site.because("channels of different vectors are read together"))
    if x.factors is not None:
        seen = mixed(x.instances, x.factors).flatten(0, -2).sum(0)
        reason = site.because("copies of its channels that saw different factors are read")
        a.split_columns(columns, seen, reason)
    name = bias.name if isinstance(bias, Param) else None
    bare = Norm(kind="layer", weight=None, bias=None, offset=0, eps=None) if x.centred else None
    a.reads.append(Read(site, weight, name, found.column_dim, x.gain or bare, columns=columns, in_part=in_part))


def read_apart(a: RotationAnalysis, site: Site, x: Vector, dims: Sequence[int]) -> None:
    """Along ``dims``, each part of ``x`` is read by a matrix of its own: channels of two parts cannot be mixed."""
    parts = [size if d in dims and varies(x.coordinates, d) else 1 for d, size in enumerate(x.coordinates.shape)]
    if any(size > 1 for size in parts):
        keys = torch.arange(int(np.prod(parts))).view(parts).expand(x.coordinates.shape)
        a.split(x, keys, site.because("parts of it are read by matrices of their own"))


def pattern_along_rows(instances: Tensor, real: Tensor) -> Tensor | None:
    """Which places of the last axis belong to one instance, a number for each; None where rows differ in that.

    ``real``: where there is a channel at all, and no 0.
    """
    rows, there = (part.reshape(-1, part.shape[-1]).numpy() for part in (instances, real))
    found = None
    for row in np.unique(rows[there.all(-1)], axis=0):
        pattern = _numbered(row)
        if found is not None and (found != pattern).any():
            return None
        found = pattern
    for row, here in zip(rows[~there.all(-1)], there[~there.all(-1)], strict=True):
        if found is None or (_numbered(row[here]) != _numbered(found[here])).any():
            return None
    return None if found is None else torch.from_numpy(found)


def _numbered(row: Ints) -> Ints:
    """Each entry as the place of the first one that is equal to it."""
    _, first, inverse = np.unique(row, return_index=True, return_inverse=True)
    return first[inverse]


def use(site: Site, w: Param, bias: Value, found: Factors, labels: Tensor) -> Use:
    """What is kept of a product: who reads which labels."""
    name = bias.name if isinstance(bias, Param) else None
    stack = int(torch.Size(w.full_shape[:-2]).numel()) if len(w.full_shape) > 2 else None
    sizes = w.full_shape[found.column_dim], w.full_shape[found.row_dim]
    return Use(site, w.name, name, found.column_dim, stack, *sizes, labels)
