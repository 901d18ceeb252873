"""A causal language model as a function of plain tensors: a step of decoding, its cache given and handed back.

Shapes: B sequences, S new tokens, P earlier ones, H heads of the cache, D their size.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from autoquant.library_patches import marked_as_compiling
from autoquant.models.caches import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from autoquant.models.source import one_line

Pairs = Sequence[tuple[Tensor, Tensor]]
"""Keys and values [B, H, P, D] of each layer."""
BATCH, NEW, EARLIER = 2, 3, 5
"""Of the example inputs; each its own number, and none of them 0 or 1, which a trace takes for constants."""


class CachedStep(nn.Module):
    """``(input_ids [B, S], attention_mask [B, P + S], position_ids [B, S], past) -> (logits [B, S, V], present)``.

    ``past`` and ``present``: see :data:`Pairs`; P may be 0. The mask is 1 for tokens and 0 for padding.
    ``takes_positions``: whether the model has a place for ``position_ids``, which it else works out from the mask.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.takes_positions = "position_ids" in inspect.signature(model.forward).parameters

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: Pairs
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        positions = {"position_ids": position_ids} if self.takes_positions else {}
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=DynamicCache(past) if past else DynamicCache(),
            use_cache=True,
            **positions,
        )
        return out.logits, [(layer.keys, layer.values) for layer in out.past_key_values.layers]


@dataclass(frozen=True, slots=True)
class Example:
    """Inputs of a step."""

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    past: Pairs


@torch.no_grad()
def example_of(step: CachedStep, device: str = "cpu") -> Example:
    """Inputs that the step runs on, a cache of its own making among them. Raises whatever the model's code does."""

    def whole(*shape: int) -> Tensor:
        return torch.ones(*shape, dtype=torch.long, device=device)

    def positions(first: int, count: int) -> Tensor:
        return torch.arange(first, first + count, device=device).expand(BATCH, count).contiguous()

    with marked_as_compiling():  # a look at a mask's values is none that a trace could take
        _, past = step(whole(BATCH, EARLIER), whole(BATCH, EARLIER), positions(0, EARLIER), ())
        example = Example(whole(BATCH, NEW), whole(BATCH, EARLIER + NEW), positions(EARLIER, NEW), past)
        _, present = step(example.input_ids, example.attention_mask, example.position_ids, past)
    lengths = [tensor.shape[2] for pair in present for tensor in pair]
    if set(lengths) != {EARLIER + NEW}:
        raise ValueError(f"{EARLIER} tokens and {NEW} more make a cache of {lengths[:4]}")
    return example


def reason_against_step(model: Any) -> str | None:
    """Why a model without weights is no function of tokens and of the keys and values of earlier ones; None where it
    is one.
    """
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        return f"{name}: has an encoder; only decoders are expressed"
    try:
        layers = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
        kinds = {type(layer) for layer in layers}
        other = kinds - {DynamicLayer, DynamicSlidingWindowLayer}
        if other:
            return f"{name}: keeps {other.pop().__name__} between tokens, and not keys and values alone"
        example_of(CachedStep(copy.deepcopy(model).to("meta")), "meta")  # its buffers may be elsewhere
    except Exception as error:  # the model's own code
        return f"{name}: cannot be run on the keys and values of earlier tokens: {one_line(error)}"
    return None
