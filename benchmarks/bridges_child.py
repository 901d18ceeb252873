"""Run by bridges.py in the other tool's environment: PYTHON bridges_child.py TOOL MODEL RECIPE OUTPUT

Applies a recipe of which the quantization is left out to a float64 model and writes the logits before and after to
OUTPUT, with what the tool says of itself. Imports nothing of this project.
"""

import importlib.metadata
import json
import re
import sys
import traceback
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM


def tokens_of(model) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(2, model.config.get_text_config().vocab_size, (4, 32), generator=generator)


def logits(model, ids) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits.double()


def llm_compressor(model, recipe: Path, ids) -> None:
    from datasets import Dataset
    from llmcompressor import oneshot

    data = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
    oneshot(model=model, dataset=data, recipe=str(recipe), num_calibration_samples=len(ids), max_seq_length=32)


def quark(model, recipe: Path, ids) -> None:
    from quark.torch.algorithm.awq.smooth import SmoothQuantProcessor
    from quark.torch.algorithm.rotation.rotation import RotationProcessor
    from quark.torch.quantization.config.config import RotationConfig, SmoothQuantConfig

    content = json.loads(recipe.read_text())["algo_config"]
    for section in content:
        if section["name"] == "rotation":
            RotationProcessor(model, RotationConfig.from_dict(section), None).apply()
        else:
            SmoothQuantProcessor(model, SmoothQuantConfig(**section), [{"input_ids": row[None]} for row in ids]).apply()


def version_of(tool: str) -> str:
    return importlib.metadata.version({"llm-compressor": "llmcompressor", "quark": "amd-quark"}[tool])


def said(error: Exception) -> str:
    """What a tool says, and the last places in its own code."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [
        frame for frame in frames if re.search(r"site[^/]*/(llmcompressor|compressed_tensors|quark)/", frame.filename)
    ]
    places = [f"{re.split(r'site[^/]*/', frame.filename)[-1]}:{frame.lineno}" for frame in own[-5:]]
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text} ({', '.join(places)})"


def main(tool: str, folder: str, recipe: str, output: str) -> None:
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, **eager).eval()
    model.config.use_cache = False
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = tokens_of(model)
    before = logits(model, ids)
    try:
        {"llm-compressor": llm_compressor, "quark": quark}[tool](model, Path(recipe), ids)
    except Exception as error:  # whatever the tool says to a recipe
        Path(output).write_text(json.dumps({"version": version_of(tool), "why": said(error)}))
        return
    after = logits(model, ids)
    changed = sum(
        not torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items() if name in weights
    )
    change = float((after - before).norm() / before.norm())
    Path(output).write_text(
        json.dumps({"change": change, "version": version_of(tool), "tensors": len(weights), "changed": changed})
    )


main(*sys.argv[1:])
