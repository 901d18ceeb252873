"""Perplexity as the field computes it, and how far a model is from a reference.

The rule: the text is tokenized once, as a whole and without special tokens; its tokens are cut into windows of
``window`` tokens that do not overlap, the last one shorter; each window is one forward pass and starts with the BOS
token where the tokenizer has one (BOS is put before the ``window`` tokens, so that every token of the text is
predicted exactly once). A model with a fixed prefix sees the same windows: its prefix takes the place of BOS, or is put
in front of a window that has none, and is never predicted. The negative log-likelihood is averaged over predicted
tokens, in nats; perplexity is its exponential.

Of an encoder-decoder the encoder reads the first half of each window, BOS included, and the decoder predicts every
token of the second behind its start token (teacher forcing): the loss that transformers computes for these labels. It
is no figure to compare with a causal model's.

Windows go through the model one by one, because per-tensor dynamic scales span whatever shares a forward pass;
``batch`` changes that. Standard errors are over windows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from autoquant.calibration.windows import Windows, check_fit
from autoquant.errors import AutoQuantError
from autoquant.models.reading import Batch, Example, ids_of, read

LogitsOf = Callable[[Batch], Tensor]
"""From token ids [B, S] to logits [B, P + 1, V]: row i predicts token i - P of a window, the last what follows it. Of
an example P words are predicted.
"""


class Scored(Protocol):
    """What is predicted, batch by batch: windows of text, or examples."""

    @property
    def batches(self) -> Sequence[Batch]: ...


@dataclass(frozen=True, slots=True)
class Examples:
    """Images or sounds, the words beside which are predicted."""

    batches: tuple[Example, ...]

    @property
    def counts(self) -> tuple[int, ...]:
        """Number of predicted tokens of each."""
        return tuple(example.words for example in self.batches)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over predicted tokens and its standard error over windows (NaN for a single window)."""

    mean: float
    standard_error: float

    def said(self, digits: int) -> str:
        """``'22.341 ± 0.120'``; of a single window, which has no error, the mean alone."""
        error = "" if math.isnan(self.standard_error) else f" ± {self.standard_error:.{digits}f}"
        return f"{self.mean:.{digits}f}{error}"


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What :func:`evaluate` measured. Figures per token in nats; ``kl`` to ``log_ratio`` only with a reference."""

    tokens: int
    windows: int
    nll: Estimate
    kl: Estimate | None = None
    top1: Estimate | None = None
    log_ratio: Estimate | None = None  # nll minus the reference's, window by window

    @property
    def perplexity(self) -> Estimate:
        """``exp(nll)``, its standard error by the delta method."""
        return exp_estimate(self.nll)

    @property
    def perplexity_ratio(self) -> Estimate | None:
        """Perplexity divided by the reference's. Paired: the error is that of the difference, not of two
        perplexities.
        """
        return None if self.log_ratio is None else exp_estimate(self.log_ratio)


@dataclass(frozen=True, slots=True)
class Likelihoods:
    """Of each window: the negative log-likelihood in nats, summed over its predicted tokens in float64, and their
    number.
    """

    nll: tuple[float, ...]
    counts: tuple[int, ...]


@torch.no_grad()
def evaluate(
    model: LogitsOf, windows: Scored, reference: LogitsOf | None = None, progress: Callable[[int], None] | None = None
) -> Evaluation:
    """Perplexity of ``model`` and, given a ``reference``, KL(reference || model), top-1 agreement and paired
    difference.

    Both are functions that :func:`logits_of` makes from modules; both see the same batches. ``progress`` is called with
    the number of windows of each batch done. Sums are in float64.
    """
    counts: list[int] = []
    sums: dict[str, list[float]] = {"nll": [], "kl": [], "top1": [], "log_ratio": []}
    for batch in windows.batches:
        ids = ids_of(batch)
        predicted = _log_softmax(model(batch))
        nll = _nll(predicted, ids)
        rows = {"nll": nll}
        if reference is not None:
            expected = _log_softmax(reference(batch))
            rows["kl"] = _kl(expected, predicted)
            rows["top1"] = (expected.argmax(-1) == predicted.argmax(-1)).double()
            rows["log_ratio"] = nll - _nll(expected, ids)
        counts += [nll.shape[1]] * len(ids)
        for name, values in rows.items():
            sums[name] += values.sum(-1, dtype=torch.float64).tolist()
        if progress is not None:
            progress(len(ids))
    estimates = {name: ratio_estimate(values, counts) for name, values in sums.items() if values}
    return Evaluation(sum(counts), len(counts), **estimates)


@torch.no_grad()
def nll_per_window(
    model: LogitsOf, windows: Windows, progress: Callable[[int], None] = lambda windows: None
) -> Likelihoods:
    """What each window's predicted tokens cost.

    What is kept of a model so that it can be compared with others later, window by window:
    ``ratio_estimate`` of the differences is the paired difference with its standard error.
    """
    sums: list[float] = []
    counts: list[int] = []
    for ids in windows.batches:
        nll = _nll(_log_softmax(model(ids)), ids)
        sums += nll.sum(-1, dtype=torch.float64).tolist()
        counts += [nll.shape[1]] * len(ids)
        progress(len(ids))
    return Likelihoods(tuple(sums), tuple(counts))


def logits_of(module: nn.Module) -> LogitsOf:
    """A model that goes on with text as a function from ids [B, S] or examples, on any device, to float32 logits.

    The function raises AutoQuantError for text where a model does not run on text alone, and where a window is longer
    than the model's position table.
    """
    device = next(module.parameters()).device

    def forward(batch: Batch) -> Tensor:
        check_fit(module, [batch])
        try:
            logits: Tensor = read(module, batch.to(device)).logits
        except IndexError as error:
            raise AutoQuantError(
                f"the model cannot take {ids_of(batch).shape[1]} tokens at once: use a smaller window"
            ) from error
        return (logits[:, -(batch.words + 1) :] if isinstance(batch, Example) else logits).float()

    return forward


def perplexity_of(module: nn.Module, windows: Windows) -> float:
    """The perplexity alone."""
    return evaluate(logits_of(module), windows).perplexity.mean


def _log_softmax(logits: Tensor) -> Tensor:
    """Log-probabilities [B, P, V] of the predicted tokens."""
    return functional.log_softmax(logits[:, :-1].float(), -1)


def _nll(log_probabilities: Tensor, ids: Tensor) -> Tensor:
    targets = ids[:, -log_probabilities.shape[1] :, None].to(log_probabilities.device)
    return -log_probabilities.gather(-1, targets).squeeze(-1)


def _kl(expected: Tensor, predicted: Tensor) -> Tensor:
    """KL(expected || predicted) over the last axis of log-probabilities; impossible tokens contribute 0."""
    terms = expected.exp() * (expected - predicted)
    return torch.where(expected == -torch.inf, 0.0, terms).sum(-1)


def ratio_estimate(sums: Sequence[float], counts: Sequence[float]) -> Estimate:
    """Ratio estimator: windows differ in length, so the mean is sum / count and its error that of the residuals.

    Cochran 1977, Sampling Techniques, eq. 2.46 and 6.13: var = W / (W - 1) * sum((s_w - mean * n_w)^2) / (sum n_w)^2.
    """
    total, number = math.fsum(counts), len(counts)
    mean = math.fsum(sums) / total
    if number < 2:
        return Estimate(mean, math.nan)
    residuals = math.fsum((s - mean * n) ** 2 for s, n in zip(sums, counts, strict=True))
    return Estimate(mean, math.sqrt(number / (number - 1) * residuals) / total)


def exp_estimate(estimate: Estimate) -> Estimate:
    """``exp`` of an estimate, infinite where float64 ends; its error to first order."""
    value = math.exp(estimate.mean) if not estimate.mean > 709 else math.inf
    return Estimate(value, value * estimate.standard_error)
