"""Caches that begin with the keys and values of a fixed prefix.

A cache of a model with a prefix holds the prefix's tokens in front of all others. The caller knows of some of them
(those that were in its own input) and not of the rest, which are *hidden*: lengths, masks and positions that the caller
sees are without them, the model's own are with them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from autoquant.models.caches import Cache, DynamicLayer


@dataclass(slots=True)
class Call:
    """What has to be done behind one forward pass; kept with its cache, since passes may run side by side.

    ``covered``: leading input tokens that the prefix stands for; ``all_covered``: there are no others. ``keep``: the
    caller's ``logits_to_keep``. ``cache``: what the caller gets, None for no cache.
    """

    covered: int
    all_covered: bool
    keep: Any
    cache: PrefixedCache | None


class PrefixedCache(Cache):
    """A cache whose layers begin with ``prefix_length`` tokens, of which the caller does not know ``hidden``.

    ``inside``: a forward pass is going on. ``wanted``: the caller gets the cache back.
    """

    prefix_length: int = 0
    hidden: int = 0
    inside: bool = False
    wanted: bool = True
    call: Call | None = None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens held; without the hidden ones unless the model itself asks."""
        length: int = super().get_seq_length(layer_idx)
        return length if self.inside else length - self.hidden

    def reset(self) -> None:
        """Forget everything; a cache that began with a prefix is replaced by a new one when it is used again."""
        if self.prefix_length:
            self.layers, self.hidden = [], 0
        super().reset()  # type: ignore[no-untyped-call]  # transformers' own


class PatientLayer(DynamicLayer):
    """A layer that may have a length before it has rows; until then there is nothing to reorder."""

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.is_initialized:
            super().reorder_cache(beam_idx)  # type: ignore[arg-type]  # LongTensor there, a name for Tensor

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.is_initialized:
            super().batch_select_indices(indices)


class PrefixLayer(PatientLayer):
    """One layer's cache in floating point, which begins with a prefix's keys and values [1, H, P, D]."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # transformers' own
        self.prefix = (keys, values)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """The prefix takes the place of the empty tensors that a layer starts with, once for each row of the batch."""
        super().lazy_initialization(key_states, value_states)
        self.keys, self.values = (
            prefix.to(states).expand(len(states), -1, -1, -1)
            for prefix, states in zip(self.prefix, (key_states, value_states), strict=True)
        )

    def get_seq_length(self) -> int:
        length: int = super().get_seq_length() if self.is_initialized else self.prefix[0].shape[-2]
        return length
