"""All knobs by name, in the order of the model's own pipeline: each is judged with those before it in place."""

from __future__ import annotations

from collections.abc import Mapping

from autoquant.searcher.candidates.activations import per_token, static_clip
from autoquant.searcher.candidates.cache import key_cache
from autoquant.searcher.candidates.candidate import Knob
from autoquant.searcher.candidates.exclusion import in_float
from autoquant.searcher.candidates.prefix import prefix
from autoquant.searcher.candidates.rotation import learned, online, rotation
from autoquant.searcher.candidates.smoothing import alpha, descent
from autoquant.searcher.candidates.weights import bias, rounding

KNOBS: Mapping[str, Knob] = {
    "prefix": prefix,
    "spikes": per_token,
    "clip": static_clip,
    "rotation": rotation,
    "online": online,
    "alpha": alpha,
    "descent": descent,
    "learned": learned,
    "cache": key_cache,
    "weights": rounding,
    "bias": bias,
    "float": in_float,
}
