"""What the tests of quantization share: the packaged model, its config, another architecture, and short texts."""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autoquant.analyzer.analyze import analyze
from autoquant.config.format import Config
from autoquant.models.reduce import randomise_
from autoquant.models.repair import resolve

DATA = Path(__file__).parents[1] / "autoquant" / "data"
PACKAGED = DATA / "wikinano1m"
STATIC_KV = "w_int8_per_channel_a_int8_per_tensor_static_kv_cache_int8_per_tensor_static"


@cache
def config_of(folder: Path) -> Config:
    return analyze(resolve(str(folder)), how="export").config


def windows(count: int = 2, length: int = 24) -> tuple[Tensor, ...]:
    tokens = torch.randint(3, 2000, (count, length), generator=torch.Generator().manual_seed(0))
    return tuple(torch.cat([torch.zeros(count, 1, dtype=torch.long), tokens], 1).split(1))


def gpt2(folder: Path) -> Path:
    """A small GPT-2 with random norms and biases: LayerNorm, Conv1D, fused qkv, tied embeddings."""
    from transformers import AutoModelForCausalLM, GPT2Config

    made: Any = AutoModelForCausalLM.from_config(
        GPT2Config(vocab_size=2048, n_positions=64, n_embd=32, n_layer=3, n_head=4)
    )
    randomise_(made, 0)
    made.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(PACKAGED / name, folder / name)
    return folder
