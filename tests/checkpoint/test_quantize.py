from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from quantized import DATA, PACKAGED, STATIC, STATIC_KV, TINY, config_of, gpt2, windows
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import autoquant
from autoquant.checkpoint.formats.native import TENSORS
from autoquant.checkpoint.quantize import Recipe, load_float32, quantize_checkpoint, windows_on_gpu
from autoquant.cli.main import main
from autoquant.config.file import save_config
from autoquant.config.format import Config, Rounding, SmoothingMethod, StaticClip, Strategy, edited
from autoquant.errors import AutoQuantError
from autoquant.io.folders import PROVENANCE
from autoquant.io.safetensors_stream import open_shards
from autoquant.pipeline.select import Transforms
from autoquant.quantizer.linear import int8_weights

DYNAMIC = "w_int8_per_channel_a_int8_per_token_dynamic"


def recipe(folder: Path, transforms: str, strategy: str = STATIC_KV, config: Config | None = None) -> Recipe:
    return Recipe(config or config_of(folder), Strategy(strategy), Transforms.parse(transforms), windows())


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What ``quantize_checkpoint`` does where the whole model is needed."""

    def quantize(*arguments: Any, **named: Any) -> None:
        with monkeypatch.context() as patched:
            patched.setattr("autoquant.checkpoint.quantize._streamable", lambda *_: (None, None))
            quantize_checkpoint(*arguments, **named)

    return quantize


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("transforms", ["fc_fc:0.5+rotation", "smooth:0.6+fc_fc", "none"])
@pytest.mark.parametrize("model", ["packaged", "gpt2"])
def test_layer_by_layer_the_same_bytes_are_written(model: str, transforms: str, whole: Any, tmp_path: Path) -> None:
    source = PACKAGED if model == "packaged" else gpt2(tmp_path / "gpt2")
    made = recipe(source, transforms)
    whole(source, tmp_path / "whole", made, {"seed": 1})
    layers: list[tuple[str, int, int]] = []
    quantize_checkpoint(
        source, tmp_path / "layered", made, {"seed": 1}, progress=lambda *at: layers.append(at), low_memory=True
    )
    assert not {"quantize"}.intersection(step for step, _, _ in layers)
    assert files(tmp_path / "layered") == files(tmp_path / "whole")
    count = 5 if model == "packaged" else 3
    assert ("calibrate", count, count) in layers


@pytest.mark.parametrize("model", ["packaged", "gpt2"])
def test_linears_decided_in_sequence_are_written_layer_by_layer(model: str, whole: Any, tmp_path: Path) -> None:
    source = PACKAGED if model == "packaged" else gpt2(tmp_path / "gpt2")
    config = config_of(source)
    weights = edited(config.quantization.weights, rounding=Rounding.QRONOS, bias_correction=model == "gpt2")
    activations = edited(config.quantization.activations, clip=StaticClip.OUTPUT)
    config = edited(config, quantization=edited(config.quantization, weights=weights, activations=activations))
    made = recipe(source, "smooth+fc_fc+rotation" if model == "packaged" else "smooth:0.6+fc_fc", STATIC_KV, config)
    whole(source, tmp_path / "whole", made, {"seed": 1})
    quantize_checkpoint(source, tmp_path / "layered", made, {"seed": 1}, low_memory=True)
    result = json.loads((tmp_path / "layered" / PROVENANCE).read_text())["result"]
    assert (result["device"], result["dtype"]) == ("cpu", "float32")
    errors = result["output_errors"]
    assert len(errors) == (35 if model == "packaged" else 12) and all(0 < error < 0.1 for error in errors.values())
    assert files(tmp_path / "layered") == files(tmp_path / "whole")


def test_experts_that_are_stored_one_by_one_are_read_layer_by_layer(whole: Any, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("mixtral", **TINY, num_local_experts=3, num_experts_per_tok=2), dtype=torch.bfloat16
    )
    model.save_pretrained(tmp_path / "in")
    assert "model.layers.0.block_sparse_moe.experts.2.w1.weight" in open_shards(tmp_path / "in").entries
    batches = tuple(torch.randint(0, 64, (3, 20), generator=torch.Generator().manual_seed(0)).split(1))
    made = replace(recipe(tmp_path / "in", "smooth+fc_fc+rotation", STATIC), calibration=batches)
    whole(tmp_path / "in", tmp_path / "whole", made, {})
    quantize_checkpoint(tmp_path / "in", tmp_path / "layered", made, {}, low_memory=True)
    assert files(tmp_path / "layered") == files(tmp_path / "whole")


def test_large_tables_are_rounded_by_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = recipe(PACKAGED, "fc_fc:0.5+rotation")
    quantize_checkpoint(PACKAGED, tmp_path / "at once", made, {})
    monkeypatch.setattr("autoquant.checkpoint.streamed._LARGE", 1000)
    quantize_checkpoint(PACKAGED, tmp_path / "rows", made, {})
    assert files(tmp_path / "rows") == files(tmp_path / "at once")


def test_layer_by_layer_keys_are_scaled_alike(whole: Any, tmp_path: Path) -> None:
    config = config_of(PACKAGED)
    groups = tuple(edited(g, enable=g.kind == "query_key" or None) for g in config.smoothing.groups)
    config = edited(config, smoothing=edited(config.smoothing, groups=groups))
    for strategy in (STATIC_KV, DYNAMIC):
        made = recipe(PACKAGED, "fc_fc:0.5+rotation", strategy, config)
        whole(PACKAGED, tmp_path / "whole", made, {}, force=True)
        quantize_checkpoint(PACKAGED, tmp_path / "layered", made, {}, force=True, low_memory=True)
        assert files(tmp_path / "layered") == files(tmp_path / "whole")
    weights = [load_float32(PACKAGED), autoquant.load(tmp_path / "whole", torch.float32)]
    keys = [w(windows()[0], use_cache=True).past_key_values.layers[0].keys.abs().amax((0, 2)) for w in weights]
    spread = [(k.max() / k.mean()).item() for k in keys]
    assert spread[1] < 0.8 * spread[0], "the cached keys are flatter"


@torch.no_grad()
def test_low_memory_holds_one_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []
    made, forward = recipe(PACKAGED, "none"), nn.Linear.forward

    def spy(module: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        held.append(sum(not parameter.is_meta for parameter in model[0].model.layers.parameters()))
        return forward(module, x)

    from autoquant.checkpoint import layerwise

    build, model = layerwise.Stream._model, []
    monkeypatch.setattr(layerwise.Stream, "_model", lambda run: model.append(build(run)) or model[-1])
    monkeypatch.setattr(nn.Linear, "forward", spy)
    quantize_checkpoint(PACKAGED, tmp_path / "out", made, {}, low_memory=True)
    assert set(held) == {9}, "the parameters of one layer"
    assert len(held) == 2 * 35, "the head, of which nothing is asked, does not run"
    assert all(parameter.is_meta for parameter in model[0].model.layers.parameters())


@torch.no_grad()
def test_a_loaded_model_is_near_the_float_one(tmp_path: Path) -> None:
    quantize_checkpoint(PACKAGED, tmp_path / "out", recipe(PACKAGED, "fc_fc:0.5+rotation"), {})
    model, reference = autoquant.load(tmp_path / "out", torch.float32), load_float32(PACKAGED)
    assert len(int8_weights(model)) == 35 and model.lm_head.weight is not model.model.embed_tokens.weight
    wanted = reference(windows()[0]).logits
    error = ((model(windows()[0]).logits - wanted).square().mean() / wanted.var()).sqrt().item()
    assert error < 0.25
    assert torch.float16 == autoquant.load(tmp_path / "out").lm_head.weight.dtype


@torch.no_grad()
def test_online_rotations_are_made_again_on_loading(tmp_path: Path) -> None:
    config = config_of(PACKAGED)
    online = tuple(edited(o, enable=o.kind == "R4") for o in config.rotation.online)
    config = edited(config, rotation=edited(config.rotation, online=online))
    made = recipe(PACKAGED, "fc_fc:0.5+rotation", config=config)
    quantize_checkpoint(PACKAGED, tmp_path / "out", made, {})
    model = autoquant.load(tmp_path / "out", torch.float32)
    assert model.model.layers[0].mlp.down_proj.rotation.size == 352
    wanted = load_float32(PACKAGED)(windows()[0]).logits
    error = ((model(windows()[0]).logits - wanted).square().mean() / wanted.var()).sqrt().item()
    assert error < 0.25


@pytest.mark.parametrize("rounding", [Rounding.NEAREST, Rounding.QRONOS])
@pytest.mark.parametrize("kind", ["R3", "R4"])
def test_online_rotations_are_put_in_layer_by_layer(kind: str, rounding: Rounding, whole: Any, tmp_path: Path) -> None:
    config = config_of(PACKAGED)
    online = tuple(edited(o, enable=o.kind == kind) for o in config.rotation.online)
    weights = edited(config.quantization.weights, rounding=rounding)
    quantization = edited(config.quantization, weights=weights)
    config = edited(config, rotation=edited(config.rotation, online=online), quantization=quantization)
    made = recipe(PACKAGED, "fc_fc:0.5+rotation", config=config)
    whole(PACKAGED, tmp_path / "whole", made, {})
    quantize_checkpoint(PACKAGED, tmp_path / "layered", made, {}, low_memory=True)
    assert files(tmp_path / "layered") == files(tmp_path / "whole")


@torch.no_grad()
def test_a_prefix_is_stored_and_lowers_the_error(tmp_path: Path) -> None:
    config = config_of(PACKAGED)
    section = edited(config.quantization, prefix=(0,))
    with_prefix = edited(config, quantization=section)
    wanted, errors = load_float32(PACKAGED)(windows()[0]).logits, {}
    for name, used in (("without", config), ("with", with_prefix)):
        quantize_checkpoint(PACKAGED, tmp_path / name, recipe(PACKAGED, "fc_fc:0.5+rotation", config=used), {})
        logits = autoquant.load(tmp_path / name, torch.float32)(windows()[0]).logits
        errors[name] = ((logits - wanted).square().mean() / wanted.var()).sqrt().item()
    assert errors["with"] < 0.6 * errors["without"], errors
    torch.testing.assert_close(logits[:, 0], wanted[:, 0], rtol=1e-4, atol=1e-4)
    model = autoquant.load(tmp_path / "with")
    assert model.get_submodule("fixed_prefix").tokens == (0,)
    assert model.generate(windows()[0][:, :1], max_new_tokens=4, do_sample=False).shape == (1, 5)
    stored = [load_file(tmp_path / name / TENSORS) for name in ("with", "without")]
    shrunk = [stored[0][name].item() / stored[1][name].item() for name in stored[1] if name.endswith("input_scale")]
    assert min(shrunk) < 0.3 and max(shrunk) <= 1.001, "the prefix was left out of the calibration"
    other = edited(with_prefix, quantization=edited(section, prefix=(0, 5)))
    save_config(other, tmp_path / "with" / "autoquant_config.json", force=True)
    with pytest.raises(AutoQuantError, match=r"with: the stored prefix has 1 tokens, quantization\.prefix 2"):
        autoquant.load(tmp_path / "with")
    with pytest.raises(AutoQuantError, match=r"quantization\.prefix: --low-memory cannot compute a prefix"):
        quantize_checkpoint(
            PACKAGED, tmp_path / "low", recipe(PACKAGED, "none", config=with_prefix), {}, low_memory=True
        )
    assert not (tmp_path / "low").exists()


@pytest.mark.parametrize("low_memory", [False, True])
def test_without_calibration(low_memory: bool, tmp_path: Path) -> None:
    made = Recipe(config_of(PACKAGED), Strategy(STATIC_KV), Transforms.parse("rotation"))
    with pytest.raises(AutoQuantError, match=r"static after 'rotation' needs --calibration FILE"):
        quantize_checkpoint(PACKAGED, tmp_path / "out", made, {}, low_memory=low_memory)
    made = Recipe(config_of(PACKAGED), Strategy(DYNAMIC), Transforms.parse("rotation"))
    quantize_checkpoint(PACKAGED, tmp_path / "out", made, {}, low_memory=low_memory)
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_the_command(tmp_path: Path) -> None:
    save_config(config_of(PACKAGED), tmp_path / "c.json")
    arguments = ["quantize", str(PACKAGED), str(tmp_path / "c.json"), "-o", str(tmp_path / "out")]
    arguments += ["--transforms", "fc_fc+rotation"]
    arguments += ["--calibration", str(DATA / "sample.calibration.txt"), "--sequences", "2", "--length", "32"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert (
        result.stdout == f"{tmp_path / 'out'}: {DYNAMIC} after fc_fc+rotation, 2.38 MB -> 2.01 MB, compressed-tensors\n"
    )
    assert "exists already; give --force" in CliRunner().invoke(main, arguments).stderr
    assert CliRunner().invoke(main, [*arguments, "--force", "--quiet"]).output == ""
    renamed = CliRunner().invoke(main, [*arguments, "--force", "--format", "json"])
    assert json.loads(renamed.stdout)["format"] == "compressed-tensors"
    assert "warning: --format json is now --result json" in renamed.stderr
    wrong = CliRunner().invoke(main, [*arguments, "--force", "--strategy", DYNAMIC[:-1]])
    assert (wrong.exit_code, wrong.stdout) == (1, "")
    assert f"no strategy '{DYNAMIC[:-1]}'; did you mean '{DYNAMIC}'?" in wrong.stderr


@pytest.mark.parametrize(
    ("count", "length", "wanted"),
    [(0, 512, 8), (16, 512, 8), (128, 512, 8), (256, 512, 16), (1024, 512, 32), (1024, 2048, 8)],
)
def test_a_pass_on_a_gpu_has_more_windows_where_there_are_many(count: int, length: int, wanted: int) -> None:
    assert windows_on_gpu([torch.zeros(1, length, dtype=torch.long)] * count) == wanted


def test_importing_autoquant_imports_no_torch() -> None:
    import subprocess

    code = "import sys, autoquant; autoquant.load; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("low_memory", [False, True])
def test_each_tensor_keeps_its_stored_dtype(low_memory: bool, tmp_path: Path) -> None:
    source = tmp_path / "mixed"
    shutil.copytree(PACKAGED, source)
    tensors = load_file(source / "model.safetensors")
    wide = ["model.norm.weight", "model.layers.1.input_layernorm.weight"]
    tensors |= {name: tensors[name].float() * (1 + 2**-20) for name in wide}
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    quantize_checkpoint(source, tmp_path / "out", recipe(source, "none"), {}, low_memory=low_memory)
    stored = load_file(tmp_path / "out" / TENSORS)
    assert all(torch.equal(stored[name], tensors[name]) for name in wide)
    other = "model.layers.0.input_layernorm.weight"
    assert {name for name in stored if stored[name].dtype is torch.float32 and "norm" in name} == set(wide)
    assert stored[other].dtype is torch.float16
    loaded = autoquant.load(tmp_path / "out")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float16}, "as transformers loads it"
    assert loaded(windows()[0]).logits.isfinite().all()
    assert torch.equal(autoquant.load(tmp_path / "out", torch.float32).model.norm.weight, tensors[wide[0]])


def test_what_takes_the_whole_model_is_refused_in_low_memory(tmp_path: Path) -> None:
    config = config_of(PACKAGED)
    smoothing = edited(config.smoothing, method=SmoothingMethod.DESCENT)
    weights = edited(config.quantization.weights, bias_correction=True)
    corrected = edited(config, quantization=edited(config.quantization, weights=weights))
    for changed, message in (
        (edited(config, smoothing=smoothing), "cannot find scales by descent"),
        (corrected, "cannot make the bias that model.layers.0.self_attn.q_proj lacks"),
    ):
        with pytest.raises(AutoQuantError, match=message):
            made = recipe(PACKAGED, "fc_fc:0.5+rotation", config=changed)
            quantize_checkpoint(PACKAGED, tmp_path / "low", made, {}, low_memory=True)
    assert not list(tmp_path.iterdir())
