"""Run by LLM Compressor's own Python: prints its registries of mappings as JSON. Imports nothing of this project."""

import importlib.metadata
import json
from pathlib import Path

import llmcompressor
from llmcompressor.modifiers.transform.awq.dynamic_mappings import AWQ_DYNAMIC_MAPPING_REGISTRY
from llmcompressor.modifiers.transform.awq.mappings import AWQ_MAPPING_REGISTRY
from llmcompressor.modifiers.transform.smoothquant.dynamic_mappings import SMOOTHQUANT_DYNAMIC_MAPPING_REGISTRY
from llmcompressor.modifiers.transform.smoothquant.utils import MAPPINGS_REGISTRY

HOOK = "activation_hook_target"
FILES = {
    "SmoothQuantModifier": ("modifiers/transform/smoothquant/utils.py", "MAPPINGS_REGISTRY"),
    "AWQModifier": ("modifiers/transform/awq/mappings.py", "AWQ_MAPPING_REGISTRY"),
}

smooth = {
    name: [[list(mapping.balance_layers), mapping.smooth_layers] for mapping in mappings]
    for name, mappings in MAPPINGS_REGISTRY.items()
}
awq = {
    name: [
        {"smooth_layer": m.smooth_layer, "balance_layers": list(m.balance_layers), HOOK: getattr(m, HOOK, None)}
        for m in mappings
    ]
    for name, mappings in AWQ_MAPPING_REGISTRY.items()
}
root = Path(llmcompressor.__file__).parent
content = {
    "version": importlib.metadata.version("llmcompressor"),
    "registries": {"SmoothQuantModifier": smooth, "AWQModifier": awq},
    "sources": {
        modifier: {"path": f"src/llmcompressor/{file}", "text": (root / file).read_text(), "name": name}
        for modifier, (file, name) in FILES.items()
    },
    "made_at_run_time": {
        "SmoothQuantModifier": sorted(SMOOTHQUANT_DYNAMIC_MAPPING_REGISTRY),
        "AWQModifier": sorted(AWQ_DYNAMIC_MAPPING_REGISTRY),
    },
}
print(json.dumps(content))
