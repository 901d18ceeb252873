"""Checkpoints whose weights are stored with scales go through apply and quantize as if they were not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from autoquant.analyzer.analyze import analyze
from autoquant.checkpoint.apply import apply_checkpoint
from autoquant.checkpoint.quantize import Recipe, quantize_checkpoint
from autoquant.config.format import Config, Strategy
from autoquant.models.load import load_language_model
from autoquant.models.repair import find_source
from autoquant.pipeline.select import Transforms

SIZES = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 64, "dtype": "bfloat16",
}  # fmt: skip
MLA = {
    "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 32,
    "moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
    "first_k_dense_replace": 1, "num_key_value_heads": 4, "head_dim": 16,
}  # fmt: skip
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("fp8", {}),
    "deepseek_v3": ("fp8", MLA),
    "gpt_oss": ("mxfp4", {"num_local_experts": 4, "num_experts_per_tok": 2, "hidden_size": 64}),
}
BLOCK = 32


def made(folder: Path, kind: str) -> tuple[Path, Path]:
    """A small checkpoint with scales, and the one of the numbers that it stands for."""
    torch.manual_seed(0)
    method, more = KINDS[kind]
    config = AutoConfig.for_model(kind, **(SIZES | more))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    scaled, plain = folder / "scaled", folder / "plain"
    model.save_pretrained(scaled)
    stored, numbers = load_file(scaled / "model.safetensors"), {}
    for name, tensor in list(stored.items()):
        parts, numbers[name] = (in_blocks if method == "fp8" else in_mxfp4)(name, tensor)
        if parts:
            del stored[name]
            stored |= parts
    plain.mkdir()
    settings = json.loads((scaled / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps(settings))
    section = {"quant_method": method} | ({"weight_block_size": [BLOCK, BLOCK]} if method == "fp8" else {})
    (scaled / "config.json").write_text(json.dumps(settings | {"quantization_config": section}))
    save_file(stored, scaled / "model.safetensors", {"format": "pt"})
    save_file(numbers, plain / "model.safetensors", {"format": "pt"})
    return scaled, plain


def in_blocks(name: str, tensor: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    if not name.endswith("_proj.weight"):
        return {}, tensor
    rows, columns = tensor.shape
    blocks = tensor.float().view(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
    scale = blocks.abs().amax((1, 3)) / 448
    values = (blocks / scale[:, None, :, None]).view(rows, columns).to(torch.float8_e4m3fn)
    number = Fp8Dequantize(None)._dequantize_one(values, scale, torch.bfloat16)
    return {name: values, f"{name}_scale_inv": scale}, number


def in_mxfp4(name: str, tensor: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    if not name.endswith(("gate_up_proj", "down_proj")):
        return {}, tensor
    experts, columns, rows = tensor.shape
    blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
    scales = torch.randint(118, 124, (experts, rows, columns // 32), dtype=torch.uint8)
    return {f"{name}_blocks": blocks, f"{name}_scales": scales}, convert_moe_packed_tensors(blocks, scales)


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def claims(folder: Path) -> Config:
    return analyze(find_source(str(folder))).config


@pytest.mark.parametrize("kind", KINDS)
def test_apply_writes_what_it_makes_of_the_numbers(tmp_path: Path, kind: str) -> None:
    scaled, plain = made(tmp_path, kind)
    config = claims(scaled)
    assert config.smoothing.groups and config.rotation.spaces
    for source, target in ((scaled, "one"), (plain, "other")):
        apply_checkpoint(source, config, tmp_path / target, seed=0)
    assert same(tensors(tmp_path / "one"), tensors(tmp_path / "other"))
    assert "quantization_config" not in json.loads((tmp_path / "one" / "config.json").read_text())
    ids = torch.arange(12)[None]
    with torch.no_grad():
        before = load_language_model(scaled, dtype=torch.float32)(ids).logits
        after = load_language_model(tmp_path / "one", dtype=torch.float32)(ids).logits
    assert (after - before).norm() < 0.02 * before.norm()  # of bfloat16


@pytest.mark.parametrize("kind", ["llama", *(pytest.param(kind, marks=pytest.mark.slow) for kind in list(KINDS)[1:])])
def test_quantize_writes_what_it_makes_of_the_numbers(tmp_path: Path, kind: str) -> None:
    scaled, plain = made(tmp_path, kind)
    config = claims(plain)
    strategy = Strategy("w_int8_per_channel_a_int8_per_token_dynamic")
    windows = tuple(torch.randint(0, 64, (1, 24)) for _ in range(2))
    for source, target in ((scaled, "one"), (plain, "other")):
        recipe = Recipe(config, strategy, Transforms.parse("fc_fc:0.5+rotation"), windows)
        quantize_checkpoint(source, tmp_path / target, recipe, {"seed": 0})
    assert same(tensors(tmp_path / "one"), tensors(tmp_path / "other"))
