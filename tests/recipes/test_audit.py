"""Hand-made mappings judged, each kind of verdict by a mapping whose truth is known from the model's code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from torch import nn

import autoquant as aq
from autoquant.cli.main import main
from autoquant.errors import AutoQuantError
from autoquant.models.repair import find_source
from autoquant.recipes.audit import Bench, Verdict, audit, bench_for, scale_
from autoquant.recipes.matching import MatchedPair, WrittenMapping
from autoquant.recipes.mending import mended

QKV = tuple(f"re:.*{name}_proj$" for name in "qkv")


@pytest.fixture(scope="module")
def gemma2() -> Bench:
    return bench_for(find_source("gemma2"))


@pytest.fixture(scope="module")
def qwen3_moe() -> Bench:
    return bench_for(find_source("qwen3_moe"))


def judged(
    bench: Bench, smooth: str, *balance: str, tool: str = "llm-compressor", modifier: str = ""
) -> tuple[str, str]:
    one = audit(bench, [WrittenMapping(smooth, balance, modifier=modifier)], tool).judged[0]
    return one.verdict.value, one.why


def test_a_norm_that_the_tool_knows_to_be_one_plus_weight_is_right(gemma2: Bench) -> None:
    assert judged(gemma2, "re:.*input_layernorm$", *QKV) == ("right", "")


def test_a_norm_behind_the_block_feeds_nothing(gemma2: Bench) -> None:
    verdict, why = judged(gemma2, "re:.*post_attention_layernorm$", "re:.*gate_proj$", "re:.*up_proj$")
    assert verdict == "wrong"
    assert why == (
        "'model.layers.0.post_attention_layernorm' is the source of no group: it goes into add at 'model.layers.0' "
        "(Gemma2DecoderLayer); 'model.layers.0.mlp.gate_proj' reads 'model.layers.0.pre_feedforward_layernorm'"
    )


def test_every_set_that_changes_the_logits_is_explained(gemma2: Bench) -> None:
    """The first set holds, the second scales what its reader does not read."""
    names = (r"re:^model\.layers\.(0\.mlp\.up|[1-9]\.mlp\.gate)_proj$", r"re:.*mlp\.down_proj$")
    found = audit(gemma2, [WrittenMapping(names[0], names[1:])], "llm-compressor").judged[0]
    assert (found.verdict, len(found.faults)) == (Verdict.WRONG, 1)
    assert found.faults[0].pair.smooth == "model.layers.1.mlp.gate_proj"


def test_what_is_wrong_is_mended_by_the_groups_that_were_meant(gemma2: Bench) -> None:
    attention = WrittenMapping("re:.*input_layernorm$", QKV)
    behind = WrittenMapping("re:.*post_attention_layernorm$", ("re:.*gate_proj$", "re:.*up_proj$"))
    nothing = WrittenMapping("re:.*post_feedforward_layernorm$", ("re:.*embed_tokens$",))
    kept, dropped = mended(gemma2, audit(gemma2, [attention, behind, nothing], "llm-compressor"))
    before = WrittenMapping(
        r"re:^model\.layers\.\d+\.pre_feedforward_layernorm$",
        tuple(rf"re:^model\.layers\.\d+\.mlp\.{name}_proj$" for name in ("gate", "up")),
    )
    assert kept == (attention, before)
    assert dropped == (nothing,)


def test_a_forgotten_reader_is_added(qwen3_moe: Bench) -> None:
    experts = ("re:.*gate_proj$", "re:.*up_proj$")
    mapping = WrittenMapping("re:.*post_attention_layernorm$", experts)
    (kept,), dropped = mended(qwen3_moe, audit(qwen3_moe, [mapping], "llm-compressor"))
    assert kept.balance == (*experts, r"re:^model\.layers\.\d+\.mlp\.gate$")
    assert dropped == ()


def test_grouped_queries_stop_one_modifier_and_another_leaves_them_out(gemma2: Bench) -> None:
    assert judged(gemma2, "re:.*v_proj$", "re:.*o_proj$")[0] == "stops"
    assert judged(gemma2, "re:.*v_proj$", "re:.*o_proj$", modifier="AWQModifier")[0] == "skipped"


def test_a_forgotten_router_is_named_and_costs_something(qwen3_moe: Bench) -> None:
    experts = ("re:.*gate_proj$", "re:.*up_proj$")
    found = audit(qwen3_moe, [WrittenMapping("re:.*post_attention_layernorm$", experts)], "llm-compressor").judged[0]
    assert found.verdict is Verdict.INCOMPLETE
    assert found.why == "forgets the reader 'model.layers.0.mlp.gate'"
    assert found.change is not None and found.change > 1e-2
    assert judged(qwen3_moe, "re:.*post_attention_layernorm$", *experts, "re:.*mlp.gate$") == ("right", "")


def test_experts_are_taken_one_by_one(qwen3_moe: Bench) -> None:
    assert judged(qwen3_moe, "re:.*up_proj$", "re:.*down_proj$") == ("right", "")


def test_what_nothing_uses_is_idle_and_what_matches_nothing_is_said(qwen3_moe: Bench) -> None:
    found = audit(qwen3_moe, [WrittenMapping("re:nowhere", ("re:neither",))], "llm-compressor")
    assert found.verdict is Verdict.NOT_MATCHED
    assert "model.norm -> lm_head" in found.idle


def test_scales_go_in_as_each_tool_puts_them() -> None:
    class Gain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.full((4,), 2.0, dtype=torch.float64))

    module = nn.ModuleDict({"norm": Gain(), "read": nn.Linear(4, 3, dtype=torch.float64)})
    before = module["read"].weight.detach().clone()
    scale_(module, MatchedPair("norm", ("read",)), "llm-compressor", 0)
    scales = module["read"].weight / before
    assert torch.allclose(module["norm"].weight * scales[0], torch.full((4,), 2.0, dtype=torch.float64))
    with pytest.raises(AutoQuantError, match="'read' has 3 channels, 'other' reads 4"):
        scale_(
            nn.ModuleDict({"read": nn.Linear(4, 3), "other": nn.Linear(4, 4)}),
            MatchedPair("read", ("other",)),
            "quark",
            0,
        )


def test_a_recipe_there_and_back_uses_the_same_groups(tmp_path: Path) -> None:
    """Export, import: the groups that the recipe holds are on, all others off."""
    folder = Path(aq.__file__).parent / "data" / "wikinano1m"
    config = aq.analyze(folder).config
    written = aq.export_recipe(config, "llm-compressor")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(written.text)
    found = aq.import_recipe(recipe, "llm-compressor", folder)
    left_out = {refusal.name for refusal in written.refused}
    wanted = [g.name for g in config.smoothing.groups if g.kind.value != "query_key" and g.name not in left_out]
    assert list(found.used) == wanted
    assert [group.name for group in found.config.smoothing.groups if group.enable] == wanted


def test_a_wrong_recipe_is_no_config(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    mapping = [["re:.*q_proj$", "re:.*k_proj$"], "re:.*input_layernorm$"]
    recipe.write_text(yaml.safe_dump({"a_stage": {"b_modifiers": {"SmoothQuantModifier": {"mappings": [mapping]}}}}))
    folder = Path(aq.__file__).parent / "data" / "wikinano1m"
    output = tmp_path / "config.json"
    run = CliRunner().invoke(main, ["import", str(recipe), str(folder), "--from", "llm-compressor", "-o", str(output)])
    assert run.exit_code == 1
    assert "1 of 1 mappings do not hold; nothing is written" in run.stderr
    assert "forgets the reader 'model.layers.0.self_attn.v_proj'" in run.stderr
    assert not output.exists()
    run = CliRunner().invoke(main, ["audit", str(recipe), str(folder), "--format", "json", "--quiet"])
    assert run.exit_code == 1
    (entry,) = json.loads(run.stdout)["entries"]
    assert entry["verdict"] == "incomplete"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "neither JSON nor YAML"),
        ("a: 1", "no mappings of SmoothQuantModifier or AWQModifier"),
        ("SmoothQuantModifier: {mappings: [[1, 2, 3]]}", r"expected \[\[balance, ...\], smooth\]"),
        ("SmoothQuantModifier: {mappings: [[[], norm]]}", "no layer undoes it"),
        ("SmoothQuantModifier: {mappings: [[[1], norm]]}", "expected one name and a list of names"),
        ("SmoothQuantModifier: {mappings: 3}", "mappings: expected a list, not 3"),
        ("SmoothQuantModifier: {smoothing_strength: much, mappings: []}", "a strength of 'much'"),
        ("SmoothQuantModifier: {mappings: [[['re:a('], norm]]}", "is no regular expression"),
    ],
)
def test_a_file_that_is_no_recipe_says_why(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(AutoQuantError, match=message):
        aq.audit(path, "llm-compressor", "llama")


def test_a_registry_needs_the_tool(tmp_path: Path) -> None:
    with pytest.raises(AutoQuantError, match="name the MODEL"):
        aq.audit("all", "llm-compressor")
    with pytest.raises(AutoQuantError, match="no such file; for a class name the --python that has llm-compressor"):
        aq.audit("LlamaForCausalLM", "llm-compressor", "llama")
    with pytest.raises(AutoQuantError, match="cannot be run"):
        aq.audit("all", "llm-compressor", python=tmp_path / "no-python")


def test_a_norm_among_the_readers_stops_every_algorithm(gemma2: Bench) -> None:
    verdict, why = judged(gemma2, "re:.*input_layernorm$", "re:.*q_proj$", "re:.*pre_feedforward_layernorm$")
    assert (verdict, why) == (
        "stops",
        "'model.layers.0.pre_feedforward_layernorm' is no linear: it has no columns to scale",
    )


def test_a_module_without_a_weight_stops_every_algorithm(gemma2: Bench) -> None:
    verdict, why = judged(gemma2, "re:.*act_fn$", "re:.*down_proj$", modifier="AWQModifier")
    assert verdict == "stops"
    assert why.endswith("has no weight to scale")
