"""Sums, extremes and lengths along dimensions, and over neighbours."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import torch
from torch import Tensor, fx

from autoquant.analyzer.axes import Param
from autoquant.analyzer.interpreter import Constant, Dynamic, Site, Value
from autoquant.analyzer.rotation_state import (
    Mean,
    RotationAnalysis,
    Square,
    Vector,
    apart,
    apply,
    fresh_instances,
    mixed,
    seen_along,
)
from autoquant.analyzer.rules.arithmetic import rotate_squared
from autoquant.analyzer.rules.choices import scale_larger
from autoquant.analyzer.rules.gains import behind_gain
from autoquant.analyzer.rules.registry import rotation_rule, scale_rule
from autoquant.analyzer.rules.sentences import (
    ADDS,
    LENGTH,
    PICKS,
)
from autoquant.analyzer.scale_state import ScaleAnalysis, scalar
from autoquant.aten import (
    POOLS,
    operator_name,
)

_ADDING = "sum nansum mean"
_PICKING = "amax amin max min"


@scale_rule(_ADDING, says=ADDS)
@scale_rule(_PICKING, says=PICKS)
def scale_reduce(
    a: ScaleAnalysis, site: Site, x: Value, dim: Value = None, keepdim: Value = False, **kwargs: Value
) -> Value:
    if isinstance(dim, (Tensor, Param, Constant, Dynamic)):  # max and min of two tensors
        return scale_larger(a, site, x, dim)
    return scale_with_positions(a, site, scale_along(a, site, x, dim, keepdim))


@rotation_rule("mean sum", says=LENGTH)
def rotate_reduce(
    a: RotationAnalysis, site: Site, x: Value, dim: Value = None, keepdim: Value = False, **kwargs: Value
) -> Value:
    vector = x.of if isinstance(x, Square) else x
    if not isinstance(vector, Vector):
        return a.end(site, [x], "it is summed")
    ndim = vector.coordinates.ndim
    dims = [d % ndim for d in ([dim] if isinstance(dim, int) and not isinstance(dim, bool) else dim or range(ndim))]
    if isinstance(x, Square):
        return rotate_measured(a, site, vector, dims, "its length is taken over part of its channels")
    if not any(apart(vector.coordinates, d) for d in dims):

        def added(vector: Vector) -> Vector:
            a.stay_apart(site, vector)
            coordinates = a.variables.merge_along(vector.coordinates, dims, site.order, bool(keepdim))
            factors = seen_along(vector, dims, bool(keepdim), tuple(coordinates.shape))
            return Vector(coordinates, fresh_instances(coordinates), factors=factors)

        return behind_gain(a, site, vector, dims, added, lambda index: index if keepdim else index.squeeze(dims))
    if vector.gain is not None:
        return a.end(site, [x], "it is summed")
    if site.operator == "mean" and keepdim and dims == [ndim - 1]:
        rotate_centred(a, site, vector, dims)
        return Mean(vector)
    if ndim - 1 not in dims:
        return squeezed(a.added_along(site, vector, dims), () if keepdim else dims)
    return a.end(site, [x], "its channels are summed")


def squeezed(vector: Vector, dims: Sequence[int]) -> Value:
    """Without axes of size 1."""
    return apply(vector, lambda labels: labels.squeeze(tuple(dims)))


def scale_along(a: ScaleAnalysis, site: Site, x: Value, dim: Value, keepdim: Value) -> Tensor:
    """Labels that agree along ``dim``: a number, a list, or all dimensions."""
    labels = a.labels(site, x)
    if isinstance(dim, bool) or dim is None or dim == []:
        dims = list(range(labels.ndim))
    else:
        dims = [d % max(labels.ndim, 1) for d in ([dim] if isinstance(dim, int) else dim)]
    if min(dims, default=a.lead) < a.lead:
        a.mixed(labels)
    return a.variables.merge_along(labels, dims, site.order, bool(keepdim))


def scale_with_positions(a: ScaleAnalysis, site: Site, values: Tensor) -> Value:
    """A maximum alone, or with its positions, which do not depend on a common scale."""
    if len(site.outputs) == 1:
        return values
    return values, Dynamic(tuple(site.outputs[1].shape), site.outputs[1].dtype)


def variance_sentence(node: fx.Node, carriers: Collection[fx.Node], params: Collection[Param]) -> str:
    """What ``scale_variance`` does at a node."""
    what = "passes it" if operator_name(node) == "std" else "squares it"
    return f"a spread: what it is taken of carries the same scale, and the result {what}"


@scale_rule("var std var_mean", says=variance_sentence)
def scale_variance(
    a: ScaleAnalysis,
    site: Site,
    x: Value,
    dim: Value = None,
    unbiased: Value = True,
    keepdim: Value = False,
    **kwargs: Value,
) -> Value:
    merged = scale_along(a, site, x, dim, keepdim)
    squared = merged if site.operator == "std" else a.variables.power(merged, 2.0, site.order)
    return (squared, merged) if site.operator == "var_mean" else squared


@rotation_rule("var std var_mean", says="takes the length of the centred vector, which a rotation keeps")
def rotate_variance(
    a: RotationAnalysis,
    site: Site,
    x: Value,
    dim: Value = None,
    unbiased: Value = True,
    keepdim: Value = False,
    **kwargs: Value,
) -> Value:
    """The length of what is left after the mean is subtracted."""
    dims = [dim] if isinstance(dim, int) and not isinstance(dim, bool) else dim
    if not isinstance(x, Vector) or x.gain is not None or not isinstance(dims, (list, tuple)):
        return a.end(site, [x], "its channels are summed")
    if [d % x.coordinates.ndim for d in dims] != [x.coordinates.ndim - 1]:
        return a.end(site, [x], "its channels are summed")
    rotate_centred(a, site, x, [x.coordinates.ndim - 1])
    unknown = a.unknown(site)
    return (unknown[0], Mean(x)) if site.operator == "var_mean" and keepdim else unknown


def rotate_measured(
    a: RotationAnalysis, site: Site, vector: Vector, dims: Sequence[int], text: str, centre: bool = False
) -> Value:
    shape = [1 if d in dims else s for d, s in enumerate(vector.coordinates.shape)]
    keys = torch.arange(int(np.prod(shape))).view(shape).expand(vector.coordinates.shape)
    keys = keys if vector.factors is None else mixed(keys, vector.factors)
    a.split(vector, keys, site.because(text), centre=centre, length=not (centre or vector.centred))
    return a.unknown(site)


def rotate_centred(a: RotationAnalysis, site: Site, vector: Vector, dims: Sequence[int]) -> None:
    rotate_measured(a, site, vector, dims, "the mean over part of its channels is subtracted", centre=True)


@scale_rule("linalg_vector_norm", says="a length: what it is taken of carries the same scale, and so does it")
def scale_length(
    a: ScaleAnalysis, site: Site, x: Value, order: Value = 2, dim: Value = None, keepdim: Value = False, **kwargs: Value
) -> Value:
    if order == 0:
        return a.block(site, [x], "its non-zero elements are counted")
    return scale_reduce(a, site, x, dim, keepdim)


@rotation_rule("linalg_vector_norm", says=LENGTH)
def rotate_length(
    a: RotationAnalysis,
    site: Site,
    x: Value,
    order: Value = 2,
    dim: Value = None,
    keepdim: Value = False,
    **kwargs: Value,
) -> Value:
    if scalar(order) != 2.0 or not isinstance(x, Vector):
        return a.end(site, [x], "its norm is not the Euclidean one")
    return rotate_reduce(a, site, rotate_squared(a, site, x, 2), dim, keepdim)


def running_sentence(node: fx.Node, carriers: Collection[fx.Node], params: Collection[Param]) -> str:
    """What ``scale_running`` does at a node."""
    return ADDS if operator_name(node) == "cumsum" else PICKS


@scale_rule("cumsum cummax cummin", says=running_sentence)
def scale_running(a: ScaleAnalysis, site: Site, x: Value, dim: int, **kwargs: Value) -> Value:
    labels = a.labels(site, x)
    a.mixed(labels)
    merged = a.variables.merge_along(labels, [dim % labels.ndim], site.order, keepdim=True).expand(labels.shape)
    return scale_with_positions(a, site, merged)


@rotation_rule("cumsum", says="adds up whole vectors: all of them are rotated alike")
def rotate_running(a: RotationAnalysis, site: Site, x: Value, dim: int, **kwargs: Value) -> Value:
    """Sums over tokens, as far as each of them."""
    return rotate_summed_along(a, site, x, [dim])


def rotate_summed_along(a: RotationAnalysis, site: Site, x: Value, dims: Sequence[int]) -> Value:
    """Each token of the result is a sum of whole vectors, whatever their factors are."""
    along = [dim % x.coordinates.ndim for dim in dims] if isinstance(x, Vector) else []
    if not isinstance(x, Vector) or any(apart(x.coordinates, dim) for dim in along):
        return a.end(site, [x], "its channels are summed")

    def added(x: Vector) -> Vector:
        a.stay_apart(site, x)
        labels = a.variables.merge_along(x.coordinates, along, site.order, keepdim=True).expand(site.shape)
        return Vector(labels, fresh_instances(labels), factors=seen_along(x, along, True, site.shape))

    return behind_gain(a, site, x, along, added, lambda index: index.expand(site.shape))


_SPECTRA = "fft_fft fft_ifft fft_rfft fft_irfft fft_hfft fft_ihfft"


@scale_rule(_SPECTRA, says=ADDS)
def scale_spectrum(
    a: ScaleAnalysis, site: Site, x: Value, n: Value = None, dim: int = -1, norm: Value = None, **kwargs: Value
) -> Value:
    """Sums along one dimension, with factors that are numbers."""
    labels = a.labels(site, x)
    a.mixed(labels)
    return a.variables.merge_along(labels, [dim % labels.ndim], site.order, keepdim=True).expand(site.shape)


@rotation_rule(_SPECTRA, says="adds up whole vectors: all of them are rotated alike")
def rotate_spectrum(
    a: RotationAnalysis, site: Site, x: Value, n: Value = None, dim: int = -1, norm: Value = None, **kwargs: Value
) -> Value:
    """Over tokens: real numbers that mix channels go past the complex ones that mix tokens."""
    return rotate_summed_along(a, site, x, [dim])


@scale_rule(*POOLS, says="adds or picks neighbours: all of them carry the same scale")
def scale_pooled(a: ScaleAnalysis, site: Site, x: Value, *args: Value, **kwargs: Value) -> Value:
    labels = a.labels(site, x)
    a.mixed(labels)
    dims = range(labels.ndim - POOLS[site.operator], labels.ndim)
    merged = a.variables.merge_along(labels, list(dims), site.order, keepdim=True).expand(site.shape)
    return scale_with_positions(a, site, merged)


_LINEAR_POOLS = " ".join(name for name in POOLS if "max" not in name)
_NEIGHBOURS = "adds up whole vectors that are neighbours: all of them are rotated alike"


@rotation_rule(_LINEAR_POOLS, says=_NEIGHBOURS)
def rotate_pooled(a: RotationAnalysis, site: Site, x: Value, *args: Value, **kwargs: Value) -> Value:
    """Sums over neighbours with numbers for factors, which padding with 0 does not mind. A maximum is of each channel
    by itself.
    """
    return rotate_summed_along(a, site, x, range(-POOLS[site.operator], 0))


@rotation_rule("grid_sampler", says=_NEIGHBOURS)
def rotate_sampled(a: RotationAnalysis, site: Site, x: Value, places: Value, *args: Value) -> Value:
    """Sums over the spatial dimensions, all but the first two."""
    if not isinstance(places, (Constant, Dynamic)):
        return a.end(site, [x, places], "it is read at computed places")
    return rotate_summed_along(a, site, x, range(2, len(site.shape)))


@scale_rule("grid_sampler", says="reads between neighbours: all of them carry the same scale, the places have scale 1")
def scale_sampled(a: ScaleAnalysis, site: Site, x: Value, places: Value, *args: Value) -> Value:
    """Sums over the spatial dimensions, all but the first two: the places say which."""
    labels = a.labels(site, x)
    a.mixed(labels)
    if isinstance(places, (Tensor, Param)):
        a.variables.fix(a.labels(site, places), site.because("it says where another tensor is read"))
    return a.variables.merge_along(labels, range(2, labels.ndim), site.order, keepdim=True).expand(site.shape)
