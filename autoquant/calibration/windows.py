"""Texts as windows of token ids: what calibration and evaluation run through a model.

The text is tokenized once, as a whole and without special tokens; its tokens are cut into windows that do not overlap.
Each window starts with the BOS token where the tokenizer has one, which its length does not count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autoquant.calibration.texts import read_text
from autoquant.config.spelling import counted
from autoquant.errors import AutoQuantError
from autoquant.models.reading import Batch, Example, examples_of, longest_read, texts
from autoquant.models.vocabulary import token_embedding
from autoquant.quantizer.prefix import MODULE as PREFIX


@dataclass(frozen=True, slots=True)
class CalibrationOptions:
    """Which part of which text calibrates.

    ``text``: a file or a dataset's folder, None where there is none; ``sequences`` windows of ``length`` of its tokens,
    BOS apart; ``seed``: they are drawn at random, None: the first. ``lower``: what a user lowers where the text is too
    short.
    """

    text: Path | None = None
    sequences: int = 16
    length: int = 512
    seed: int | None = None
    field: str = "text"
    lower: str = "--sequences or --length"


@dataclass(frozen=True, slots=True)
class Windows:
    """Token ids [N, S] of equally long windows, in order, the shorter last one apart; whether each starts with BOS."""

    batches: tuple[Tensor, ...]
    has_bos: bool

    @property
    def predicted(self) -> int:
        """Number of predicted tokens."""
        return sum(self.counts)

    @property
    def counts(self) -> tuple[int, ...]:
        """Number of predicted tokens of each window."""
        return tuple(batch.shape[1] - 1 for batch in self.batches for _ in range(len(batch)))


def tokenize(tokenizer: Any, text: str) -> list[int]:
    """Token ids of the whole text, without special tokens."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def cut_windows(
    ids: Sequence[int], window: int = 512, bos: int | None = None, tokens: int | None = None, batch: int = 1
) -> Windows:
    """Cut the first ``tokens`` ids (all: None) into windows of ``window`` tokens, each behind ``bos`` (None: none).

    Without a BOS token the first token of each window is context only and is not predicted. ``batch`` windows of equal
    length share a forward pass. Raises AutoQuantError where there is nothing to predict.
    """
    if window < 1 or batch < 1 or (tokens is not None and tokens < 1):
        raise AutoQuantError("window, batch and tokens must be at least 1")
    taken = torch.tensor(ids[:tokens], dtype=torch.long)
    start = [] if bos is None else [bos]
    full, rest = taken.numel() // window, taken.numel() % window
    pieces = [taken[: full * window].view(full, window)] if full else []
    pieces += [taken[full * window :].view(1, rest)] if rest else []
    rows = [torch.cat([piece.new_tensor(start).expand(len(piece), -1), piece], 1) for piece in pieces]
    batches = tuple(chunk for row in rows if row.shape[1] > 1 for chunk in torch.split(row, batch))
    if not batches:
        raise AutoQuantError(f"{len(taken)} tokens in windows of {window}: nothing to predict")
    return Windows(batches, bos is not None)


def rebatched(windows: Windows, batch: int) -> Windows:
    """The same windows in the same order, up to ``batch`` of equal length in a forward pass."""
    return Windows(together(windows.batches, batch), windows.has_bos)


def examples_and(batches: Sequence[Batch], most: int) -> tuple[Batch, ...]:
    """The same examples one by one, then the windows of text as :func:`together` puts them."""
    return (*examples_of(batches), *together(texts(batches), most))


def together(batches: Sequence[Tensor], most: int) -> tuple[Tensor, ...]:
    """The same windows in the same order, up to ``most`` of equal length in a batch [B, S]."""
    groups: list[list[Tensor]] = []
    for row in (row for part in batches for row in torch.split(part, 1)):
        if groups and len(groups[-1]) < most and groups[-1][0].shape == row.shape:
            groups[-1].append(row)
        else:
            groups.append([row])
    return tuple(torch.cat(rows) for rows in groups)


def calibration_batches(windows: Windows, count: int, seed: int | None = None) -> tuple[Tensor, ...]:
    """The first ``count`` windows [1, S] one by one, or ``count`` random ones in random order when a seed is given.

    Raises AutoQuantError where there are fewer.
    """
    rows = [row for batch in windows.batches for row in torch.split(batch, 1)]
    if len(rows) < count:
        raise AutoQuantError(f"the calibration text has {len(rows)} windows; {count} were asked for")
    if seed is None:
        return tuple(rows[:count])
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return tuple(rows[int(i)] for i in order[:count])


def calibration_windows(tokenizer: Any, options: CalibrationOptions) -> tuple[Tensor, ...]:
    """The windows [1, S] that the options ask for; () where they name no text. Errors as of reading and cutting."""
    if options.text is None:
        return ()
    ids = tokenize(tokenizer, read_text(options.text, options.field, tokenizer))
    windows = cut_windows(ids, options.length, tokenizer.bos_token_id)
    if len(windows.counts) < options.sequences:
        raise AutoQuantError(
            f"{options.text}: {len(ids)} tokens, which make {counted(len(windows.counts), 'window')} of "
            f"{options.length}; {options.sequences} were asked for: lower {options.lower}, or give more text"
        )
    return calibration_batches(windows, options.sequences, options.seed)


def check_fit(model: nn.Module, batches: Sequence[Batch]) -> None:
    """Raise AutoQuantError for token ids beyond the model's table and batches [B, S] beyond its table of positions.

    Rotary positions have no end; what is longer than the model was trained for is the caller's choice. The ids that
    keep the places of an image may be those of no row.
    """
    tokens = token_embedding(model)
    if tokens is None:
        return
    rows = len(tokens.weight)
    for batch in texts(batches):
        largest = int(batch.max()) if batch.numel() else 0
        if largest >= rows:
            raise AutoQuantError(
                f"token {largest} is beyond the model's table of {rows} tokens: the tokenizer is another model's"
            )
    limit = _positions(model, tokens)
    longest = max((_positions_of(model, batch) for batch in batches), default=0)
    if limit is not None and longest > limit:
        included = "BOS and prefix included" if hasattr(model, PREFIX) else "BOS included"
        raise AutoQuantError(
            f"windows of {longest} tokens, {included}, are longer than the model's {limit} positions: lower --length"
        )


def _positions_of(model: nn.Module, batch: Batch) -> int:
    """How many positions a batch takes of a model's table."""
    if isinstance(batch, Example):
        return batch.ids.shape[1]
    return longest_read(model, batch.shape[1]) + _hidden_prefix(model, batch)


def _hidden_prefix(model: nn.Module, batch: Tensor) -> int:
    """How many tokens a fixed prefix puts in front of a batch [B, S], those apart that the batch begins with."""
    tokens = getattr(getattr(model, PREFIX, None), "tokens", ())
    if batch.shape[1] and tuple(batch[0, : len(tokens)].tolist()) == tokens:
        return 0
    return len(tokens) - bool(batch.shape[1] and int(batch[0, 0]) in tokens)


def _positions(model: Any, tokens: nn.Module) -> int | None:
    """The number of positions of a model that looks them up in a table, else None.

    Tables may have a few rows more, for padding.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(limit, int):
        return None
    tables = [m.weight for m in model.modules() if isinstance(m, nn.Embedding) and m is not tokens]
    buffers = [buffer for buffer in model.buffers() if buffer.dim() == 2 and buffer.is_floating_point()]
    tables += [buffer for buffer in buffers if buffer.shape[1] > 1]  # neither int8 weights nor their scales
    return limit if any(limit <= len(table) < limit + 8 for table in tables) else None
