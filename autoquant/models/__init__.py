"""From MODEL, as a user names it, to a module: full size on the meta device, or small with real weights.

The only package that imports transformers, and only when one of its functions is called. Nothing here knows an
architecture: sizes are reduced by what their configuration fields are called and by how their values relate.
"""

from autoquant.kinds import KINDS, Kind
from autoquant.models.build import build_meta
from autoquant.models.classes import registered_types
from autoquant.models.inputs import masks_beside
from autoquant.models.reduction import (
    float64_throughout,
    grouped_experts,
    layer_kinds,
    randomise_,
    runs_in_float64,
    small,
    widened,
)
from autoquant.models.repair import resolve
from autoquant.models.source import LoadedModel, ModelSource, build_structure
from autoquant.models.weights import class_of, load_checkpoint, load_weights

__all__ = [
    "KINDS",
    "Kind",
    "LoadedModel",
    "ModelSource",
    "build_meta",
    "build_structure",
    "class_of",
    "float64_throughout",
    "grouped_experts",
    "layer_kinds",
    "load_checkpoint",
    "load_weights",
    "masks_beside",
    "randomise_",
    "registered_types",
    "resolve",
    "runs_in_float64",
    "small",
    "widened",
]
