"""Convolutions over time or space."""

from __future__ import annotations

from torch import Tensor

from autoquant.analyzer.axes import Param
from autoquant.analyzer.interpreter import Constant, Dynamic, Site, Value
from autoquant.analyzer.rotation_state import (
    RotationAnalysis,
    Vector,
    fresh_instances,
)
from autoquant.analyzer.rules.registry import rotation_rule, scale_rule
from autoquant.analyzer.rules.sentences import (
    product_with_weight,
    written_by_weight,
)
from autoquant.analyzer.scale_state import ScaleAnalysis
from autoquant.aten import (
    CONVOLUTIONS,
    NO_ROTATION,
)


@scale_rule(*CONVOLUTIONS, says=product_with_weight)
def scale_convolution(
    a: ScaleAnalysis,
    site: Site,
    x: Value,
    w: Value,
    bias: Value = None,
    stride: Value = 1,
    padding: Value = 0,
    dilation: Value = 1,
    groups: int = 1,
) -> Value:
    """Over time or space: depthwise, or dense in its channels."""
    dims = CONVOLUTIONS[site.operator]
    if not isinstance(w, Param) or not isinstance(x, (Tensor, Constant, Dynamic)) or len(w.shape) != dims + 2:
        return a.block(site, [x, w, bias], "it is a convolution with a computed weight")
    labels = a.labels(site, x)
    a.mixed(labels)
    channel = labels.ndim - dims - 1
    labels = a.variables.merge_along(labels, [d for d in range(labels.ndim) if d != channel], site.order)
    here = site.because("it is a weight")
    if w.shape[1] == 1:  # depthwise: each channel makes one or several
        found = a.axes.channels(w, here)
        if found is None:
            return a.block(site, [x, w, bias], "the channels of the weight are mixed by a reshape")
        columns, out = found
        a.variables.equal(columns, labels.repeat_interleave(w.shape[0] // groups), site.order, ratio=-1.0)
    elif groups == 1 and not w.views:
        a.variables.equal(a.axes.axis(w, 1, "column", here, stacked=False), labels, site.order, ratio=-1.0)
        out = a.axes.axis(w, 0, "row", here, stacked=False)
    else:
        return a.block(site, [x, w, bias], "it is a convolution that mixes channels in groups")
    if bias is not None:
        a.variables.equal(out, a.labels(site, bias), site.order)
    return out.view(-1, *(1,) * dims).expand(site.shape)


@rotation_rule(*CONVOLUTIONS, says=written_by_weight)
def rotate_convolution(
    a: RotationAnalysis, site: Site, x: Value, w: Value, bias: Value = None, *args: Value, **kwargs: Value
) -> Value:
    """A dense one over pixels or sound, which nothing rotates, writes vectors: one per place."""
    groups = kwargs.get("groups", args[3] if len(args) > 3 else 1)
    if (
        not isinstance(x, (Constant, Dynamic))
        or not isinstance(w, Param)
        or w.views
        or groups != 1
        or not isinstance(bias, (Param, type(None)))
    ):
        return a.end(site, [x, w, bias], NO_ROTATION)
    rows = a.axes.axis(w, 0, "row", site.because("it is a weight"), stacked=False)
    if bias is not None:
        labels = a.axes.leaf(bias, 0, site.because("it is a bias"))
        if labels is None or bias.views:
            return a.end(site, [w, bias], NO_ROTATION)
        rows = a.variables.merge(rows, labels, site.order)
    rows = rows.view(-1, *(1,) * CONVOLUTIONS[site.operator]).expand(site.shape)
    return Vector(rows, fresh_instances(rows))
