"""auto-round's scheme and layer config as JSON (auto-round 0.16, ``auto_round.schemes``): it takes no pairs."""

from __future__ import annotations

import json

from autoquant.config.format import Config
from autoquant.config.layers import LAYER
from autoquant.errors import AutoQuantError
from autoquant.quantizer.strategies import scheme_of
from autoquant.recipes.pairs import Refusal, expressions
from autoquant.recipes.unpaired import in_float, in_use

ALGORITHMS = ("rounding",)
_NO_PAIRS = "auto-round is told no pairs: apply the config first (autoquant apply), then round"


def recipe(config: Config, algorithm: str = "rounding") -> tuple[str, list[Refusal]]:
    """The JSON, and what of the config auto-round cannot be told. Raises AutoQuantError for another algorithm."""
    if algorithm not in ALGORITHMS:
        raise AutoQuantError(f"algorithm '{algorithm}': auto-round's settings have {', '.join(ALGORITHMS)}")
    scheme = scheme_of(config.quantization.strategy)
    token = "token" in scheme.activation.value
    every = tuple(range(config.model.layers))
    content = {
        "scheme": {
            "bits": 8,
            "group_size": -1 if scheme.weight_per_channel else 0,
            "data_type": "int",
            "sym": True,
            "act_bits": 8,
            "act_group_size": -1 if token else 0,
            "act_data_type": "int",
            "act_dynamic": not scheme.activation.is_static,
            "act_sym": True,
        },
        "layer_config": {
            expressions(path, every if LAYER in path else (), config.model.layers): {"bits": 16, "act_bits": 16}
            for path in in_float(config)
        },
    }
    return json.dumps(content, indent=2) + "\n", in_use(config, _NO_PAIRS, _NO_PAIRS)
