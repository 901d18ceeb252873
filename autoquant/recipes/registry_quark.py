"""Run by AMD Quark's own Python: prints its templates' scaling layers as JSON. Imports nothing of this project."""

import importlib.metadata
import json

from quark.torch.quantization.config import algo_configs

maps = {"awq": algo_configs.AWQ_MAP, "smooth": algo_configs.SQ_MAP}
content = {
    "version": importlib.metadata.version("amd-quark"),
    "registries": {
        name: {
            model: {"scaling_layers": config.scaling_layers, "model_decoder_layers": config.model_decoder_layers}
            for model, config in found.items()
        }
        for name, found in maps.items()
    },
}
print(json.dumps(content))
