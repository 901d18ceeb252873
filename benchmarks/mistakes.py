"""Mistakes that other tools have made, put into proved configs: what does the certificate say of each?

Each mistake is made in the analyzer's own config for a small model, or, where the executor refuses such a config, in
the executor. Every figure is the relative change of the logits when the one claim with the mistake is applied. The
same on a default-initialised model (gains 1, biases 0) shows why certificates randomise them: it is blind to some.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from autoquant.certificate import prove
from autoquant.certificate.certify import small_config
from autoquant.certificate.claims import keep
from autoquant.certificate.prove import changed
from autoquant.certificate.runs import refer
from autoquant.config.format import Config, IndexMap, Norm, Slot, edited
from autoquant.executor.apply import apply_
from autoquant.models.reduce import float64_throughout, small
from autoquant.models.repair import find_source
from autoquant.models.source import LoadedModel

SEED = 0

Claim = Any  # a SmoothingGroup or a Space


def leave_config(claim: Claim) -> Claim:
    return claim


def leave_model(model: Any) -> None:
    pass


def forget_bias_writers(space: Claim) -> Claim:
    return edited(space, writers=tuple(w for w in space.writers if not w.path.endswith("bias")))


def forget_norm_biases(space: Claim) -> Claim:
    def without(norm: Norm | None) -> Norm | None:
        return None if norm is None else edited(norm, bias=None)

    return edited(space, reads=tuple(edited(r, norm=without(r.norm)) for r in space.reads))


def forget_bias_sources(group: Claim) -> Claim:
    return edited(group, sources=tuple(s for s in group.sources if not s.path.endswith("bias")))


def forget_router(group: Claim) -> Claim:
    return edited(group, targets=tuple(t for t in group.targets if not t.path.endswith("mlp.gate.weight")))


def take_the_post_norm(group: Claim) -> Claim:
    (source,) = group.sources
    path = source.path.replace("pre_feedforward_layernorm", "post_attention_layernorm")
    return edited(group, sources=(edited(source, path=path),))


def shift_by_one_row(group: Claim) -> Claim:
    def shifted(slot: Slot) -> Slot:
        blocks = tuple(edited(block, start=block.start - 1) for block in slot.index or ())
        return edited(slot, index=blocks)

    return edited(group, sources=tuple(map(shifted, group.sources)))


def forget_query_groups(group: Claim) -> Claim:
    """Only the first query head of each key/value head is scaled back."""

    def first(block: IndexMap) -> IndexMap:
        extents = zip(block.shape, block.channel_stride, strict=True)
        return edited(block, shape=tuple(n if stride else 1 for n, stride in extents))

    def ungrouped(slot: Slot) -> Slot:
        return edited(slot, index=tuple(map(first, slot.index or ())))

    return edited(group, targets=tuple(map(ungrouped, group.targets)))


def subtract_embedding_mean(model: Any) -> None:
    weight = model.get_input_embeddings().weight
    weight -= weight.mean(dim=1, keepdim=True)


def tie_again(model: Any) -> None:
    model.get_output_embeddings().weight = model.get_input_embeddings().weight


@dataclass(frozen=True, slots=True)
class Mutation:
    """A mistake in the claim of ``kind`` of a model whose name holds ``claim``. ``before`` and ``after`` are what a
    faulty executor does to the model around the right work.
    """

    title: str
    model: str
    kind: str
    claim: str
    config: Callable[[Claim], Claim] = leave_config
    before: Callable[[Any], None] = leave_model
    after: Callable[[Any], None] = leave_model
    tied: bool = False


MUTATIONS = (
    Mutation("forget the v bias in R2", "qwen2", "R2", "v_proj", forget_bias_writers),
    Mutation("forget the LayerNorm biases in R1", "gpt2", "R1", "residual", forget_norm_biases),
    Mutation("forget a LayerNorm bias in smoothing", "gpt2", "norm_linear", "ln_1", forget_bias_sources),
    Mutation("leave the router out of its group", "mixtral", "norm_linear", "experts", forget_router),
    Mutation("pair the MLP with the post-attention norm", "gemma2", "norm_linear", "mlp", take_the_post_norm),
    Mutation("shift the fused v rows by one", "phi3", "linear_linear", "qkv_proj", shift_by_one_row),
    Mutation("subtract the embedding mean under RMSNorm", "mistral", "R1", "residual", before=subtract_embedding_mean),
    Mutation("leave the embeddings tied", "mistral", "R1", "residual", after=tie_again, tied=True),
    Mutation("scale v -> o without the GQA tie", "mistral", "linear_linear", "v_proj", forget_query_groups),
)


def figures(mutation: Mutation) -> tuple[float, float, float]:
    """Relative change of the logits: the right claim, the mistake, the mistake on a default-initialised model."""
    loaded, default, config = case(mutation.model, mutation.tied)
    groups = [(g.name, g.kind.value) for g in config.smoothing.groups]
    spaces = [(s.name, s.kind) for s in config.rotation.spaces]
    (claim,) = [(n, k) for n, k in (*groups, *spaces) if k == mutation.kind and mutation.claim in n]
    right = keep(config, [claim])
    wrong = mutate(right, mutation.config)

    def faulty(model: nn.Module, *args: Any, **kwargs: Any) -> None:
        mutation.before(model)
        apply_(model, *args, **kwargs)
        mutation.after(model)

    intact = measure(loaded, right)
    with patch.object(prove, "apply_", faulty):
        return intact, measure(loaded, wrong), measure(default, wrong)


@cache
def case(model: str, tied: bool) -> tuple[LoadedModel, LoadedModel, Config]:
    """A small model with random parameters, the same as initialised by default, and their config."""
    source = find_source(model, layers=2)
    source.config.tie_word_embeddings = tied or source.config.tie_word_embeddings
    loaded = small(source, SEED)
    with torch.random.fork_rng(devices=()), patch("autoquant.models.reduce.randomise_", lambda module, seed: None):
        torch.manual_seed(SEED)
        default = small(source, SEED)
    return loaded, default, small_config(source, loaded)


def mutate(config: Config, change: Callable[[Claim], Claim]) -> Config:
    """Change every smoothing group and space of a config."""
    smoothing = edited(config.smoothing, groups=tuple(map(change, config.smoothing.groups)))
    rotation = edited(config.rotation, spaces=tuple(map(change, config.rotation.spaces)))
    return edited(config, smoothing=smoothing, rotation=rotation)


def measure(loaded: LoadedModel, config: Config) -> float:
    """The relative change of the logits when all of ``config`` is applied."""
    with float64_throughout():
        return changed(loaded, refer(loaded), config, SEED)
