"""The float model's predictions on held-out windows, and how far those of another model are from them."""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from autoquant.models.vocabulary import output_embedding


@dataclass(frozen=True, slots=True)
class Distance:
    """How far a model is from float, sums per window in nats: KL divergence, negative log-likelihood above float's, and
    the number of tokens.
    """

    kl: tuple[float, ...]
    excess: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(slots=True, eq=False)
class Reference:
    """What the float model predicts of batches of windows, token ids [B, S] each.

    Log-probabilities of a large vocabulary are large: what the head was given is kept, [B, L, H] by batch, with the
    head, and they are computed window by window when asked for. Where logits are more than what the head makes, or the
    model does not say which module that is, log-probabilities [B, P, V] are kept in host memory.
    """

    head: nn.Module | None = None
    given: dict[int, Tensor] = field(default_factory=dict)
    kept: dict[int, Tensor] = field(default_factory=dict)

    @contextmanager
    def taking(self, model: nn.Module) -> Iterator[Callable[[int, Any], None]]:
        """A context in which the float model's passes are watched; gives what is to be told of a batch's output, in the
        thread of its pass, while the head's parameters are there.
        """
        here, head = threading.local(), output_embedding(model)

        def watch(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            here.given = args[0]

        def take(number: int, output: Any) -> None:
            given: Tensor | None = getattr(here, "given", None)
            if head is not None and self.head is None and not self.kept and _is_all(head, given, output.logits):
                self.head = _alone(head)
            if self.head is None or given is None:
                self.kept[number] = _log_softmax(output.logits).cpu()
            else:
                self.given[number] = given

        handle = None if head is None else head.register_forward_pre_hook(watch)
        try:
            yield take
        finally:
            if handle is not None:
                handle.remove()

    def log_probabilities(self, batch: int, window: int, device: torch.device) -> Tensor:
        """Of the predicted tokens of one window, [P, V]."""
        if self.head is None or batch in self.kept:
            return self.kept[batch][window].to(device)
        return _log_softmax(self.head.forward(self.given[batch][window : window + 1]))[0].to(device)

    def distance(self, batch: int, ids: Tensor, logits: Tensor) -> Distance:
        """How far logits [B, L, V] are from float's for the batch of this number, token ids [B, S]."""
        kl: list[float] = []
        excess: list[float] = []
        predicted = logits.shape[1] - 1
        for window, row in enumerate(ids):
            got = _log_softmax(logits[window : window + 1])[0]
            expected = self.log_probabilities(batch, window, got.device)
            targets = row[-predicted:, None].to(got.device)
            difference = expected - got
            excess.append(float(difference.gather(-1, targets).sum(dtype=torch.float64)))
            kl.append(float((expected.exp() * difference).sum(dtype=torch.float64)))
        return Distance(tuple(kl), tuple(excess), (predicted,) * len(ids))


def joined(parts: Sequence[Distance]) -> Distance:
    """All windows of some batches."""
    return Distance(
        tuple(one for part in parts for one in part.kl),
        tuple(one for part in parts for one in part.excess),
        tuple(one for part in parts for one in part.counts),
    )


def _log_softmax(logits: Tensor) -> Tensor:
    """Log-probabilities [B, P, V] of the predicted tokens, float32."""
    return functional.log_softmax(logits[:, :-1].float(), -1)


def _is_all(head: nn.Module, given: Tensor | None, logits: Tensor) -> bool:
    """True if logits are what the head makes of what it was given, within rounding: nothing follows."""
    if given is None or given.shape[:-1] != logits.shape[:-1] or any(head.children()):
        return False
    made: Tensor = head.forward(given)
    return made.shape == logits.shape and bool((made - logits).abs().max() <= 1e-5 * logits.abs().max())


def _alone(head: nn.Module) -> nn.Module:
    """The head as it is now: its parameters stay when the model's go."""
    result = copy.copy(head)
    result._parameters = dict(head._parameters)
    result._forward_pre_hooks = OrderedDict()
    return result
