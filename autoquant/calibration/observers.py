"""Per-channel maxima of what a model's linears read, by the names that its config gives them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from autoquant.calibration.input_maxima import InputMaxima
from autoquant.models.locate import locate


@contextmanager
def observe_linears(model: nn.Module, weights: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Collect, while the context is open, the per-channel maxima of all inputs of the named weights.

    Yields a dictionary weight name -> float32 [I] ([E, I] for 3-D weights) that fills up; experts without tokens stay
    at 0. A linear in a wrapper goes by the wrapper's name and is observed inside it. Raises AutoQuantError for a name
    that the model lacks.
    """
    observer = InputMaxima({name: locate(model, name).parameter for name in weights})
    with observer:
        yield observer.maxima
