"""A model whose parameters can be read, changed and run: what the steps before quantization are written against."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autoquant.calibration.observers import Sweep, sweep
from autoquant.calibration.runner import Progress, Runner, silent, whole
from autoquant.executor.apply import execute_
from autoquant.executor.online import check_installable
from autoquant.executor.plan import Plan
from autoquant.models.reading import Batch
from autoquant.models.structure import ModelStructure, structure_of
from autoquant.quantizer.prefix import prefixed


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
        self, weights: Iterable[str], batches: Sequence[Batch], *, cache: bool, progress: Progress = silent
    ) -> Sweep:
        return sweep(self.model, weights, batches, cache=cache, runner=self.runner, progress=progress)

    def module(self) -> nn.Module:
        return self.model
