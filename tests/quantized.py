"""What the tests of quantization share: the packaged model, its config, another architecture, and short texts."""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autoquant.analyzer.analyze import analyze
from autoquant.checkpoint.quantize import load_float32
from autoquant.config.format import Config, Strategy
from autoquant.models.reduce import randomise_
from autoquant.models.repair import find_source
from autoquant.searcher.judge import Task

DATA = Path(__file__).parents[1] / "autoquant" / "data"
PACKAGED = DATA / "wikinano1m"
TINY = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
"""Sizes of a decoder that is made in no time."""
STATIC = Strategy.PER_CHANNEL_STATIC
STATIC_KV = "w_int8_per_channel_a_int8_per_tensor_static_kv_cache_int8_per_tensor_static"


@cache
def config_of(folder: Path) -> Config:
    return analyze(find_source(str(folder)), how="export").config


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


def with_a_tower(folder: Path) -> Path:
    """A small checkpoint of a type that takes images, whose class is that of its language model too."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    text = dict(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, sliding_window=16, query_pre_attn_scalar=8,
    )  # fmt: skip
    vision = dict(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4
    )
    tokens = dict(image_token_index=60, boi_token_index=61, eoi_token_index=62, mm_tokens_per_image=4)
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, **tokens)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def encoder_decoder(folder: Path, model_type: str) -> Path:
    """A small encoder-decoder with random norms and biases, and the packaged tokenizer; of Whisper's type too."""
    from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoModelForSpeechSeq2Seq

    sizes = dict(vocab_size=2048, d_model=32, decoder_start_token_id=0)
    if model_type == "t5":
        sizes |= dict(d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=2, num_heads=4)
    else:
        sizes |= {f"{part}_{name}": n for part in ("encoder", "decoder") for name, n in _HALF.items()}
    named = dict(pad_token_id=0, bos_token_id=0, eos_token_id=1)
    if model_type == "whisper":
        named |= dict(num_mel_bins=16, max_source_positions=50, max_target_positions=64)
    elif model_type != "t5":
        named |= dict(max_position_embeddings=64)
    kind = AutoModelForSpeechSeq2Seq if model_type == "whisper" else AutoModelForSeq2SeqLM
    made: Any = kind.from_config(AutoConfig.for_model(model_type, **sizes, **named))
    randomise_(made, 0)
    made.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(PACKAGED / name, folder / name)
    return folder


_HALF = {"layers": 2, "attention_heads": 4, "ffn_dim": 48}


def search_task(*knobs: str, strategy: Strategy = STATIC, per_token: int = 0) -> Task:
    """What a search is about: windows of random tokens through the packaged model."""
    found = windows(6, 40)
    return Task(
        load=lambda: load_float32(PACKAGED),
        strategy=strategy,
        fit=found[:3],
        held_out=(torch.cat(found[3:]),),
        calibration="random tokens",
        per_token=per_token,
        bos=0,
        knobs=frozenset(knobs),
    )
