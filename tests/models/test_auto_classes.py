"""Which model types a class is registered for."""

from __future__ import annotations

from autoquant.models.auto_classes import types_of_class


def test_the_type_that_a_class_was_written_for_comes_first() -> None:
    """Other types have Llama's class too, some of them before it in the alphabet."""
    types = [model_type for model_type, _ in types_of_class("LlamaForCausalLM")]
    assert types[0] == "llama"
    assert len(types) > 1
    assert types_of_class("NoSuchForCausalLM") == []
