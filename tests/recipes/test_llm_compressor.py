"""Recipes for LLM Compressor: what they say, what they leave out, and that they match exactly the modules meant."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from autoquant.config.file import load_config
from autoquant.config.format import Config, SmoothingOverride, Strategy, edited
from autoquant.errors import AutoQuantError
from autoquant.models.repair import find_source
from autoquant.models.source import build_structure
from autoquant.recipes.llm_compressor import recipe
from autoquant.recipes.matching import RE, is_match, matched_pairs
from autoquant.recipes.pairs import scale_pairs
from autoquant.recipes.reading import mappings_in
from autoquant.recipes.tools import TOOLS, write_recipe

CONFIGS = Path(__file__).parents[2] / "generated_configs"


def config_of(name: str) -> Config:
    return load_config(CONFIGS / f"{name}.json")


def test_the_recipe_of_a_plain_model() -> None:
    text, refused = recipe(config_of("llama"))
    stage = yaml.safe_load(text)["autoquant_stage"]
    assert refused == []
    assert list(stage) == ["rotation_modifiers", "smooth_500_modifiers", "quantization_modifiers"]
    mappings = stage["smooth_500_modifiers"]["SmoothQuantModifier"]["mappings"]
    assert mappings[0] == [
        [rf"re:^model\.layers\.\d+\.self_attn\.{name}_proj$" for name in "qkv"],
        r"re:^model\.layers\.\d+\.input_layernorm$",
    ]
    groups = stage["rotation_modifiers"]["SpinQuantModifier"]["transform_config"]["config_groups"]
    assert [(group["type"], group["head_dim"]) for group in groups.values()] == [("hadamard", None), ("hadamard", 128)]
    quantized = stage["quantization_modifiers"]["QuantizationModifier"]["config_groups"]["group_0"]
    assert (quantized["weights"]["strategy"], quantized["input_activations"]["strategy"]) == ("channel", "token")
    assert "re:^lm_head$" not in quantized["targets"]


def test_that_nothing_is_centred() -> None:
    """SpinQuantModifier shifts the embeddings to mean 0, which an RMSNorm does not forgive."""
    stage = yaml.safe_load(recipe(config_of("llama"))[0])["autoquant_stage"]
    embedding = stage["rotation_modifiers"]["SpinQuantModifier"]["mappings"]["embedding"]
    assert not is_match("model.embed_tokens", "Embedding", embedding)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gemma2", "is a gain that is 1 + weight"),
        ("phi3", "has an index map: some of its rows only"),
        ("qwen3_moe", "is a router"),
        ("mixtral", "is no weight of a module"),
        ("opt", "is tied with"),
        ("cohere", "a LayerNorm reads it: its writers have to be centred"),
        ("qwen2", "is written too, and is rotated with it"),
    ],
)
def test_what_is_left_out_is_said(name: str, reason: str) -> None:
    config = config_of(name)
    if name == "opt":  # its default configuration ties nothing that a group scales
        paths = [slot.path for slot in config.smoothing.groups[0].targets]
        config = edited(config, model=edited(config.model, tied=((paths[0], "another.weight"),)))
    assert any(reason in refusal.reason for refusal in recipe(config)[1])


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3", "opt", "bloom", "deepseek_v3"])
def test_expressions_take_the_modules_that_are_meant(name: str) -> None:
    module = build_structure(find_source(name, layers=3))
    names = {path: type(part).__name__ for path, part in module.named_modules()}
    config = config_of(name)
    pairs = {(smooth, balance) for pair in scale_pairs(config)[0] for smooth, balance in pair.filled()}
    found = {
        (pair.smooth, pair.balance)
        for mapping in mappings_in(yaml.safe_load(recipe(config)[0]), "llm-compressor")
        for pair in matched_pairs(mapping, names)
    }
    expected = {(smooth, balance) for smooth, balance in pairs if smooth in names}
    assert found == expected
    assert found


def test_layers_that_are_off_or_have_an_alpha_of_their_own() -> None:
    config = config_of("llama")
    group = edited(
        config.smoothing.groups[0],
        overrides=(SmoothingOverride(layers="0", enable=False), SmoothingOverride(layers="1,2", alpha=0.7)),
    )
    config = edited(config, smoothing=edited(config.smoothing, groups=(group,)))
    stage = yaml.safe_load(recipe(config)[0])["autoquant_stage"]
    first = stage["smooth_700_modifiers"]["SmoothQuantModifier"]["mappings"][0][1]
    assert first == r"re:^model\.layers\.(1|2)\.input_layernorm$"
    rest = stage["smooth_500_modifiers"]["SmoothQuantModifier"]["mappings"][0][1].removeprefix(RE)
    assert rest.startswith(r"^model\.layers\.(3|4|") and "(0|" not in rest


def test_static_caches_are_said_and_dynamic_ones_left_out() -> None:
    config = config_of("llama")
    static = edited(config, quantization=edited(config.quantization, strategy=Strategy.PER_CHANNEL_STATIC_KV))
    body = yaml.safe_load(recipe(static)[0])["autoquant_stage"]["quantization_modifiers"]["QuantizationModifier"]
    assert body["kv_cache_scheme"]["strategy"] == "tensor"
    token = edited(config, quantization=edited(config.quantization, strategy=Strategy.PER_CHANNEL_PER_TOKEN_KV))
    assert [refusal.name for refusal in recipe(token)[1]] == ["quantization.strategy"]


def test_awq_has_keys_of_its_own() -> None:
    stage = yaml.safe_load(recipe(config_of("llama"), "awq")[0])["autoquant_stage"]
    first = stage["smooth_modifiers"]["AWQModifier"]["mappings"][0]
    assert sorted(first) == ["balance_layers", "smooth_layer"]


def test_unknown_tools_and_algorithms_are_errors() -> None:
    with pytest.raises(AutoQuantError, match="did you mean 'quark'"):
        write_recipe(config_of("llama"), "quarks")
    for tool in TOOLS:
        with pytest.raises(AutoQuantError, match="algorithm 'magic'"):
            write_recipe(config_of("llama"), tool, "magic")
