"""Encoder-decoders and models with images or sound: small configurations, what must be found, and the proof."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import pytest
import torch
from readable import text
from syrupy.assertion import SnapshotAssertion
from transformers import CONFIG_MAPPING
from transformers.models.umt5.modeling_umt5 import UMT5LayerSelfAttention

from autoquant.analyzer.analyze import Analyzed, analyze
from autoquant.capture.routes import Captured, capture
from autoquant.certificate.certify import certify
from autoquant.errors import AutoQuantError
from autoquant.models.images import AddsNothing
from autoquant.models.source import ModelSource

WIDTHS: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 3}
TEXT = {**WIDTHS, "num_key_value_heads": 2, "vocab_size": 96, "head_dim": 16}
BART: dict[str, Any] = {
    "vocab_size": 96,
    "d_model": 64,
    **{
        f"{side}_{what}": size
        for side in ("encoder", "decoder")
        for what, size in (("layers", 3), ("attention_heads", 4), ("ffn_dim", 96))
    },
}


def made(name: str) -> Any:
    """A configuration of the type, small."""
    match name:
        case "t5":
            sizes = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_heads": 4, "num_layers": 3, "vocab_size": 96}
            return CONFIG_MAPPING["t5"](**sizes)
        case "bart":
            return CONFIG_MAPPING["bart"](**BART, activation_function="relu")
        case "mbart":
            return CONFIG_MAPPING["mbart"](**BART, activation_function="relu")
        case "whisper":
            ids = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 1)
            return CONFIG_MAPPING["whisper"](**BART, **ids, num_mel_bins=8, max_source_positions=8)
        case "llava":
            vision = CONFIG_MAPPING["clip_vision_model"](**WIDTHS, image_size=28, patch_size=14)
            text_config = CONFIG_MAPPING["llama"](**TEXT)
            return CONFIG_MAPPING["llava"](vision_config=vision, text_config=text_config, image_token_index=95)
        case _:
            vision = {"depth": 3, "embed_dim": 64, "hidden_size": 64, "num_heads": 4, "patch_size": 4}
            ids = {"image_token_id": 95, "video_token_id": 94}
            rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
            text_config = {**{k: v for k, v in TEXT.items() if k != "head_dim"}, "rope_parameters": rope}
            return CONFIG_MAPPING["qwen2_vl"](text_config=text_config, vision_config=vision, **ids)


TYPES = ("t5", "bart", "mbart", "whisper", "llava", "qwen2_vl")


@functools.cache
def found(name: str) -> Analyzed:
    torch.set_num_threads(1)
    return analyze(ModelSource(name, made(name)), how="export")


def names(name: str) -> set[str]:
    return {group.name for group in found(name).config.smoothing.groups}


@pytest.mark.parametrize("name", TYPES)
def test_findings(name: str, snapshot: SnapshotAssertion) -> None:
    assert text(found(name).findings) == snapshot


@pytest.mark.parametrize("name", TYPES)
def test_proof(name: str) -> None:
    certificate = certify(found(name), ModelSource(name, made(name))).certificate
    assert certificate is not None and certificate.dtype == "float64"
    assert {row.kind for row in certificate.rows} >= {"norm_linear", "linear_linear", "R2", "all"}
    assert all(row.worst < 1e-12 for row in certificate.rows)


@pytest.mark.parametrize(
    ("name", "source", "block", "norm"),
    [
        ("t5", "encoder.final_layer_norm", "block.{layer}.layer.1.EncDecAttention.", "encoder.final_layer_norm"),
        ("mbart", "encoder.layer_norm", "layers.{layer}.encoder_attn.", "encoder.layer_norm"),
        ("whisper", "encoder.layer_norm", "layers.{layer}.encoder_attn.", "encoder.layer_norm"),
        # Its norms come after the sums: only the last layer's is read by nothing else.
        (
            "bart",
            "encoder.layers.{layer}.final_layer_norm",
            "layers.{layer}.encoder_attn.",
            "layers.2.final_layer_norm",
        ),
    ],
)
def test_the_encoders_last_norm_goes_into_every_cross_attention(name: str, source: str, block: str, norm: str) -> None:
    groups = [group for group in found(name).config.smoothing.groups if group.layers is None]
    (group,) = [group for group in groups if group.name.partition(" -> ")[0].endswith(source)]
    key, value = (f"decoder.{block}{part}" for part in (("k", "v") if name == "t5" else ("k_proj", "v_proj")))
    assert group.name.partition(" -> ")[2] == f"{key}, {value}"
    assert group.kind == "norm_linear"
    assert all(slot.path.rpartition(".")[0].endswith(norm) for slot in group.sources)
    written_out = {f"{path.replace('{layer}', str(layer))}.weight" for path in (key, value) for layer in range(3)}
    assert {slot.path.removeprefix("model.") for slot in group.targets} == written_out


@pytest.mark.parametrize("name", ["bart", "mbart", "whisper"])
def test_cross_attention_values_go_to_their_output(name: str) -> None:
    block = "model.decoder.layers.{layer}."
    assert {f"{block}encoder_attn.v_proj -> out_proj", f"{block}encoder_attn.q_proj -> k_proj"} <= names(name)
    stacks = {linear.path.partition(".{layer}")[0] for linear in found(name).config.model.linears if linear.layers}
    assert stacks == {"model.encoder.layers", "model.decoder.layers"}


def test_one_table_for_encoder_and_decoder_is_one_space() -> None:
    (space,) = [space for space in found("t5").config.rotation.spaces if space.kind == "R1"]
    assert {writer.path.partition(".")[0] for writer in space.writers} == {"encoder", "decoder"}
    (tied,) = found("t5").config.model.tied
    assert {"shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"} <= set(tied)
    assert {writer.path for writer in space.writers if "embed" in writer.path} <= set(tied)


@pytest.mark.parametrize("name", ["t5", "bart", "mbart", "whisper"])
def test_a_head_goes_by_the_module_that_multiplies(name: str) -> None:
    """Of BART and T5 another module holds its table; BART adds a buffer, in the logits' dtype, to what it makes."""
    (head,) = [linear for linear in found(name).config.model.linears if linear.layers is None]
    assert (head.path, head.role) == ("proj_out" if name == "whisper" else "lm_head", "lm_head")
    assert found(name).config.quantization.exclude == (head.path,)


def test_what_untying_would_change_stays_tied() -> None:
    """One that rescales its last hidden state only where its configuration says that the table is tied."""
    if "is_causal" not in inspect.getsource(UMT5LayerSelfAttention):
        pytest.skip("this transformers' umt5 masks its encoder causally, but not while it is traced")
    config = CONFIG_MAPPING["umt5"](
        d_model=64, d_kv=16, d_ff=96, num_heads=4, num_layers=3, vocab_size=96, tie_word_embeddings=True
    )
    source = ModelSource("rescaled", config)
    analyzed = analyze(source)
    assert analyzed.captured.inseparable and not analyze(ModelSource("t5", made("t5"))).captured.inseparable
    proved = certify(analyzed, source)
    assert proved.rotation.spaces and not any(space.kind == "R1" for space in proved.rotation.spaces)
    assert not any("shared" in slot.path for group in proved.smoothing.groups for slot in group.sources + group.targets)
    reason = "decoder.final_layer_norm.weight cannot be folded into lm_head.weight, used elsewhere too"
    assert [b.what for b in proved.blocked if b.reason == reason] == ["rotation"]


@pytest.mark.parametrize(("name", "tower"), [("llava", "model.vision_tower."), ("qwen2_vl", "model.visual.")])
def test_towers_are_traced(name: str, tower: str) -> None:
    config = found(name).config
    paths = {linear.path for linear in config.model.linears}
    assert any(path.startswith(tower) for path in paths)
    assert any(path.startswith("model.language_model.layers") for path in paths)
    assert any(
        tower.removesuffix(".") in g.sources[0].path and g.kind == "norm_linear" for g in config.smoothing.groups
    )
    assert config.provenance.capture == "export"


def test_what_is_not_read_is_said() -> None:
    # Llava takes the features before the tower's last layer.
    reasons = {b.path: (b.layers, b.reason) for b in found("llava").config.blocked if b.what == "smoothing"}
    layers, reason = reasons["model.vision_tower.encoder.layers.{layer}"]
    assert layers == "2" and reason == "it is not traced: nothing that it computes reaches the logits"


def test_a_tower_without_inputs_is_said() -> None:
    config = made("llava")
    config.image_token_id = None  # nothing says where the image goes
    analyzed = analyze(ModelSource("blind", config), how="export")
    blocked = {b.path: b.reason for b in analyzed.config.blocked if b.what == "smoothing"}
    assert blocked["model.vision_tower"].startswith("it is not traced: no pixel_values could be made (")
    assert any("language_model" in linear.path for linear in analyzed.config.model.linears)


def fails_with_images(monkeypatch: pytest.MonkeyPatch, *, text_too: bool = False) -> None:
    """Let every capture fail that is given an image."""

    def refused(module: Any, args: Any, kwargs: Any, *rest: Any, **named: Any) -> Captured:
        if text_too or "pixel_values" in kwargs:
            raise AutoQuantError("cannot capture it: its tower looks at values" if "pixel_values" in kwargs else "nor")
        return capture(module, args, kwargs, *rest, **named)

    monkeypatch.setattr("autoquant.analyzer.analyze.capture", refused)


def test_a_model_that_cannot_be_captured_with_images_is_analysed_on_text(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = {group.name for group in found("llava").config.smoothing.groups}
    fails_with_images(monkeypatch)
    source = ModelSource("on text", made("llava"))
    proved = certify(analyze(source), source)
    # What the projector may read for an image is as wide as what leaves the language model: that keeps its scale.
    kept = {name for name in whole if "vision" not in name} - {"model.language_model.norm -> lm_head"}
    assert {group.name for group in proved.smoothing.groups} == kept
    reasons = {block.reason for block in proved.blocked if (block.what, block.path) == ("smoothing", "lm_head")}
    assert any("which the inputs that could be made do not reach, may read it" in reason for reason in reasons)
    assert [space.kind for space in proved.rotation.spaces] == ["R2"]  # an image goes into the stream, unrotated
    assert not any("refused by the proof" in b.reason for b in proved.blocked)
    stream = "what images or sound add to the stream is not traced, so that it cannot be rotated with it"
    assert [b.path for b in proved.blocked if b.reason == stream] == ["model.language_model.embed_tokens"]
    reason = (
        "it is not traced: the model is analysed on text alone (with images or sound: cannot capture it: its tower "
        "looks at values)"
    )
    told = {b.path for b in proved.blocked if b.reason == reason}
    assert told == {"model.vision_tower", "model.multi_modal_projector"}


def test_what_cannot_be_captured_on_text_either_says_what_it_said_of_images(monkeypatch: pytest.MonkeyPatch) -> None:
    fails_with_images(monkeypatch, text_too=True)
    with pytest.raises(AutoQuantError, match="its tower looks at values"):
        analyze(ModelSource("neither", made("llava")))


@pytest.mark.parametrize(("error", "kinds"), [(RuntimeError, ["R2"]), (AddsNothing, ["R1", "R2"])])
def test_a_stream_that_an_unseen_image_goes_into_is_not_rotated(
    error: type[Exception], kinds: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tower would write what is not rotated; one whose images become token ids writes nothing."""

    def none(*_: Any) -> Any:
        raise error("no image")

    monkeypatch.setattr("autoquant.models.inputs.image_layouts", lambda *_: iter([none]))
    source = ModelSource("unseen", made("llava"))
    config = analyze(source).config
    assert [space.kind for space in config.rotation.spaces] == kinds
    assert {b.path for b in config.blocked if b.reason.startswith("it is not traced: no pixel_values")} == {
        *["model.vision_tower", "model.multi_modal_projector"]
    }
