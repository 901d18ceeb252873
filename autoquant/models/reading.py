"""How windows of token ids go into a model: as they are, or in halves to an encoder and to a decoder."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from autoquant.config.format import Strategy
from autoquant.errors import AutoQuantError
from autoquant.models.inputs import reads_text

IN_HALVES = (
    "the first half of each window is what the encoder reads, and the second is predicted behind it and the "
    "decoder's start token"
)
"""How a text calibrates and scores an encoder-decoder, in words."""


def reads_in_halves(model: Any) -> bool:
    """Whether a model has an encoder and a decoder, each of which takes token ids."""
    in_two = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    return in_two and "decoder_input_ids" in inspect.signature(model.forward).parameters


def check_reads_text(model: Any) -> None:
    """Raise AutoQuantError for a model that needs an image or a sound, which text neither calibrates nor scores."""
    if not reads_text(model):
        raise AutoQuantError(
            f"{type(model).__name__} does not run without {model.main_input_name}, and text neither calibrates nor "
            "scores it; what needs no calibration goes: `autoquant apply` and, with --strategy "
            f"{Strategy.PER_CHANNEL_PER_TOKEN.value}, `autoquant quantize`, both with --transforms rotation"
        )


def halves(ids_BS: Tensor) -> tuple[Tensor, Tensor]:
    """What the encoder reads of windows [B, S], [B, S // 2], and what is predicted, [B, S - S // 2]."""
    middle = ids_BS.shape[1] // 2
    return ids_BS[:, :middle], ids_BS[:, middle:]


def read(model: nn.Module, ids_BS: Tensor, call: Callable[..., Any] | None = None) -> Any:
    """The output of a model for windows of token ids [B, S] on its device; ``call``: a function to call in its place.

    The decoder of an encoder-decoder is given its start token and the second half of each window: teacher forcing. In
    the logits [B, L, V] of every model row i predicts the token i + 1 - L of the window, and the last row what follows
    it: L is S, of an encoder-decoder S - S // 2 + 1. Raises AutoQuantError where no start token is known, and as of
    :func:`check_reads_text`.
    """
    check_reads_text(model)
    called = model if call is None else call
    if not reads_in_halves(model):
        return called(ids_BS)
    given, predicted = halves(ids_BS)
    start = predicted.new_full((len(predicted), 1), start_token(model))
    return called(input_ids=given, decoder_input_ids=torch.cat([start, predicted], 1))


def longest_read(model: nn.Module, tokens: int) -> int:
    """How many positions a window of so many tokens takes of a model's table."""
    return tokens - tokens // 2 + 1 if reads_in_halves(model) else tokens


def start_token(model: Any) -> int:
    """The token that a decoder starts with, as ``generate`` takes it: that of its configurations, or their BOS.

    Raises AutoQuantError where they name none.
    """
    places = (model.config, getattr(model, "generation_config", None), getattr(model.config, "decoder", None))
    for name in ("decoder_start_token_id", "bos_token_id"):
        for place in places:
            token = getattr(place, name, None)
            if isinstance(token, int):
                return token
    raise AutoQuantError(
        f"{type(model).__name__}: its config.json names neither a decoder_start_token_id nor a bos_token_id, so that "
        "nothing says what its decoder starts with: add the first"
    )
