"""Operators that treat every element by itself."""

from __future__ import annotations

from collections.abc import Collection

from torch import fx

from autoquant.analyzer.axes import Param
from autoquant.analyzer.interpreter import Site, Value
from autoquant.analyzer.rotation_state import Gain, Mean, RotationAnalysis, Square, Vector, anew
from autoquant.analyzer.rules.registry import rotation_rule, scale_rule
from autoquant.analyzer.rules.sentences import (
    ENDS,
    FORMAT,
)
from autoquant.analyzer.scale_state import ScaleAnalysis, scalar
from autoquant.aten import (
    CASTS,
    LINEAR,
    NO_ROTATION,
    NONLINEAR,
    PASSES,
    operator_name,
)


def passes_sentence(node: fx.Node, carriers: Collection[fx.Node], params: Collection[Param]) -> str:
    """What ``scale_passes`` does at a node."""
    return FORMAT if operator_name(node) in CASTS else "passes a scale: f(s x) = s f(x) for every s > 0"


def vector_sentence(node: fx.Node, carriers: Collection[fx.Node], params: Collection[Param]) -> str:
    """What ``rotate_passes`` does at a node."""
    return FORMAT if operator_name(node) in CASTS else "passes whole vectors"


@scale_rule(*PASSES, says=passes_sentence)
def scale_passes(a: ScaleAnalysis, site: Site, x: Value, *args: Value, **kwargs: Value) -> Value:
    if site.outputs and not (site.outputs[0].is_floating_point() or site.outputs[0].is_complex()):
        return a.block(site, [x], "it is rounded")
    if site.operator == "alpha_dropout" and kwargs.get("train", args[1] if len(args) > 1 else False):
        return a.block(site, [x], "a constant is added")  # to what is dropped
    return a.labels(site, x)


@rotation_rule(*LINEAR, says=vector_sentence)
def rotate_passes(a: RotationAnalysis, site: Site, x: Value, *args: Value, **kwargs: Value) -> Value:
    if not isinstance(x, (Vector, Square, Mean, Gain)):
        return a.end(site, [x], NO_ROTATION)
    if not site.outputs[0].is_floating_point():
        return a.end(site, [x], "it is rounded")
    if isinstance(x, Mean) and site.operator in ("neg", "conj"):
        return a.end(site, [x], "a mean is negated")
    return anew(x) if isinstance(x, Vector) and site.operator not in CASTS else x


@scale_rule(*NONLINEAR, says=ENDS)
def scale_nonlinear(a: ScaleAnalysis, site: Site, *args: Value, **kwargs: Value) -> Value:
    name = site.operator.rpartition("::")[2]
    return a.block(site, [*args, *kwargs.values()], f"{name}(s x) is not s {name}(x)")


@scale_rule(
    "clamp clamp_min clamp_max hardtanh threshold",
    says="bounded by 0 alone it passes a scale: f(s x) = s f(x) for every s > 0",
)
def scale_clamp(a: ScaleAnalysis, site: Site, x: Value, low: Value = None, high: Value = None) -> Value:
    if all(bound is None or scalar(bound) == 0.0 for bound in (low, high)):
        return a.labels(site, x)
    return a.block(site, [x, low, high], "it is clamped")


@scale_rule(
    "glu", says="first half times the sigmoid of the second: the scale of the first passes, the second has scale 1"
)
def scale_glu(a: ScaleAnalysis, site: Site, x: Value, dim: int = -1) -> Value:
    """``value * sigmoid(gate)``, the two halves of ``x``."""
    labels = a.labels(site, x)
    if dim % labels.ndim < a.lead:
        a.mixed(labels)
    value, gate = labels.chunk(2, dim)
    a.variables.fix(gate, site.because("its gate half goes through a sigmoid"))
    return value


@scale_rule("prelu", says="passes a scale: f(s x) = s f(x) for every s > 0; its slopes have scale 1")
def scale_prelu(a: ScaleAnalysis, site: Site, x: Value, weight: Value) -> Value:
    a.variables.fix(a.labels(site, weight), site.because("it is the slope of an activation"))
    return a.labels(site, x)
