"""How each operator carries rotations: the rotation column of the operator table.

A rotation mixes the coordinates of one instance (one token, or one head of one token), so

- what multiplies the elements of one instance must be the same number: coordinates that see other factors fall into
  other blocks (``split``),
- a sum over tokens keeps the coordinates and makes new instances,
- a norm reads the length of an instance, which a rotation of whole blocks keeps,
- a gain is carried along until a linear reads it; anything else that meets it ends the space,
- every other operator ends the space.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from autoquant.analyzer.families import Factors, Param
from autoquant.analyzer.interpret import Known, Rule, Site, Unknown, Value
from autoquant.analyzer.operators import NO_ROTATION, PRODUCTS, operator_name
from autoquant.analyzer.rotation_analysis import (
    Gain,
    Mean,
    Read,
    RotationAnalysis,
    Square,
    Vector,
    apply,
    coordinates_of,
    fresh_instances,
    mixed,
    shape_of,
    varies,
)
from autoquant.analyzer.scale_analysis import scalar
from autoquant.analyzer.variables import ZERO
from autoquant.config import Norm


def rules(a: RotationAnalysis) -> dict[str, Rule]:
    """The rotation rule of every operator that is not data movement; any other operator ends a space."""
    v = a.variables

    def passes(site: Site, x: Value, *args: Value, **kwargs: Value) -> Value:
        if not isinstance(x, (Vector, Square, Mean, Gain)):
            return a.end(site, [x], NO_ROTATION)
        return x if site.outputs[0].is_floating_point() else a.end(site, [x], "it is rounded")

    def add(site: Site, x: Value, y: Value, *args: Value, **kwargs: Value) -> Value:
        if kwargs.get("alpha", args[0] if args else 1) != 1:
            return a.end(site, [x, y], "it is added with a factor")
        for one, other in ((x, y), (y, x)):
            number = scalar(other)
            nothing = number == 0.0 or (isinstance(other, Known) and not bool(other.value.any()))
            if nothing and isinstance(one, (Vector, Square)) and site.shape == tuple(coordinates_of(one).shape):
                return one
            if number == 1.0 and isinstance(one, Param) and site.operator == "add":
                return Gain(one, 1)
        if (
            site.operator == "sub"
            and isinstance(x, Vector)
            and isinstance(y, Mean)
            and x.coordinates is y.of.coordinates
        ):
            return replace(x, table=None, centred=True)
        if isinstance(x, Param) or isinstance(y, Param):
            vector, param = (x, y) if isinstance(y, Param) else (y, x)
            return added_parameter(site, vector, param)
        if not isinstance(x, Vector) or not isinstance(y, Vector):
            return a.end(site, [x, y], "a tensor that is not rotated is added")
        if x.gain is not None or y.gain is not None:
            gain = x.gain or y.gain
            name = gain.weight if gain else None
            return a.end(site, [x, y], f"{name} is applied to it before it is added: it cannot be folded into a linear")
        coordinates = v.merge(x.coordinates, y.coordinates, site.order)
        one, other = torch.broadcast_tensors(x.instances, y.instances)
        pairs = (one * (int(other.max()) + 1) + other).reshape(-1)  # whatever tokens meet, meet in one instance
        instances = torch.unique(pairs, return_inverse=True)[1].view(site.shape)
        if x.factors is None and y.factors is None:
            return Vector(coordinates, instances)
        none = torch.zeros(1, dtype=torch.int64)
        factors = mixed(*(none if side.factors is None else side.factors for side in (x, y)))
        return Vector(coordinates, instances, factors=factors.expand(site.shape))

    def added_parameter(site: Site, vector: Value, param: Param) -> Value:
        """A bias or a table of positions: it writes into the space too."""
        if not isinstance(vector, Vector) or not param.shape:
            return a.end(site, [vector, param], "a parameter is added")
        if vector.gain is not None:
            if (
                vector.gain.bias is None
                and param.shape == param.full_shape
                and param.shape == tuple(vector.coordinates.shape[-1:])
                and vector.gain_index is not None
            ):
                bias_of(vector.gain.weight, param, site)
                return replace(vector, gain=vector.gain.model_copy(update={"bias": param.name}))
            return a.end(site, [vector, param], "a parameter is added")
        labels = a.families.leaf(param, 0, site.because("it is a parameter"))
        if labels is None or len([size for size in param.full_shape if size > 1]) > 1:
            return a.end(site, [vector, param], "a parameter is added")
        return Vector(v.merge(vector.coordinates, labels, site.order).expand(site.shape), vector.instances)

    def bias_of(norm: str | None, bias: Param, site: Site) -> None:
        """One bias of two norms could be folded into the readers of neither: it is gone after the first."""
        a.families.other_use(bias, site.because("it is a norm's bias"), f"the bias of {norm or 'a norm'}")

    def multiply(site: Site, x: Value, y: Value, **kwargs: Value) -> Value:
        if kwargs.get("rounding_mode") is not None:
            return a.end(site, [x, y], "it is rounded")
        if isinstance(x, Vector) and isinstance(y, Vector):
            if x.coordinates is y.coordinates or (
                x.gain is None
                and y.gain is None
                and torch.equal(x.coordinates, y.coordinates)
                and torch.equal(x.instances, y.instances)
            ):
                return squared(site, x)
            return a.end(site, [x, y], "it is multiplied by another activation")
        vector, factor = (y, x) if isinstance(y, (Vector, Square, Mean)) else (x, y)
        if isinstance(vector, (Square, Mean)):
            return vector if scalar(factor) is not None else a.end(site, [vector, factor], "it is multiplied")
        if not isinstance(vector, Vector):
            return a.end(site, [x, y], NO_ROTATION)
        if site.operator in ("div", "true_divide") and vector is not x:
            return a.end(site, [x, y], "it is divided by")
        if isinstance(factor, (Param, Gain)):
            return gained(site, vector, factor if isinstance(factor, Gain) else Gain(factor, 0))
        return scaled(site, vector, factor)

    def seen_along(vector: Vector, dims: Sequence[int], keepdim: bool, shape: tuple[int, ...]) -> Tensor | None:
        """What each channel of a sum over ``dims`` was multiplied by, anywhere along them."""
        return None if vector.factors is None else vector.factors.sum(list(dims), keepdim=keepdim).expand(shape)

    def scaled(site: Site, vector: Vector, factor: Value) -> Value:
        if scalar(factor) is not None:
            if vector.gain is not None and vector.gain.bias is not None:
                return a.end(site, [vector], "a norm's bias is scaled")
            return replace(vector, table=None)  # a norm's epsilon is not scaled with the table
        shape = shape_of(factor)
        if vector.gain is not None and vector.gain.bias is not None:
            return a.end(site, [vector], "a norm's bias is scaled")
        try:
            keys = torch.arange(int(np.prod(shape))).view(shape).expand(vector.coordinates.shape)
        except RuntimeError:
            return a.end(site, [vector], "it is broadcast")
        a.split(vector, keys, site.because("its channels are multiplied by different factors"))
        return replace(vector, table=None, factors=vector.times(keys + (site.order << 32)))

    def gained(site: Site, vector: Vector, gain: Gain) -> Value:
        """A norm weight: it waits for the linears that it can be folded into."""
        shape = gain.param.full_shape
        size = max(shape, default=1)
        if (
            vector.gain is not None
            or int(np.prod(shape)) != size
            or vector.coordinates.shape[-1] != size
            or site.operator != "mul"
        ):
            return a.end(site, [vector, gain], "it is multiplied by a parameter")
        a.families.other_use(gain.param, site.because("it is a gain"), f"gain{gain.offset}")
        index = gain.param.replay(torch.arange(size).view(shape))
        if index.shape[-1] != size:
            return a.end(site, [vector, gain], "it is multiplied by a parameter")
        index = index.expand(vector.coordinates.shape)
        norm = Norm(
            kind="layer" if vector.centred else "rms",
            weight=gain.param.name,
            bias=None,
            offset=1 if gain.offset else 0,
            eps=None,
        )
        return replace(vector, gain=norm, gain_index=index, table=None)

    def squared(site: Site, x: Value, *args: Value) -> Value:
        if site.operator == "pow" and scalar(args[0]) != 2.0:
            return a.end(site, [x], "it is raised to a power")
        if not isinstance(x, Vector) or x.gain is not None:
            return a.end(site, [x], "it is squared")
        return Square(x)

    def reduce(site: Site, x: Value, dim: Value = None, keepdim: Value = False, **kwargs: Value) -> Value:
        vector = x.of if isinstance(x, Square) else x
        if not isinstance(vector, Vector) or vector.gain is not None:
            return a.end(site, [x], "it is summed")
        ndim = vector.coordinates.ndim
        dims = [d % ndim for d in ([dim] if isinstance(dim, int) and not isinstance(dim, bool) else dim or range(ndim))]
        if isinstance(x, Square):
            return measured(site, vector, dims, "its length is taken over part of its channels")
        if not any(varies(vector.coordinates, d) for d in dims):
            coordinates = v.merge_along(vector.coordinates, dims, site.order, bool(keepdim))
            factors = seen_along(vector, dims, bool(keepdim), tuple(coordinates.shape))
            return Vector(coordinates, fresh_instances(coordinates), factors=factors)
        if site.operator == "mean" and keepdim and dims == [ndim - 1]:
            centred(site, vector, dims)
            return Mean(vector)
        return a.end(site, [x], "its channels are summed")

    def measured(site: Site, vector: Vector, dims: Sequence[int], text: str, centre: bool = False) -> Value:
        shape = [1 if d in dims else s for d, s in enumerate(vector.coordinates.shape)]
        keys = torch.arange(int(np.prod(shape))).view(shape).expand(vector.coordinates.shape)
        a.split(vector, keys, site.because(text), centre)
        return a.unknown(site)

    def centred(site: Site, vector: Vector, dims: Sequence[int]) -> None:
        measured(site, vector, dims, "the mean over part of its channels is subtracted", centre=True)

    def length(
        site: Site, x: Value, order: Value = 2, dim: Value = None, keepdim: Value = False, **kwargs: Value
    ) -> Value:
        if scalar(order) != 2.0 or not isinstance(x, Vector):
            return a.end(site, [x], "its norm is not the Euclidean one")
        return reduce(site, squared(site, x, 2), dim, keepdim)

    def norm(
        site: Site, x: Value, shape: Value, weight: Value = None, bias: Value = None, eps: Value = None, *args: Value
    ) -> Value:
        layer = site.operator == "layer_norm"
        if not layer:
            bias, eps = None, bias  # rms_norm has no bias
        if (
            not isinstance(x, Vector)
            or x.gain is not None
            or len(shape) != 1
            or not isinstance(weight, (Param, Gain, type(None)))
            or not isinstance(bias, (Param, type(None)))
        ):
            return a.end(site, [x, weight, bias], "it is normalised")
        gain = Gain(weight, 0) if isinstance(weight, Param) else weight
        params = [] if gain is None else [gain.param]
        if any(param.views for param in (*params, *([] if bias is None else [bias]))):
            return a.end(site, [x, weight, bias], "it is normalised with a weight that is rearranged")
        here = site.because("it belongs to a norm")
        folds = x.table is not None and None not in (weight, eps) and folds_into_table(site, x.table)
        owner = f" of {x.table}" if folds else ""
        if gain is not None:
            a.families.other_use(gain.param, here, f"gain{gain.offset}{owner}")
        if bias is not None:
            bias_of(f"{gain.param.name if gain is not None else None}{owner}", bias, site)
        found = Norm(
            kind="layer" if layer else "rms",
            weight=gain.param.name if gain is not None else None,
            bias=bias.name if bias is not None else None,
            offset=1 if gain is not None and gain.offset else 0,
            eps=eps,
        )
        if folds and x.table is not None:
            a.folded[x.table] = found  # of the token alone: the table can hold the result
            return replace(x, table=None)
        if layer:
            centred(site, x, [x.coordinates.ndim - 1])
        else:
            measured(site, x, [x.coordinates.ndim - 1], "its length is taken over part of its channels")
        if weight is None and bias is None:
            return replace(x, table=None, centred=layer)
        index = torch.arange(x.coordinates.shape[-1]).expand(x.coordinates.shape)
        return Vector(x.coordinates, x.instances, found, index)

    def folds_into_table(site: Site, table: str) -> bool:
        """Is it the only use of the table's only lookup, and does more than linears depend on it?"""
        others = (user for user in site.node.users if operator_name(user) not in PRODUCTS)
        return a.lookups[table] == 1 and table not in a.folded and _read_nowhere_else(site.node.args[0]) and any(others)

    def embedding(site: Site, table: Value, indices: Value, *args: Value, **kwargs: Value) -> Value:
        if not isinstance(table, Param) or table.views or len(table.full_shape) != 2:
            return a.end(site, [table, indices], "the table is computed")
        labels = a.families.axis(table, 1, "table", site.because("it is an embedding"), stacked=False).expand(
            site.shape
        )
        a.lookups[table.name] += 1
        return Vector(labels, fresh_instances(labels), table=table.name)

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
        return Vector(rows, fresh_instances(rows))

    def read(site: Site, x: Vector, columns: Tensor, found: Factors, weight: str, bias: Value) -> None:
        real = x.coordinates != ZERO
        one = torch.where(real, x.instances, x.instances.amax(-1, keepdim=True))
        if bool((one != one[..., :1]).any()):
            a.end(site, [x], "channels of different tokens are read together")
            return
        summed = [x.coordinates.ndim - 2] if columns.ndim > 1 else range(x.coordinates.ndim - 1)
        labels = v.merge_along(x.coordinates, list(summed), site.order)
        v.equal(columns, labels, site.order)
        if x.gain_index is not None and not bool((x.gain_index == torch.arange(x.gain_index.shape[-1])).all()):
            a.end(site, [x], "the norm's weight is rearranged before it is read")
        if x.factors is not None:
            seen = mixed(x.instances, x.factors).flatten(0, -2).sum(0)
            for copies in labels if labels.ndim > 1 else [labels]:
                a.split_copies(copies, seen, site.because("copies of its channels that saw different factors are read"))
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

    def index_add(site: Site, x: Value, dim: int, index: Value, source: Value, **kwargs: Value) -> Value:
        empty = isinstance(x, Known) and not bool(x.value.any())
        if not empty or not isinstance(source, Vector) or source.gain is not None or varies(source.coordinates, dim):
            return a.end(site, [x, source], "it is added to something else")
        labels = v.merge_along(source.coordinates, [dim % source.coordinates.ndim], site.order, keepdim=True).expand(
            site.shape
        )
        return Vector(labels, fresh_instances(labels))

    def masked(site: Site, x: Value, mask: Value, value: Value) -> Value:
        if isinstance(x, Vector) and scalar(value) == 0.0 and isinstance(mask, (Known, Unknown)):
            return scaled(site, x, mask)
        return a.end(site, [x, mask, value], "it is masked")

    table: dict[str, Rule] = {}
    for names, rule in (
        (("to", "_to_copy", "type_as", "float", "dropout", "neg", "_assert_tensor_metadata", "clone", "alias"), passes),
        (("add", "sub"), add),
        (("mul", "div", "true_divide"), multiply),
        (("pow", "square"), squared),
        (("mean", "sum"), reduce),
        (("linalg_vector_norm",), length),
        (("layer_norm", "rms_norm"), norm),
        (("embedding",), embedding),
        (("linear",), linear),
        (("matmul", "mm", "bmm"), matmul),
        (("addmm",), addmm),
        (("scaled_dot_product_attention",), attention),
        (("_grouped_mm", "transformers::grouped_mm_fallback"), grouped),
        (("index_add",), index_add),
        (("masked_fill",), masked),
    ):
        for name in names:
            table[name] = rule
    return table


def _read_nowhere_else(node: object) -> bool:
    """Does what the embedding looked up go here only, through any number of casts?"""
    while isinstance(node, torch.fx.Node) and len(node.users) == 1:
        if operator_name(node) == "embedding":
            return True
        node = node.args[0]
    return False
