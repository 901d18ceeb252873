"""Which model types a class is registered for."""

from __future__ import annotations

from dataclasses import replace

import pytest
from transformers import CONFIG_MAPPING

from autoquant.errors import AutoQuantError
from autoquant.models.auto_classes import class_by_name, types_of_class
from autoquant.models.source import build_structure, named_source


def test_the_type_that_a_class_was_written_for_comes_first() -> None:
    """Other types have Llama's class too, some of them before it in the alphabet."""
    types = [model_type for model_type, _ in types_of_class("LlamaForCausalLM")]
    assert types[0] == "llama"
    assert len(types) > 1
    assert types_of_class("NoSuchForCausalLM") == []


def test_a_class_is_found_by_name_where_its_configuration_stands_for_two_types() -> None:
    config = CONFIG_MAPPING["evolla"]()
    assert class_by_name("image-text-to-text", config).__name__ == "EvollaForProteinText2Text"
    assert class_by_name("causal-lm", CONFIG_MAPPING["llama"]()) is None
    assert class_by_name("causal-lm", CONFIG_MAPPING["t5"]()) is None


def test_a_field_that_is_looked_into_and_not_set_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    source = named_source("llama", trust_remote_code=False)
    source = replace(source, config=CONFIG_MAPPING["llama"](rope_parameters=None, num_hidden_layers=1))
    source.config.rope_parameters = None
    with pytest.raises(AutoQuantError, match=r"cannot be built \(causal-lm\): rope_parameters is not set, and has no"):
        build_structure(source)
