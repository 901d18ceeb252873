"""Knobs read, set, compared and carried over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from autoquant.cli.main import main
from autoquant.config.assign import assign
from autoquant.config.compare import differences, merge
from autoquant.config.file import config_text, load_config, parse_config, save_config
from autoquant.config.format import Config, edited
from autoquant.config.knobs import changed_knobs, knob_text, knobs_of, value_text, with_knobs
from autoquant.errors import AutoQuantError

CONFIGS = Path(__file__).parents[2] / "generated_configs"
EDITS = [
    "smoothing.alpha=0.7",
    "rotation.seed=7",
    "rotation.method=orthogonal",
    "quantization.strategy=w_int8_per_channel_a_int8_per_tensor_static",
    "quantization.weights.rounding=gptq",
    "quantization.exclude=[]",
    "layers 0-3: enable=false",
    "layers 0: strategy=null",
    "mlp.up_proj -> down_proj: alpha=0.6",
    "rotation.online[0].enable=true",
    "smoothing.groups[1].enable=true",
]


def config(name: str = "llama") -> Config:
    return load_config(CONFIGS / f"{name}.json")


def said(one: Config, other: Config) -> list[str]:
    return [difference.line for difference in differences(one, other)]


@pytest.mark.parametrize("name", ["llama", "deepseek_v3", "gemma2", "speech-seq2seq/whisper"])
def test_what_analyze_writes_has_no_changed_knobs(name: str) -> None:
    assert changed_knobs(config(name)) == {} and said(config(name), config(name)) == []


def test_every_edit_is_one_difference_and_one_changed_knob() -> None:
    before = config()
    for text in (edit for edit in EDITS if not edit.startswith("layers 0-3")):
        after = assign(before, [text])
        assert len(changed_knobs(after)) == 1, text
        assert len(said(before, after)) == (7 if text.startswith("layers") else 1), text  # an override for each linear
        assert parse_config(config_text(after)) == after


def test_what_the_edits_say() -> None:
    before = config()
    assert said(before, assign(before, ["rotation.seed=7"])) == ["rotation.seed: 0 -> 7"]
    after = assign(before, ["mlp.up_proj -> down_proj: alpha=0.6"])
    name = "model.layers.{layer}.mlp.up_proj -> down_proj"
    assert said(before, after) == [f"smoothing.groups['{name}'].alpha: null -> 0.6"]
    after = assign(before, ["layers 0-3: enable=false", "layers 0-3: alpha=1"])
    groups = [group for group in after.smoothing.groups if group.overrides]
    assert [g.kind.value for g in groups] == ["norm_linear", "linear_linear", "norm_linear", "linear_linear"]
    assert all([(o.layers, o.enable, o.alpha) for o in g.overrides] == [("0-3", False, 1.0)] for g in groups)
    after = assign(before, ["layers 30-40: strategy=null"])
    assert {(o.layers, o.strategy) for o in after.quantization.overrides} == {("30-31", None)}
    assert len(after.quantization.overrides) == 7


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("smoothing.alhpa=1", "no knob 'smoothing.alhpa'; did you mean 'smoothing.alpha'?"),
        ("smoothing.alpha=2", "alpha: expected at most 1, not 2.0"),
        ("smoothing.alpha=high", "alpha: expected a number, not 'high'"),
        ("smoothing.enable=True", "enable: expected true or false, not 'True': JSON writes true"),
        (
            "rotation.method=hadmard",
            "method is one of hadamard, orthogonal, learned, not 'hadmard'; did you mean 'hadamard'",
        ),
        ("quantization.strategy=int8", "int8"),
        ("layers 99: enable=false", "no smoothing group has any of the layers 99"),
        ("layers 3-1: enable=false", "'3-1' runs backwards"),
        ("layers 0: alpa=1", "layers have no 'alpa'; did you mean 'alpha'?"),
        ("up_porj -> down_proj: alpha=1", "no group or space 'up_porj -> down_proj'"),
        ("v_proj -> o_proj: enable=false", "give one by number: smoothing.groups[2].enable, rotation.spaces[1].enable"),
        ("smoothing.groups[44].alpha=1", "smoothing.groups has 6 entries, counted from 0"),
        ("smoothing.groups[0].alpa=1", "no knob 'alpa'; did you mean 'alpha'?"),
        ("layers x: enable=false", "layers are given as in 'layers 0-3: enable=false'"),
        ("layers 0-3 enable=false", "layers are given as in 'layers 0-3: enable=false'"),
        ("*.down_proj: enable=false", "`autoquant show CONFIG` has the names, which are no patterns"),
        ("rotation.seed=7.5", "seed: expected a whole number, not 7.5"),
        ("A" * 700 + "=1", "'" + "A" * 79 + "…': no knob '" + "A" * 79 + "…'"),
        ("layers 0: down_porj: strategy=null", "no linear 'down_porj'; did you mean 'down_proj'?"),
        ("layers 32: down_proj: strategy=null", "mlp.down_proj is in none of these layers"),
        (
            "layers 0: up_proj -> down_porj: alpha=1",
            "no smoothing group 'up_proj -> down_porj' in layers; did you mean",
        ),
        ("layers 40: mlp.up_proj -> down_proj: alpha=1", "is in none of these layers, but in 0-31"),
        ("layers 0: mlp.up_proj -> down_proj: alhpa=1", "layers have no 'alhpa'; did you mean 'alpha'?"),
        ("layers 0: mlp.up_proj -> down_proj: alpha=2", "alpha: expected at most 1, not 2"),
        ("smoothing.groups['up_proj'].alpha=1", "no 'up_proj' in smoothing.groups"),
        ("alpha", "no '='; expected 'smoothing.alpha=0.7'"),
        ('quantization.exclude=["haed"]', "$.quantization.exclude[0]: 'haed' is no linear in model.linears"),
    ],
)
def test_what_cannot_be_set(text: str, message: str) -> None:
    with pytest.raises(AutoQuantError) as error:
        assign(config(), [text])
    assert message in "\n".join([error.value.message, *error.value.details])


def test_differences_of_claims_and_facts() -> None:
    before = config()
    group, *others = before.smoothing.groups
    target = edited(group.targets[0], size=4095)
    changed = edited(group, targets=(target, *group.targets[1:]), channels=4095)
    after = edited(before, smoothing=edited(before.smoothing, groups=(*others[1:], changed)))
    after = edited(after, provenance=edited(after.provenance, torch="9.9"))
    assert said(before, after) == [
        "- group model.layers.{layer}.self_attn.q_proj -> k_proj",
        f"group {group.name}: channels 4096, targets of 3 entries -> channels 4095, targets of 3 entries",
        f"provenance.torch: {before.provenance.torch} -> 9.9",
    ]


def test_hand_edits_are_carried_over() -> None:
    old = assign(config(), EDITS)
    merged = merge(config(), old)
    assert merged.conflicts == () and len(merged.carried) == len(changed_knobs(old))
    assert merged.config == old


def test_edits_of_what_is_gone_and_edits_against_each_other_are_conflicts() -> None:
    old = assign(config(), ["smoothing.alpha=0.7", "mlp.up_proj -> down_proj: alpha=0.6", "layers 30-31: enable=false"])
    fewer = config("gemma2")  # of 26 layers
    merged = merge(assign(fewer, ["smoothing.alpha=0.8"]), old)
    found = "\n".join(merged.conflicts)
    assert "smoothing.alpha = 0.7: the new config has 0.8; --take says which" in found
    assert "overrides = [{layers: 30-31, enable: false}]" in found and "layer 31 does not exist" in found
    assert "post_attention_layernorm -> mlp.gate_proj, mlp.up_proj'].overrides" in found and "no such group" in found
    assert merged.carried == ("smoothing.groups['model.layers.{layer}.mlp.up_proj -> down_proj'].alpha = 0.6",)
    assert merge(assign(fewer, ["smoothing.alpha=0.8"]), old, "old").config.smoothing.alpha == 0.7
    assert merge(assign(fewer, ["smoothing.alpha=0.8"]), old, "new").config.smoothing.alpha == 0.8


def test_knobs_and_values_in_words() -> None:
    found = knobs_of(config())
    assert knob_text(("quantization", "weights", "clip")) == "quantization.weights.clip"
    assert [value_text(value) for value in (None, True, 0, 0.5, (1, 2), ())] == [
        "null",
        "true",
        "0",
        "0.5",
        "[1, 2]",
        "[]",
    ]
    assert with_knobs(config(), found) == config()


def run(*arguments: object) -> Any:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def test_the_commands(tmp_path: Path) -> None:
    path, old = tmp_path / "c.json", tmp_path / "old.json"
    save_config(config(), path)
    assert run("set", path, "smoothing.alpha=0.7", "-o", old).output == "smoothing.alpha: 0.5 -> 0.7\n"
    assert run("diff", path, old).output == "knobs\n  smoothing.alpha: 0.5 -> 0.7\n"
    assert run("diff", path, path).output == "they say the same\n"
    (row,) = json.loads(run("diff", path, old, "--format", "json").output)
    assert row == {"part": "knobs", "where": "smoothing.alpha", "before": "0.5", "after": "0.7"}
    merged = run("merge", path, old, "-o", tmp_path / "m.json")
    assert merged.output == f"carried: smoothing.alpha = 0.7\nwrote {tmp_path / 'm.json'}: 1 of 1 edits carried\n"
    assert (tmp_path / "m.json").read_bytes() == old.read_bytes()
    before = path.read_bytes()
    assert run("set", path, "smoothing.alpha=0.8", "smoothing.alpha=9").exit_code == 1
    assert path.read_bytes() == before
    assert run("set", path, "smoothing.alpha=0.8", "--quiet").output == ""
    refused = run("merge", path, old, "-o", tmp_path / "n.json")
    assert refused.exit_code == 1 and not (tmp_path / "n.json").exists()
    assert (
        refused.output.splitlines()[-1]
        == f"error: {tmp_path / 'n.json'}: not written: 1 conflict; --take new or old goes on"
    )
    assert run("merge", path, old, "-o", tmp_path / "n.json", "--take", "old").exit_code == 0
