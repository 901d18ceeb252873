# ruff: noqa: E501 - a finding is one line, however long
"""The rotatable spaces of every small graph: exactly these, and each of them carried out."""

from __future__ import annotations

from typing import Literal

import pytest
from proved_graphs import GRAPHS, proof, reasons
from readable import space_lines

from autoquant.analyzer.rotation_spaces import named_by_start
from autoquant.config.format import Read, Reader, Space, Writer

TOLERANCE = 1e-9
EXPECTED: dict[str, list[str]] = {
    "matrix_per_head_from_left": [],
    "matrix_from_left_of_one_head": [],
    "block_diagonal": [
        "other 1 x 2 a.weight.0[0:2x2/2,1>0,1] a.bias.0[0:2x2/2,1>0,1] -> w.1",
        "other 2 x 2 w.0 -> o.weight.1 +bias",
    ],
    "gain_of_three_dimensions": [],
    "relu_gate": [],
    "relu_h_times_h": [],
    "h_times_h": [],
    "squared_relu": [],
    "squared_relu_pow": [],
    "weight_halved": [],
    "weight_halved_plus_one": [],
    "plus_one": [],
    "adaln": [],
    "adaln_no1": [],
    "perm_const": ["other 1 x 4 a.weight.0 a.bias.0 -> b.weight.1[0:2x2/2,1>2+1,-2] +bias"],
    "perm_list": ["other 1 x 4 a.weight.0 a.bias.0 -> b.weight.1[0:2x2/2,1>2+1,-2] +bias"],
    "perm_index_select": ["other 1 x 4 a.weight.0 a.bias.0 -> b.weight.1[0:2x2/2,1>2+1,-2] +bias"],
    "perm_flip": ["other 1 x 4 a.weight.0 a.bias.0 -> b.weight.1[0:4/1>3+-1] +bias"],
    "linear_twice": [],
    "linear_twice_parallel": [],
    "ln_bias_two": [],
    "silu": [],
    "gated": [],
    "one_expert_elsewhere": [
        "other 1 x 4 up.0.weight.0 up.0.bias.0 -> down.0.weight.1 +bias z.weight.1 +bias",
        "other 1 x 4 down.0.weight.0 down.0.bias.0 down.1.weight.0 down.1.bias.0 -> o.weight.1 +bias",
        "other 1 x 4 up.1.weight.0 up.1.bias.0 -> down.1.weight.1 +bias",
    ],
    "experts_once": ["other 1 x 4 down.2 -> o.weight.1 +bias"],
    "experts_twice": ["other 1 x 4 down.2 -> o.weight.1 +bias"],
    "shared_weight": ["other 1 x 4 a.weight.0 b.weight.0 -> o.weight.1 +bias"],
    "shared_weight_seq": [],
    "conv": [],
    "conv_silu": [],
    "conv_gate": [],
    "conv_dense": [
        "other 1 x 4 a.weight.0 a.bias.0 -> cv.weight.1",
        "other 1 x 4 cv.weight.0 cv.bias.0 -> b.weight.1 +bias",
    ],
    "leaky": [],
    "leaky_negative": [],
    "hardtanh": [],
    "relu6": [],
    "divide": [],
    "cat": [
        "other 1 x 4 a.weight.0 a.bias.0 -> b.weight.1[0..3] +bias",
        "other 1 x 2 a2.weight.0 a2.bias.0 -> b.weight.1[4..5] +bias",
    ],
    "chunk": [],
    "split": [],
    "W.T": ["other 1 x 4 a.weight.0 a.bias.0 -> w.1"],
    "W": ["other 1 x 6 u.1 -> w.0"],
    "addmm": ["other 1 x 6 u.1 b.0 -> w.0 +bias"],
    "baddbmm": [],
    "einsum_mixes_tokens": ["R2 1 x 4 v.weight.0 v.bias.0 -> o.weight.1 +bias"],
    "einsum": ["other 1 x 4 a.weight.0 a.bias.0 -> w.0", "other 1 x 4 w.1 -> b.weight.1 +bias"],
    "unknown_op": [],
    "shared_bias": ["other 1 x 4 a.weight.0 a.bias.0 b.bias.0 b.weight.0 -> o.weight.1 +bias o2.weight.1 +bias"],
    "norm_twice": [],
    "norm_tied": [],
    "norm_added": [],
    "offset": [],
    "offset_and_plain": [],
    "index_add": ["other 1 x 4 a.weight.0 a.bias.0 -> o.weight.1 +bias"],
    "scan": [],
    "extra_output": [],
    "buffer_scale": [],
    "param_scale": ["other 1 x 4 a.weight.0 a.bias.0 -> rms(k) b.weight.1 +bias"],
    "max_binary": [],
    "normalize": ["other 1 x 4 a.weight.0 a.bias.0 -> b.weight.1 +bias"],
    "vector_norm": ["other 1 x 4 a.weight.0 a.bias.0 -> b.weight.1 +bias"],
    "to_int": [],
    "pad": ["other 1 x 4 a.weight.0 a.bias.0 -> b.weight.1[1..4] +bias"],
    "pad_value": [],
    "pad_reflect": [],
    "expand_as": ["other 1 x 4 a.weight.0 a.bias.0 -> b.weight.1 +bias"],
    "reshape_as": ["other 1 x 4 a.weight.0 a.bias.0 -> b.weight.1 +bias"],
    "repeat_unknown": ["other 1 x 4 a.weight.0 a.bias.0 -> b.weight.1 +bias"],
    "rsub": [],
    "sub": ["other 1 x 4 a.weight.0 a.bias.0 a2.weight.0 a2.bias.0 -> b.weight.1 +bias"],
    "alpha": [],
    "roll": ["other 1 x 4 a.weight.0 a.bias.0 -> b.weight.1[0:2/1>3+-3 2..3>1] +bias"],
    "threshold": [],
    "threshold1": [],
    "prelu": [],
    "glu": [],
    "amax": [],
    "where_gt": [],
    "batchnorm": [],
    "groupnorm": [],
    "bilinear": [],
    "transposed_add": [],
    "rms_groups": ["other 2 x 2 a.weight.0 a.bias.0 -> o.weight.1 +bias"],
    "mixed_occurrence": [],
    "mixed_occurrence2": [],
    "param_slice_rows": [],
    "fused_slices": [],
    "weight_scaled": [],
    "weight_norm": [],
    "bias_plus": ["other 1 x 4 a.weight.0 a.bias.0 -> o.weight.1 +bias"],
    "bias_view": ["other 1 x 4 w.0 k.1x2 -> o.weight.1 +bias"],
    "param_scalar": ["other 1 x 4 a.weight.0 a.bias.0 -> b.weight.1 +bias"],
    "param_scalar_add": [],
    "linear_attention": ["R2 1 x 4 v.weight.0 v.bias.0 -> o.weight.1 +bias"],
    "max_dim": [],
    "topk_values": [],
    "sort_values": [],
    "gather": [],
    "scatter": [],
    "index_put": ["other 1 x 4 a.weight.0 a.bias.0 -> b.weight.1 +bias"],
    "index_put_zeros": ["other 1 x 4 a.weight.0 a.bias.0 -> b.weight.1 +bias"],
    "index_put_ones": [],
    "index_put_zeros_channels": [],
    "select_scatter": [],
    "slice_assign": [],
    "relu_": [],
    "mean_pool": ["other 1 x 4 a.weight.0 a.bias.0 -> b.weight.1 +bias"],
    "sum_all": ["other 1 x 4 a.weight.0 a.bias.0 -> b.weight.1 +bias"],
    "x_over_norm": ["other 1 x 4 a.weight.0 a.bias.0 -> b.weight.1 +bias"],
    "x_over_sum": [],
    "pow3": [],
    "sqrt_relu": [],
    "pow_half_mix": [],
    "pow_gate": [],
    "h2_plus_h": [],
    "buffer_index_tokens": ["other 1 x 4 a.weight.0 a.bias.0 -> b.weight.1 +bias"],
    "moveaxis_mix": [],
    "moveaxis_legal": ["other 1 x 4 a.weight.0 a.bias.0 -> b.weight.1[0:2x2/2,1>1,2] +bias"],
    "two_linears_sum_bias_none": ["other 1 x 4 a.weight.0 a.bias.0 p.0 -> b.weight.1 +bias"],
    "norm_over_heads": ["R2 2 x 4 v.weight.0 v.bias.0 -> o.weight.1 +bias"],
    "attention": ["R2 2 x 4 v.weight.0 v.bias.0 -> o.weight.1 +bias"],
    "attention_norope": ["R2 2 x 4 v.weight.0 v.bias.0 -> o.weight.1 +bias"],
    "gqa_repeat": ["R2 2 x 2 v.weight.0 v.bias.0 -> o.weight.1[0:2x2x2/4,2,1>2,0,1] +bias"],
    "gqa_expand": ["R2 2 x 2 v.weight.0 v.bias.0 -> o.weight.1[0:2x2x2/4,2,1>2,0,1] +bias"],
    "sdpa_gqa": ["R2 2 x 2 v.weight.0 v.bias.0 -> o.weight.1[0:2x2x2/4,2,1>2,0,1] +bias"],
    "qk_shared": ["R2 2 x 2 v.weight.0 v.bias.0 -> o.weight.1 +bias"],
    "kv_shared": [],
    "complex_rope": ["R2 2 x 4 v.weight.0 v.bias.0 -> o.weight.1 +bias"],
    "interleaved_rope": ["R2 2 x 4 v.weight.0 v.bias.0 -> o.weight.1 +bias"],
    "partial_rope": ["R2 2 x 4 v.weight.0 v.bias.0 -> o.weight.1 +bias"],
    "mqa_bcast": ["R2 1 x 2 v.weight.0 v.bias.0 -> o.weight.1[0:2x2/2,1>0,1] +bias"],
    "interleaved_qkv": ["R2 2 x 2 a.weight.0[4:2x2/6,1>2,1] a.bias.0[4:2x2/6,1>2,1] -> o.weight.1 +bias"],
    "heads_scalar": ["other 2 x 2 a.weight.0 a.bias.0 -> o.weight.1 +bias"],
    "heads_gate": ["other 2 x 2 a.weight.0 a.bias.0 -> o.weight.1 +bias"],
    "post_norm": [],
    "tied": ["R1 1 x 4 e.weight.1 b.weight.0 b.bias.0 -> rms(n2.weight) b.weight.1 +bias -> rms(n.weight) h.weight.1"],
    "extra_output_space": [],
    "norm_read_and_added": [],
    "buffer_space": [],
    "emb_scaled_norm": ["R1 1 x 4 e.weight.1 -> rms(n.weight) o.weight.1 +bias"],
    "emb_norm": [
        "R1 1 x 4 e.weight.1 after layer(n.weight, n.bias) b.weight.0 b.bias.0 -> rms(n2.weight) b.weight.1 +bias -> rms(f_.weight) o.weight.1 +bias"
    ],
    "mlp_bias_ln_space": [
        "R1 1 x 4 centred e.weight.1 pos.1 b.weight.0 b.bias.0 -> layer(n2.weight, n2.bias) c.weight.1 +bias"
        " -> layer(f_.weight, f_.bias) o.weight.1"
    ],
    "pos_table": ["R1 1 x 4 centred e.weight.1 pe.weight.1 -> layer(f_.weight, f_.bias) o.weight.1"],
    "pos_slice": ["R1 1 x 4 e.weight.1 pos.1 -> rms(f_.weight) o.weight.1"],
    "positions_by_number": ["R1 1 x 4 e.weight.1 pos.1 -> rms(n.weight) o.weight.1 +bias"],
    "every_second_position": [],
    "positions_used_otherwise": [],
    "norm_gain_two_offsets": [],
    "norm_gain_reused": [],
    "norm_twice_space": [],
    "two_norms_one_linear": [],
    "ln_and_raw": [],
    "ln_and_rms": [],
    "class_token": ["R1 1 x 4 centred e.weight.1 cls.2 pos.2 -> layer(n.weight, n.bias) o.weight.1 +bias"],
    "class_token_among_others": [],
    "token_of_two_channels": [],
    "pictures_in_one_row": [
        "R1 1 x 4 e.weight.1 v.weight.0 v.bias.0 -> v.weight.1 +bias -> rms(n.weight) o.weight.1 +bias"
    ],
    "pictures_out_of_step": [],
    "sum_of_rows_out_of_step": [],
    "rows_out_of_step": [],
    "rows_out_of_step_by_the_data": [],
    "mean_of_rows_out_of_step": [],
    "pictures_and_newlines": ["R1 1 x 4 e.weight.1 v.weight.0 v.bias.0 newline.0 -> rms(n.weight) o.weight.1 +bias"],
    "length_then_ln": [],
    "ln_then_length": ["R1 1 x 4 centred e.weight.1 -> layer() b.weight.1 +bias"],
    "norm_before_addmm_with_beta_1": [
        "R1 1 x 4 e.weight.1 -> b.weight.1 +bias",
        "other 1 x 4 centred b.weight.0 b.bias.0 -> layer(n.weight, n.bias) m.0 +bias",
    ],
    "norm_before_addmm_with_beta_0.5": ["R1 1 x 4 e.weight.1 -> b.weight.1 +bias"],
    "ln_only_bias": ["R1 1 x 4 centred e.weight.1 -> layer() b.weight.1 +bias"],
    "emb_twice_folded": ["R1 1 x 4 e.weight.1 -> rms(n.weight) o.weight.1 +bias -> rms(n2.weight) p.weight.1 +bias"],
    "emb_twice_folded_same": ["R1 1 x 4 e.weight.1 -> rms(n.weight) o.weight.1 +bias p.weight.1 +bias"],
    "emb_folded_norm_reused": [],
    "emb_turned_before_its_norm": [],
    "emb_folded_in_parts": [],
    "emb_folded_then_tied": [
        "R1 1 x 4 e.weight.1 b.weight.0 b.bias.0 -> rms(n2.weight) b.weight.1 +bias -> rms(n.weight) h.weight.1"
    ],
    "token_mix": ["R1 1 x 4 e.weight.1 -> rms(n.weight) o.weight.1 +bias"],
    "token_mean": ["R1 1 x 4 e.weight.1 -> rms(n.weight) o.weight.1 +bias"],
    "token_cumsum": ["R1 1 x 4 e.weight.1 -> rms(n.weight) o.weight.1 +bias"],
    "half_norm": [],
    "gain_of_joined_parts": [],
    "table_that_is_measured_alone": ["R1 1 x 4 e2.weight.1 -> o.weight.1 +bias"],
    "table_of_unlike_channels": ["R1 1 x 4 e.weight.1 -> a.weight.1 b.weight.1"],
    "mean_of_joined_parts": [],
    "norm_behind_grouped_heads": [],
    "clamped_before_attention": [],
    "attention_over_channels": [],
    "relu_to_a_broken_power": [],
    "depthwise_of_flipped": [],
    "read_again_as_tokens": [],
    "table_is_weight": [],
    "table_is_head": ["R1 1 x 4 b.weight.0 b.bias.0 -> e.weight.1 a.weight.1 +bias"],
    "table_is_head_of_a_layer_norm": [],
    "table_is_head_behind_a_gain": [],
    "weight_is_bias": [],
    "bias_of_two_norms": [],
    "bias_of_two_spaces": [],
    "parts_of_two": ["R1 2 x 2 e.weight.1 b.weight.0 b.bias.0 -> b.weight.1 +bias o.weight.1[0:2x2/2,1>2+-2,1] +bias"],
    "parts_of_a_vector_and_its_norm": ["R1 2 x 2 e.weight.1 -> o.weight.1[0:2x2/2,1>2+-2,1] +bias"],
    "halves_added": [
        "R1 1 x 4 e.weight.1 -> w.1",
        "other 1 x 4 w.0[0:3x4/4,1>0,1] -> o.weight.1[0:2x4/4,1>0,1] +bias",
    ],
    "halves_added_and_read_from_the_second": ["R1 1 x 4 e.weight.1 -> w.1"],
    "norm_with_a_rolled_bias": ["R1 1 x 4 e.weight.1 -> b.weight.1 +bias"],
    "gain_of_another_vector_too": [],
    "norm_that_is_no_module": [],
    "stack_tokens": ["R1 1 x 4 e.weight.1 -> o.weight.1[0:2x4/4,1>0,1] +bias"],
    "cat_tokens": ["R1 1 x 4 e.weight.1 e2.weight.1 -> rms(n.weight) o.weight.1 +bias"],
    "layer_scale": [
        "R1 1 x 4 e.weight.1 -> rms(n.weight) b.weight.1 +bias -> rms(g) b.weight.0 b.bias.0 "
        "-> rms(f_.weight) o.weight.1 +bias"
    ],
    "layer_scalar": [
        "R1 1 x 4 e.weight.1 b.weight.0 b.bias.0 -> rms(n.weight) b.weight.1 +bias -> rms(f_.weight) o.weight.1 +bias"
    ],
    "norm_bias_no_reader_bias": ["R1 1 x 4 centred e.weight.1 -> layer(n.weight, n.bias) w.0"],
}

WHY: dict[str, str] = {
    "kv_shared": ": it is a product of two activations (aten.matmul)",
    "post_norm": "e: n.weight is applied to it before it is added: it cannot be folded into a linear (aten.add)",
    "extra_output_space": "e: it is an output of the model (aten.output)",
    "norm_read_and_added": "e: n.weight is applied to it before it is added: it cannot be folded into a linear (aten.add)",
    "buffer_space": "e: its channels are multiplied by different factors (aten.mul)",
    "gain_of_another_vector_too": "e: it is multiplied by a parameter (aten.mul)",
    "norm_that_is_no_module": "e: n is applied to it before it is added: it cannot be folded into a linear (aten.add)",
    "every_second_position": "e: only a part of the parameter is used for these inputs, and others may use more of it (aten.add)",
    "positions_used_otherwise": "e: pos is used where no rotation passes it (aten.tanh)",
    "class_token_among_others": "e: no rotation passes it (aten.softmax)",
    "token_of_two_channels": "e: n.weight does not multiply these channels alone, each once and in their order (aten.linear)",
    "norm_gain_two_offsets": "e: the parameter is used in different ways: as 1 + a gain and as a gain (aten.mul)",
    "norm_gain_reused": "e: n.weight is used where it is an output of the model (aten.output)",
    "norm_twice_space": "e: n.weight is applied to other vectors too (aten.linear)",
    "two_norms_one_linear": "e: n.weight is applied to it before it is added: it cannot be folded into a linear (aten.add)",
    "ln_and_raw": "e: its mean is subtracted for some of its readers only (aten.linear)",
    "ln_and_rms": "e: its mean is subtracted for some of its readers only (aten.linear)",
    "length_then_ln": "e: its length is taken before its mean is subtracted (aten.rms_norm)",
    "emb_folded_in_parts": "e: n.weight is folded into all of its channels, which are rotated in parts (aten.embedding)",
    "emb_folded_norm_reused": "e: the parameter is used in different ways: as a gain and as a gain of e.weight (aten.rms_norm)",
    "read_again_as_tokens": "e: channels of different vectors are read together (aten.linear)",
    "table_is_head_of_a_layer_norm": "e: e.weight is written too, and could not be centred for that without being read otherwise (aten.linear)",
    "table_is_head_behind_a_gain": "e: n.weight cannot be folded into e.weight, used elsewhere too (aten.linear)",
    "weight_is_bias": "e: the parameter is used in different ways: as a gain and as the bias of p (aten.layer_norm)",
    "bias_of_two_norms": "e: the parameter is used in different ways: as the bias of n and as the bias of n2 (aten.layer_norm)",
    "bias_of_two_spaces": "e: n is applied to other vectors too (aten.linear)",
    "half_norm": "e: n.weight does not multiply these channels alone, each once and in their order (aten.linear)",
    "gain_of_joined_parts": "e: n.weight does not multiply these channels alone, each once and in their order (aten.linear)",
    "table_that_is_measured_alone": "e: no weight reads it (aten.embedding)",
    "table_of_unlike_channels": "e2: channels of different vectors are read together (aten.linear)",
    "mean_of_joined_parts": "e: its mean is taken over channels that could only be rotated apart (aten.layer_norm)",
    "norm_behind_grouped_heads": ": n.weight does not multiply these channels alone, each once and in their order (aten.linear)",
    "clamped_before_attention": ": no rotation passes it (aten.clamp)",
    "attention_over_channels": ": its channels are summed (aten.scaled_dot_product_attention)",
}
"""What is said about the embedding, or about attention, that cannot be rotated."""


@pytest.mark.parametrize("name", EXPECTED)
def test_spaces(name: str) -> None:
    findings, _ = proof(name)
    assert [" ".join(line.strip() for line in space_lines(s)) for s in findings.spaces] == EXPECTED[name]


@pytest.mark.parametrize(
    "name",
    EXPECTED,
)
def test_spaces_hold(name: str) -> None:
    for outcome in proof(name)[1]:
        assert outcome.change < TOLERANCE, outcome


@pytest.mark.parametrize("name", WHY)
def test_reason(name: str) -> None:
    assert WHY[name] in reasons(proof(name)[0], "rotation")


def test_every_graph_has_an_expectation() -> None:
    assert set(EXPECTED) == set(GRAPHS)


def test_residual_streams_are_told_apart_by_what_starts_them() -> None:
    def space(kind: Literal["R1", "R2"], path: str) -> Space:
        read = Read(readers=(Reader(path="o.weight", size=4, dim=1),))
        return Space(name="residual", kind=kind, size=4, writers=(Writer(path=path, size=4, dim=1),), reads=(read,))

    alone = (space("R1", "text.weight"), space("R2", "v.weight"))
    assert named_by_start(alone) == alone
    several = (*alone, space("R1", "vision.weight"), space("R1", "vision.weight"))
    assert [one.name for one in named_by_start(several)] == [
        "residual of text",
        "residual",
        "residual of vision",
        "residual of vision #2",
    ]
