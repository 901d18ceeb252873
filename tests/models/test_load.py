"""The one loader: folders as people have them are loaded rightly, with what is odd said, or refused in one line."""

from __future__ import annotations

import io
import json
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from autoquant.capture.identity import ties_of
from autoquant.errors import AutoQuantError
from autoquant.models.load import load_checkpoint, load_language_model, load_skeleton
from autoquant.models.repair import find_source
from autoquant.models.source import build_structure
from autoquant.models.tokenizer import load_tokenizer

PACKAGED = Path(__file__).parents[2] / "autoquant" / "data" / "wikinano1m"
EMBEDDING, Q = "model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(PACKAGED, tmp_path / "model"))


def change(folder: Path, edit: Callable[[dict[str, Tensor]], dict[str, Tensor] | None], **settings: Any) -> None:
    """Rewrite the weights by ``edit`` and set fields of the config."""
    tensors = load_file(folder / "model.safetensors")
    save_file(edit(tensors) or tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))


@torch.no_grad()
def logits(model: Any) -> Tensor:
    result: Tensor = model(torch.arange(3, 19)[None]).logits
    return result


def wanted() -> Tensor:
    return logits(load_language_model(PACKAGED, dtype=torch.float32))


def test_a_plain_folder_is_loaded_without_a_word(capfd: pytest.CaptureFixture[str]) -> None:
    model = load_language_model(PACKAGED, dtype=torch.float32, device="cpu")
    assert not model.training and model.model.norm.weight.dtype == torch.float32
    assert load_language_model(PACKAGED).model.norm.weight.dtype == torch.float16  # as stored
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("prefix", ["base_model.model.", "module.", "_orig_mod.", "module._orig_mod."])
def test_a_wrapper_s_prefix_is_left_out_and_said(folder: Path, tmp_path: Path, prefix: str) -> None:
    change(folder, lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()})
    with pytest.warns(UserWarning, match=f"every tensor's name begins with '{prefix}', which is left out"):
        model = load_language_model(folder, dtype=torch.float32)
    assert torch.equal(logits(model), wanted())
    model.save_pretrained(tmp_path / "again")
    assert (
        load_file(tmp_path / "again" / "model.safetensors").keys() == load_file(PACKAGED / "model.safetensors").keys()
    )


def test_missing_weights_are_named_with_the_nearest_stored(folder: Path) -> None:
    def rename(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name.replace("q_proj", "q_prj"): tensor for name, tensor in tensors.items()}

    change(folder, rename)
    for load in (load_language_model, load_checkpoint):
        with pytest.raises(AutoQuantError) as caught:
            load(folder)
        message = caught.value.message
        assert "\n" not in message and "5 weights are missing or of another shape: " in message
        assert (
            "model.layers.0.self_attn.q_proj.weight, did you mean 'model.layers.0.self_attn.q_prj.weight'?" in message
        )


def test_more_than_five_are_counted(folder: Path) -> None:
    change(folder, lambda tensors: {name: tensor for name, tensor in tensors.items() if ".mlp." not in name})
    with pytest.raises(AutoQuantError, match=r"15 weights are missing .*down_proj.weight.* and 10 more"):
        load_language_model(folder)


def test_another_shape_is_said(folder: Path) -> None:
    change(folder, lambda tensors: tensors.update({Q: tensors[Q][:5].clone()}))
    with pytest.raises(
        AutoQuantError, match=rf"{Q} \(\[128, 128\], stored as \[5, 128\]\) is missing or of another shape"
    ):
        load_language_model(folder)


def test_tensors_without_a_place_are_named(folder: Path) -> None:
    mtp = {"mtp.fc.weight": torch.ones(2, 2), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)}
    change(folder, lambda tensors: tensors.update(mtp))
    with pytest.warns(UserWarning, match=r"no place for mtp.fc.weight, model.layers.0.self_attn.rotary_emb.inv_freq"):
        assert torch.equal(logits(load_language_model(folder, dtype=torch.float32)), wanted())


def test_tied_by_the_config_yet_different(folder: Path) -> None:
    change(folder, lambda tensors: tensors.update({"lm_head.weight": tensors[EMBEDDING] * 2}))
    with pytest.warns(
        UserWarning, match=r"config.json ties lm_head.weight, the file holds another one: taken as untied"
    ):
        model = load_language_model(folder, dtype=torch.float32)
    assert torch.allclose(logits(model), wanted() * 2) and model.config.tie_word_embeddings is False
    with pytest.warns(UserWarning, match="taken as untied"):
        assert ties_of(load_skeleton(folder)) == ()
    assert ties_of(load_skeleton(PACKAGED)) == ((EMBEDDING, "lm_head.weight"),)


def test_the_analysis_takes_it_as_untied_too(folder: Path) -> None:
    change(folder, lambda tensors: tensors.update({"lm_head.weight": tensors[EMBEDDING] * 2}))
    with pytest.warns(UserWarning, match="taken as untied"):
        source = find_source(str(folder))
    assert ties_of(build_structure(source)) == ()
    assert ties_of(build_structure(find_source(str(PACKAGED)))) == ((EMBEDDING, "lm_head.weight"),)
    (folder / "model.safetensors").unlink()
    assert find_source(str(folder)).config.tie_word_embeddings is True, "a configuration alone says what is tied"


def test_rows_that_are_no_numbers_stay_tied(folder: Path) -> None:
    def copied(tensors: dict[str, torch.Tensor]) -> None:
        tensors[EMBEDDING][5] = torch.nan
        tensors["lm_head.weight"] = tensors[EMBEDDING].clone()

    change(folder, copied)
    assert ties_of(load_skeleton(folder)) == ((EMBEDDING, "lm_head.weight"),)


def test_tied_and_equal_stays_tied(folder: Path) -> None:
    change(folder, lambda tensors: tensors.update({"lm_head.weight": tensors[EMBEDDING].clone()}))
    model = load_language_model(folder, dtype=torch.float32)
    assert model.config.tie_word_embeddings is True and torch.equal(logits(model), wanted())


def test_the_same_file_as_transformers_beside_an_older_index(folder: Path) -> None:
    old = {name: tensor + 1 for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(old, folder / "model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(old, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.warns(UserWarning, match=r"model.safetensors is read, as transformers does, and .*index.json is not"):
        assert torch.equal(logits(load_language_model(folder, dtype=torch.float32)), wanted())


def test_a_leftover_adapter_does_not_swap_the_model(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "elsewhere/model", "peft_type": "LORA"}')
    with pytest.warns(UserWarning, match=r"adapter_config.json: left out; the model's own weights are loaded"):
        model = load_language_model(folder, dtype=torch.float32)
    assert torch.equal(logits(model), wanted()) and model.config.name_or_path == str(folder)


def test_an_adapter_alone_is_to_be_merged(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(AutoQuantError, match=r"holds an adapter .LoRA. and no model; merge it into its base first"):
        load_language_model(folder)


def test_an_adapter_beside_its_base_is_to_be_merged(folder: Path) -> None:
    change(folder, lambda tensors: tensors.update({Q.replace(".weight", ".lora_A.default.weight"): torch.ones(2, 128)}))
    with pytest.raises(AutoQuantError, match=r"holds the adapter .*lora_A.* merge it into the model first"):
        load_language_model(folder)


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "compressed-tensors", "fp8", "mxfp4"])
def test_what_is_quantized_already_is_refused(folder: Path, method: str) -> None:
    change(folder, lambda tensors: None, quantization_config={"quant_method": method})
    with pytest.raises(AutoQuantError, match=rf"is quantized already \({method}\)"):
        load_language_model(folder)
    with pytest.raises(AutoQuantError, match=rf"is quantized already \({method}\)"):
        load_skeleton(folder)


def test_float8_without_its_scales_is_refused(folder: Path) -> None:
    change(folder, lambda tensors: tensors.update({Q: tensors[Q].to(torch.float8_e4m3fn)}))
    for quantized in (False, True):
        with pytest.raises(AutoQuantError, match=rf"{Q} .* float8, whose scales its config.json does not declare"):
            load_language_model(folder, quantized=quantized)


def test_integer_weights_are_refused(folder: Path) -> None:
    change(folder, lambda tensors: tensors.update({Q: tensors[Q].to(torch.int8)}))
    with pytest.raises(AutoQuantError, match=rf"{Q} is stored as torch.int8: is quantized already"):
        load_language_model(folder)


def test_integer_weights_that_no_setting_declares_are_no_floats_either(folder: Path) -> None:
    """What ``eval`` loads with: they were taken for floats."""
    change(folder, lambda tensors: tensors.update({Q: tensors[Q].to(torch.int8)}))
    with pytest.raises(AutoQuantError, match=rf"{Q} is stored as torch.int8: .* config.json does not declare"):
        load_language_model(folder, quantized=True)


def test_more_layers_than_a_model_has_are_not_built(folder: Path) -> None:
    change(folder, lambda tensors: None, num_hidden_layers=10**9)
    with pytest.raises(AutoQuantError, match="num_hidden_layers: 1,000,000,000; at most 10,000"):
        load_language_model(folder)


def test_a_model_far_larger_than_its_file_is_not_made(folder: Path) -> None:
    change(folder, lambda tensors: None, vocab_size=2048 * 10**6)
    with pytest.raises(AutoQuantError, match=r"describes 262,[\d,]+ parameters, the file holds 1,185,152: they do not"):
        load_language_model(folder)


def test_a_name_that_transformers_does_not_know_is_said_with_its_field(folder: Path) -> None:
    change(folder, lambda tensors: None, hidden_act="zork")
    with pytest.raises(AutoQuantError, match="hidden_act: 'zork' is none that transformers knows"):
        load_language_model(folder)
    change(folder, lambda tensors: None, hidden_act="silu", rope_parameters={"rope_type": "nowhere", "rope_theta": 1e4})
    with pytest.raises(AutoQuantError, match="rope_type: 'nowhere' is none that transformers knows"):
        load_language_model(folder)


@pytest.mark.parametrize("settings", [{"hidden_size": "32"}, {"dtype": "zork"}, {"quantization_config": "awq"}])
def test_a_wrong_config_is_not_said_of_the_tokenizer(folder: Path, settings: dict[str, Any]) -> None:
    change(folder, lambda tensors: None, **settings)
    with pytest.raises(AutoQuantError, match=r"config\.json: not a valid configuration"):
        load_tokenizer(folder)


def test_pickles_are_not_loaded(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(AutoQuantError, match=r"only safetensors .*; pytorch_model.bin may hold code: where you trust"):
        load_language_model(folder)


def own_code(folder: Path, ran: Path) -> None:
    auto = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    change(folder, lambda tensors: None, model_type="own", architectures=["OwnForCausalLM"], auto_map=auto)
    trace = f"from pathlib import Path\nPath({str(ran)!r}).touch()\n"
    (folder / "configuration_own.py").write_text(
        trace + "from transformers import LlamaConfig\nclass OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
    )
    (folder / "modeling_own.py").write_text(
        trace + "from transformers import LlamaForCausalLM\nfrom .configuration_own import OwnConfig\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )


@pytest.mark.parametrize("answer", ["y\ny\ny\n", ""])
def test_code_of_a_checkpoint_runs_only_where_it_is_trusted(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(answer))
    own_code(folder, tmp_path / "ran")
    for load in (load_language_model, load_checkpoint, load_skeleton):
        with pytest.raises(AutoQuantError, match=r"code of its own \(configuration_own.py, modeling_own.py\).*--trust"):
            load(folder)
    assert not (tmp_path / "ran").exists()
    if answer:
        model = load_language_model(folder, dtype=torch.float32, trust_remote_code=True)
        assert torch.equal(logits(model), wanted()) and (tmp_path / "ran").exists()


def test_kernels_named_in_a_config_are_not_fetched(folder: Path) -> None:
    change(folder, lambda tensors: None, attn_implementation="someone/kernel")
    with pytest.warns(UserWarning, match="its attention 'someone/kernel' is not fetched"):
        model = load_language_model(folder, dtype=torch.float32)
    assert model.config._attn_implementation == "sdpa" and torch.equal(logits(model), wanted())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./modle", "no such folder; expected a checkpoint"),
        ("/nowhere/at/all", "no such folder; expected a checkpoint"),
        ("no-such/model-of-ours", "not to be had from the hub: .*and it is not among the files fetched before"),
    ],
)
def test_a_mistyped_folder(name: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for load in (load_language_model, load_tokenizer):
        with pytest.raises(AutoQuantError, match=message):
            load(name)


def test_the_nearest_folder_is_named(folder: Path) -> None:
    with pytest.raises(AutoQuantError, match="no such folder; did you mean 'model'"):
        load_language_model(folder.with_name("modell"))
    with pytest.raises(AutoQuantError, match="is a file; name the checkpoint's folder"):
        load_language_model(folder / "config.json")


def test_no_tokenizer_is_one_line(folder: Path) -> None:
    assert load_tokenizer(folder).bos_token_id is not None
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(AutoQuantError, match="has no tokenizer, which texts need: copy its") as caught:
        load_tokenizer(folder)
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("kind", ["F8_E8M0", "U32", "U16"])
def test_tensors_of_rarer_types_are_left_behind_not_refused(folder: Path, kind: str) -> None:
    raw = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, body = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    size = 32 * {"F8_E8M0": 1, "U32": 4, "U16": 2}[kind]
    header["extra.scale"] = {"dtype": kind, "shape": [32], "data_offsets": [len(body), len(body) + size]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + body + bytes(size))
    with pytest.warns(UserWarning, match="no place for extra.scale"):
        assert torch.equal(logits(load_language_model(folder, dtype=torch.float32)), wanted())


@pytest.mark.parametrize("text", ["{", "[" * 200_000, "[]", "{}", '{"model_type": 3}'])
def test_a_config_that_is_none(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(AutoQuantError) as caught, warnings.catch_warnings():
        load_language_model(folder)
    assert "\n" not in caught.value.message and "config.json: " in caught.value.message
