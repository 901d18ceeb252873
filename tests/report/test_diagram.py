from __future__ import annotations

from pathlib import Path

import pytest

from autoquant.config.file import load_config
from autoquant.config.format import Config
from autoquant.report.diagram import LayerKind, layer_kinds

CONFIGS = Path(__file__).parents[2] / "generated_configs"


def config(name: str) -> Config:
    return load_config(CONFIGS / f"{name}.json")


def lines(kind: LayerKind) -> set[tuple[str, str, str]]:
    """Without the prefix of the layer."""
    names = {box.key: box.name for box in kind.boxes}
    return {(names[line.start], names[line.end], line.kind) for line in kind.lines}


def test_one_layer_of_llama() -> None:
    layer, outside = layer_kinds(config("llama"))
    assert layer.title == "32 layers of model.layers: 0-31" and outside.title == "Outside of the layers"
    assert lines(layer) == {
        ("residual", "input_layernorm", "R1"),
        ("input_layernorm", "self_attn.q_proj", "norm_linear"),
        ("input_layernorm", "self_attn.k_proj", "norm_linear"),
        ("input_layernorm", "self_attn.v_proj", "norm_linear"),
        ("self_attn.q_proj", "self_attn.k_proj", "query_key"),
        ("self_attn.v_proj", "self_attn.o_proj", "linear_linear"),
        ("self_attn.v_proj", "self_attn.o_proj", "R2"),
        ("self_attn.o_proj", "residual", "R1"),
        ("residual", "post_attention_layernorm", "R1"),
        ("post_attention_layernorm", "mlp.gate_proj", "norm_linear"),
        ("post_attention_layernorm", "mlp.up_proj", "norm_linear"),
        ("mlp.up_proj", "mlp.down_proj", "linear_linear"),
        ("mlp.down_proj", "residual", "R1"),
    }
    rows = {box.name: box.row for box in layer.boxes}
    attention = ["input_layernorm", "self_attn.v_proj", "self_attn.o_proj"]
    order = [*attention, "post_attention_layernorm", "mlp.up_proj", "mlp.down_proj"]
    assert [rows[name] for name in order] == [1, 2, 3, 4, 5, 6] and rows["self_attn.q_proj"] == 2


def test_layers_that_differ_are_kinds_of_their_own() -> None:
    dense, experts, _ = layer_kinds(config("deepseek_v3"))
    assert (dense.layers, experts.layers) == ("0-2", "3-60")
    boxes = {box.name: box for box in experts.boxes}
    assert boxes["mlp.experts.down_proj"].count == 256 and boxes["mlp.gate"].kind == "router"
    (blocked,) = boxes["mlp.experts.down_proj"].blocked
    assert blocked.startswith("rotation: ") and "mlp.experts.down_proj" not in {box.name for box in dense.boxes}
    chain = {"self_attn.q_a_proj": 2, "self_attn.q_a_layernorm": 3, "self_attn.q_b_proj": 4}
    assert {name: boxes[name].row for name in chain} == chain


def test_a_blocked_residual_has_no_lines() -> None:
    layer, _ = layer_kinds(config("gemma2"))
    assert "R1" not in {line.kind for line in layer.lines}
    assert "pre_feedforward_layernorm" in {box.name for box in layer.boxes}


def test_what_feeds_a_layer_from_outside_stands_in_it() -> None:
    encoder, decoder, _ = layer_kinds(config("speech-seq2seq/whisper"))
    assert "encoder" in encoder.title and "decoder" in decoder.title
    feeders = {start for start, end, _ in lines(decoder) if end == "encoder_attn.v_proj"}
    assert feeders == {"model.encoder.layer_norm"}


@pytest.mark.parametrize("name", ["llama", "deepseek_v3", "gemma2", "mamba2", "opt", "speech-seq2seq/whisper"])
def test_every_linear_and_every_group_is_drawn(name: str) -> None:
    found = config(name)
    kinds = layer_kinds(found)
    drawn = {line.of for kind in kinds for line in kind.lines}
    assert {group.name for group in found.smoothing.groups} <= drawn
    assert {f"{space.kind} {space.name}" for space in found.rotation.spaces} <= drawn
    boxes = {box.name for kind in kinds for box in kind.boxes}
    assert {linear.path.partition("{layer}.")[2] or linear.path for linear in found.model.linears} <= boxes
