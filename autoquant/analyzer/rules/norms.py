"""Operators that normalise."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import torch
from torch import fx

from autoquant.analyzer.axes import Param
from autoquant.analyzer.interpreter import Dynamic, Site, Value
from autoquant.analyzer.rotation_state import (
    Gain,
    RotationAnalysis,
    Vector,
    anew,
)
from autoquant.analyzer.rules.arithmetic import rotate_bias_of
from autoquant.analyzer.rules.reductions import rotate_centred, rotate_measured
from autoquant.analyzer.rules.registry import rotation_rule, scale_rule
from autoquant.analyzer.scale_state import ScaleAnalysis
from autoquant.aten import (
    NORMS,
    PRODUCTS,
    operator_name,
)
from autoquant.config.format import Norm

LAYER_NORM_EPS = 1e-5
"""aten::layer_norm's default, which a graph may leave out."""


def norm_sentence(node: fx.Node, carriers: Collection[fx.Node], params: Collection[Param]) -> str:
    """What ``scale_norm`` and ``scale_channel_norm`` do at a node."""
    if params:
        return "normalises, then multiplies by the norm's weight: each element of it can take a scale"
    return "ends here: it is normalised"


def length_sentence(node: fx.Node, carriers: Collection[fx.Node], params: Collection[Param]) -> str:
    """What ``rotate_norm`` does at a node."""
    kept = "divides by the vector's length, which a rotation keeps; its weight is folded into the readers"
    return kept.replace("divides", "centres the vector, divides") if operator_name(node) == "layer_norm" else kept


@scale_rule(*NORMS, says=norm_sentence)
def scale_norm(
    a: ScaleAnalysis,
    site: Site,
    x: Value,
    shape: Value,
    weight: Value = None,
    bias: Value = None,
    *args: Value,
    **kwargs: Value,
) -> Value:
    if site.operator == "rms_norm":
        bias = None  # it has none: what stands there is epsilon
    a.mixed(a.labels(site, x))
    reason = site.because("it is normalised" if weight is not None else "it is normalised by a norm without a weight")
    a.variables.fix(a.labels(site, x), reason)
    if weight is None:
        return a.fixed(site.shape, reason)
    out = a.labels(site, weight)
    if bias is not None:
        a.variables.equal(out, a.labels(site, bias), site.order)
    return out.expand(site.shape)


@rotation_rule(*NORMS, says=length_sentence)
def rotate_norm(
    a: RotationAnalysis,
    site: Site,
    x: Value,
    shape: Value,
    weight: Value = None,
    bias: Value = None,
    eps: Value = None,
    *args: Value,
) -> Value:
    layer, x = site.operator == "layer_norm", a.as_vector(site, x)
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
        and rotate_folds_into_table(a, site, x.table)
    )
    owner = f" of {x.table}" if folds else ""
    if gain is not None:
        a.gain_sizes[gain.param.name] = x.coordinates.shape[-1]
        a.axes.other_use(gain.param, here, f"{gain.words}{owner}")
    if bias is not None:
        rotate_bias_of(a, f"{gain.param.name if gain is not None else None}{owner}", bias, site)
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
        rotate_centred(a, site, x, [x.coordinates.ndim - 1])
    else:
        rotate_measured(a, site, x, [x.coordinates.ndim - 1], "its length is taken over part of its channels")
    if weight is None and bias is None:
        return anew(replace(x, table=None, centred=layer))
    index = torch.arange(x.coordinates.shape[-1]).expand(x.coordinates.shape)
    return Vector(x.coordinates, x.instances, found, index, factors=x.factors)


def rotate_folds_into_table(a: RotationAnalysis, site: Site, table: str) -> bool:
    """True if it is the only use of the table's only lookup, and more than linears depend on it."""
    others = (user for user in site.node.users if operator_name(user) not in PRODUCTS)
    return a.lookups[table] == 1 and table not in a.folded and _read_nowhere_else(site.node.args[0]) and any(others)


@scale_rule("batch_norm _native_batch_norm_legit_no_training group_norm instance_norm", says=norm_sentence)
def scale_channel_norm(a: ScaleAnalysis, site: Site, x: Value, *args: Value, **kwargs: Value) -> Value:
    """batch_norm, group_norm, instance_norm: normalised somehow, then an affine map per channel (dimension 1)."""
    first = 1 if site.operator == "group_norm" else 0  # behind the number of groups
    weight, bias = (*args, None, None)[first : first + 2]  # a graph leaves out what is at its default
    a.mixed(a.labels(site, x))
    reason = site.because("it is normalised")
    a.variables.fix(a.labels(site, x), reason)
    if weight is None:
        return a.outputs(site, reason)
    out = a.labels(site, weight)
    if bias is not None:
        a.variables.equal(out, a.labels(site, bias), site.order)
    spread = out.view(-1, *(1,) * (len(site.shape) - 2)).expand(site.shape)
    statistics = tuple(Dynamic(tuple(f.shape), f.dtype) for f in site.outputs[1:])
    return (spread, *statistics) if statistics else spread


@scale_rule("_weight_norm", says="ends here: the weight is normalised before it is used")
def scale_weight_norm(a: ScaleAnalysis, site: Site, direction: Value, length: Value, *args: Value) -> Value:
    """The length of each row is a parameter: its columns can take no scale, and what its rows take ends here."""
    return a.block(site, [direction, length], "it is a weight that is normalised before it is used")


def _read_nowhere_else(node: object) -> bool:
    """True if what the embedding looked up goes here only, through any number of casts."""
    while isinstance(node, torch.fx.Node) and len(node.users) == 1:
        if operator_name(node) == "embedding":
            return True
        node = node.args[0]
    return False
