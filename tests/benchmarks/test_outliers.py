from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from autoquant.config.format import Config, edited
from autoquant.errors import AutoQuantError
from autoquant.models.structure import structure_of

LAYERS, HIDDEN, INNER = 4, 24, 40


@pytest.fixture(scope="module")
def outliers() -> Any:
    """The script benchmarks/outliers.py as a module."""
    spec = importlib.util.spec_from_file_location("outliers", Path(__file__).parents[2] / "benchmarks" / "outliers.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["outliers"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS}
    made = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0)).double()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.add_(torch.rand_like(parameter) - 0.5 if "norm" in name else torch.randn_like(parameter) / 5)
    return made.eval()


def config(groups: tuple[str, ...] = ("attention", "mlp", "down")) -> Config:
    block = "model.layers.{layer}."

    def group(name: str, kind: str, channels: int, source: str, targets: list[str]) -> dict[str, Any]:
        return {
            "name": name,
            "kind": kind,
            "layers": f"0-{LAYERS - 1}",
            "channels": channels,
            "sources": [{"path": f"{block}{source}.weight", "size": channels}],
            "targets": [{"path": f"{block}{target}.weight", "dim": 1, "size": channels} for target in targets],
        }

    attention = [f"self_attn.{letter}_proj" for letter in "qkv"]
    every = {
        "attention": group("attention", "norm_linear", HIDDEN, "input_layernorm", attention),
        "mlp": group("mlp", "norm_linear", HIDDEN, "post_attention_layernorm", ["mlp.gate_proj", "mlp.up_proj"]),
        "down": group("down", "linear_linear", INNER, "mlp.up_proj", ["mlp.down_proj"]),
    }
    fingerprint = structure_of(model()).fingerprint
    versions = {"autoquant": "0", "torch": "0", "model": "test", "capture": "hand", "fingerprint": fingerprint}
    content = {
        "format_version": 2,
        "provenance": versions,
        "model": {"layers": LAYERS, "hidden_size": HIDDEN, "parameters": 21_048},
        "smoothing": {"groups": [every[name] for name in groups]},
        "rotation": {},
        "quantization": {},
    }
    return Config.model_validate(content, strict=False)


def batches() -> list[Tensor]:
    return [torch.randint(1, 50, (2, 16), generator=torch.Generator().manual_seed(seed)) for seed in range(3)]


@torch.no_grad()
def test_the_profile_is_reached_and_the_function_kept(outliers: Any) -> None:
    made = model()
    before = made(batches()[0]).logits
    figures = outliers.add_outliers_(made, config(), batches())
    after = made(batches()[0]).logits
    assert ((after - before).norm() / before.norm()).item() < 1e-12
    assert len(figures) == 3 * LAYERS
    worst = {figures["attention", layer] > 20 for layer in range(LAYERS)}
    assert worst == {True, False}, "one layer is the worst"
    for (name, _), figure in figures.items():
        wanted = [20.0] if name == "down" else [13.0, 25.0]
        assert any(figure == pytest.approx(target, rel=1e-5) for target in wanted), f"{name}: {figure}"


@torch.no_grad()
def test_the_same_seed_gives_the_same_channels_in_every_layer(outliers: Any) -> None:
    first, second = model(), model()
    reference = {name: parameter.clone() for name, parameter in first.named_parameters()}
    outliers.add_outliers_(first, config(), batches(), seed=5)
    outliers.add_outliers_(second, config(), batches(), seed=5)
    changed = set()
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, second.get_parameter(name))
        if "layernorm" in name:
            changed |= set((parameter / reference[name] > 1.5).nonzero().flatten().tolist())
    assert len(changed) == 1


def test_a_config_with_narrow_groups_only_is_an_error(outliers: Any) -> None:
    narrow = config(("down",))
    narrow = edited(narrow, model=edited(narrow.model, hidden_size=INNER))
    with pytest.raises(AutoQuantError, match="no norm -> linear or up -> down group"):
        outliers.add_outliers_(model(), narrow, batches())
