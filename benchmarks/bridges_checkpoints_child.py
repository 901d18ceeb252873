"""Run by bridges_checkpoints.py in LLM Compressor's environment: PYTHON bridges_checkpoints_child.py PLAN.json

Calibrates each model of the plan by its recipe and saves it as LLM Compressor does. Imports nothing of this project.
"""

import json
import shutil
import sys
import time
from pathlib import Path

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.pipelines.cache import IntermediatesCache
from transformers import AutoModelForCausalLM

if not torch.accelerator.is_available():  # AWQModifier pins memory for one always (0.14.0.1, awq/base.py:507)
    IntermediatesCache.pin_memory = lambda self, index: None


def make(cell, rows) -> None:
    source, output = Path(cell["source"]), Path(cell["output"])
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
    how = {"num_calibration_samples": len(rows), "max_seq_length": len(rows[0]), "shuffle_calibration_samples": False}
    oneshot(model=model, dataset=data, recipe=cell["recipe"], **how)
    model.save_pretrained(output, save_compressed=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / name, output / name)


def main(plan: str) -> None:
    content = json.loads(Path(plan).read_text())
    torch.set_num_threads(content["threads"])
    for cell in content["cells"]:
        start, marker = time.monotonic(), Path(cell["output"]).with_suffix(".error")
        try:
            make(cell, content["windows"])
        except Exception as error:  # whatever the tool says to a recipe
            marker.write_text(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
        print(f"{Path(cell['output']).name}: {time.monotonic() - start:.0f} s", flush=True)


main(*sys.argv[1:])
