"""Sums, products and powers, element by element."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, fx

from autoquant.analyzer.axes import Param
from autoquant.analyzer.interpreter import Dynamic, Site, Value
from autoquant.analyzer.rotation_state import (
    Beside,
    Gain,
    Mean,
    RotationAnalysis,
    Square,
    Vector,
    anew,
    broadcast,
    coordinates_of,
    is_nothing,
    mixed,
    varies,
)
from autoquant.analyzer.rotation_state import shape_of as vector_shape
from autoquant.analyzer.rules.gains import folded_before, rotate_gained
from autoquant.analyzer.rules.registry import rotation_rule, scale_rule
from autoquant.analyzer.rules.sentences import (
    LENGTH,
    origin,
    params_text,
)
from autoquant.analyzer.scale_state import ScaleAnalysis, scalar
from autoquant.analyzer.variables import ZERO
from autoquant.aten import (
    NO_ROTATION,
    base_name,
    operator_name,
)
from autoquant.config.format import Norm, edited


def sum_sentence(node: fx.Node, carriers: Collection[fx.Node], params: Collection[Param]) -> str:
    """What ``scale_add`` does at a node."""
    if operator_name(node) == "add" and params and not carriers:
        return f"1 + {params_text(params)}, a norm's gain: each element of it can take a scale"
    return "adds a parameter: it takes the same scale" if params else "sum: both sides carry the same scale"


def product_sentence(node: fx.Node, carriers: Collection[fx.Node], params: Collection[Param]) -> str:
    """What ``scale_multiply`` and ``scale_divide`` do at a node."""
    word = "product" if operator_name(node) == "mul" else "quotient"
    if params and not carriers:
        return f"multiplies by {params_text(params)}: each element of it can take a scale"
    others = [argument for argument in node.all_input_nodes if argument not in carriers]
    if others:
        return f"{word}: the scale of one side passes, the other ({origin(others[0])}) has scale 1"
    if len(carriers) > 1:
        return f"{word}: the scales of both sides combine"
    return f"{word} with a constant: passes a scale"


def factor_sentence(node: fx.Node, carriers: Collection[fx.Node], params: Collection[Param]) -> str:
    """What ``rotate_multiply`` does at a node."""
    if params:
        return f"multiplies by {params_text(params)}, which is folded into every reader"
    return "scales the vector by one number, which a rotation does not mind"


@scale_rule("add sub rsub", says=sum_sentence)
def scale_add(a: ScaleAnalysis, site: Site, x: Value, y: Value, *args: Value, **kwargs: Value) -> Value:
    alpha = kwargs.get("alpha", args[0] if args else 1)
    if alpha == 0:
        return a.labels(site, y if site.operator == "rsub" else x).expand(site.shape)
    for one, other in ((x, y), (y, x)):
        number = scalar(other)
        if number == 0.0:
            return a.labels(site, one).expand(site.shape)
        if number == 1.0 and alpha == 1 and isinstance(one, Param) and site.operator == "add":
            return a.labels(site, one, offset=1).expand(site.shape)
        if number is not None and isinstance(one, (Tensor, Param)):
            normalises = any(base_name(user) in ("rsqrt", "sqrt", "pow", "reciprocal") for user in site.node.users)
            return a.block(site, [one], "it is normalised" if normalises else "a constant is added")
    left, right = a.labels(site, x), a.labels(site, y)
    a.meet(site, left, right)
    return a.variables.merge(left, right, site.order)


@rotation_rule("add sub", says="sum: both sides are rotated alike")
def rotate_sum(a: RotationAnalysis, site: Site, x: Value, y: Value, *args: Value, **kwargs: Value) -> Value:
    """A gain that waits goes into the linear that it follows, where it can (LayerScale)."""
    sides = [folded_before(a, site, node, side) for node, side in zip(site.node.args, (x, y), strict=False)]
    return rotate_add(a, site, *sides, *args, **kwargs)


def rotate_add(a: RotationAnalysis, site: Site, x: Value, y: Value, *args: Value, **kwargs: Value) -> Value:
    if kwargs.get("alpha", args[0] if args else 1) != 1:
        return a.end(site, [x, y], "it is added with a factor")
    for one, other in ((x, y), (y, x)):
        number = scalar(other)
        if (
            (number == 0.0 or is_nothing(other))
            and isinstance(one, (Vector, Square))
            and site.shape == tuple(coordinates_of(one).shape)
        ):
            return one
        if number == 1.0 and isinstance(one, Param) and site.operator == "add":
            return Gain(one, 1)
    if site.operator == "sub" and isinstance(x, Vector) and isinstance(y, Mean) and x.coordinates is y.of.coordinates:
        return anew(replace(x, table=None, centred=True))
    if isinstance(x, Param) or isinstance(y, Param):
        vector, param = (x, y) if isinstance(y, Param) else (y, x)
        return rotate_added_parameter(a, site, vector, param)
    if not isinstance(x, Vector) or not isinstance(y, Vector):
        return a.end(site, [x, y], "a tensor that is not rotated is added")
    waiting = _gain_of_both(x, y)
    if waiting is None:
        first = x.gain or y.gain
        name = first.weight if first else None
        return a.end(site, [x, y], f"{name} is applied to it before it is added: it cannot be folded into a linear")
    coordinates = a.variables.merge(x.coordinates, y.coordinates, site.order)
    a.arrange(site, x.coordinates.expand(site.shape), y.coordinates.expand(site.shape))
    one, other = torch.broadcast_tensors(x.instances, y.instances)
    pairs = (one * (int(other.max()) + 1) + other).reshape(-1)  # whatever tokens meet, meet in one instance
    instances = torch.unique(pairs, return_inverse=True)[1].view(site.shape)
    if x.factors is None and y.factors is None:
        return Vector(coordinates, instances, *waiting)
    none = torch.zeros(1, dtype=torch.int64)
    factors = mixed(*(none if side.factors is None else side.factors for side in (x, y)))
    return Vector(coordinates, instances, *waiting, factors=factors.expand(site.shape))


def _gain_of_both(x: Vector, y: Vector) -> tuple[Norm | None, Tensor | None] | None:
    """The gain that waits behind both, channel by channel, which multiplies their sum as well, and the places of its
    channels; without a gain none. None where each has one of its own.
    """
    if x.gain is None and y.gain is None:
        return None, None
    if x.gain is None or x.gain != y.gain or x.gain.bias is not None or x.gain_index is None or y.gain_index is None:
        return None
    index = torch.where(x.coordinates == ZERO, y.gain_index, x.gain_index)
    same = (index == y.gain_index) | (y.coordinates == ZERO)
    return (x.gain, index) if bool(same.all()) else None


@rotation_rule("lerp", says="blends two tensors: both are rotated alike")
def rotate_lerp(a: RotationAnalysis, site: Site, x: Value, y: Value, weight: Value) -> Value:
    """``x + weight * (y - x)``, with one weight for all channels."""
    if not isinstance(x, Vector) or not isinstance(y, Vector) or isinstance(weight, (Vector, Square, Mean, Param)):
        return a.end(site, [x, y, weight], "a tensor that is not rotated is blended in")
    return rotate_add(a, site, *(rotate_scaled(a, site, one, weight) for one in (x, y)))


def rotate_added_parameter(a: RotationAnalysis, site: Site, vector: Value, param: Param) -> Value:
    """A bias or a table of positions: it writes into the space too."""
    if not isinstance(vector, Vector) or not param.shape:
        return a.end(site, [vector, param], "a parameter is added")
    if vector.gain is not None:
        if (
            vector.gain.bias is None
            and not param.views
            and param.shape == tuple(vector.coordinates.shape[-1:])
            and vector.gain_index is not None
            and a.gain_sizes.get(vector.gain.weight or "", param.shape[-1]) == param.shape[-1]
            and site.operator == "add"
        ):
            rotate_bias_of(a, vector.gain.weight, param, site)
            return replace(vector, gain=edited(vector.gain, bias=param.name))
        return a.end(site, [vector, param], "a parameter is added")
    labels = a.written_by(site, param)
    if labels is None:
        return a.end(site, [vector, param], "a parameter is added")
    vector = broadcast(vector, site.shape)
    a.arrange(site, vector.coordinates, labels.expand(site.shape))
    merged = a.variables.merge(vector.coordinates, labels, site.order)
    return anew(replace(vector, coordinates=merged, table=None, centred=False))


def rotate_bias_of(a: RotationAnalysis, norm: str | None, bias: Param, site: Site) -> None:
    """One bias of two norms could be folded into the readers of neither: it is gone after the first."""
    a.axes.other_use(bias, site.because("it is a norm's bias"), f"the bias of {norm or 'a norm'}")


@scale_rule("mul", says=product_sentence)
def scale_multiply(a: ScaleAnalysis, site: Site, x: Value, y: Value, **kwargs: Value) -> Value:
    left, right = a.labels(site, x), a.labels(site, y)
    a.meet(site, left, right)
    return a.variables.product(left, right, site.order, stored=left.shape != right.shape)


@scale_rule("div", says=product_sentence)
def scale_divide(a: ScaleAnalysis, site: Site, x: Value, y: Value, **kwargs: Value) -> Value:
    if kwargs.get("rounding_mode") is not None:
        return a.block(site, [x, y], "it is rounded")
    left, right = a.labels(site, x), a.labels(site, y)
    a.meet(site, left, right)
    return a.variables.product(left, a.variables.power(right, -1.0, site.order), site.order)


@rotation_rule("mul div", says=factor_sentence)
def rotate_multiply(a: RotationAnalysis, site: Site, x: Value, y: Value, **kwargs: Value) -> Value:
    if kwargs.get("rounding_mode") is not None:
        return a.end(site, [x, y], "it is rounded")
    if isinstance(x, Vector) and isinstance(y, Vector):
        if x.coordinates is y.coordinates or (
            x.gain is None
            and y.gain is None
            and torch.equal(x.coordinates, y.coordinates)
            and torch.equal(x.instances, y.instances)
        ):
            return rotate_squared(a, site, x)
        for one, other, node in ((x, y, site.node.args[1]), (y, x, site.node.args[0])):
            if site.operator == "mul" and other.coordinates.shape[-1:] == (1,) and varies(one.coordinates, -1):
                # Numbers that are made of another vector, each for a whole one: a gate per head, the keys of a state.
                a.end(site, [other], "it is multiplied by another activation")
                return rotate_scaled(a, site, one, unexpanded(node, Dynamic(vector_shape(other), torch.float32)))
        return a.end(site, [x, y], "it is multiplied by another activation")
    vector, factor = (y, x) if isinstance(y, (Vector, Square, Mean)) else (x, y)
    if isinstance(factor, (Vector, Square, Mean, Beside)):
        return a.end(site, [x, y], "it is multiplied by another activation")
    if isinstance(vector, Square):
        return vector if scalar(factor) is not None else a.end(site, [vector, factor], "it is multiplied")
    if isinstance(vector, Mean):  # only the mean itself centres what it is subtracted from
        return vector if scalar(factor) == 1.0 else a.end(site, [vector, factor], "a mean is multiplied")
    if not isinstance(vector, Vector):
        return a.end(site, [x, y], NO_ROTATION)
    if site.operator == "div" and vector is not x:
        return a.end(site, [x, y], "it is divided by")
    number = isinstance(factor, Param) and len(factor.shape) <= len(site.shape) and factor.shape[-1:] in ((), (1,))
    if number and not _along_channels(vector, factor.shape):
        return rotate_number(a, site, vector, factor)
    if isinstance(factor, (Param, Gain)):
        return rotate_gained(a, site, vector, factor if isinstance(factor, Gain) else Gain(factor, 0))
    return rotate_scaled(a, site, vector, unexpanded(site.node.args[1 if vector is x else 0], factor))


def _along_channels(vector: Vector, shape: Sequence[int]) -> bool:
    """True if numbers of ``shape`` are as many as there are channels, and differ along all axes on which these lie."""
    sizes = (1,) * (vector.coordinates.ndim - len(shape)) + tuple(shape)
    along = [size > 1 for d, size in enumerate(sizes) if varies(vector.coordinates, d)]
    return any(along) and all(along) and int(np.prod(shape)) == len(torch.unique(vector.coordinates))


def rotate_scaled(a: RotationAnalysis, site: Site, vector: Vector, factor: Value) -> Value:
    if scalar(factor) is not None or (isinstance(factor, Dynamic) and len(factor.shape) == 0):
        if vector.gain is not None and vector.gain.bias is not None:
            return a.end(site, [vector], "a norm's bias is scaled")
        return anew(replace(vector, table=None))  # a norm's epsilon is not scaled with the table
    shape = vector_shape(factor)
    if vector.gain is not None and vector.gain.bias is not None:
        return a.end(site, [vector], "a norm's bias is scaled")
    if tuple(vector.coordinates.shape) != site.shape:  # several copies, each with factors of its own
        if vector.coordinates.shape[-1:] != site.shape[-1:]:
            return a.end(site, [vector], "it is broadcast")
        vector = broadcast(vector, site.shape)
    keys = torch.arange(int(np.prod(shape))).view(shape).expand(site.shape)
    a.split(vector, keys, site.because("its channels are multiplied by different factors"))
    return anew(replace(vector, table=None, factors=vector.times(keys + (site.order << 32))))


def unexpanded(node: object, factor: Value) -> Value:
    """A factor as it was before it was repeated along axes of size 1: ``F.normalize`` expands what it divides by."""
    if not isinstance(factor, Dynamic):
        return factor
    shape = factor.shape
    while isinstance(node, fx.Node) and operator_name(node) in REPEATED and isinstance(node.args[0], fx.Node):
        node = node.args[0]
        if len(_shape(node)) != len(shape):
            break
        shape = _shape(node)
    return Dynamic(shape, factor.dtype)


REPEATED = frozenset(["expand", "expand_as", "broadcast_to"])


def _shape(node: fx.Node) -> tuple[int, ...]:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def rotate_number(a: RotationAnalysis, site: Site, vector: Vector, param: Param) -> Value:
    """Numbers that are a parameter, one for all channels: what is multiplied by them is rotated all the same."""
    a.axes.other_use(param, site.because("it is a number"), "a number")
    return rotate_scaled(a, site, vector, Dynamic(param.shape, site.outputs[0].dtype))


@scale_rule("addcmul addcdiv", says="sum with a product: what is added carries the scale of the product")
def scale_add_product(a: ScaleAnalysis, site: Site, x: Value, y: Value, z: Value, *, value: Value = 1) -> Value:
    """``x + value * y * z``, or ``y / z``."""
    start, left, right = a.labels(site, x), a.labels(site, y), a.labels(site, z)
    a.meet(site, start, left, right)
    if site.operator == "addcdiv":
        right = a.variables.power(right, -1.0, site.order)
    return a.variables.merge(start, a.variables.product(left, right, site.order), site.order).expand(site.shape)


@scale_rule("lerp", says="blends two tensors: both carry the same scale, their share has scale 1")
def scale_lerp(a: ScaleAnalysis, site: Site, x: Value, y: Value, weight: Value) -> Value:
    """``x + weight * (y - x)``."""
    left, right, share = a.labels(site, x), a.labels(site, y), a.labels(site, weight)
    a.meet(site, left, right, share)
    a.variables.fix(share, site.because("it is the share of two tensors that are blended"))
    return a.variables.merge(left, right, site.order).expand(site.shape)


@scale_rule("pow float_power", says="a power: the scale is raised to it")
def scale_pow_(a: ScaleAnalysis, site: Site, x: Value, exponent: Value) -> Value:
    number = scalar(exponent)
    if number is None or number == 0:
        return a.block(site, [x, exponent], "it is raised to a power that is not a constant")
    return a.variables.power(a.labels(site, x), number, site.order)


POWERS = {"square": 2.0, "sqrt": 0.5, "rsqrt": -0.5, "reciprocal": -1.0}

_POWER_SAYS = {
    "square": "squares the scale",
    "sqrt": "takes the square root of the scale",
    "rsqrt": "puts one over the square root of the scale",
    "reciprocal": "puts one over the scale",
}


def power_sentence(node: fx.Node, carriers: Collection[fx.Node], params: Collection[Param]) -> str:
    """What ``scale_power`` does at a node."""
    return _POWER_SAYS[operator_name(node)]


@scale_rule(*POWERS, says=power_sentence)
def scale_power(a: ScaleAnalysis, site: Site, x: Value) -> Value:
    return a.variables.power(a.labels(site, x), POWERS[site.operator], site.order)


@rotation_rule("pow square", says=LENGTH)
def rotate_squared(a: RotationAnalysis, site: Site, x: Value, *args: Value) -> Value:
    if site.operator == "pow" and scalar(args[0]) != 2.0:
        return a.end(site, [x, *args], "it is raised to a power")  # the exponent may be a vector too
    if not isinstance(x, Vector) or x.gain is not None:
        return a.end(site, [x], "it is squared")
    return Square(x)
