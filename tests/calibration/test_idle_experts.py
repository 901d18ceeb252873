from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import autoquant
from autoquant.analyzer.analyze import analyze
from autoquant.calibration.idle_experts import idle_experts, idle_text
from autoquant.checkpoint.quantize import Recipe, quantize_checkpoint
from autoquant.config.format import Strategy
from autoquant.io.folders import PROVENANCE
from autoquant.models.repair import find_source
from autoquant.pipeline.select import Transforms
from autoquant.quantizer.strategies import PlannedLinear, scheme_of

STATIC = Strategy.PER_CHANNEL_STATIC


def stack(weight: str, experts: int | None = 3) -> PlannedLinear:
    return PlannedLinear(weight, weight, None, 2, 2, experts, 2, scheme_of(STATIC))


def test_an_expert_is_idle_if_none_of_its_weights_saw_anything() -> None:
    up, down = torch.ones(3, 2), torch.ones(3, 2)
    up[1] = 0
    down[:2] = 0
    maxima = {"a.up": up, "a.down": down, "b.weight": torch.zeros(2)}
    planned = [stack("a.up"), stack("a.down"), stack("c.up"), stack("b.weight", None)]
    assert idle_experts(planned, maxima) == {"a": (1,)}
    assert idle_experts(planned, maxima | {"a.up": torch.ones(3, 2)}) == {}


def test_the_text_names_them_and_counts_them() -> None:
    assert idle_text({"a": (1,)}) == (
        "no calibration token reached 1 expert, whose scales no data tells: a 1; "
        "calibrate on more, or more varied, text"
    )
    text = idle_text({"a": (1, 2), "b": tuple(range(9))})
    assert "reached 11 experts" in text
    assert ": a 1, a 2, b 0, b 1, b 2, b 3, b 4, b 5 and 3 more; " in text


def mixture(folder: Path) -> Any:
    """A Mixtral whose router sends the ids below 16 to any expert but number 3."""
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 32}
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 2}
    experts: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 1}
    torch.manual_seed(0)
    model: Any = MixtralForCausalLM(MixtralConfig(**sizes, **heads, **experts, initializer_range=0.1)).eval()
    with torch.no_grad():
        table = model.model.embed_tokens.weight
        table[:16, 0], table[16:, 0] = -4.0, 4.0
        for layer in model.model.layers:
            layer.mlp.gate.weight[:, 0] = 0
            layer.mlp.gate.weight[3] = 0
            layer.mlp.gate.weight[3, 0] = 8.0
            layer.self_attn.o_proj.weight[0] = 0
            layer.mlp.experts.down_proj[:, 0] = 0
    model.save_pretrained(folder)
    return model


def ids(largest: int) -> tuple[Tensor, ...]:
    drawn = torch.randint(0, largest, (8, 32), generator=torch.Generator().manual_seed(0))
    return tuple(drawn.split(1))


def test_experts_without_tokens_are_named_in_the_result_and_the_provenance(tmp_path: Path) -> None:
    from quantized import PACKAGED
    from transformers import AutoTokenizer

    mixture(tmp_path / "model")
    AutoTokenizer.from_pretrained(PACKAGED).save_pretrained(tmp_path / "model")
    config = analyze(find_source(str(tmp_path / "model")), how="export").config
    for name, largest, experts in (("some", 16, {3}), ("all", 32, set())):
        recipe = Recipe(config, STATIC, Transforms.parse("none"), ids(largest))
        done = quantize_checkpoint(tmp_path / "model", tmp_path / name, recipe, {}).quantized
        owners = {f"model.layers.{layer}.mlp.experts" for layer in range(2)} if experts else set()
        assert set(done.idle) == owners
        assert all(experts <= set(numbers) for numbers in done.idle.values())
        made = json.loads((tmp_path / name / PROVENANCE).read_text(encoding="utf-8"))
        assert made["result"]["idle_experts"] == {owner: list(numbers) for owner, numbers in done.idle.items()}
        assert autoquant.load(tmp_path / name)(ids(32)[0]).logits.isfinite().all()


def test_experts_that_are_modules_of_a_list() -> None:
    names = [f"layers.0.experts.{number}.{part}.weight" for number in range(3) for part in ("up", "down")]
    entries = [stack(name, None) for name in [*names, "layers.0.q.weight"]]
    maxima = {name: torch.ones(4) for name in names if ".2." not in name} | {"layers.0.q.weight": torch.ones(4)}
    maxima["layers.0.experts.1.up.weight"] = torch.zeros(4)
    assert idle_experts(entries, maxima) == {"layers.0.experts": (2,)}
    assert idle_experts(entries, {}) == {}, "nothing was calibrated"
