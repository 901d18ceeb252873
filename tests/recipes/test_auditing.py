"""Registries as a tool prints them: which entries are judged, and which are only named."""

from __future__ import annotations

from typing import Any

from autoquant.recipes.audit import Audit, Judged, Verdict
from autoquant.recipes.auditing import Entry, entries_of, names_of
from autoquant.recipes.matching import WrittenMapping

NORM = [["re:.*q_proj$", "re:.*k_proj$", "re:.*v_proj$"], "re:.*input_layernorm$"]
CONTENT: dict[str, Any] = {
    "version": "1",
    "registries": {
        "SmoothQuantModifier": {"LlamaForCausalLM": [NORM], "GoneForCausalLM": [NORM], "MadeForCausalLM": [NORM]},
        "AWQModifier": {"LlamaForCausalLM": [{"smooth_layer": NORM[1], "balance_layers": NORM[0][:2]}]},
    },
    "made_at_run_time": {"SmoothQuantModifier": ["MadeForCausalLM"], "AWQModifier": ["MadeForCausalLM"]},
}


def entries(name: str) -> list[Entry]:
    return list(entries_of(name, CONTENT, "llm-compressor", None, lambda step: None))


def test_each_class_is_named_once() -> None:
    assert names_of(CONTENT) == ["LlamaForCausalLM", "GoneForCausalLM", "MadeForCausalLM"]


def test_each_algorithm_of_a_class_is_judged() -> None:
    found = entries("LlamaForCausalLM")
    assert [(one.modifier, one.model, one.audit and one.audit.verdict) for one in found] == [
        ("SmoothQuantModifier", "llama", Verdict.RIGHT),
        ("AWQModifier", "llama", Verdict.INCOMPLETE),
    ]
    assert found[0].mend is None
    assert found[1].mend is not None
    assert found[1].mend.mappings[0].balance == (*NORM[0][:2], r"re:^model\.layers\.\d+\.self_attn\.v_proj$")


def test_what_cannot_be_judged_says_why() -> None:
    assert [(one.audit, one.why) for one in entries("GoneForCausalLM")] == [
        (None, "this transformers has no such class")
    ]
    assert [(one.modifier, one.why) for one in entries("MadeForCausalLM")] == [
        ("SmoothQuantModifier", "its mappings are made from the model at run time"),
        ("AWQModifier", "its mappings are made from the model at run time"),
    ]


def test_what_the_tool_leaves_out_is_no_fault_beside_what_is_right() -> None:
    mapping = WrittenMapping("norm", ("read",))
    right, skipped, stops = (Judged(mapping, Verdict(name)) for name in ("right", "skipped", "stops"))
    assert Audit("llama", "llm-compressor", (right, skipped)).verdict is Verdict.RIGHT
    assert Audit("llama", "llm-compressor", (skipped,)).verdict is Verdict.SKIPPED
    assert Audit("llama", "llm-compressor", (right, stops, skipped)).verdict is Verdict.STOPS
