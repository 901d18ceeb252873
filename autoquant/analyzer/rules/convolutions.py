"""Convolutions over time or space."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from autoquant.analyzer.axes import Factors, Param
from autoquant.analyzer.interpreter import Constant, Dynamic, Site, Value
from autoquant.analyzer.movement import windows
from autoquant.analyzer.rotation_notes import Product
from autoquant.analyzer.rotation_state import (
    RotationAnalysis,
    Vector,
    apply,
    fresh_instances,
)
from autoquant.analyzer.rules.contractions import rotate_read
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


_WINDOWS = "copies each channel for the places of a window: all copies carry its scale"


@scale_rule("im2col", says=_WINDOWS)
def scale_windows(a: ScaleAnalysis, site: Site, x: Value, *window: Sequence[int]) -> Value:
    """``F.unfold``: the places of a window become channels, and windows become tokens."""
    labels = a.labels(site, x)
    a.mixed(labels)
    return windows(labels, *window)


@rotation_rule("im2col", says="copies vectors for the places of a window: what reads them reads each by itself")
def rotate_windows(a: RotationAnalysis, site: Site, x: Value, *window: Sequence[int]) -> Value:
    """Each channel of a window is the same one of each of its places: instances side by side."""
    if not isinstance(x, Vector):
        return a.end(site, [x], NO_ROTATION)
    padded = any(window[2])
    if padded and x.gain is not None and x.gain.bias is not None:
        return a.end(site, [x], f"it is padded with 0, to which {x.gain.bias} was not added")
    moved: Vector = apply(x, lambda labels: windows(labels, *window))
    if padded:
        a.split(moved, torch.zeros_like(moved.instances), site.because("some of its channels become 0"))
    return moved


@rotation_rule(*CONVOLUTIONS, says=written_by_weight)
def rotate_convolution(
    a: RotationAnalysis, site: Site, x: Value, w: Value, bias: Value = None, *args: Value, **kwargs: Value
) -> Value:
    """A dense one writes vectors, one per place, and reads those of several places by a matrix for each."""
    groups = kwargs.get("groups", args[3] if len(args) > 3 else 1)
    if not isinstance(w, Param) or w.views or not isinstance(bias, (Param, type(None))):
        return a.end(site, [x, w, bias], NO_ROTATION)
    if groups != 1:
        alone = w.shape[1] == 1
        text = "each channel is convolved by itself" if alone else "its channels are convolved in groups"
        return a.end(site, [x, w, bias], text)
    here = site.because("it is a weight")
    rows = a.axes.axis(w, 0, "row", here, stacked=False)
    columns = a.axes.axis(w, 1, "column", here, stacked=False)
    if isinstance(x, Vector):
        if x.gain is not None and x.gain.bias is not None:  # what pads has none, and each place has its own matrix
            return a.end(site, [x, w, bias], f"{x.gain.bias} cannot be folded into a convolution")
        channel = len(site.shape) - CONVOLUTIONS[site.operator] - 1
        last = apply(x, lambda labels: labels.movedim(channel, -1))
        rotate_read(a, site, last, columns, Factors(columns, rows, 1, 0), w.name, None)
    else:  # pixels or sound
        a.variables.fix(columns, site.because("it also reads what is not rotated"))
        a.end(site, [x], NO_ROTATION)
    if bias is not None:
        labels = a.axes.leaf(bias, 0, site.because("it is a bias"))
        if labels is None or bias.views:
            return a.end(site, [w, bias], NO_ROTATION)
        rows = a.variables.merge(rows, labels, site.order)
    a.products[site.node] = Product(w.name, 0, None if bias is None else bias.name)
    rows = rows.view(-1, *(1,) * CONVOLUTIONS[site.operator]).expand(site.shape)
    return Vector(rows, fresh_instances(rows))
