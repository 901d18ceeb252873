"""A model whose parameters can be read, changed and run, wherever they are.

The steps before quantization are written against this, so that they are the same for a module in memory and for one
whose parameters are read from disk when a layer needs them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from autoquant.calibration.observers import Sweep, sweep
from autoquant.calibration.runner import Progress, Runner, silent, whole
from autoquant.executor.apply import execute_
from autoquant.executor.online import check_installable
from autoquant.executor.plan import Plan
from autoquant.models.structure import ModelStructure, structure_of
from autoquant.quantizer.prefix import prefixed


class Held(Protocol):
    """What the pipeline asks of a model."""

    @property
    def inventory(self) -> ModelStructure:
        """Names and shapes of the parameters as they are now."""

    def read(self, name: str) -> Tensor:
        """A parameter as it is now."""

    def execute_(self, plan: Plan) -> None:
        """Carry out a plan: from now on the parameters are the changed ones."""

    def prefixed(self, tokens: Sequence[int]) -> AbstractContextManager[None]:
        """A context in which every sequence begins with ``tokens``. Raises AutoQuantError where that cannot be."""

    def sweep(
        self, weights: Iterable[str], batches: Sequence[Tensor], *, cache: bool, progress: Progress = silent
    ) -> Sweep:
        """One calibration sweep over the model as it is now."""

    def module(self) -> nn.Module:
        """The model with all of its parameters. Raises AutoQuantError where these are never in memory together."""


@dataclass(frozen=True, slots=True)
class InMemory:
    """A module with its parameters, and how text goes through it."""

    model: nn.Module
    runner: Runner = whole

    @property
    def inventory(self) -> ModelStructure:
        return structure_of(self.model)

    def read(self, name: str) -> Tensor:
        return self.model.get_parameter(name)

    @torch.no_grad()
    def execute_(self, plan: Plan) -> None:
        check_installable(self.model, plan.online)
        execute_(self.model, plan)

    def prefixed(self, tokens: Sequence[int]) -> AbstractContextManager[None]:
        return prefixed(self.model, tokens)

    def sweep(
        self, weights: Iterable[str], batches: Sequence[Tensor], *, cache: bool, progress: Progress = silent
    ) -> Sweep:
        return sweep(self.model, weights, batches, cache=cache, runner=self.runner, progress=progress)

    def module(self) -> nn.Module:
        return self.model
