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

from autoquant.analyzer.axes import Param
from autoquant.analyzer.interpreter import Known, Rule, Site, Unknown, Value
from autoquant.analyzer.rotation_products import rotation_products
from autoquant.analyzer.rotation_state import (
    Gain,
    Mean,
    RotationAnalysis,
    Square,
    Vector,
    anew,
    broadcast,
    coordinates_of,
    fresh_instances,
    mixed,
    seen_along,
    shape_of,
    varies,
    whole_rows,
)
from autoquant.analyzer.scale_state import scalar
from autoquant.aten import CASTS, LINEAR, NO_ROTATION, PRODUCTS, operator_name
from autoquant.config.format import Norm

LAYER_NORM_EPS = 1e-5
"""aten::layer_norm's default, which a graph may leave out."""


def rules(a: RotationAnalysis) -> dict[str, Rule]:
    """The rotation rule of every operator that is not data movement; any other operator ends a space."""
    v = a.variables

    def passes(site: Site, x: Value, *args: Value, **kwargs: Value) -> Value:
        if not isinstance(x, (Vector, Square, Mean, Gain)):
            return a.end(site, [x], NO_ROTATION)
        if not site.outputs[0].is_floating_point():
            return a.end(site, [x], "it is rounded")
        return anew(x) if isinstance(x, Vector) and site.operator not in CASTS else x

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
            return anew(replace(x, table=None, centred=True))
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
        a.arrange(site, x.coordinates.expand(site.shape), y.coordinates.expand(site.shape))
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
                and not param.views
                and param.shape == tuple(vector.coordinates.shape[-1:])
                and vector.gain_index is not None
            ):
                bias_of(vector.gain.weight, param, site)
                return replace(vector, gain=vector.gain.model_copy(update={"bias": param.name}))
            return a.end(site, [vector, param], "a parameter is added")
        labels = a.written_by(site, param)
        if labels is None:
            return a.end(site, [vector, param], "a parameter is added")
        vector = broadcast(vector, site.shape)
        a.arrange(site, vector.coordinates, labels.expand(site.shape))
        merged = v.merge(vector.coordinates, labels, site.order)
        return anew(replace(vector, coordinates=merged, table=None, centred=False))

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
        if site.operator == "div" and vector is not x:
            return a.end(site, [x, y], "it is divided by")
        if isinstance(factor, Param) and int(np.prod(factor.full_shape)) == 1 and len(factor.shape) <= len(site.shape):
            return number(site, vector, factor)
        if isinstance(factor, (Param, Gain)):
            return gained(site, vector, factor if isinstance(factor, Gain) else Gain(factor, 0))
        return scaled(site, vector, factor)

    def scaled(site: Site, vector: Vector, factor: Value) -> Value:
        if scalar(factor) is not None or (isinstance(factor, Unknown) and len(factor.shape) == 0):
            if vector.gain is not None and vector.gain.bias is not None:
                return a.end(site, [vector], "a norm's bias is scaled")
            return anew(replace(vector, table=None))  # a norm's epsilon is not scaled with the table
        shape = shape_of(factor)
        if vector.gain is not None and vector.gain.bias is not None:
            return a.end(site, [vector], "a norm's bias is scaled")
        if tuple(vector.coordinates.shape) != site.shape:  # several copies, each with factors of its own
            if vector.coordinates.shape[-1:] != site.shape[-1:]:
                return a.end(site, [vector], "it is broadcast")
            vector = broadcast(vector, site.shape)
        keys = torch.arange(int(np.prod(shape))).view(shape).expand(site.shape)
        a.split(vector, keys, site.because("its channels are multiplied by different factors"))
        return anew(replace(vector, table=None, factors=vector.times(keys + (site.order << 32))))

    def number(site: Site, vector: Vector, param: Param) -> Value:
        """One number that is a parameter: what is multiplied by it is rotated all the same."""
        a.families.other_use(param, site.because("it is a number"), "a number")
        return scaled(site, vector, Unknown((), site.outputs[0].dtype))

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
            return a.end(site, [x, *args], "it is raised to a power")  # the exponent may be a vector too
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

    def variance(
        site: Site, x: Value, dim: Value = None, unbiased: Value = True, keepdim: Value = False, **kwargs: Value
    ) -> Value:
        """The length of what is left after the mean is subtracted."""
        dims = [dim] if isinstance(dim, int) and not isinstance(dim, bool) else dim
        if not isinstance(x, Vector) or x.gain is not None or not isinstance(dims, (list, tuple)):
            return a.end(site, [x], "its channels are summed")
        if [d % x.coordinates.ndim for d in dims] != [x.coordinates.ndim - 1]:
            return a.end(site, [x], "its channels are summed")
        centred(site, x, [x.coordinates.ndim - 1])
        unknown = a.unknown(site)
        return (unknown[0], Mean(x)) if site.operator == "var_mean" and keepdim else unknown

    def measured(site: Site, vector: Vector, dims: Sequence[int], text: str, centre: bool = False) -> Value:
        shape = [1 if d in dims else s for d, s in enumerate(vector.coordinates.shape)]
        keys = torch.arange(int(np.prod(shape))).view(shape).expand(vector.coordinates.shape)
        keys = keys if vector.factors is None else mixed(keys, vector.factors)
        a.split(vector, keys, site.because(text), centre=centre, length=not (centre or vector.centred))
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
        elif eps is None:
            eps = LAYER_NORM_EPS
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
        folds = (
            x.table is not None
            and None not in (weight, eps)
            and params[0].name == f"{site.at}.weight"  # a module of its own, which can become the identity
            and folds_into_table(site, x.table)
        )
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
            return anew(replace(x, table=None))
        if layer:
            centred(site, x, [x.coordinates.ndim - 1])
        else:
            measured(site, x, [x.coordinates.ndim - 1], "its length is taken over part of its channels")
        if weight is None and bias is None:
            return anew(replace(x, table=None, centred=layer))
        index = torch.arange(x.coordinates.shape[-1]).expand(x.coordinates.shape)
        return Vector(x.coordinates, x.instances, found, index, factors=x.factors)

    def folds_into_table(site: Site, table: str) -> bool:
        """Is it the only use of the table's only lookup, and does more than linears depend on it?"""
        others = (user for user in site.node.users if operator_name(user) not in PRODUCTS)
        return a.lookups[table] == 1 and table not in a.folded and _read_nowhere_else(site.node.args[0]) and any(others)

    def index_add(site: Site, x: Value, dim: int, index: Value, source: Value, **kwargs: Value) -> Value:
        """Whole vectors are added to any of the rows."""
        empty = isinstance(x, Known) and not bool(x.value.any())
        into = x if isinstance(x, Vector) else None
        if (
            not (empty or into)
            or not isinstance(source, Vector)
            or source.gain is not None
            or (into is not None and (into.gain is not None or varies(into.coordinates, dim)))
            or varies(source.coordinates, dim)
            or kwargs.get("alpha", 1) != 1
        ):
            return a.end(site, [x, source], "it is added to something else")
        dim %= source.coordinates.ndim
        labels = v.merge_along(source.coordinates, [dim], site.order, keepdim=True).expand(site.shape)
        if into is not None:
            labels = v.merge(into.coordinates, labels, site.order)
        factors = seen_along(source, [dim], True, site.shape)
        if into is not None and into.factors is not None:
            factors = into.factors if factors is None else mixed(into.factors, factors)
        return Vector(labels, fresh_instances(labels), factors=factors)

    def masked(site: Site, x: Value, mask: Value, value: Value) -> Value:
        if isinstance(x, Vector) and scalar(value) == 0.0 and isinstance(mask, (Known, Unknown)):
            return scaled(site, x, mask)
        return a.end(site, [x, mask, value], "it is masked")

    def where(site: Site, condition: Value, x: Value, y: Value) -> Value:
        """``c x + (1 - c) y`` with ``c`` 0 or 1."""
        if not isinstance(condition, (Known, Unknown)) or isinstance(x, Param) or isinstance(y, Param):
            return a.end(site, [condition, x, y], "it is masked")
        sides = [scaled(site, side, condition) if isinstance(side, Vector) else side for side in (x, y)]
        return add(site, *sides)

    def masked_scatter(site: Site, x: Value, mask: Value, source: Value) -> Value:
        """Some whole vectors of ``x`` are replaced, in order, by those of ``source`` (pictures among words)."""
        if (
            not isinstance(x, Vector)
            or not isinstance(source, Vector)
            or not whole_rows(site.node.args[1], mask)
            or x.gain is not None
            or source.gain is not None
            or source.coordinates.shape[-1] != x.coordinates.shape[-1]
        ):
            return a.end(site, [x, mask, source], "it is masked")
        a.arrange(site, x.coordinates, source.coordinates)
        row = v.merge_along(source.coordinates, range(source.coordinates.ndim - 1), site.order)
        labels = v.merge(x.coordinates, row, site.order)
        factors = seen_along(source, range(source.coordinates.ndim - 1), False, tuple(row.shape))
        if factors is not None or x.factors is not None:
            none = torch.zeros(1, dtype=torch.int64)
            parts = [none if part is None else part for part in (x.factors, factors)]
            factors = mixed(parts[0], parts[1]).expand(site.shape)
        return Vector(labels, fresh_instances(labels), factors=factors)

    table: dict[str, Rule] = rotation_products(a)
    for names, rule in (
        (LINEAR, passes),
        (("add", "sub"), add),
        (("mul", "div"), multiply),
        (("pow", "square"), squared),
        (("mean", "sum"), reduce),
        (("var", "std", "var_mean"), variance),
        (("linalg_vector_norm",), length),
        (("layer_norm", "rms_norm"), norm),
        (("index_add",), index_add),
        (("masked_fill",), masked),
        (("masked_scatter",), masked_scatter),
        (("where",), where),
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
