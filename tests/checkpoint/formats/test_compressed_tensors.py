"""What vLLM and others load: written, read back, converted, refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from quantized import DATA, PACKAGED, STATIC_KV, config_of, gpt2, windows
from safetensors.torch import load_file, save_file

import autoquant
from autoquant.checkpoint.convert import convert_checkpoint
from autoquant.checkpoint.formats import COMPRESSED_TENSORS, NATIVE, Wish, format_of
from autoquant.checkpoint.formats.native import TENSORS
from autoquant.checkpoint.quantize import Recipe, quantize_checkpoint
from autoquant.checkpoint.targets import reasons_against, targets
from autoquant.cli.main import main
from autoquant.config.file import save_config
from autoquant.config.format import (
    ActivationQuantization,
    Config,
    QuantizationOverride,
    StaticClip,
    Strategy,
    edited,
)
from autoquant.errors import AutoQuantError
from autoquant.io.folders import PROVENANCE
from autoquant.pipeline.select import Transforms
from autoquant.quantizer.linear import int8_weights

TOKEN, STATIC, TENSOR = Strategy.PER_CHANNEL_PER_TOKEN, Strategy.PER_CHANNEL_STATIC, Strategy.PER_TENSOR_STATIC
SERVED = Wish(COMPRESSED_TENSORS)


def recipe(strategy: Strategy, config: Config | None = None, transforms: str = "fc_fc:0.5+rotation") -> Recipe:
    return Recipe(config or config_of(PACKAGED), strategy, Transforms.parse(transforms), windows())


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for each strategy and format."""
    folder = tmp_path_factory.mktemp("made")
    for strategy in (TOKEN, STATIC, TENSOR):
        for form in (COMPRESSED_TENSORS, NATIVE):
            quantize_checkpoint(PACKAGED, folder / f"{strategy.name}-{form}", recipe(strategy), {}, wish=Wish(form))
    return folder


@pytest.mark.parametrize("strategy", [TOKEN, STATIC, TENSOR])
def test_tensors_names_and_shapes_are_those_that_servers_expect(strategy: Strategy, made: Path) -> None:
    folder = made / f"{strategy.name}-{COMPRESSED_TENSORS}"
    tensors, native = load_file(folder / "model.safetensors"), load_file(made / f"{strategy.name}-{NATIVE}" / TENSORS)
    linear = "model.layers.2.mlp.down_proj"
    assert torch.equal(tensors[f"{linear}.weight"], native[f"{linear}.weight.values"])
    scale = tensors[f"{linear}.weight_scale"]
    assert scale.shape == ((1,) if strategy is TENSOR else (128, 1)) and scale.dtype is torch.float32
    assert torch.equal(scale.flatten(), native[f"{linear}.weight.scale"].flatten())
    assert (f"{linear}.input_scale" in tensors) == (strategy is not TOKEN)
    if strategy is not TOKEN:
        assert tensors[f"{linear}.input_scale"].shape == (1,)
        q, k, v = (tensors[f"model.layers.2.self_attn.{p}_proj.input_scale"] for p in "qkv")
        assert torch.equal(q, k) and torch.equal(q, v), "one slot at the server"
    assert tensors["lm_head.weight"].dtype is torch.float16
    assert len(tensors) == 7 * 5 * (2 + (strategy is not TOKEN)) + 2 * 5 + 3  # norms; embedding, last norm, head
    settings = json.loads((folder / "config.json").read_text())
    assert settings["tie_word_embeddings"] is False and settings["architectures"] == ["LlamaForCausalLM"]
    section = settings["quantization_config"]
    assert section["ignore"] == ["lm_head"] and section["config_groups"]["group_0"]["targets"] == ["Linear"]


def test_a_folder_has_all_that_a_server_reads(made: Path) -> None:
    folder = made / f"STATIC-{COMPRESSED_TENSORS}".replace("STATIC", STATIC.name)
    wanted = {"README.md", "autoquant_config.json", PROVENANCE, "config.json", "generation_config.json"}
    wanted |= {"model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in folder.iterdir()} == wanted
    card = (folder / "README.md").read_text()
    assert f"`{STATIC.value}`" in card and "35 matrices" in card and "vllm serve" in card


@torch.no_grad()
@pytest.mark.parametrize("strategy", [TOKEN, STATIC, TENSOR])
def test_a_loaded_folder_computes_what_the_native_one_does(strategy: Strategy, made: Path) -> None:
    served, native = (
        autoquant.load(made / f"{strategy.name}-{form}", "float32") for form in (COMPRESSED_TENSORS, NATIVE)
    )
    assert len(int8_weights(served)) == 35
    assert not hasattr(served.config, "quantization_config")
    assert torch.equal(served(windows()[0]).logits, native(windows()[0]).logits)


@pytest.mark.parametrize("strategy", [TOKEN, STATIC, TENSOR])
def test_there_and_back_again_is_the_same_bytes(strategy: Strategy, made: Path, tmp_path: Path) -> None:
    served, native = (made / f"{strategy.name}-{form}" for form in (COMPRESSED_TENSORS, NATIVE))
    assert convert_checkpoint(native, tmp_path / "served", Wish(COMPRESSED_TENSORS, "vllm")) == NATIVE
    assert files(tmp_path / "served") == files(served)
    assert convert_checkpoint(tmp_path / "served", tmp_path / "native", Wish(NATIVE)) == COMPRESSED_TENSORS
    assert files(tmp_path / "native") == files(native)


def test_several_schemes_come_back_as_the_same_bytes(tmp_path: Path) -> None:
    """What `search --target vllm` finds: single linears with scales per token, clipped scales."""
    config = config_of(PACKAGED)
    spiky = QuantizationOverride(path="model.layers.{layer}.mlp.down_proj", layers="0,4", strategy=TOKEN)
    clip = ActivationQuantization(clip=StaticClip.MSE)
    section = edited(config.quantization, overrides=(spiky,), activations=clip)
    found = recipe(STATIC, edited(config, quantization=section))
    for form in (NATIVE, COMPRESSED_TENSORS):
        quantize_checkpoint(PACKAGED, tmp_path / form, found, {}, wish=Wish(form))
    convert_checkpoint(tmp_path / NATIVE, tmp_path / "served", Wish(COMPRESSED_TENSORS, "vllm"))
    assert files(tmp_path / "served") == files(tmp_path / COMPRESSED_TENSORS)
    convert_checkpoint(tmp_path / "served", tmp_path / "back", Wish(NATIVE))
    assert files(tmp_path / "back") == files(tmp_path / NATIVE)


def test_convert_takes_no_folder_with_a_link_out_of_it(made: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(made / f"{TOKEN.name}-{NATIVE}", tmp_path / "native")
    (tmp_path / "secret").write_text("x")
    (folder / "notes.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(AutoQuantError, match=r"notes\.txt: is a link out of the checkpoint"):
        convert_checkpoint(folder, tmp_path / "out", Wish(COMPRESSED_TENSORS))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["native", "secret"]


def test_a_loaded_model_saves_what_it_was_loaded_from(made: Path, tmp_path: Path) -> None:
    folder = made / f"{STATIC.name}-{COMPRESSED_TENSORS}"
    autoquant.load(folder).save_pretrained(tmp_path / "again")
    again, before = files(tmp_path / "again"), files(folder)
    assert again == {name: before[name] for name in again}, "no tokenizer was given"
    assert before.keys() - again.keys() == {"tokenizer.json", "tokenizer_config.json"}
    native = autoquant.load(made / f"{STATIC.name}-{NATIVE}")
    native.save_pretrained(tmp_path / "other", format=COMPRESSED_TENSORS)
    assert files(tmp_path / "other") == again


def test_low_memory_writes_the_same_bytes(made: Path, tmp_path: Path) -> None:
    quantize_checkpoint(PACKAGED, tmp_path / "out", recipe(STATIC), {}, wish=SERVED, low_memory=True)
    assert files(tmp_path / "out") == files(made / f"{STATIC.name}-{COMPRESSED_TENSORS}")


@torch.no_grad()
def test_mixed_schemes_are_groups_with_names(tmp_path: Path) -> None:
    config = config_of(PACKAGED)
    overrides = (
        QuantizationOverride(path="model.layers.{layer}.mlp.down_proj", layers="0-1", strategy=TOKEN),
        QuantizationOverride(path="model.layers.{layer}.self_attn.o_proj", layers="4", strategy=None),
    )
    config = edited(config, quantization=edited(config.quantization, overrides=overrides))
    for form in (COMPRESSED_TENSORS, NATIVE):
        quantize_checkpoint(PACKAGED, tmp_path / form, recipe(STATIC, config), {}, wish=Wish(form))
    section = json.loads((tmp_path / COMPRESSED_TENSORS / "config.json").read_text())["quantization_config"]
    static, token = section["config_groups"]["group_0"], section["config_groups"]["group_1"]
    assert token["targets"] == ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
    assert len(static["targets"]) == 35 - 2 - 1 and "Linear" not in static["targets"]
    assert sorted(section["ignore"]) == ["lm_head", "model.layers.4.self_attn.o_proj"]
    served, native = (autoquant.load(tmp_path / form, "float32") for form in (COMPRESSED_TENSORS, NATIVE))
    assert torch.equal(served(windows()[0]).logits, native(windows()[0]).logits)
    convert_checkpoint(tmp_path / COMPRESSED_TENSORS, tmp_path / "back", Wish(NATIVE))
    assert files(tmp_path / "back") == files(tmp_path / NATIVE)


def mixture(folder: Path, kind: str = "mixtral") -> Config:
    """A tiny mixture of experts with a tokenizer, and its config: all linears but head and routers in int8."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from autoquant.analyzer.analyze import analyze
    from autoquant.models.reduce import randomise_
    from autoquant.models.repair import find_source

    sizes = {"vocab_size": 2048, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    tokens = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1}
    made: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **heads, **tokens))
    randomise_(made, 0)
    made.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(PACKAGED / name, folder / name)
    return analyze(find_source(str(folder)), how="export").config


def ignores_experts(ignored: Iterable[str], module: str) -> bool:
    """True if all names are ignored that vLLM 0.32 asks for, which are not those of the hub for every type."""
    found = [name.removeprefix("re:") for name in ignored if name.startswith("re:")]
    asked = [f"{module}.0.{name}" for name in ("gate_proj", "up_proj", "down_proj")]
    return all(any(re.match(expression, name) for expression in found) for name in asked)


def test_experts_that_the_hub_has_in_one_tensor_stay_in_floating_point_by_every_name(tmp_path: Path) -> None:
    config = mixture(tmp_path / "model", "granitemoe")
    stacks = [linear.path for linear in config.model.linears if linear.stack is not None]
    section = edited(config.quantization, exclude=(*config.quantization.exclude, *stacks))
    made = Recipe(edited(config, quantization=section), STATIC, Transforms.parse("none"), windows())
    quantize_checkpoint(tmp_path / "model", tmp_path / "dense", made, {}, wish=SERVED)
    section = json.loads((tmp_path / "dense" / "config.json").read_text())["quantization_config"]
    ignored = set(section["ignore"])
    block = "model.layers.1.block_sparse_moe"
    assert {f"{block}.input_linear", f"{block}.output_linear"} <= ignored, "each layer's by itself"
    assert ignores_experts(ignored, f"{block}.experts")
    assert not any(re.match(name.removeprefix("re:"), "model.layers.1.self_attn.q_proj") for name in ignored)


@torch.no_grad()
def test_experts_have_the_hubs_names_one_by_one(tmp_path: Path) -> None:
    config = mixture(tmp_path / "model")
    for form in (COMPRESSED_TENSORS, NATIVE):
        made = Recipe(config, TOKEN, Transforms.parse("none"))
        quantize_checkpoint(tmp_path / "model", tmp_path / form, made, {}, wish=Wish(form, None))
    tensors = load_file(tmp_path / COMPRESSED_TENSORS / "model.safetensors")
    expert = "model.layers.1.block_sparse_moe.experts.3"
    native = load_file(tmp_path / NATIVE / TENSORS)
    gate_up = native["model.layers.1.mlp.experts.gate_up_proj.values"][3]
    assert torch.equal(tensors[f"{expert}.w1.weight"], gate_up[:48]) and tensors[f"{expert}.w1.weight_scale"].shape == (
        48,
        1,
    )
    assert torch.equal(tensors[f"{expert}.w3.weight"], gate_up[48:])
    assert tensors[f"{expert}.w2.weight"].shape == (32, 48)
    section = json.loads((tmp_path / COMPRESSED_TENSORS / "config.json").read_text())["quantization_config"]
    routers = {f"model.layers.{i}.{name}" for i in (0, 1) for name in ("mlp.gate", "block_sparse_moe.gate")}
    assert set(section["ignore"]) == {"lm_head", *routers}, "under both names"
    served, kept = (autoquant.load(tmp_path / form, "float32") for form in (COMPRESSED_TENSORS, NATIVE))
    assert torch.equal(served(windows()[0]).logits, kept(windows()[0]).logits)
    convert_checkpoint(tmp_path / COMPRESSED_TENSORS, tmp_path / "back", Wish(NATIVE))
    assert files(tmp_path / "back") == files(tmp_path / NATIVE)

    section = edited(config.quantization, exclude=(*config.quantization.exclude, *EXPERTS))
    dense = edited(config, quantization=section)
    quantize_checkpoint(
        tmp_path / "model", tmp_path / "dense", Recipe(dense, TOKEN, Transforms.parse("none")), {}, wish=SERVED
    )
    section = json.loads((tmp_path / "dense" / "config.json").read_text())["quantization_config"]
    assert r"re:model\.layers\.0\.block_sparse_moe\.experts\.\d+\.w2$" in section["ignore"]
    assert all(ignores_experts(section["ignore"], f"model.layers.1.{at}.experts") for at in ("block_sparse_moe", "mlp"))
    assert "model.layers.0.block_sparse_moe.experts.2.w2.weight_scale" not in load_file(
        tmp_path / "dense" / "model.safetensors"
    )
    assert len(int8_weights(autoquant.load(tmp_path / "dense"))) == 8

    (reason,) = reasons_against("transformers", dense)
    assert reason.startswith("model.layers.{layer}.mlp.experts.") and "loads no experts; the nearest is" in reason
    assert reasons_against("vllm", dense) == ()

    static = Recipe(config, STATIC, Transforms.parse("none"), windows())
    with pytest.raises(AutoQuantError, match="format 'compressed-tensors' cannot take the result") as caught:
        quantize_checkpoint(tmp_path / "model", tmp_path / "static", static, {}, wish=SERVED)
    assert "takes no int8 experts per channel / per tensor static; the nearest is" in caught.value.details[0]


EXPERTS = ("model.layers.{layer}.mlp.experts.gate_up_proj", "model.layers.{layer}.mlp.experts.down_proj")


@pytest.mark.parametrize(
    ("wish", "strategy", "message", "detail"),
    [
        (Wish(None, "vllm"), Strategy.PER_CHANNEL_DYNAMIC, "the target 'vllm'", "the nearest is .*per_token_dynamic$"),
        (Wish(None, "any"), STATIC, "the target 'any'", "the nearest is .*per_token_dynamic$"),
        (
            SERVED,
            Strategy(STATIC_KV),
            "the format 'compressed-tensors'",
            "nearest is .*tensor_static, .*int8_per_token_head",
        ),
    ],
)
def test_what_is_asked_for_and_not_served_is_refused_before_the_work(
    wish: Wish, strategy: Strategy, message: str, detail: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autoquant.checkpoint.quantize.prepare_held_", None)  # nothing is calibrated
    with pytest.raises(AutoQuantError, match=f"{message} cannot take the result") as caught:
        quantize_checkpoint(PACKAGED, tmp_path / "out", recipe(strategy), {}, wish=wish)
    assert any(re.search(detail, line) for line in caught.value.details), caught.value.details
    assert not list(tmp_path.iterdir())


def test_a_prefix_and_online_rotations_are_refused() -> None:
    from autoquant.checkpoint.formats import Changes, choose_format
    from autoquant.executor.resolved import ResolvedOnline

    config = config_of(PACKAGED)
    prefixed = edited(config, quantization=edited(config.quantization, prefix=(0,)))
    changes = Changes(("a.bias",), ("norm",), (ResolvedOnline("R4", "model.layers.0.mlp.down_proj", 352, None),))
    chosen = choose_format(Wish(), prefixed, changes)
    assert chosen.form == NATIVE
    assert [reason.partition(":")[0] for reason in chosen.against] == [
        "quantization.prefix",
        "model.layers.0.mlp.down_proj",
        "norm",
        "a.bias",
    ]


def test_a_rotated_residual_is_not_for_a_class_whose_head_is_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tied = replace(targets()["vllm"], head_is_table=frozenset({"LlamaForCausalLM"}))
    monkeypatch.setattr("autoquant.checkpoint.targets.targets", lambda: {"vllm": tied})
    for transforms, form in (("fc_fc:0.5+rotation", NATIVE), ("fc_fc:0.5", COMPRESSED_TENSORS)):
        made = recipe(TOKEN, transforms=transforms)
        done = quantize_checkpoint(PACKAGED, tmp_path / form, made, {}, wish=Wish())
        assert done.chosen.form == form
        assert [reason.partition(":")[0] for reason in done.chosen.against] == ["lm_head"] * (form == NATIVE)


def test_without_a_wish_the_command_says_which_format_and_why(tmp_path: Path) -> None:
    save_config(config_of(PACKAGED), tmp_path / "c.json")
    text = str(DATA / "sample.calibration.txt")
    base = ["quantize", str(PACKAGED), str(tmp_path / "c.json"), "--quiet", "--calibration", text, "--length", "64"]
    for strategy, form, lines in ((TOKEN.value, COMPRESSED_TENSORS, 0), (STATIC_KV, NATIVE, 1)):
        more = ["-o", str(tmp_path / form), "--sequences", "2", "--strategy", strategy]
        result = CliRunner().invoke(main, [*base[:3], *base[4:], *more])
        assert result.exit_code == 0, result.output
        said = [
            line for line in result.stdout.splitlines() if line.startswith("format native, not compressed-tensors: ")
        ]
        assert len(said) == lines and f", {form}" in result.stdout
        found = format_of(tmp_path / form)
        assert found is not None and found.name == form


def test_convert_says_what_it_did_and_what_it_cannot(made: Path, tmp_path: Path) -> None:
    native = made / f"{TOKEN.name}-{NATIVE}"
    result = CliRunner().invoke(main, ["convert", str(native), "--to", COMPRESSED_TENSORS, "-o", str(tmp_path / "out")])
    assert (result.exit_code, result.stdout) == (0, f"{tmp_path / 'out'}: native -> compressed-tensors\n")
    for source, to, message in (
        (native, NATIVE, "is of the format 'native' already"),
        (PACKAGED, NATIVE, "no quantized checkpoint that can be converted"),
        (native, "gguf", "no format 'gguf'"),
    ):
        result = CliRunner().invoke(main, ["convert", str(source), "--to", to, "-o", str(tmp_path / "none")])
        assert result.exit_code == 1 and message in result.stderr
        assert not (tmp_path / "none").exists()


def test_a_killed_export_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("autoquant.checkpoint.formats.compressed_tensors.write_surroundings", killed)
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(PACKAGED, tmp_path / "out", recipe(TOKEN), {}, wish=SERVED)
    assert not list(tmp_path.iterdir())


def edit(folder: Path, **tensors: Any) -> None:
    """Replace tensors of a folder, by their names with dots written as two underscores; None takes one away."""
    named = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    stored = {**load_file(folder / "model.safetensors"), **named}
    save_file(
        {n: t for n, t in stored.items() if t is not None}, folder / "model.safetensors", metadata={"format": "pt"}
    )


LINEAR = "model__layers__0__mlp__down_proj"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({f"{LINEAR}__weight": None}, "1 tensors are missing: model.layers.0.mlp.down_proj.weight"),
        ({f"{LINEAR}__weight": torch.ones(128, 352)}, r"is torch.float32 \[128, 352\], not int8 \[128, 352\]"),
        ({f"{LINEAR}__input_scale": None}, "has no input_scale, which static activations need"),
        ({"other": torch.ones(1)}, "its model has no place for 1 tensors: other"),
        ({f"{LINEAR}__weight_zero_point": torch.ones(128, 1)}, "is not zero; only symmetric int8 runs here"),
        ({f"{LINEAR}__weight_scale": torch.ones(3, 1)}, r"has \[3, 1\] weight_scale, which is not what its group says"),
    ],
)
def test_a_damaged_folder_says_what_is_wrong(tensors: Any, message: str, made: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(made / f"{STATIC.name}-{COMPRESSED_TENSORS}", folder)
    edit(folder, **tensors)
    with pytest.raises(AutoQuantError, match=message):
        autoquant.load(folder)


@torch.no_grad()
def test_another_tools_folder_runs_and_is_not_converted(made: Path, tmp_path: Path) -> None:
    """As LLM Compressor writes one: no files of ours, scales in the model's dtype, -128 among the weights."""
    folder = tmp_path / "theirs"
    shutil.copytree(made / f"{TOKEN.name}-{COMPRESSED_TENSORS}", folder)
    for name in ("autoquant_config.json", PROVENANCE, "README.md"):
        (folder / name).unlink()
    scale = load_file(folder / "model.safetensors")["model.layers.0.mlp.down_proj.weight_scale"]
    weight = torch.full((128, 352), -128, dtype=torch.int8)
    edit(folder, **{f"{LINEAR}__weight_scale": scale.bfloat16(), f"{LINEAR}__weight": weight})
    edit(folder, **{f"{LINEAR}__weight_zero_point": torch.zeros(128, 1, dtype=torch.int8)})
    model = autoquant.load(folder, "float32")
    assert torch.equal(int8_weights(model)["model.layers.0.mlp.down_proj.weight"].scale, scale.bfloat16().float())
    assert model(windows()[0]).logits.isfinite().all()
    with pytest.raises(AutoQuantError, match=r"has no autoquant_config.json: another tool wrote it"):
        convert_checkpoint(folder, tmp_path / "native", Wish(NATIVE))
    with pytest.raises(AutoQuantError, match=r"has no autoquant_config.json, so that a copy of it cannot be written"):
        model.save_pretrained(tmp_path / "copy")
    with pytest.raises(AutoQuantError, match="is quantized already"):
        quantize_checkpoint(folder, tmp_path / "again", recipe(TOKEN), {})


def test_transposed_linears_stay_native(tmp_path: Path) -> None:
    source = gpt2(tmp_path / "gpt2")
    made = Recipe(config_of(source), TOKEN, Transforms.parse("none"))
    done = quantize_checkpoint(source, tmp_path / "out", made, {}, wish=Wish())
    assert done.chosen.form == NATIVE
    assert done.chosen.against[0] == "transformer.h.0.attn.c_attn: its weight is transposed (Conv1D); exclude it"
