"""LLM Compressor's SmoothQuant and W8A8 on windows of tokens, timed: beside ours in speed_quantize.py and servable.py.

PYTHON benchmarks/smoothquant_llmc.py MODEL WINDOWS.json OUTPUT DEVICE [static|token], in an environment with
llmcompressor; static, the default, or per token is how activations are rounded.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

START = time.monotonic()


INPUTS: dict[str, dict[str, Any]] = {
    "static": {"strategy": "tensor", "dynamic": False},
    "token": {"strategy": "token", "dynamic": True},
}


def told(step: str, since: float) -> float:
    now = time.monotonic()
    print(f"{step}: {now - since:.1f} s", flush=True)
    return now


def main(folder: str, windows: str, output: str, device: str, activations: str = "static") -> None:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier

    try:
        from llmcompressor.modifiers.smoothquant import SmoothQuantModifier
    except ImportError:
        from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
    from transformers import AutoModelForCausalLM

    at = told("import", START)
    ids = json.loads(Path(windows).read_text())
    placed = {} if device == "cpu" else {"device_map": device}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **placed)
    at = told("load", at)
    data = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]})
    each = {"num_bits": 8, "type": "int", "symmetric": True}
    scheme = QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(**each, strategy="channel"),
        input_activations=QuantizationArgs(**each, **INPUTS[activations]),
    )
    recipe = [
        SmoothQuantModifier(smoothing_strength=0.5),
        QuantizationModifier(config_groups={"group_0": scheme}, ignore=["lm_head"]),
    ]
    oneshot(
        model=model,
        dataset=data,
        recipe=recipe,
        max_seq_length=len(ids[0]),
        num_calibration_samples=len(ids),
    )
    at = told("calibrate and quantize", at)
    model.save_pretrained(output, save_compressed=True)
    told("save", at)


if __name__ == "__main__":
    main(*sys.argv[1:])
