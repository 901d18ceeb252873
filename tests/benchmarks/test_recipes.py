"""A sample of benchmarks/recipes.py: broken recipes are never accepted wrongly, and its judge sees what is wrong."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from autoquant.models.repair import find_source
from autoquant.recipes.audit import Bench, bench_for

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
LAYER = r"re:^model\.layers\.\d+\."
NORM, QKV = LAYER + "input_layernorm$", [f"{LAYER}self_attn\\.{name}_proj$" for name in "qkv"]


@pytest.fixture(scope="module")
def recipes() -> Any:
    """The script as a module; it has its oracle beside it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "oracle", _loaded("oracle"))  # tests/analyzer has another of this name
        patch.syspath_prepend(str(BENCHMARKS))
        return _loaded("recipes")


def _loaded(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def llama() -> Bench:
    return bench_for(find_source("llama"))


@pytest.mark.parametrize("tool", ["llm-compressor", "quark", "brevitas", "modelopt"])
def test_mutations_are_never_accepted_wrongly(recipes: Any, llama: Bench, tool: str) -> None:
    outcomes = [recipes.outcome(llama, tool, number) for number in range(8)]
    assert [one for one in outcomes if one.wrongly_accepted] == []
    assert any(one.change is None for one in outcomes)


def test_the_judge_keeps_a_right_recipe_and_sees_a_wrong_one(recipes: Any, llama: Bench) -> None:
    assert recipes.judged(llama, "llm-compressor", [(NORM, QKV)], "") < 1e-12
    assert recipes.judged(llama, "llm-compressor", [(NORM, QKV[:2])], "") > 1e-2
    assert recipes.judged(llama, "llm-compressor", [(QKV[0], [f"{LAYER}mlp\\.down_proj$"])], "") == float("inf")
    inner = [f"self_attn.{name}_proj" for name in "qkv"]
    assert recipes.judged(llama, "quark", [("input_layernorm", inner)], "model.layers") < 1e-12
    assert recipes.judged(llama, "quark", [("post_attention_layernorm", inner)], "model.layers") > 1e-2
    assert recipes.judged(llama, "quark", [("self_attn.q_proj", ["input_layernorm"])], "model.layers") == 0.0


def test_the_judge_takes_the_readers_of_a_layer_and_of_an_expert(recipes: Any) -> None:
    names = [f"m.d.layers.{layer}.{part}" for layer in range(2) for part in ("norm", "e.0.up", "e.1.up", "e.0.down")]
    found = recipes.sets_of(
        "llm-compressor", [("re:.*norm$", ["re:.*up$"]), ("re:.*up$", ["re:.*down$"])], "", names, ()
    )
    assert found[0] == ("m.d.layers.0.norm", ["m.d.layers.0.e.0.up", "m.d.layers.0.e.1.up"])
    assert ("m.d.layers.1.e.0.up", ["m.d.layers.1.e.0.down"]) in found


@pytest.mark.parametrize("tool", ["llm-compressor", "quark", "brevitas"])
@pytest.mark.parametrize("name", ["llama", "image-text-to-text/gemma3", "seq2seq-lm/bart"])
def test_there_and_back(recipes: Any, tool: str, name: str) -> None:
    found = recipes.trip(tool, name)
    assert (found.problem, found.there > 0) == ("", True)
