"""Hand-written configs for LayerNorm, Conv1D, fused and expert models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from handmade import FC, NORM, block, cols, gqa, group, make_config, rows
from torch import nn

from autoquant.config.format import Config, IndexMap, Norm, Read, Reader, Slot, SmoothingGroup, Space, Writer

HIDDEN, INNER, HEADS, HEAD, EXPERTS = 24, 40, 3, 8, 4

OPT = {
    "vocab_size": 50,
    "hidden_size": HIDDEN,
    "ffn_dim": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "word_embed_proj_dim": HIDDEN,
    "max_position_embeddings": 64,
}
GPT2 = {"vocab_size": 50, "n_embd": HIDDEN, "n_inner": INNER, "n_layer": 2, "n_head": HEADS, "n_positions": 64}
NEOX = {
    "vocab_size": 50,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 64,
}
BLOOM = {"vocab_size": 50, "hidden_size": 32, "n_layer": 2, "n_head": 4}
MIXTRAL = {
    "vocab_size": 50,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": HEAD,
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
}


def layer_norm(path: str) -> Norm:
    return Norm(kind="layer", weight=f"{path}.weight", bias=f"{path}.bias")


def norm_group(name: str, norm: str, targets: list[Slot], bias: bool = True, **more: Any) -> SmoothingGroup:
    channels = more.pop("channels", HIDDEN)
    sources = [rows(f"{norm}.weight", channels)] + [rows(f"{norm}.bias", channels)] * bias
    return group(name, NORM, channels, sources, targets)


def linear_reader(path: str, size: int = HIDDEN, biased: bool = True, dim: int = 1) -> Reader:
    return Reader(path=f"{path}.weight", dim=dim, size=size, bias=f"{path}.bias" if biased else None)


def written(path: str, size: int = HIDDEN, dim: int = 0) -> list[Writer]:
    return [Writer(path=f"{path}.weight", dim=dim, size=size), Writer(path=f"{path}.bias", size=size)]


def residual_space(writers: Sequence[Writer], reads: Sequence[Read], centre: bool = False) -> Space:
    return Space(
        name="residual",
        kind="R1",
        layers="0-1",
        size=HIDDEN,
        centre=centre,
        writers=tuple(writers),
        reads=tuple(reads),
    )


def heads_space(writers: Sequence[Writer], reads: Sequence[Read]) -> Space:
    return Space(
        name="heads", kind="R2", layers="0-1", size=HEAD, blocks=HEADS, writers=tuple(writers), reads=tuple(reads)
    )


def opt_config(model: nn.Module, centre: bool = True) -> Config:
    base = "model.decoder.layers.{layer}."
    at = f"{base}self_attn."
    qkv = [f"{at}{n}_proj" for n in "qkv"]
    groups = [
        norm_group("attention_in", f"{base}self_attn_layer_norm", [cols(f"{p}.weight", HIDDEN) for p in qkv]),
        norm_group("mlp_in", f"{base}final_layer_norm", [cols(f"{base}fc1.weight", HIDDEN)]),
        group(
            "v_o",
            FC,
            HIDDEN,
            [rows(f"{at}v_proj.weight", HIDDEN), rows(f"{at}v_proj.bias", HIDDEN)],
            [cols(f"{at}out_proj.weight", HIDDEN)],
        ),
        group(
            "fc1_fc2",
            FC,
            INNER,
            [rows(f"{base}fc1.weight", INNER), rows(f"{base}fc1.bias", INNER)],
            [cols(f"{base}fc2.weight", INNER)],
        ),
    ]
    residual = residual_space(
        centre=centre,
        writers=(
            Writer(path="model.decoder.embed_tokens.weight", dim=1, size=HIDDEN),
            Writer(path="model.decoder.embed_positions.weight", dim=1, size=HIDDEN),
            *written(f"{at}out_proj"),
            *written(f"{base}fc2"),
        ),
        reads=(
            Read(norm=layer_norm(f"{base}self_attn_layer_norm"), readers=tuple(linear_reader(p) for p in qkv)),
            Read(norm=layer_norm(f"{base}final_layer_norm"), readers=(linear_reader(f"{base}fc1"),)),
            Read(norm=layer_norm("model.decoder.final_layer_norm"), readers=(linear_reader("lm_head", biased=False),)),
        ),
    )
    heads = heads_space(
        writers=tuple(written(f"{at}v_proj")),
        reads=(Read(readers=(linear_reader(f"{at}out_proj"),)),),
    )
    return make_config(model, groups, (residual, heads))


def gpt2_config(model: nn.Module, centre: bool = True) -> Config:
    """Conv1D: weights are [in, out], so readers have dim 0 and writers dim 1; v is the last third of c_attn."""
    base = "transformer.h.{layer}."
    v = (block(2 * HIDDEN, HIDDEN),)
    c_attn = f"{base}attn.c_attn"
    groups = [
        norm_group("attention_in", f"{base}ln_1", [rows(f"{c_attn}.weight", HIDDEN)]),
        norm_group("mlp_in", f"{base}ln_2", [rows(f"{base}mlp.c_fc.weight", HIDDEN)]),
        group(
            "v_o",
            FC,
            HIDDEN,
            [cols(f"{c_attn}.weight", 3 * HIDDEN, index=v), rows(f"{c_attn}.bias", 3 * HIDDEN, index=v)],
            [rows(f"{base}attn.c_proj.weight", HIDDEN)],
        ),
    ]
    residual = residual_space(
        centre=centre,
        writers=(
            Writer(path="transformer.wte.weight", dim=1, size=HIDDEN),
            Writer(path="transformer.wpe.weight", dim=1, size=HIDDEN),
            *written(f"{base}attn.c_proj", dim=1),
            *written(f"{base}mlp.c_proj", dim=1),
        ),
        reads=(
            Read(norm=layer_norm(f"{base}ln_1"), readers=(linear_reader(c_attn, dim=0),)),
            Read(norm=layer_norm(f"{base}ln_2"), readers=(linear_reader(f"{base}mlp.c_fc", dim=0),)),
            Read(norm=layer_norm("transformer.ln_f"), readers=(linear_reader("lm_head", biased=False),)),
        ),
    )
    heads = heads_space(
        writers=(
            Writer(path=f"{c_attn}.weight", dim=1, size=3 * HIDDEN, index=v),
            Writer(path=f"{c_attn}.bias", size=3 * HIDDEN, index=v),
        ),
        reads=(
            Read(
                readers=(Reader(path=f"{base}attn.c_proj.weight", dim=0, size=HIDDEN, bias=f"{base}attn.c_proj.bias"),)
            ),
        ),
    )
    return make_config(model, groups, (residual, heads))


def neox_config(model: nn.Module) -> Config:
    """Rows of query_key_value are interleaved per head: [heads, (q, k, v), head size]. the output head has no bias."""
    base = "gpt_neox.layers.{layer}."
    head = next(n for n, m in model.named_modules() if m is model.get_output_embeddings())  # type: ignore[operator]
    qkv, dense = f"{base}attention.query_key_value", f"{base}attention.dense"
    v = (IndexMap(start=2 * HEAD, shape=(HEADS, HEAD), stride=(3 * HEAD, 1), channel_stride=(HEAD, 1)),)
    first, second = f"{base}mlp.dense_h_to_4h", f"{base}mlp.dense_4h_to_h"
    groups = [
        norm_group("attention_in", f"{base}input_layernorm", [cols(f"{qkv}.weight", HIDDEN)]),
        norm_group("mlp_in", f"{base}post_attention_layernorm", [cols(f"{first}.weight", HIDDEN)]),
        group(
            "v_o",
            FC,
            HIDDEN,
            [rows(f"{qkv}.{n}", 3 * HIDDEN, index=v) for n in ("weight", "bias")],
            [cols(f"{dense}.weight", HIDDEN)],
        ),
    ]
    residual = residual_space(
        writers=(
            Writer(path="gpt_neox.embed_in.weight", dim=1, size=HIDDEN),
            *written(dense),
            *written(second),
        ),
        reads=(
            Read(norm=layer_norm(f"{base}input_layernorm"), readers=(linear_reader(qkv),)),
            Read(norm=layer_norm(f"{base}post_attention_layernorm"), readers=(linear_reader(first),)),
            Read(norm=layer_norm("gpt_neox.final_layer_norm"), readers=(linear_reader(head, biased=False),)),
        ),
    )
    heads = heads_space(
        writers=tuple(Writer(path=f"{qkv}.{n}", size=3 * HIDDEN, index=v) for n in ("weight", "bias")),
        reads=(Read(readers=(linear_reader(dense),)),),
    )
    return make_config(model, groups, (residual, heads))


def bloom_config(model: nn.Module) -> Config:
    """A norm stands between the embedding table and the residual stream: it is folded into the table."""
    base, hidden = "transformer.h.{layer}.", 32
    dense, second = f"{base}self_attention.dense", f"{base}mlp.dense_4h_to_h"
    table_norm = Norm(
        kind="layer",
        weight="transformer.word_embeddings_layernorm.weight",
        bias="transformer.word_embeddings_layernorm.bias",
        eps=1e-5,
    )
    residual = Space(
        name="residual",
        kind="R1",
        layers="0-1",
        size=hidden,
        writers=(
            Writer(path="transformer.word_embeddings.weight", dim=1, size=hidden, fold_norm=table_norm),
            *written(dense, hidden),
            *written(second, hidden),
        ),
        reads=(
            Read(
                norm=layer_norm(f"{base}input_layernorm"),
                readers=(linear_reader(f"{base}self_attention.query_key_value", hidden),),
            ),
            Read(
                norm=layer_norm(f"{base}post_attention_layernorm"),
                readers=(linear_reader(f"{base}mlp.dense_h_to_4h", hidden),),
            ),
            Read(norm=layer_norm("transformer.ln_f"), readers=(linear_reader("lm_head", hidden, biased=False),)),
        ),
    )
    return make_config(model, (), (residual,))


def mixtral_config(model: nn.Module) -> Config:
    """Experts are [experts, out, in]; up is the second half of each expert's gate_up rows."""
    base = "model.layers.{layer}."
    at, mlp = f"{base}self_attn.", f"{base}mlp."
    gate_up, down = f"{mlp}experts.gate_up_proj", f"{mlp}experts.down_proj"
    kv = 2 * HEAD
    up = (IndexMap(start=INNER, shape=(EXPERTS, INNER), stride=(2 * INNER, 1), channel_stride=(INNER, 1)),)
    qkv = [f"{at}{n}_proj.weight" for n in "qkv"]
    o_columns = cols(f"{at}o_proj.weight", 2 * kv, index=gqa(2, 2, HEAD))
    # One norm feeds the router and every expert: each expert's columns carry the same channels.
    every = (IndexMap(shape=(EXPERTS, HIDDEN), stride=(HIDDEN, 1), channel_stride=(0, 1)),)
    expert_columns = {"path": gate_up, "dim": 2, "stack": EXPERTS, "size": EXPERTS * HIDDEN, "index": every}
    groups = [
        norm_group("attention_in", f"{base}input_layernorm", [cols(p, HIDDEN) for p in qkv], bias=False),
        norm_group(
            "mlp_in",
            f"{base}post_attention_layernorm",
            [cols(f"{mlp}gate.weight", HIDDEN), Slot(**expert_columns)],
            bias=False,
        ),
        group("v_o", FC, kv, [rows(f"{at}v_proj.weight", kv)], [o_columns]),
        group(
            "up_down",
            FC,
            EXPERTS * INNER,
            [Slot(path=gate_up, dim=1, stack=EXPERTS, size=EXPERTS * 2 * INNER, index=up)],
            [Slot(path=down, dim=2, stack=EXPERTS, size=EXPERTS * INNER)],
        ),
    ]
    residual = residual_space(
        writers=(
            Writer(path="model.embed_tokens.weight", dim=1, size=HIDDEN),
            Writer(path=f"{at}o_proj.weight", dim=0, size=HIDDEN),
            Writer(path=down, dim=1, size=HIDDEN),
        ),
        reads=(
            Read(
                norm=Norm(kind="rms", weight=f"{base}input_layernorm.weight"),
                readers=tuple(Reader(path=p, dim=1, size=HIDDEN) for p in qkv),
            ),
            Read(
                norm=Norm(kind="rms", weight=f"{base}post_attention_layernorm.weight"),
                readers=(Reader(path=f"{mlp}gate.weight", dim=1, size=HIDDEN), Reader(**expert_columns)),
            ),
            Read(norm=Norm(kind="rms", weight="model.norm.weight"), readers=(linear_reader("lm_head", biased=False),)),
        ),
    )
    heads = Space(
        name="heads",
        kind="R2",
        layers="0-1",
        size=HEAD,
        blocks=2,
        writers=(Writer(path=f"{at}v_proj.weight", size=kv),),
        reads=(Read(readers=(Reader(**o_columns.model_dump()),)),),
    )
    return make_config(model, groups, (residual, heads))
