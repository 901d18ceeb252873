# ruff: noqa: E501 - a finding is one line, however long
"""The smoothable groups of every small graph: exactly these, and each of them carried out."""

from __future__ import annotations

import pytest
import torch
from proved_graphs import GRAPHS, proof, reasons
from readable import group_lines
from small_graphs import Graph, X, lin

from autoquant.analyzer.smoothing_groups import analyse_scales
from autoquant.capture.routes import capture

TOLERANCE = 1e-9

EXPECTED: dict[str, list[str]] = {
    "matrix_per_head_from_left": ["query_key 6 w1.1x2 -> w2.2x2"],
    "matrix_from_left_of_one_head": ["query_key 3 w1.1 -> w2.2"],
    "block_diagonal": [
        "linear_linear 2 a.weight.0[0:2x2/2,1>0,1] a.bias.0[0:2x2/2,1>0,1] -> w.1",
        "linear_linear 4 w.0 -> o.weight.1",
    ],
    "gain_of_three_dimensions": [],
    "relu_to_a_broken_power": [],
    "depthwise_of_flipped": [],
    "norm_behind_grouped_heads": [
        "query_key 4 q.weight.0[0:2x2x2/4,2,1>2,0,1] q.bias.0[0:2x2x2/4,2,1>2,0,1] -> k.weight.0 k.bias.0",
        "norm_linear 8 n.weight.0 -> o.weight.1",
    ],
    "clamped_before_attention": [],
    "attention_over_channels": [
        "query_key 1 q.weight.0[0:4/1>0] q.bias.0[0:4/1>0] -> k.weight.0[0:4/1>0] k.bias.0[0:4/1>0]",
        "linear_linear 1 v.weight.0[0:4/1>0] v.bias.0[0:4/1>0] -> o.weight.1[0:4/1>0]",
    ],
    "gain_of_joined_parts": ["norm_linear 8 n.weight.0 -> o.weight.1"],
    "table_that_is_measured_alone": [
        "linear_linear 4 e2.weight.1 -> o.weight.1",
        "linear_linear 1 o.weight.0[0:4/1>0] o.bias.0[0:4/1>0] -> e.weight.1[0:4/1>0]",
    ],
    "table_of_unlike_channels": [
        "linear_linear 4 e.weight.1 -> a.weight.1 b.weight.1",
        "linear_linear 1 a.weight.0 e2.weight.1[0] -> o.weight.1[0]",
        "linear_linear 1 b.weight.0 e2.weight.1[1] -> o.weight.1[1]",
    ],
    "mean_of_joined_parts": [],
    "relu_gate": ["linear_linear 4 a2.weight.0 a2.bias.0 -> b.weight.1"],
    "relu_h_times_h": ["linear_linear 4 a.weight.0 a.bias.0 -> b.weight.1^2"],
    "h_times_h": ["linear_linear 4 a.weight.0 a.bias.0 -> b.weight.1^2"],
    "squared_relu": ["linear_linear 4 a.weight.0 a.bias.0 -> b.weight.1^2"],
    "squared_relu_pow": ["linear_linear 4 a.weight.0 a.bias.0 -> b.weight.1^2"],
    "weight_halved": [
        "norm_linear 4 n.weight.0 n.bias.0 -> a.weight.1",
        "linear_linear 4 a.weight.0 a.bias.0 -> b.weight.1",
    ],
    "weight_halved_plus_one": [],
    "plus_one": [],
    "adaln": ["norm_linear 4 n.weight.0 -> b.weight.1"],
    "adaln_no1": ["linear_linear 4 a.weight.0 a.bias.0 -> b.weight.1"],
    "perm_const": ["linear_linear 4 a.weight.0 a.bias.0 -> b.weight.1[0:2x2/2,1>2+1,-2]"],
    "perm_list": ["linear_linear 4 a.weight.0 a.bias.0 -> b.weight.1[0:2x2/2,1>2+1,-2]"],
    "perm_index_select": ["linear_linear 4 a.weight.0 a.bias.0 -> b.weight.1[0:2x2/2,1>2+1,-2]"],
    "perm_flip": ["linear_linear 4 a.weight.0 a.bias.0 -> b.weight.1[0:4/1>3+-1]"],
    "linear_twice": [],
    "linear_twice_parallel": ["linear_linear 4 a.weight.0 a.bias.0 -> o.weight.1"],
    "ln_bias_two": ["norm_linear 4 n.weight.0 n.bias.0 -> a.weight.1 b.weight.1"],
    "silu": [],
    "gated": ["linear_linear 4 u.weight.0 u.bias.0 -> d.weight.1"],
    "one_expert_elsewhere": [
        "linear_linear 4 up.0.weight.0 up.0.bias.0 -> down.0.weight.1 z.weight.1",
        "linear_linear 4 down.0.weight.0 down.0.bias.0 down.1.weight.0 down.1.bias.0 -> o.weight.1",
        "linear_linear 4 up.1.weight.0 up.1.bias.0 -> down.1.weight.1",
    ],
    "experts_once": [
        "norm_linear 4 n.weight.0 -> up.1",
        "linear_linear 12 up.2x2 -> down.1x2",
        "linear_linear 4 down.2 -> o.weight.1",
    ],
    "experts_twice": [
        "norm_linear 4 n.weight.0 -> up.1",
        "linear_linear 6 up.2 -> down.1",
        "linear_linear 4 down.2 -> o.weight.1",
    ],
    "shared_weight": [
        "norm_linear 4 n.weight.0 n2.weight.0 -> a.weight.1 b.weight.1",
        "linear_linear 4 a.weight.0 b.weight.0 -> o.weight.1",
    ],
    "shared_weight_seq": ["linear_linear 4 n.weight.0 a.weight.0 b.weight.0 -> a.weight.1 b.weight.1 o.weight.1"],
    "conv": [
        "linear_linear 4 a.weight.0 a.bias.0 -> cv.weight.0",
        "linear_linear 4 cv.weight.0 cv.bias.0 -> b.weight.1",
    ],
    "conv_silu": ["linear_linear 4 a.weight.0 a.bias.0 -> cv.weight.0"],
    "conv_gate": [
        "linear_linear 4 a.weight.0 a.bias.0 -> cv.weight.0",
        "linear_linear 4 a2.weight.0 a2.bias.0 -> b.weight.1",
    ],
    "conv_dense": [
        "linear_linear 4 a.weight.0 a.bias.0 -> cv.weight.1",
        "linear_linear 4 cv.weight.0 cv.bias.0 -> b.weight.1",
    ],
    "leaky": ["linear_linear 4 a.weight.0 a.bias.0 -> b.weight.1"],
    "leaky_negative": ["linear_linear 4 a.weight.0 a.bias.0 -> b.weight.1"],
    "hardtanh": [],
    "relu6": [],
    "divide": [],
    "cat": [
        "linear_linear 4 a.weight.0 a.bias.0 -> b.weight.1[0..3]",
        "linear_linear 2 a2.weight.0 a2.bias.0 -> b.weight.1[4..5]",
    ],
    "chunk": ["linear_linear 4 a.weight.0[4..7] a.bias.0[4..7] -> b.weight.1"],
    "split": ["linear_linear 4 a.weight.0[0:2x4/4,1>0,1] a.bias.0[0:2x4/4,1>0,1] -> b.weight.1"],
    "W.T": ["linear_linear 4 a.weight.0 a.bias.0 -> w.1"],
    "W": ["linear_linear 6 u.1 -> w.0"],
    "addmm": ["linear_linear 6 u.1 b.0 -> w.0"],
    "baddbmm": ["query_key 4 a.weight.0 a.bias.0 -> b.weight.0 b.bias.0"],
    "einsum_mixes_tokens": ["linear_linear 4 v.weight.0 v.bias.0 -> o.weight.1"],
    "einsum": ["linear_linear 4 a.weight.0 a.bias.0 -> w.0", "linear_linear 4 w.1 -> b.weight.1"],
    "unknown_op": [],
    "shared_bias": ["linear_linear 4 a.weight.0 a.bias.0 b.bias.0 b.weight.0 -> o.weight.1 o2.weight.1"],
    "norm_twice": ["norm_linear 4 n.weight.0 -> b.weight.1 c.weight.1"],
    "norm_tied": ["norm_linear 4 n.weight.0 n2.weight.0 -> o.weight.1 o2.weight.1"],
    "norm_added": [],
    "offset": ["norm_linear 4 1+w.0 -> b.weight.1"],
    "offset_and_plain": [],
    "index_add": ["linear_linear 4 a.weight.0 a.bias.0 -> o.weight.1"],
    "scan": ["linear_linear 4 inp.weight.0 inp.bias.0 -> out.weight.1"],
    "extra_output": [],
    "buffer_scale": ["linear_linear 4 a.weight.0 a.bias.0 -> b.weight.1"],
    "param_scale": ["linear_linear 4 a.weight.0 a.bias.0 -> b.weight.1"],
    "max_binary": ["linear_linear 4 a.weight.0 a.bias.0 a2.weight.0 a2.bias.0 -> b.weight.1"],
    "normalize": [],
    "vector_norm": ["linear_linear 4 a.weight.0 a.bias.0 -> b.weight.1"],
    "to_int": [],
    "pad": ["linear_linear 4 a.weight.0 a.bias.0 -> b.weight.1[1..4]"],
    "pad_value": ["linear_linear 4 a.weight.0 a.bias.0 -> b.weight.1[1..4]"],
    "pad_reflect": [],
    "expand_as": ["linear_linear 4 a.weight.0 a.bias.0 -> b.weight.1"],
    "reshape_as": ["linear_linear 4 a.weight.0 a.bias.0 -> b.weight.1"],
    "repeat_unknown": ["linear_linear 4 a.weight.0 a.bias.0 -> b.weight.1"],
    "rsub": [],
    "sub": ["linear_linear 4 a.weight.0 a.bias.0 a2.weight.0 a2.bias.0 -> b.weight.1"],
    "alpha": ["linear_linear 4 a.weight.0 a.bias.0 a2.weight.0 a2.bias.0 -> b.weight.1"],
    "roll": ["linear_linear 4 a.weight.0 a.bias.0 -> b.weight.1[0:2/1>3+-3 2..3>1]"],
    "threshold": ["linear_linear 4 a.weight.0 a.bias.0 -> b.weight.1"],
    "threshold1": [],
    "prelu": ["linear_linear 4 a.weight.0 a.bias.0 -> b.weight.1"],
    "glu": ["linear_linear 4 a.weight.0[0..3] a.bias.0[0..3] -> b.weight.1"],
    "amax": ["linear_linear 1 a.weight.0[0:4/1>0] a.bias.0[0:4/1>0] -> b.weight.1[0:4/1>0]"],
    "where_gt": ["linear_linear 4 a.weight.0 a.bias.0 -> b.weight.1"],
    "batchnorm": ["norm_linear 4 bn.weight.0 bn.bias.0 -> b.weight.1"],
    "groupnorm": ["norm_linear 4 gn.weight.0 gn.bias.0 -> b.weight.1"],
    "bilinear": [],
    "transposed_add": ["linear_linear 1 a.weight.0[0:4/1>0] a.bias.0[0:4/1>0] -> o.weight.1[0:4/1>0]"],
    "rms_groups": [],
    "mixed_occurrence": ["linear_linear 2 a.weight.0 a.bias.0 -> o.weight.1[0..1 2:2/1>1+-1]"],
    "mixed_occurrence2": ["linear_linear 2 a.weight.0 a.bias.0 -> o.weight.1[0:2x2/2,1>0,1]"],
    "param_slice_rows": [],
    "fused_slices": [],
    "weight_scaled": ["linear_linear 4 w.0 -> o.weight.1"],
    "weight_norm": [],
    "bias_plus": ["linear_linear 4 a.weight.0 a.bias.0 -> o.weight.1"],
    "bias_view": ["linear_linear 4 w.0 k.1x2 -> o.weight.1"],
    "param_scalar": ["linear_linear 4 a.weight.0 a.bias.0 -> b.weight.1"],
    "param_scalar_add": ["linear_linear 1 a.weight.0[0:4/1>0] a.bias.0[0:4/1>0] k.0 -> b.weight.1[0:4/1>0]"],
    "linear_attention": [
        "query_key 4 q.weight.0 q.bias.0 -> k.weight.0 k.bias.0",
        "linear_linear 4 v.weight.0 v.bias.0 -> o.weight.1",
    ],
    "max_dim": ["linear_linear 4 a.weight.0 a.bias.0 -> b.weight.1"],
    "topk_values": ["linear_linear 1 a.weight.0[0:4/1>0] a.bias.0[0:4/1>0] -> b.weight.1[0:2/1>0]"],
    "sort_values": ["linear_linear 1 a.weight.0[0:4/1>0] a.bias.0[0:4/1>0] -> b.weight.1[0:4/1>0]"],
    "gather": ["linear_linear 1 a.weight.0[0:4/1>0] a.bias.0[0:4/1>0] -> b.weight.1[0:4/1>0]"],
    "scatter": ["linear_linear 4 a.weight.0 a.bias.0 -> b.weight.1[0:2x2/2,1>1+-1,2]"],
    "index_put": ["linear_linear 4 a.weight.0 a.bias.0 -> b.weight.1"],
    "index_put_zeros": ["linear_linear 4 a.weight.0 a.bias.0 -> b.weight.1"],
    "index_put_ones": [],
    "index_put_zeros_channels": ["linear_linear 3 a.weight.0[1..3] a.bias.0[1..3] -> b.weight.1[1..3]"],
    "select_scatter": [
        "linear_linear 3 a.weight.0[0:2/2>1 3>2] a.bias.0[0:2/2>1 3>2] -> b.weight.1[0:2/2>1 3>2]",
        "linear_linear 1 c.weight.0[0] c.bias.0[0] -> b.weight.1[1]",
    ],
    "slice_assign": ["linear_linear 4 a.weight.0 a.bias.0 -> b.weight.1"],
    "relu_": ["linear_linear 4 a.weight.0 a.bias.0 -> b.weight.1"],
    "mean_pool": ["linear_linear 4 a.weight.0 a.bias.0 -> b.weight.1"],
    "sum_all": ["linear_linear 4 a.weight.0 a.bias.0 -> b.weight.1"],
    "x_over_norm": [],
    "x_over_sum": [],
    "pow3": ["linear_linear 4 a.weight.0 a.bias.0 -> b.weight.1^3"],
    "sqrt_relu": ["linear_linear 4 a.weight.0^2 a.bias.0^2 -> b.weight.1"],
    "pow_half_mix": ["linear_linear 4 a.weight.0^2 a.bias.0^2 -> b.weight.1 c.weight.1^2"],
    "pow_gate": ["linear_linear 4 c.weight.0 c.bias.0 -> b.weight.1"],
    "h2_plus_h": [],
    "buffer_index_tokens": ["linear_linear 4 a.weight.0 a.bias.0 -> b.weight.1"],
    "moveaxis_mix": ["linear_linear 1 a.weight.0[0:4/1>0] a.bias.0[0:4/1>0] -> b.weight.1[0:4/1>0]"],
    "moveaxis_legal": ["linear_linear 4 a.weight.0 a.bias.0 -> b.weight.1[0:2x2/2,1>1,2]"],
    "two_linears_sum_bias_none": ["linear_linear 4 a.weight.0 a.bias.0 p.0 -> b.weight.1"],
    "norm_over_heads": [
        "query_key 2 qn.weight.0[0:2x2/2,1>0,1] -> kn.weight.0[0:2x2/2,1>0,1]",
        "linear_linear 8 v.weight.0 v.bias.0 -> o.weight.1",
    ],
    "attention": [
        "query_key 4 q.weight.0[0:2x2x2/4,2,1>2,0,1] q.bias.0[0:2x2x2/4,2,1>2,0,1] -> k.weight.0[0:2x2x2/4,2,1>2,0,1] k.bias.0[0:2x2x2/4,2,1>2,0,1]",
        "linear_linear 8 v.weight.0 v.bias.0 -> o.weight.1",
    ],
    "attention_norope": [
        "query_key 8 q.weight.0 q.bias.0 -> k.weight.0 k.bias.0",
        "linear_linear 8 v.weight.0 v.bias.0 -> o.weight.1",
    ],
    "gqa_repeat": [
        "query_key 4 q.weight.0[0:2x2x2/4,2,1>2,0,1] q.bias.0[0:2x2x2/4,2,1>2,0,1] -> k.weight.0 k.bias.0",
        "linear_linear 4 v.weight.0 v.bias.0 -> o.weight.1[0:2x2x2/4,2,1>2,0,1]",
    ],
    "gqa_expand": [
        "query_key 2 q.weight.0[0:2x4/4,1>1,0] q.bias.0[0:2x4/4,1>1,0] -> k.weight.0[0:2x2/2,1>1,0] k.bias.0[0:2x2/2,1>1,0]",
        "linear_linear 4 v.weight.0 v.bias.0 -> o.weight.1[0:2x2x2/4,2,1>2,0,1]",
    ],
    "sdpa_gqa": [
        "query_key 4 q.weight.0[0:2x2x2/4,2,1>2,0,1] q.bias.0[0:2x2x2/4,2,1>2,0,1] -> k.weight.0 k.bias.0",
        "linear_linear 4 v.weight.0 v.bias.0 -> o.weight.1[0:2x2x2/4,2,1>2,0,1]",
    ],
    "qk_shared": ["linear_linear 4 v.weight.0 v.bias.0 -> o.weight.1"],
    "kv_shared": ["query_key 4 q.weight.0 q.bias.0 o.weight.1 -> k.weight.0 k.bias.0"],
    "complex_rope": [
        "query_key 4 q.weight.0[0:4x2/2,1>1,0] q.bias.0[0:4x2/2,1>1,0] -> k.weight.0[0:4x2/2,1>1,0] k.bias.0[0:4x2/2,1>1,0]",
        "linear_linear 8 v.weight.0 v.bias.0 -> o.weight.1",
    ],
    "interleaved_rope": [
        "query_key 4 q.weight.0[0:4x2/2,1>1,0] q.bias.0[0:4x2/2,1>1,0] -> k.weight.0[0:4x2/2,1>1,0] k.bias.0[0:4x2/2,1>1,0]",
        "linear_linear 8 v.weight.0 v.bias.0 -> o.weight.1",
    ],
    "partial_rope": [
        "query_key 8 q.weight.0[0:2x2/2,1>0,1 4:2x4/4,1>2+2,1] q.bias.0[0:2x2/2,1>0,1 4:2x4/4,1>2+2,1] -> k.weight.0[0:2x2/2,1>0,1 4:2x4/4,1>2+2,1] k.bias.0[0:2x2/2,1>0,1 4:2x4/4,1>2+2,1]",
        "linear_linear 8 v.weight.0 v.bias.0 -> o.weight.1",
    ],
    "mqa_bcast": [
        "query_key 2 q.weight.0[0:2x2/2,1>0,1] q.bias.0[0:2x2/2,1>0,1] -> k.weight.0 k.bias.0",
        "linear_linear 2 v.weight.0 v.bias.0 -> o.weight.1[0:2x2/2,1>0,1]",
    ],
    "interleaved_qkv": [
        "query_key 4 a.weight.0[0:2x2/6,1>2,1] a.bias.0[0:2x2/6,1>2,1] -> a.weight.0[2:2x2/6,1>2,1] a.bias.0[2:2x2/6,1>2,1]",
        "linear_linear 4 a.weight.0[4:2x2/6,1>2,1] a.bias.0[4:2x2/6,1>2,1] -> o.weight.1",
    ],
    "heads_scalar": ["linear_linear 4 a.weight.0 a.bias.0 -> o.weight.1"],
    "heads_gate": ["linear_linear 4 a.weight.0 a.bias.0 -> o.weight.1"],
    "post_norm": ["norm_linear 4 m.weight.0 -> b.weight.1", "norm_linear 4 f_.weight.0 -> o.weight.1"],
    "tied": ["norm_linear 4 n2.weight.0 -> b.weight.1", "norm_linear 4 n.weight.0 -> h.weight.1"],
    "extra_output_space": ["norm_linear 4 n.weight.0 -> o.weight.1"],
    "norm_read_and_added": ["norm_linear 4 n3.weight.0 -> p.weight.1", "norm_linear 4 n2.weight.0 -> o.weight.1"],
    "buffer_space": ["norm_linear 4 n.weight.0 -> o.weight.1"],
    "emb_scaled_norm": ["norm_linear 4 n.weight.0 -> o.weight.1"],
    "emb_norm": ["norm_linear 4 n2.weight.0 -> b.weight.1", "norm_linear 4 f_.weight.0 -> o.weight.1"],
    "mlp_bias_ln_space": [
        "norm_linear 4 n2.weight.0 n2.bias.0 -> c.weight.1",
        "norm_linear 4 f_.weight.0 f_.bias.0 -> o.weight.1",
    ],
    "pos_table": ["norm_linear 4 f_.weight.0 f_.bias.0 -> o.weight.1"],
    "pos_slice": ["norm_linear 4 f_.weight.0 -> o.weight.1"],
    "norm_gain_two_offsets": [],
    "norm_gain_reused": ["norm_linear 4 n.weight.0 -> b.weight.1 b.weight.0 b.bias.0"],
    "norm_twice_space": ["norm_linear 4 n.weight.0 -> b.weight.1 c.weight.1"],
    "two_norms_one_linear": ["norm_linear 4 n.weight.0 n2.weight.0 -> b.weight.1"],
    "ln_and_raw": ["norm_linear 4 n.weight.0 n.bias.0 -> b.weight.1"],
    "ln_and_rms": ["norm_linear 4 n.weight.0 n.bias.0 -> b.weight.1", "norm_linear 4 n2.weight.0 -> c.weight.1"],
    "positions_by_number": ["norm_linear 4 n.weight.0 -> o.weight.1"],
    "every_second_position": ["norm_linear 4 n.weight.0 -> o.weight.1"],
    "positions_used_otherwise": ["norm_linear 4 n.weight.0 -> o.weight.1"],
    "class_token": ["norm_linear 4 n.weight.0 n.bias.0 -> o.weight.1"],
    "class_token_among_others": ["norm_linear 4 n.weight.0 -> o.weight.1"],
    "token_of_two_channels": ["norm_linear 4 n.weight.0 -> o.weight.1"],
    "sum_of_rows_out_of_step": ["norm_linear 4 n.weight.0 -> o.weight.1"],
    "rows_out_of_step": ["norm_linear 4 n.weight.0 -> o.weight.1"],
    "rows_out_of_step_by_the_data": ["norm_linear 4 n.weight.0 -> o.weight.1"],
    "mean_of_rows_out_of_step": ["norm_linear 4 n.weight.0 -> o.weight.1"],
    "pictures_out_of_step": ["norm_linear 4 n.weight.0 -> o.weight.1"],
    "pictures_in_one_row": ["norm_linear 4 n.weight.0 -> o.weight.1"],
    "pictures_and_newlines": ["norm_linear 4 n.weight.0 -> o.weight.1"],
    "length_then_ln": ["norm_linear 4 n.weight.0 n.bias.0 -> b.weight.1"],
    "ln_then_length": [],
    "norm_before_addmm_with_beta_1": [
        "linear_linear 4 e.weight.1 -> b.weight.1",
        "norm_linear 4 n.weight.0 n.bias.0 -> m.0",
    ],
    "norm_before_addmm_with_beta_0.5": ["linear_linear 4 e.weight.1 -> b.weight.1"],
    "ln_only_bias": [],
    "emb_twice_folded": ["norm_linear 4 n.weight.0 -> o.weight.1", "norm_linear 4 n2.weight.0 -> p.weight.1"],
    "emb_twice_folded_same": ["norm_linear 4 n.weight.0 -> o.weight.1 p.weight.1"],
    "emb_folded_norm_reused": [],
    "emb_turned_before_its_norm": ["norm_linear 4 n2.weight.0 -> o.weight.1"],
    "emb_folded_in_parts": [
        "norm_linear 2 n.weight.0[0..1] -> a.weight.1",
        "norm_linear 2 n.weight.0[2..3] -> b.weight.1",
    ],
    "emb_folded_then_tied": ["norm_linear 4 n2.weight.0 -> b.weight.1", "norm_linear 4 n.weight.0 -> h.weight.1"],
    "token_mix": ["norm_linear 4 n.weight.0 -> o.weight.1"],
    "token_mean": ["norm_linear 4 n.weight.0 -> o.weight.1"],
    "token_cumsum": ["norm_linear 4 n.weight.0 -> o.weight.1"],
    "half_norm": [
        "linear_linear 2 e.weight.1[2..3] -> o.weight.1[2..3]",
        "norm_linear 2 n.weight.0 -> o.weight.1[0..1]",
    ],
    "read_again_as_tokens": [
        "linear_linear 4 e.weight.1 b.weight.0[0:2x2/2,1>1+-1,2] -> b.weight.1 o.weight.1[0:2x2/2,1>1+-1,2]"
    ],
    "table_is_weight": [],
    "table_is_head": [],
    "table_is_head_of_a_layer_norm": [],
    "table_is_head_behind_a_gain": [],
    "weight_is_bias": ["norm_linear 4 p.0 -> o.weight.1"],
    "bias_of_two_norms": ["norm_linear 4 n.0 p.0 n2.0 -> o.weight.1 o2.weight.1"],
    "bias_of_two_spaces": ["norm_linear 4 n.0 p.0 -> o.weight.1 o2.weight.1"],
    "parts_of_two": ["linear_linear 4 e.weight.1 b.weight.0 b.bias.0 -> b.weight.1 o.weight.1[0:2x2/2,1>2+-2,1]"],
    "parts_of_a_vector_and_its_norm": [],
    "halves_added": [
        "linear_linear 4 e.weight.1 -> w.1",
        "linear_linear 4 w.0[0:3x4/4,1>0,1] -> o.weight.1[0:2x4/4,1>0,1]",
    ],
    "halves_added_and_read_from_the_second": [
        "linear_linear 4 e.weight.1 -> w.1",
        "linear_linear 4 w.0[0:3x4/4,1>0,1] -> o.1[0:2x3/3,1>1+-1,1 6:2/1>3+-3]",
    ],
    "norm_with_a_rolled_bias": [
        "linear_linear 4 e.weight.1 -> b.weight.1",
        "norm_linear 4 n.weight.0 p.0[0..2>1 3] -> o.weight.1",
    ],
    "gain_of_another_vector_too": ["norm_linear 4 n.weight.0 -> o.weight.1 o2.weight.1"],  # p has three rows more
    "norm_that_is_no_module": ["linear_linear 4 n.0 p.0 b.weight.0 b.bias.0 -> b.weight.1 o.weight.1"],
    "stack_tokens": ["linear_linear 4 e.weight.1 -> o.weight.1[0:2x4/4,1>0,1]"],
    "cat_tokens": ["norm_linear 4 n.weight.0 -> o.weight.1"],
    "layer_scale": [
        "norm_linear 4 n.weight.0 -> b.weight.1",
        "linear_linear 4 b.weight.0 b.bias.0 -> g.0",
        "norm_linear 4 f_.weight.0 -> o.weight.1",
    ],
    "layer_scalar": [
        "norm_linear 4 n.weight.0 -> b.weight.1",
        "linear_linear 1 b.weight.0[0:4/1>0] b.bias.0[0:4/1>0] -> g.0",
        "norm_linear 4 f_.weight.0 -> o.weight.1",
    ],
    "norm_bias_no_reader_bias": ["norm_linear 4 n.weight.0 n.bias.0 -> w.0"],
}

WHY: dict[str, str] = {
    "gain_of_three_dimensions": "o: w has its channels along several dimensions at once (aten.mul)",
    "relu_to_a_broken_power": "b: its scale is needed to a power that is no whole number (aten.linear)",
    "depthwise_of_flipped": "b: cv.weight would take two scales along one dimension (aten.linear)",
    "plus_one": "b: a constant is added (aten.add)",
    "silu": "b: silu(s x) is not s silu(x) (aten.silu)",
    "conv_silu": "b: silu(s x) is not s silu(x) (aten.silu)",
    "hardtanh": "b: it is clamped (aten.hardtanh)",
    "relu6": "b: relu6(s x) is not s relu6(x) (aten.relu6)",
    "divide": "b: nothing that feeds it can absorb a scale (aten.linear)",
    "unknown_op": "b: the operator has no rule (aten.special_i0e)",
    "norm_added": "b: its scale is that of a tensor that must keep it: it is an output of the model (aten.output)",
    "offset_and_plain": "b: its scale is that of a tensor that must keep it: the parameter is used in different ways: as a tensor and as a tensor plus 1 (aten.mul)",
    "extra_output": "b: its scale is that of a tensor that must keep it: it is an output of the model (aten.output)",
    "normalize": "b: its scale is that of a tensor that must keep it: it is clamped (aten.clamp_min)",
    "pad": "b: nothing that feeds it can absorb a scale (aten.linear)",
    "pad_reflect": "b: it is padded with its own elements (aten.pad)",
    "rsub": "b: a constant is added (aten.rsub)",
    "threshold1": "b: it is clamped (aten.threshold)",
    "rms_groups": "o: its scale is that of a tensor that must keep it: it is normalised (aten.add)",
    "param_slice_rows": "w: its scale is that of a tensor that must keep it: it is an output of the model (aten.output)",
    "h2_plus_h": "b: its scale is that of a tensor that must keep it: the scale is needed to two different powers (aten.mul)",
    "kv_shared": "o: its input is scaled only with the others of 'q -> k' (aten.linear)",
    "table_is_weight": "o: its scale is that of a tensor that must keep it: the parameter is used in different ways: as a table and as a weight (aten.linear)",
    "norm_read_and_added": "b: its scale is that of a tensor that must keep it: it is normalised (aten.rms_norm)",
    "mlp_bias_ln_space": "b: gelu(s x) is not s gelu(x) (aten.gelu)",
    "norm_gain_two_offsets": "b: its scale is that of a tensor that must keep it: the parameter is used in different ways: as a tensor and as a tensor plus 1 (aten.mul)",
    "ln_and_raw": "c: its scale is that of a tensor that must keep it: it is normalised (aten.layer_norm)",
    "ln_only_bias": "b: it is normalised by a norm without a weight (aten.layer_norm)",
    "emb_folded_norm_reused": "p: its scale is that of a tensor that must keep it: it is normalised (aten.rms_norm)",
}
"""What is said about the first input that cannot be smoothed."""


def test_every_graph_has_an_expectation() -> None:
    assert set(EXPECTED) == set(GRAPHS)


@pytest.mark.parametrize("name", EXPECTED)
def test_groups(name: str) -> None:
    findings, outcomes = proof(name)
    assert [" ".join(line.strip() for line in group_lines(g)) for g in findings.groups] == EXPECTED[name]
    for outcome in outcomes:
        assert outcome.change < TOLERANCE or "group" not in outcome.name or "spaces" in outcome.name, outcome


@pytest.mark.parametrize("name", WHY)
def test_reason(name: str) -> None:
    assert WHY[name] in reasons(proof(name)[0], "smoothing")


@pytest.mark.parametrize("name", GRAPHS)
def test_every_input_is_smoothable_or_blocked(name: str) -> None:
    """No linear is passed over in silence."""
    findings, _ = proof(name)
    smoothed = {slot.path for group in findings.groups for slot in group.targets}
    blocked = {b.path for b in findings.blocked if b.what == "smoothing"}
    for linear in findings.linears:
        assert linear.weight in smoothed or linear.path in blocked, linear.path


def test_a_matrix_that_is_blocked_is_not_labelled_element_by_element() -> None:
    graph = Graph(lambda s, x: s.b(s.a(x)) + torch.softmax(s.a.weight, -1).sum(), a=lin(4, 20000), b=lin(20000, 4))
    solved = analyse_scales(capture(graph.double().eval(), (X,), {}, "export"))
    assert solved.analysis.variables.count < 80000  # the elements of the weight alone
    assert solved.groups == ()  # its rows would be free if it were used as a weight alone
    (reason,) = solved.analysis.axes.contested().values()
    assert reason.text == "the parameter is used in different ways: as a tensor that keeps its scale and as a weight"
