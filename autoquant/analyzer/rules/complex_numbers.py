"""Complex numbers as pairs of real ones."""

from __future__ import annotations

from autoquant.analyzer.interpreter import Site, Value
from autoquant.analyzer.rotation_state import RotationAnalysis
from autoquant.analyzer.rules.registry import rotation_rule, scale_rule
from autoquant.analyzer.scale_state import ScaleAnalysis


@scale_rule("view_as_complex", says="two numbers become one: both carry the same scale")
def scale_as_complex(a: ScaleAnalysis, site: Site, x: Value) -> Value:
    """Two numbers become one: they have one scale."""
    labels = a.labels(site, x)
    if labels.ndim <= a.lead:
        a.mixed(labels)
    return a.variables.merge_along(labels, [labels.ndim - 1], site.order)


@rotation_rule("view_as_complex", says="ends here: pairs of channels become complex numbers")
def rotate_as_complex(a: RotationAnalysis, site: Site, x: Value) -> Value:
    """What is turned by positions pair by pair could be mixed within a pair at most."""
    return a.end(site, [x], "pairs of its channels become complex numbers")


@scale_rule("view_as_real", says="one number becomes two of the same scale")
def scale_as_real(a: ScaleAnalysis, site: Site, x: Value) -> Value:
    return a.labels(site, x).unsqueeze(-1).expand(site.shape)
