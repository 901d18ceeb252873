"""The classes of transformers that caches and attentions of ours are made of, imported here alone."""

from __future__ import annotations

from typing import Any

from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

__all__ = [
    "AttentionInterface",
    "AttentionMaskInterface",
    "Cache",
    "DynamicCache",
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "PreTrainedModel",
]


def layers_share_cache(config: Any) -> bool:
    """True if layers read from the cache what others stored: without one they compute something else."""
    return any("kv_shared" in name and value for name, value in vars(config.get_text_config()).items())
