"""Quark's JSON, ModelOpt's settings, Brevitas' regions and auto-round's scheme."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from autoquant.config.file import load_config
from autoquant.config.format import Config
from autoquant.recipes.quark import recipe
from autoquant.recipes.tools import write_recipe
from autoquant.survey.recipes import RECIPES, recipes_of

CONFIGS = Path(__file__).parents[2] / "generated_configs"


def config_of(name: str) -> Config:
    return load_config(CONFIGS / f"{name}.json")


def test_quark_names_what_is_in_a_layer() -> None:
    text, refused = recipe(config_of("mistral"))
    rotation, smooth = json.loads(text)["algo_config"]
    assert smooth["model_decoder_layers"] == "model.layers"
    assert [one["prev_op"] for one in smooth["scaling_layers"]] == [
        "input_layernorm",
        "self_attn.v_proj",  # grouped queries: Quark repeats the scales itself
        "post_attention_layernorm",
        "mlp.up_proj",
    ]
    assert smooth["scaling_layers"][0]["module2inspect"] == "self_attn"
    assert (rotation["r1"], rotation["r2"], rotation["v_proj"], rotation["o_proj"]) == (
        True,
        True,
        "self_attn.v_proj",
        "self_attn.o_proj",
    )
    assert [str(refusal) for refusal in refused] == ["model.norm -> lm_head: is not within one decoder layer"]


def test_quark_rotates_each_writer_and_reader_once() -> None:
    rotation = json.loads(recipe(config_of("llama"))[0])["algo_config"][0]
    parts = rotation["scaling_layers"]
    written = [name for part in parts.values() for one in part for name in one["prev_modules"]]
    assert "model.embed_tokens" in written
    assert parts["middle_layers"][0]["prev_modules"] == ["model.layers.pre_layer_id.mlp.down_proj"]
    assert parts["last_layer"] == [
        {
            "prev_modules": ["model.layers.layer_id.mlp.down_proj"],
            "norm_module": "model.norm",
            "next_modules": ["lm_head"],
        }
    ]


def test_quark_leaves_out_groups_of_some_layers() -> None:
    refused = {refusal.reason for refusal in recipe(config_of("deepseek_v3"))[1]}
    assert "does not stand in every decoder layer, or not with one alpha" in refused


@pytest.mark.parametrize("tool", ["modelopt", "auto-round"])
def test_tools_that_take_no_pairs_say_so_of_each_group(tool: str) -> None:
    config = config_of("llama")
    text, refused = write_recipe(config, tool)
    json.loads(text)
    groups = [group.name for group in config.smoothing.groups if group.kind.value != "query_key"]
    assert [refusal.name for refusal in refused[: len(groups)]] == groups


def test_brevitas_regions_are_python() -> None:
    text, _ = write_recipe(config_of("opt"), "brevitas")
    tree = ast.parse(text)
    pairs = next(node for node in tree.body if isinstance(node, ast.Assign))
    found = ast.literal_eval(pairs.value)
    assert ("model.decoder.layers.0.fc1", ("model.decoder.layers.0.fc2",)) in found


def test_the_committed_recipes_are_those_of_the_configs() -> None:
    """Where this fails, `python -m autoquant.survey.recipes` makes them anew; look at what changed."""
    expected = {path: text for path, text in recipes_of(CONFIGS)}
    stale = [path.name for path, text in expected.items() if not path.exists() or path.read_text("utf-8") != text]
    assert stale == []
    assert {path for path in (CONFIGS / RECIPES).rglob("*") if path.is_file()} == set(expected)
