"""NVIDIA ModelOpt's ``quantize_config`` as JSON, for ``mtq.quantize`` (modelopt 0.47, torch/quantization/config.py).

ModelOpt scales the input of each linear by itself and folds that where it knows the class: it takes no pairs.
"""

from __future__ import annotations

import json
from typing import Any

from autoquant.config.format import Config
from autoquant.config.layers import LAYER
from autoquant.errors import AutoQuantError
from autoquant.quantizer.strategies import scheme_of
from autoquant.recipes.pairs import Refusal
from autoquant.recipes.unpaired import in_float, in_use

ALGORITHMS = ("smoothquant", "awq_lite", "max")
_NO_PAIRS = "ModelOpt is told no pairs: it scales each linear by itself, and folds where it knows the class"


def recipe(config: Config, algorithm: str = "smoothquant") -> tuple[str, list[Refusal]]:
    """The JSON, and what of the config ModelOpt cannot be told. Raises AutoQuantError for an unknown algorithm."""
    if algorithm not in ALGORITHMS:
        raise AutoQuantError(f"algorithm '{algorithm}': ModelOpt's settings have {', '.join(ALGORITHMS)}")
    scheme = scheme_of(config.quantization.strategy)
    weight: dict[str, Any] = {"num_bits": 8, "axis": 0 if scheme.weight_per_channel else None}
    inputs: dict[str, Any] = {"num_bits": 8, "axis": None}
    if "token" in scheme.activation.value:
        inputs = {"num_bits": 8, "type": "dynamic", "block_sizes": {"-1": None}}
    elif not scheme.activation.is_static:
        inputs["type"] = "dynamic"
    method: dict[str, Any] = {"method": algorithm}
    if algorithm == "smoothquant":
        method["alpha"] = config.smoothing.alpha
    content = {
        "quant_cfg": [
            {"quantizer_name": "*", "enable": False},
            {"quantizer_name": "*weight_quantizer", "cfg": weight, "enable": True},
            {"quantizer_name": "*input_quantizer", "cfg": inputs, "enable": True},
            *({"quantizer_name": f"*{path.replace(LAYER, '*')}.*", "enable": False} for path in in_float(config)),
        ],
        "algorithm": method,
    }
    return json.dumps(content, indent=2) + "\n", in_use(config, _NO_PAIRS, "ModelOpt rotates nothing that is told")
