from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized import TINY
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from autoquant.calibration.observers import observe_cache, observe_linears
from autoquant.checkpoint.formats import Changes, format_of
from autoquant.checkpoint.formats.native import (
    FACTS,
    TENSORS,
    load_quantized,
    save_quantized,
)
from autoquant.checkpoint.load import load
from autoquant.checkpoint.provenance import CONFIG
from autoquant.config.format import Config, Strategy
from autoquant.errors import AutoQuantError
from autoquant.io.folders import PROVENANCE
from autoquant.models.load import parameters_on_meta
from autoquant.quantizer.kv_cache import quantize_cache_
from autoquant.quantizer.linear import quantize_
from autoquant.quantizer.strategies import kv_granularity, plan_linears

PACKAGED = Path(__file__).parents[3] / "autoquant" / "data" / "wikinano1m"
HIDDEN, INNER, EXPERTS = 32, 24, 4


def moe() -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "qwen3_moe",
        **{**TINY, "hidden_size": HIDDEN, "intermediate_size": 48},
        head_dim=8,
        num_experts=EXPERTS,
        num_experts_per_tok=2,
        moe_intermediate_size=INNER,
        tie_word_embeddings=True,
        attention_bias=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def config_of(strategy: Strategy) -> Config:
    """The parts of a config that quantization reads, for :func:`moe`."""
    block = "model.layers.{layer}."

    def linear(path: str, inputs: int, outputs: int, **more: Any) -> dict[str, Any]:
        sizes = {"in_features": inputs, "out_features": outputs, "in_dim": 1, "layers": "0-1"}
        return {"path": block + path, "weight": f"{block}{path}.weight"} | sizes | more

    expert = {"stack": EXPERTS, "in_dim": 2}
    linears = [
        linear("self_attn.q_proj", HIDDEN, HIDDEN, bias=f"{block}self_attn.q_proj.bias"),
        linear("self_attn.o_proj", HIDDEN, HIDDEN),
        linear("mlp.experts.gate_up_proj", HIDDEN, 2 * INNER, weight=f"{block}mlp.experts.gate_up_proj", **expert),
        linear("mlp.experts.down_proj", INNER, HIDDEN, weight=f"{block}mlp.experts.down_proj", **expert),
    ]
    versions = {"autoquant": "0", "torch": "0", "model": "test", "capture": "export", "fingerprint": "0"}
    content = {
        "format_version": 2,
        "provenance": versions,
        "model": {"layers": 2, "parameters": 0, "linears": linears},
        "smoothing": {},
        "rotation": {},
        "quantization": {"strategy": strategy},
    }
    return Config.model_validate(content, strict=False)


def ids() -> Tensor:
    return torch.randint(3, 64, (1, 12), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def quantized(strategy: Strategy) -> tuple[Any, Config]:
    model, config = moe(), config_of(strategy)
    planned, granularity = plan_linears(config), kv_granularity(config)
    with observe_linears(model, [linear.weight for linear in planned]) as maxima, observe_cache(model) as kv:
        model(ids())
    quantize_(model, planned, maxima)
    if granularity is not None:
        quantize_cache_(model, granularity, kv)
    return model, config


@pytest.mark.parametrize("strategy", Strategy)
@torch.no_grad()
def test_a_loaded_model_computes_the_same_bits(strategy: Strategy, tmp_path: Path) -> None:
    model, config = quantized(strategy)
    save_quantized(model, tmp_path / "out", config, {"options": {"seed": 3}})
    loaded = load_quantized(tmp_path / "out")
    assert torch.equal(loaded(ids()).logits, model(ids()).logits)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert not loaded.training and not any(tensor.is_meta for tensor in loaded.state_dict().values())
    assert {name: tensor.dtype for name, tensor in loaded.state_dict().items()} == {
        name: tensor.dtype for name, tensor in model.state_dict().items()
    }
    assert json.loads((tmp_path / "out" / PROVENANCE).read_text()) == {"options": {"seed": 3}}
    assert loaded.generate(ids(), max_new_tokens=3, do_sample=False).shape == (1, 15)


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_quantized(*quantized_into(tmp_path / name), {})
    for file in (TENSORS, CONFIG, FACTS, PROVENANCE):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def quantized_into(directory: Path) -> tuple[Any, Path, Config]:
    model, config = quantized(Strategy.PER_CHANNEL_PER_TOKEN)
    return model, directory, config


def test_an_existing_folder_is_kept_unless_forced(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "precious").touch()
    with pytest.raises(AutoQuantError, match="exists already; give --force"):
        save_quantized(*quantized_into(target), {})
    assert (target / "precious").exists()
    with pytest.raises(AutoQuantError, match="holds precious, and autoquant did not write it"):
        save_quantized(*quantized_into(target), {}, force=True)
    (target / "precious").rename(target / PROVENANCE)
    save_quantized(*quantized_into(target), {"new": 1}, force=True)
    assert format_of(target) is not None and json.loads((target / PROVENANCE).read_text()) == {"new": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "a temporary folder was left behind"


def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*arguments: Any, **named: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("autoquant.checkpoint.formats.native.write_tensors", full_disk)
    with pytest.raises(AutoQuantError, match=r"cannot be written.*No space left"):
        save_quantized(*quantized_into(tmp_path / "out"), {})
    monkeypatch.setattr(
        "autoquant.checkpoint.formats.native.write_tensors", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        save_quantized(*quantized_into(tmp_path / "out"), {})
    assert list(tmp_path.iterdir()) == []


def break_tensors(folder: Path) -> None:
    (folder / TENSORS).write_bytes(b"not safetensors")


def lose_a_tensor(folder: Path) -> None:
    tensors: Mapping[str, Tensor] = load_file(folder / TENSORS)
    save_file(
        {name: t for name, t in tensors.items() if "0.self_attn.q_proj.weight.scale" not in name}, folder / TENSORS
    )


def break_facts(folder: Path) -> None:
    (folder / FACTS).write_text("{}")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_tensors, "not a safetensors file"),
        (lose_a_tensor, r"do not fit.*q_proj\.weight\.scale"),
        (break_facts, "damaged: 'provenance'"),
    ],
)
def test_damage_is_named(damage: Any, message: str, tmp_path: Path) -> None:
    save_quantized(*quantized_into(tmp_path / "out"), {})
    damage(tmp_path / "out")
    with pytest.raises(AutoQuantError, match=message):
        load_quantized(tmp_path / "out")


def test_plain_transformers_does_not_load_it_as_noise(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    save_quantized(*quantized_into(tmp_path / "out"), {})
    with pytest.raises(OSError, match="no file named"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_load_model_takes_both_kinds_of_folder_and_converts(tmp_path: Path) -> None:
    save_quantized(*quantized_into(tmp_path / "out"), {})
    converted = load(tmp_path / "out", torch.float16)
    assert converted.model.norm.weight.dtype == torch.float16
    assert converted.model.rotary_emb.inv_freq.dtype == torch.float32
    assert converted(ids()).logits.dtype == torch.float16
    assert load(PACKAGED, torch.float32).model.norm.weight.dtype == torch.float32
    with pytest.raises(AutoQuantError, match="no such folder; expected a checkpoint of transformers"):
        load(tmp_path / "nowhere")
    with pytest.raises(AutoQuantError, match=f"not a quantized model, there is no {FACTS}"):
        load_quantized(PACKAGED)


def test_what_differs_from_the_class_is_made_before_loading(tmp_path: Path) -> None:
    model, config = quantized(Strategy.PER_CHANNEL_PER_TOKEN)

    name = "model.layers.0.self_attn.o_proj"
    bias = nn.Parameter(torch.arange(HIDDEN).bfloat16())
    model.get_submodule(name).register_parameter("bias", bias)
    model.model.layers[1].input_layernorm = nn.Identity()
    changes = Changes((f"{name}.bias",), ("model.layers.1.input_layernorm",))
    save_quantized(model, tmp_path / "out", config, {}, changes=changes)
    loaded = load_quantized(tmp_path / "out")
    assert torch.equal(loaded.get_parameter(f"{name}.bias"), bias)
    assert isinstance(loaded.model.layers[1].input_layernorm, nn.Identity)
    save_quantized(model, tmp_path / "without", config, {})
    with pytest.raises(AutoQuantError, match=r"do not fit.*1\.input_layernorm\.weight"):
        load_quantized(tmp_path / "without")


def test_a_folder_of_version_0_1_is_read(tmp_path: Path) -> None:
    model, config = quantized(Strategy.PER_CHANNEL_PER_TOKEN)
    save_quantized(model, tmp_path / "out", config, {})
    (tmp_path / "out" / CONFIG).rename(tmp_path / "out" / "autoquant.json")
    (tmp_path / "out" / PROVENANCE).unlink()
    facts = json.loads((tmp_path / "out" / FACTS).read_text())
    structure = {key: facts.pop(key) for key in ("created", "identities", "online")}
    (tmp_path / "out" / FACTS).write_text(json.dumps(facts | {"provenance": structure}))
    assert torch.equal(load_quantized(tmp_path / "out")(ids()).logits, model(ids()).logits)


def test_parameters_are_on_meta_only_inside_the_context() -> None:
    with parameters_on_meta():
        inside = nn.BatchNorm1d(2)
    assert inside.weight.is_meta and not inside.running_mean.is_meta
    assert not nn.Linear(1, 1).weight.is_meta
