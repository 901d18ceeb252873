"""Kinds of models, and how a model type is written where it may be of several. No torch."""

from __future__ import annotations

from typing import Literal, cast, get_args

Kind = Literal["causal-lm", "image-text-to-text", "seq2seq-lm", "speech-seq2seq"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""In the order of preference."""


def full_name(model_type: str, kind: Kind) -> str:
    """A model type with its kind: ``seq2seq-lm/t5``, and ``llama`` alone for a causal language model."""
    return model_type if kind == KINDS[0] else f"{kind}/{model_type}"


def split_name(name: str) -> tuple[str, Kind]:
    """The model type and the kind of a full name."""
    kind, _, model_type = name.rpartition("/")
    return model_type, cast(Kind, kind or KINDS[0])
