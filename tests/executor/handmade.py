"""Configs written by hand for small transformers models, and the models themselves with random parameters.

They state what the analyzer must find; here they let the executor be tested without it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from autoquant.config.format import (
    Config,
    IndexMap,
    Linear,
    ModelFacts,
    Norm,
    Online,
    Provenance,
    Quantization,
    Read,
    Reader,
    Rotation,
    Slot,
    Smoothing,
    SmoothingGroup,
    SmoothingKind,
    Space,
    Writer,
)
from autoquant.models.reduce import float64_throughout
from autoquant.models.structure import structure_of

NORM, FC, QK = SmoothingKind.NORM_LINEAR, SmoothingKind.LINEAR_LINEAR, SmoothingKind.QUERY_KEY


def build(model_type: str, seed: int = 0, dtype: torch.dtype = torch.float64, **sizes: Any) -> nn.Module:
    """A small causal LM with every parameter random: norm gains around 1, biases and routers away from 0."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model_type, **sizes)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    if model_type == "mixtral":
        model.set_experts_implementation("eager")  # the only one that computes in float64
    randomise_(model, seed)
    return model.to(dtype)


@torch.no_grad()
def randomise_(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 1:
            around = 1.0 if name.endswith("weight") else 0.0
            parameter.copy_(around + 0.3 * noise)
        else:
            parameter.copy_(noise * parameter.shape[-1] ** -0.5)


def logits(model: nn.Module, seed: int = 1) -> Tensor:
    vocabulary = model.get_output_embeddings().weight.shape[0]  # type: ignore[operator]  # transformers models have it
    ids = torch.randint(0, vocabulary, (2, 9), generator=torch.Generator().manual_seed(seed))
    double = next(model.parameters()).dtype is torch.float64
    with torch.no_grad(), float64_throughout() if double else contextlib.nullcontext():
        out: Tensor = model(ids, use_cache=False).logits
    return out


def change(before: Tensor, after: Tensor) -> float:
    return float((after - before).norm() / before.norm())


def make_config(
    model: nn.Module,
    groups: Sequence[SmoothingGroup] = (),
    spaces: Sequence[Space] = (),
    online: Sequence[Online] = (),
    linears: Sequence[Linear] = (),
    layers: int = 2,
) -> Config:
    structure = structure_of(model)
    provenance = Provenance(autoquant="0", torch="2", model="hand", capture="hand", fingerprint=structure.fingerprint)
    return Config(
        format_version=2,
        provenance=provenance,
        model=ModelFacts(layers=layers, parameters=structure.parameters, tied=structure.ties, linears=tuple(linears)),
        smoothing=Smoothing(groups=tuple(groups)),
        rotation=Rotation(spaces=tuple(spaces), online=tuple(online)),
        quantization=Quantization(),
    )


def cols(path: str, size: int, **more: Any) -> Slot:
    return Slot(path=path, dim=1, size=size, **more)


def rows(path: str, size: int, **more: Any) -> Slot:
    return Slot(path=path, dim=0, size=size, **more)


def gqa(kv_heads: int, repeats: int, head: int) -> tuple[IndexMap, ...]:
    """Columns of the output projection: each KV head's channels once per query head of its group."""
    return (IndexMap(shape=(kv_heads, repeats, head), stride=(repeats * head, head, 1), channel_stride=(head, 0, 1)),)


def block(start: int, length: int, channel: int = 0) -> IndexMap:
    return IndexMap(start=start, shape=(length,), stride=(1,), channel_start=channel, channel_stride=(1,))


LLAMA = {
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}


def group(
    name: str, kind: SmoothingKind, channels: int, sources: list[Slot], targets: list[Slot], layers: str = "0-1"
) -> SmoothingGroup:
    return SmoothingGroup(
        name=name, kind=kind, layers=layers, channels=channels, sources=tuple(sources), targets=tuple(targets)
    )


def llama_like(
    model: nn.Module, *, offset: int = 0, bias: bool = False, facts: dict[str, int] | None = None, layer_count: int = 2
) -> Config:
    """Llama, Qwen2 (biases on q, k, v), Gemma (gain 1 + weight, tied)."""
    f = facts or LLAMA
    hidden, inner, head, kv = f["hidden_size"], f["intermediate_size"], f["head_dim"], f["num_key_value_heads"]
    repeats = f["num_attention_heads"] // kv
    at, mlp = "model.layers.{layer}.self_attn.", "model.layers.{layer}.mlp."
    layers = f"0-{layer_count - 1}"
    norms = ["model.layers.{layer}.input_layernorm.weight", "model.layers.{layer}.post_attention_layernorm.weight"]
    qkv = [f"{at}{n}_proj" for n in "qkv"]
    gate_up = [f"{mlp}gate_proj", f"{mlp}up_proj"]
    v_sources = [rows(f"{at}v_proj.weight", kv * head)] + [rows(f"{at}v_proj.bias", kv * head)] * bias
    v_targets = [cols(f"{at}o_proj.weight", kv * repeats * head, index=gqa(kv, repeats, head))]
    up, down = [rows(f"{mlp}up_proj.weight", inner)], [cols(f"{mlp}down_proj.weight", inner)]

    def normed(name: str, norm: str, paths: list[str]) -> SmoothingGroup:
        sources, targets = [rows(norm, hidden, offset=offset)], [cols(f"{p}.weight", hidden) for p in paths]
        return group(name, NORM, hidden, sources, targets, layers)

    groups = [
        normed("attention_in", norms[0], qkv),
        group("v_o", FC, kv * head, v_sources, v_targets, layers),
        normed("mlp_in", norms[1], gate_up),
        group("up_down", FC, inner, up, down, layers),
    ]

    def reads(norm: str, paths: list[str], biased: bool, own: str | None) -> Read:
        readers = tuple(
            Reader(path=f"{p}.weight", dim=1, size=hidden, bias=f"{p}.bias" if biased else None) for p in paths
        )
        return Read(layers=own, norm=Norm(kind="rms", weight=norm, offset=offset), readers=readers)

    residual = Space(
        name="residual",
        kind="R1",
        layers=layers,
        size=hidden,
        writers=(
            Writer(path="model.embed_tokens.weight", dim=1, size=hidden),
            Writer(path=f"{at}o_proj.weight", dim=0, size=hidden),
            Writer(path=f"{mlp}down_proj.weight", dim=0, size=hidden),
        ),
        reads=(
            reads(norms[0], qkv, bias, None),
            reads(norms[1], gate_up, False, None),
            reads("model.norm.weight", ["lm_head"], False, None),
        ),
    )
    heads = Space(
        name="heads",
        kind="R2",
        layers=layers,
        size=head,
        blocks=kv,
        writers=tuple(Writer(**s.model_dump()) for s in v_sources),
        reads=(
            Read(
                readers=(
                    Reader(path=f"{at}o_proj.weight", dim=1, size=kv * repeats * head, index=gqa(kv, repeats, head)),
                )
            ),
        ),
    )
    sizes = {p: (hidden, kv * head) for p in qkv} | {p: (hidden, inner) for p in gate_up}
    sizes[qkv[0]] = (hidden, kv * repeats * head)
    sizes[f"{at}o_proj"] = (kv * repeats * head, hidden)
    sizes[f"{mlp}down_proj"] = (inner, hidden)
    sizes["lm_head"] = (hidden, f["vocab_size"])
    linears = [
        Linear(
            path=p,
            layers=layers if "{layer}" in p else None,
            weight=f"{p}.weight",
            bias=f"{p}.bias" if bias and p in qkv else None,
            in_features=size[0],
            out_features=size[1],
            in_dim=1,
            role="lm_head" if p == "lm_head" else "linear",
        )
        for p, size in sizes.items()
    ]
    online = [
        Online(kind="R3", path=at[:-1], layers=layers, size=head),
        Online(kind="R4", path=f"{mlp}down_proj", layers=layers, size=inner),
        Online(kind="input", path=f"{at}q_proj", layers=layers, size=hidden),
    ]
    return make_config(model, groups, (residual, heads), online, linears, layer_count)
