"""How what calibrates and scores goes into a model: windows of token ids as they are, or in halves to an encoder and to
a decoder; an image or a sound with its words as the model's own processor lays them out.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from autoquant.config.format import Strategy
from autoquant.errors import AutoQuantError
from autoquant.models.inputs import reads_text, takes_media

IN_HALVES = (
    "the first half of each window is what the encoder reads, and the second is predicted behind it and the "
    "decoder's start token"
)
"""How a text calibrates and scores an encoder-decoder, in words."""


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """An image or a sound with its words: keyword arguments of one forward call, its batch one.

    ``inputs``: on the model's device, floats in any dtype; ``words``: how many of the last token ids are words beside
    the image, which are predicted; ``name``: that of its file.
    """

    inputs: Mapping[str, Tensor]
    words: int
    name: str

    @property
    def ids(self) -> Tensor:
        """The token ids [1, S] of what is predicted: of the decoder where there is one."""
        return self.inputs["decoder_input_ids" if "decoder_input_ids" in self.inputs else "input_ids"]

    def to(self, device: torch.device) -> Example:
        return replace(self, inputs={name: tensor.to(device) for name, tensor in self.inputs.items()})


Batch = Tensor | Example
"""What one forward pass takes: windows of token ids [B, S], or an image or a sound with its words."""


def ids_of(batch: Batch) -> Tensor:
    """The token ids [B, S] of a batch."""
    return batch.ids if isinstance(batch, Example) else batch


def texts(batches: Iterable[Batch]) -> tuple[Tensor, ...]:
    """The windows of text among batches."""
    return tuple(batch for batch in batches if isinstance(batch, Tensor))


def examples_of(batches: Iterable[Batch]) -> tuple[Example, ...]:
    """The images and sounds among batches."""
    return tuple(batch for batch in batches if isinstance(batch, Example))


def reads_in_halves(model: Any) -> bool:
    """Whether a model has an encoder and a decoder, each of which takes token ids."""
    in_two = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    return in_two and "decoder_input_ids" in inspect.signature(model.forward).parameters


def check_reads_text(model: Any) -> None:
    """Raise AutoQuantError for a model that needs an image or a sound, which text neither calibrates nor scores."""
    if not reads_text(model):
        raise AutoQuantError(
            f"{type(model).__name__} does not run without {model.main_input_name}, and text neither calibrates nor "
            "scores it: give --media FOLDER in its place; what needs no calibration goes without: `autoquant apply` "
            f"and, with --strategy {Strategy.PER_CHANNEL_PER_TOKEN.value}, `autoquant quantize`, both with "
            "--transforms rotation"
        )


def halves(ids_BS: Tensor) -> tuple[Tensor, Tensor]:
    """What the encoder reads of windows [B, S], [B, S // 2], and what is predicted, [B, S - S // 2]."""
    middle = ids_BS.shape[1] // 2
    return ids_BS[:, :middle], ids_BS[:, middle:]


def check_takes_media(model: nn.Module) -> None:
    """Raise AutoQuantError for a model that takes neither images nor sound."""
    if not takes_media(model):
        raise AutoQuantError(f"{type(model).__name__} takes neither images nor sound: leave --media out")


def read(model: nn.Module, batch: Batch, call: Callable[..., Any] | None = None) -> Any:
    """The output of a model for windows of token ids [B, S] on its device, or for an example; ``call``: a function to
    call in its place.

    The decoder of an encoder-decoder is given its start token and the second half of each window: teacher forcing. In
    the logits [B, L, V] of every model row i predicts the token i + 1 - L of the window, and the last row what follows
    it: L is S, of an encoder-decoder S - S // 2 + 1. Raises AutoQuantError where no start token is known, as of
    :func:`check_reads_text`, and, with the file's name, where a model does not run on an example.
    """
    called = model if call is None else call
    if isinstance(batch, Example):
        return _read_example(model, batch, called)
    ids_BS = batch
    check_reads_text(model)
    if not reads_in_halves(model):
        return called(ids_BS)
    given, predicted = halves(ids_BS)
    start = predicted.new_full((len(predicted), 1), start_token(model))
    return called(input_ids=given, decoder_input_ids=torch.cat([start, predicted], 1))


def _read_example(model: nn.Module, example: Example, called: Callable[..., Any]) -> Any:
    floats = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
    dtype = next((parameter.dtype for parameter in floats if not parameter.is_meta), floats[0].dtype)
    inputs = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in example.inputs.items()
    }
    try:
        return called(**inputs)
    except (IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:  # what the model's own code raises
        raise AutoQuantError(
            f"{example.name}: {type(model).__name__} does not run on what its processor makes of it: "
            f"{' '.join(str(error).split())[:200]}"
        ) from error


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
