"""What a recipe takes of a whole config: layers, alpha, experts one by one."""

from __future__ import annotations

from pathlib import Path

import pytest

from autoquant.config.file import load_config
from autoquant.config.format import Config, SmoothingOverride, edited
from autoquant.errors import AutoQuantError
from autoquant.recipes.importing import modules_in, taken_by, used
from autoquant.recipes.matching import WrittenMapping
from autoquant.recipes.pairs import scale_pairs
from autoquant.recipes.reading import mappings_of
from autoquant.recipes.tools import write_recipe

CONFIGS = Path(__file__).parents[2] / "generated_configs"


def config_of(name: str) -> Config:
    return load_config(CONFIGS / f"{name}.json")


@pytest.mark.parametrize("tool", ["llm-compressor", "brevitas"])
@pytest.mark.parametrize("name", ["llama", "deepseek_v3", "gemma4", "jamba"])
def test_there_and_back(name: str, tool: str) -> None:
    config = config_of(name)
    expected = {frozenset((s, *b)): pair.alpha for pair in scale_pairs(config)[0] for s, b in pair.filled()}
    found = taken_by(mappings_of(write_recipe(config, tool)[0], tool), config)
    assert set(found) == set(expected)
    if tool == "llm-compressor":
        assert found == expected


def test_layers_and_alpha_come_back() -> None:
    config = config_of("llama")
    group = config.smoothing.groups[0]
    edit = (SmoothingOverride(layers="0-3", enable=False), SmoothingOverride(layers="5", alpha=0.75))
    changed = edited(group, overrides=edit)
    config = edited(config, smoothing=edited(config.smoothing, groups=(changed, *config.smoothing.groups[1:])))
    taken = taken_by(mappings_of(write_recipe(config, "llm-compressor")[0], "llm-compressor"), config)
    found = used(group, config, taken)
    assert (found.enable, found.alpha) == (True, 0.5)
    assert found.overrides == (
        SmoothingOverride(layers="5", alpha=0.75),
        SmoothingOverride(layers="0-3", enable=False),
    )
    assert used(config.smoothing.groups[1], config, {}).enable is False


def test_experts_one_by_one_are_their_stack_if_all_are_taken() -> None:
    config = config_of("qwen3_moe")
    whole = frozenset(f"model.layers.0.mlp.experts.{part}" for part in ("gate_up_proj", "down_proj"))
    names = [name for name in modules_in(config) if name.startswith("model.layers.0.mlp.experts.")]
    assert names[:4] == [f"model.layers.0.mlp.experts.{at}_proj" for at in ("0.up", "0.gate", "0.down", "1.up")]
    assert whole in taken_by([WrittenMapping("re:.*up_proj$", ("re:.*down_proj$",))], config)
    assert whole not in taken_by([WrittenMapping("re:.*[0-8].up_proj$", ("re:.*[0-8].down_proj$",))], config)


def test_brevitas_regions_are_read_and_never_run() -> None:
    (mapping,) = mappings_of("import os\nPAIRS = [('a', ('b', 'c'))]\n", "brevitas")
    assert (mapping.smooth, mapping.balance) == ("a", ("b", "c"))
    for text, message in (
        ("PAIRS = [", "no Python"),
        ("PAIRS = [f()]", "nothing to be computed"),
        ("PAIRS = [1]", r"expected \(source, \(sink, ...\)\)"),
        ("x = 1", "no mappings of PAIRS"),
    ):
        with pytest.raises(AutoQuantError, match=message):
            mappings_of(text, "brevitas")


@pytest.mark.parametrize("tool", ["modelopt", "auto-round"])
def test_settings_without_pairs_are_nothing_to_import(tool: str) -> None:
    with pytest.raises(AutoQuantError, match="hold no pairs"):
        mappings_of(write_recipe(config_of("llama"), tool)[0], tool)
