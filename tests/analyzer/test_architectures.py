"""What is found in real architectures at their default size, two layers each, and the proof on small models."""

from __future__ import annotations

import functools
import os
import subprocess
import sys

import pytest
import torch
from model_types import ONE_OF_EACH
from model_types import TYPES as TABLE
from oracle import outcomes
from readable import group_lines, space_lines, text
from syrupy.assertion import SnapshotAssertion

from autoquant.analyzer.analysis import NO_MODULE, analyse
from autoquant.analyzer.analyze import analyze
from autoquant.analyzer.findings import Findings
from autoquant.analyzer.templates import canonical, unfold
from autoquant.capture.routes import capture
from autoquant.models.reduce import float64_throughout, grouped_experts, small
from autoquant.models.repair import find_source

LAYERS = {"deepseek_v3": 4, "gemma3_text": 7, "bamba": 11}  # enough for one of every kind of layer
TYPES = [*TABLE, "gpt_oss"]
TOLERANCE = 1e-9


SLOW = {"falcon_h1", "bamba", "gemma3_text", "gpt_oss"}


def marked(names: list[str]) -> list[object]:
    return [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in names]


@functools.cache
def found(name: str) -> Findings:
    return analyze(find_source(name, layers=LAYERS.get(name, 2))).findings


def groups(name: str) -> list[str]:
    return [" ".join(line.strip() for line in group_lines(g)) for g in found(name).groups]


def spaces(name: str) -> list[str]:
    return [" ".join(line.strip() for line in space_lines(s)) for s in found(name).spaces]


@pytest.mark.parametrize("name", marked(TYPES))
def test_findings(name: str, snapshot: SnapshotAssertion) -> None:
    assert text(found(name)) == snapshot
    assert found(name).unknown_operators == ()


@pytest.mark.parametrize("name", marked(TYPES))
def test_proof(name: str) -> None:
    """Every group and space of the small model, alone and together, leaves its logits where they were."""
    torch.set_num_threads(1)
    loaded = small(find_source(name))
    with grouped_experts(loaded):
        captured = capture(loaded.module, loaded.args, loaded.kwargs, "export")
    findings = analyse(captured).findings
    assert findings.groups

    def run(module: torch.nn.Module) -> torch.Tensor:
        with float64_throughout():
            return module(*loaded.args, **loaded.kwargs).logits

    for outcome in outcomes(loaded.module, run, findings):
        assert outcome.change < TOLERANCE, outcome


# --- the table of what must be found, line by line -------------------------------------------------------------------

L = "model.layers.{layer}."
GATED = [
    f"{L}input_layernorm -> self_attn.q_proj, self_attn.k_proj, self_attn.v_proj",
    f"{L}self_attn.v_proj -> o_proj",
    f"{L}post_attention_layernorm -> mlp.gate_proj, mlp.up_proj",
    f"{L}mlp.up_proj -> down_proj",
    "model.norm -> lm_head",
]
QK = f"{L}self_attn.q_proj -> k_proj"
QK_NORM = f"{L}self_attn.q_norm -> k_norm"
POST = [GATED[0], GATED[1], f"{L}pre_feedforward_layernorm -> mlp.gate_proj, mlp.up_proj", GATED[3], GATED[4]]
MOE = [*GATED[:2], f"{L}post_attention_layernorm -> mlp.gate, mlp.experts.gate_up_proj"]
MOE += [f"{L}mlp.experts.gate_up_proj -> down_proj", GATED[4], QK]
EXPECTED = {
    "llama": [*GATED, QK],
    "mistral": [*GATED, QK],
    "qwen2": [*GATED, QK],
    "granite": [*GATED, QK],
    "gemma": [*GATED, QK],
    "stablelm": [*GATED, QK],
    "qwen3": [*GATED, QK_NORM],
    "olmo": [GATED[1], GATED[3], QK],
    "olmo2": [GATED[1], GATED[3], GATED[4], QK_NORM],
    "gemma2": [*POST, QK],
    "gemma3_text": [*POST, QK_NORM],
    "phi3": [
        f"{L}input_layernorm -> self_attn.qkv_proj",
        f"{L}self_attn.qkv_proj -> qkv_proj",
        f"{L}self_attn.qkv_proj -> o_proj",
        f"{L}post_attention_layernorm -> mlp.gate_up_proj",
        f"{L}mlp.gate_up_proj -> down_proj",
        "model.norm -> lm_head",
    ],
    "glm4": [
        GATED[0],
        GATED[1],
        f"{L}post_attention_layernorm -> mlp.gate_up_proj",
        f"{L}mlp.gate_up_proj -> down_proj",
        GATED[4],
        QK,
    ],
    "cohere": [GATED[0] + ", mlp.gate_proj, mlp.up_proj", GATED[1], GATED[3], GATED[4], QK],
    "nemotron": [GATED[0], GATED[1], f"{L}post_attention_layernorm -> mlp.up_proj", GATED[3], GATED[4], QK],
    "starcoder2": [GATED[0], GATED[1], f"{L}post_attention_layernorm -> mlp.c_fc", GATED[4], QK],
    "mixtral": MOE,
    "qwen3_moe": [*MOE[:-1], QK_NORM],
}


@pytest.mark.parametrize("name", EXPECTED)
def test_table_of_groups(name: str) -> None:
    assert sorted(group.name for group in found(name).groups) == sorted(EXPECTED[name])


@pytest.mark.parametrize("name", marked(TYPES))
def test_table_of_rotations(name: str) -> None:
    """The residual rotates, or the post-norm's weight that stops it is named."""
    residual = [space for space in found(name).spaces if space.kind == "R1"]
    blocked = [b for b in found(name).blocked if b.what == "rotation"]
    if name in ("gemma2", "gemma3_text", "glm4", "olmo2"):
        assert not residual
        assert any("post_" in b.reason and "cannot be folded" in b.reason for b in blocked)
        return
    (space,) = residual
    assert space.centre == (
        name
        in ["olmo", "cohere", "opt", "gpt2", "gpt_neox", "falcon", "phi", "stablelm", "nemotron", "starcoder2", "bloom"]
    )
    assert {b.reason for b in blocked} <= {NO_MODULE}, "only the experts' own inputs"
    readers = {r.path.rpartition(".")[0] or r.path for read in space.reads for r in read.readers}
    assert "lm_head" in readers


@pytest.mark.parametrize("name", ["gemma", "gemma2", "gemma3_text", "nemotron"])
def test_gain_is_one_plus_weight(name: str) -> None:
    norms = [group for group in found(name).groups if group.kind == "norm_linear"]
    assert norms and all(g.sources[0].offset == 1 for g in norms)


def test_squared_relu_squares_the_scale() -> None:
    (group,) = (g for g in found("nemotron").groups if g.name.endswith("up_proj -> down_proj"))
    assert [slot.power for slot in group.targets] == [2]


def test_fused_rows() -> None:
    by_target = {g.name.rpartition(" ")[2]: " ".join(group_lines(g)) for g in found("phi3").groups}
    assert "qkv_proj.weight.0[6144..9215]" in by_target["o_proj"]
    assert "gate_up_proj.weight.0[8192..16383]" in by_target["down_proj"]


def test_interleaved_rows() -> None:
    (group,) = (g for g in found("gpt_neox").groups if g.name.endswith("-> dense"))
    path = "gpt_neox.layers.{layer}.attention.query_key_value"
    assert [s.path for s in group.sources] == [f"{path}.weight", f"{path}.bias"]
    (block,) = group.sources[0].index or ()
    assert (block.start, block.shape, block.stride) == (192, (64, 96), (288, 1))


def test_one_key_value_head() -> None:
    lines = groups("falcon")
    path = "transformer.h.{layer}."
    assert any(
        f"{path}self_attention.query_key_value.weight.1 {path}mlp.dense_h_to_4h.weight.1" in line for line in lines
    )
    assert any("query_key_value.weight.0[4608..4671]" in line and "dense.weight.1[0:71x64/64" in line for line in lines)


def test_transposed_linears_and_activation_in_between() -> None:
    lines, path = groups("gpt2"), "transformer.h.{layer}."
    assert f"{path}attn.c_attn.weight.1[1536..2303]" in "".join(lines)
    assert not any("c_fc.weight.1" in line and "c_proj" in line for line in lines)
    (blocked,) = (b for b in found("gpt2").blocked if b.path == f"{path}mlp.c_proj")
    assert "tanh" in blocked.operator


def test_first_linear_through_relu_and_learned_positions() -> None:
    assert any("fc1.weight.0" in line and "fc2.weight.1" in line for line in groups("opt"))
    assert any("embed_positions.weight.1" in line for line in spaces("opt"))


def test_norm_of_the_embedding_is_folded_into_the_table() -> None:
    (space,) = (s for s in found("bloom").spaces if s.kind == "R1")
    norm = space.writers[0].fold_norm
    assert norm is not None and norm.weight == "transformer.word_embeddings_layernorm.weight"


def test_norms_without_a_weight_are_named() -> None:
    blocked = {b.path: b.reason for b in found("olmo").blocked}
    assert blocked[f"{L}self_attn.q_proj"] == "it is normalised by a norm without a weight"
    assert "lm_head" in blocked


def test_linears_that_read_the_residual_itself_are_named() -> None:
    paths = {b.path for b in found("olmo2").blocked if b.what == "smoothing"}
    assert paths == {f"{L}self_attn.{x}_proj" for x in "qkv"} | {f"{L}mlp.{x}_proj" for x in ("gate", "up")}


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "qwen2_moe"])
def test_every_expert_has_scales_of_its_own(name: str) -> None:
    (group,) = (g for g in found(name).groups if g.name.endswith("experts.gate_up_proj -> down_proj"))
    (target,) = group.targets
    assert target.stack is not None and group.channels == target.size
    (norm,) = (g for g in found(name).groups if "post_attention_layernorm" in g.name)
    assert {f"{L}mlp.gate.weight", f"{L}mlp.experts.gate_up_proj"} <= {s.path for s in norm.targets}


def test_latent_attention_shared_experts_and_dense_first_layers() -> None:
    by_name = {(g.name, g.layers): g for g in found("deepseek_v3").groups}
    attention = f"{L}self_attn."
    for name in (
        f"{attention}q_a_layernorm -> q_b_proj",
        f"{attention}kv_a_layernorm -> kv_b_proj",
        f"{attention}kv_b_proj -> o_proj",
    ):
        assert (name, "0-3") in by_name
    assert (f"{L}mlp.up_proj -> down_proj", "0-2") in by_name
    assert (f"{L}mlp.shared_experts.up_proj -> down_proj", "3") in by_name


def test_state_space_layers() -> None:
    assert any("in_proj.weight.0[0..1535]" in line and "conv1d.weight.0" in line for line in groups("mamba"))


# --- the same by other ways ------------------------------------------------------------------------------------------

BOTH = [*ONE_OF_EACH, "olmo2"]
DEEP = {"mamba": 6, "gemma2": 6, "deepseek_v3": 6, "jamba": 9, "falcon_h1": 3, "gemma3_text": 7}


@pytest.mark.parametrize("name", BOTH)
def test_both_captures_lead_to_the_same_findings(name: str) -> None:
    source = find_source(name, layers=2)
    dynamo, export = (analyze(source, how=how) for how in ("dynamo", "export"))
    assert dynamo.captured.how == "dynamo"
    assert canonical(dynamo.findings) == canonical(export.findings)


@pytest.mark.slow
@pytest.mark.parametrize("name", DEEP)
def test_every_layer_traced_gives_what_representatives_give(name: str) -> None:
    source = find_source(name, layers=DEEP[name])
    few, all_ = analyze(source), analyze(source, full=True)
    assert canonical(unfold(few.findings)) == canonical(unfold(all_.findings))


def test_findings_do_not_depend_on_the_hash_seed() -> None:
    code = (
        "import hashlib\nfrom autoquant.analyzer.analyze import analyze\n"
        "from autoquant.models.repair import find_source\n"
        "config = analyze(find_source('qwen2_moe', layers=1), how='export').config\n"
        "print(hashlib.sha256(config.model_dump_json().encode()).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("0", "4711")
    }
    assert len(digests) == 1
