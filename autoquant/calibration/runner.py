"""How text goes through a model: whole, or one decoder layer at a time.

Everything that looks at a model's forward passes (maxima, rounding in sequence, the search for a prefix) is handed a
*runner* and knows nothing of where the weights are. Devices and several processes are further runners: a class or a
function with this one signature.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from autoquant.analyzer.layers import find_stacks
from autoquant.calibration.layer_by_layer import run_in_step
from autoquant.calibration.windows import check_fit
from autoquant.models.structure import ModelStructure

Progress = Callable[[int, int], None]
"""Told how much is done, and of how much."""


def silent(done: int, total: int) -> None:
    """Tell nobody."""


class Observer(Protocol):
    """Collects what it sees of forward passes."""

    def attached(self, model: nn.Module) -> AbstractContextManager[object]:
        """A context around all passes."""

    def passing(self) -> AbstractContextManager[object]:
        """A context around one pass, opened in the thread that runs it."""

    def refresh(self, model: nn.Module) -> None:
        """Look at the parameters that are in memory now: some came, others went."""


class Runner(Protocol):
    """Runs each of ``batches``, token ids [B, S], through ``model`` once, without gradients.

    Observers and the model's own hooks see every pass. Whatever they or the model raise ends the run and is passed on,
    with nothing left on the model. Raises AutoQuantError for batches that :func:`check_fit` refuses.
    """

    def __call__(
        self,
        model: nn.Module,
        batches: Sequence[Tensor],
        observers: Sequence[Observer] = (),
        progress: Progress = silent,
    ) -> None: ...


@torch.no_grad()
def whole(
    model: nn.Module, batches: Sequence[Tensor], observers: Sequence[Observer] = (), progress: Progress = silent
) -> None:
    """Batch after batch through a model that is in memory, on its device. ``progress`` is told of batches."""
    check_fit(model, batches)
    device = next(model.parameters()).device
    with ExitStack() as stack:
        for observer in observers:
            stack.enter_context(observer.attached(model))
        for done, batch in enumerate(batches, 1):
            _pass(model, batch.to(device), observers)
            progress(done, len(batches))


@dataclass(frozen=True, slots=True)
class LayerByLayer:
    """All batches side by side through one decoder layer after the other, whose parameters are read when it is entered.

    The model is on the meta device; ``inventory`` names its parameters and ``read`` makes them. Those outside of the
    layers (embeddings, head) stay in memory. ``progress`` is told of layers.
    """

    inventory: ModelStructure
    read: Callable[[str], Tensor]

    def __call__(
        self,
        model: nn.Module,
        batches: Sequence[Tensor],
        observers: Sequence[Observer] = (),
        progress: Progress = silent,
    ) -> None:
        check_fit(model, batches)
        layers = {
            f"{stack.path}.{number}": module
            for stack in find_stacks(model)
            for number, module in enumerate(model.get_submodule(stack.path).children())
        }
        inside = tuple(f"{path}." for path in layers)
        held: dict[str, nn.Parameter] = {}
        done = 0

        def put(names: Sequence[str]) -> None:
            for name in names:
                first = self.inventory.canonical[name]
                if first not in held:
                    held[first] = nn.Parameter(self.read(name), requires_grad=False)
                _set(model, name, held[first])
            for observer in observers:
                observer.refresh(model)

        def names_of(path: str) -> list[str]:
            return [name for name in self.inventory.shapes if name.startswith(f"{path}.")]

        def leave(path: str) -> None:
            nonlocal done
            for name in names_of(path):
                empty = torch.empty(self.inventory.shapes[name], device="meta")
                _set(model, name, nn.Parameter(empty, requires_grad=False))
            for first in held.keys() - kept:
                del held[first]
            for observer in observers:
                observer.refresh(model)
            done += 1
            progress(done, len(layers))

        with ExitStack() as stack:
            for observer in observers:
                stack.enter_context(observer.attached(model))
            put([name for name in self.inventory.shapes if not name.startswith(inside)])
            kept = set(held)
            works = [partial(_pass, model, batch, observers) for batch in batches]
            run_in_step(works, layers, lambda path: put(names_of(path)), leave)


@torch.no_grad()  # here as well: a thread of its own begins with gradients
def _pass(model: nn.Module, batch: Tensor, observers: Sequence[Observer]) -> None:
    with ExitStack() as stack:
        for observer in observers:
            stack.enter_context(observer.passing())
        model(batch)


def _set(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, last = name.rpartition(".")
    model.get_submodule(owner).register_parameter(last, parameter)
