"""Run by bridges.py in the other tool's environment: PYTHON bridges_child.py TOOL MODEL RECIPE OUTPUT

Applies a recipe of which the quantization is left out to a float64 model and writes the logits before and after to
OUTPUT, with what the tool says of itself. Imports nothing of this project.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM


def tokens_of(model) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(2, model.config.get_text_config().vocab_size, (4, 32), generator=generator)


def logits(model, ids) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits.double()


def llm_compressor(model, recipe: Path, ids) -> str:
    import llmcompressor
    from datasets import Dataset
    from llmcompressor import oneshot

    data = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
    oneshot(model=model, dataset=data, recipe=str(recipe), num_calibration_samples=len(ids), max_seq_length=32)
    return llmcompressor.__version__


def quark(model, recipe: Path, ids) -> str:
    import quark
    from quark.torch.algorithm.awq.smooth import SmoothQuantProcessor
    from quark.torch.algorithm.rotation.rotation import RotationProcessor
    from quark.torch.quantization.config.config import RotationConfig, SmoothQuantConfig

    content = json.loads(recipe.read_text())["algo_config"]
    for section in content:
        if section["name"] == "rotation":
            RotationProcessor(model, RotationConfig.from_dict(section), None).apply()
        else:
            SmoothQuantProcessor(model, SmoothQuantConfig(**section), [{"input_ids": row[None]} for row in ids]).apply()
    return quark.__version__


def main(tool: str, folder: str, recipe: str, output: str) -> None:
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, **eager).eval()
    model.config.use_cache = False
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = tokens_of(model)
    before = logits(model, ids)
    version = {"llm-compressor": llm_compressor, "quark": quark}[tool](model, Path(recipe), ids)
    after = logits(model, ids)
    changed = sum(
        not torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items() if name in weights
    )
    change = float((after - before).norm() / before.norm())
    Path(output).write_text(
        json.dumps({"change": change, "version": version, "tensors": len(weights), "changed": changed})
    )


main(*sys.argv[1:])
