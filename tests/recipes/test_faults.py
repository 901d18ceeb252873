"""Why a set is no pair: the explanation of each kind of hand-made mistake, its truth known from the model's code."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest

from autoquant.models.repair import find_source
from autoquant.recipes.audit import Bench, audit, bench_for
from autoquant.recipes.faults import fault_of, groups_of, uses_of
from autoquant.recipes.matching import MatchedPair, WrittenMapping

EXPERTS = "model.layers.0.mlp.experts"


@pytest.fixture(scope="module")
def bench() -> Callable[[str], Bench]:
    """The bench of a type, built once."""
    return cache(lambda name: bench_for(find_source(name)))


@pytest.mark.parametrize(
    ("name", "smooth", "balance", "verdict", "why"),
    [
        (
            "qwen3_moe",
            "re:.*gate_proj$",
            ("re:.*down_proj$",),
            "wrong",
            f"what '{EXPERTS}.0.gate_proj' makes takes no scale: of '{EXPERTS}.gate_up_proj' the other rows do",
        ),
        (
            "qwen3_moe",
            "re:.*experts.0.up_proj$",
            ("re:.*experts.1.down_proj$",),
            "wrong",
            f"'{EXPERTS}.1.down_proj' does not read what '{EXPERTS}.0.up_proj' makes: it is another expert's",
        ),
        (
            "qwen3_moe",
            "re:.*post_attention_layernorm$",
            ("re:.*mlp.gate$",),
            "incomplete",
            f"forgets the reader '{EXPERTS}.gate_up_proj'",
        ),
        (
            "cohere",
            "model.norm",
            ("lm_head",),
            "wrong",
            "'lm_head.weight' is tied with 'model.embed_tokens.weight', which is scaled too",
        ),
        (
            "cohere",
            "re:.*input_layernorm$",
            ("re:.*gate_proj$", "re:.*up_proj$"),
            "incomplete",
            "forgets the reader 'model.layers.0.self_attn.k_proj', 'model.layers.0.self_attn.q_proj', "
            "'model.layers.0.self_attn.v_proj'",
        ),
        (
            "cohere",
            "re:.*gate_proj$",
            ("re:.*down_proj$",),
            "wrong",
            "'model.layers.0.mlp.gate_proj' is the source of no group: it goes into silu at "
            "'model.layers.0.mlp.act_fn' "
            "(SiLUActivation); 'model.layers.0.mlp.down_proj' reads 'model.layers.0.mlp.up_proj'",
        ),
        (
            "olmo2",
            "re:.*post_attention_layernorm$",
            ("re:.*gate_proj$", "re:.*up_proj$"),
            "wrong",
            "'model.layers.0.post_attention_layernorm' is the source of no group: it goes into add at 'model.layers.0' "
            "(Olmo2DecoderLayer); what 'model.layers.0.mlp.gate_proj' reads takes no scale: aten.add at 'model.norm': "
            "its scale is that of a tensor that must keep it: it is normalised",
        ),
    ],
)
def test_the_reason(
    bench: Callable[[str], Bench], name: str, smooth: str, balance: tuple[str, ...], verdict: str, why: str
) -> None:
    one = audit(bench(name), [WrittenMapping(smooth, balance)], "llm-compressor").judged[0]
    assert (one.verdict.value, one.why) == (verdict, why)
    assert one.change is not None and one.change > 1e-2


def test_a_reader_of_another_norm_is_said_with_what_it_reads(bench: Callable[[str], Bench]) -> None:
    given = bench("qwen3_moe")
    pair = MatchedPair("model.layers.0.input_layernorm", ("model.layers.1.self_attn.q_proj",))
    found = fault_of(pair, given.config, groups_of(given.config), given.loaded.module, given.reference.runs[0])
    assert found.why == (
        "'model.layers.1.self_attn.q_proj' does not read what 'model.layers.0.input_layernorm' makes: "
        "it reads 'model.layers.1.input_layernorm'"
    )
    assert found.missing == ()


def test_what_takes_the_output_of_a_module_is_found(bench: Callable[[str], Bench]) -> None:
    given = bench("cohere")
    found = uses_of(given.loaded.module, "model.layers.0.input_layernorm", given.reference.runs[0])
    assert [use.module.rpartition(".")[2] for use in found] == ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]
    assert {use.function for use in found} == {"linear"}


def test_experts_that_lie_the_other_way_are_taken_apart_too(bench: Callable[[str], Bench]) -> None:
    """Llama4's stacks are [experts, in, out]."""
    mapping = WrittenMapping("re:.*experts.*up_proj$", ("re:.*experts.*down_proj$",))
    one = audit(bench("llama4_text"), [mapping], "llm-compressor").judged[0]
    assert (one.verdict.value, one.why) == ("right", "")
    assert one.sets > 2
