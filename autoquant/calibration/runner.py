"""How text, or images and sounds with their words, goes through a model: whole, or one decoder layer at a time.

Everything that looks at a model's forward passes (maxima, rounding in sequence, the search for a prefix) is handed a
*runner* and knows nothing of where the weights are. Devices and several processes are further runners: a class or a
function with this one signature.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from autoquant.analyzer.layers import find_stacks
from autoquant.calibration.layer_by_layer import in_step
from autoquant.calibration.processes import ALONE, Processes
from autoquant.calibration.windows import check_fit
from autoquant.models.locate import owner_of
from autoquant.models.reading import Batch, examples_of, read, texts
from autoquant.models.structure import ModelStructure
from autoquant.models.vocabulary import output_embedding, token_tables
from autoquant.threads import give_back_memory

Progress = Callable[[int, int], None]
"""Told how much is done, and of how much."""


def silent(done: int, total: int) -> None:
    """Tell nobody."""


def unused(batch: int, output: Any) -> None:
    """Nothing is made of what a pass gives."""


class Observer(Protocol):
    """Collects what it sees of forward passes."""

    def attached(self, model: nn.Module) -> AbstractContextManager[object]:
        """A context around all passes."""

    def passing(self) -> AbstractContextManager[object]:
        """A context around one pass, opened in the thread that runs it."""

    def refresh(self, model: nn.Module) -> None:
        """Look at the parameters that are in memory now: some came, others went."""

    def merge(self, processes: Processes, prefix: str) -> None:
        """Take over what other processes saw of parameters whose names begin with ``prefix``."""


class Runner(Protocol):
    """Runs each of ``batches``, token ids [B, S] or examples, through ``model`` once, without gradients.

    An encoder-decoder reads each window in halves (:func:`autoquant.models.reading.read`). Observers and the model's
    own hooks see every pass. Whatever they or the model raise ends the run and is passed on, with nothing left on the
    model. Raises AutoQuantError for batches that :func:`check_fit` refuses, and for a model that does not run on text.
    """

    def __call__(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        observers: Sequence[Observer] = (),
        progress: Progress = silent,
    ) -> None: ...


@torch.no_grad()
def whole(
    model: nn.Module, batches: Sequence[Batch], observers: Sequence[Observer] = (), progress: Progress = silent
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


def shared(processes: Processes) -> Runner:
    """The runner :func:`whole` for several processes, each of which runs its share."""

    def run(
        model: nn.Module, batches: Sequence[Batch], observers: Sequence[Observer] = (), progress: Progress = silent
    ) -> None:
        whole(model, own_share(processes, batches), observers, progress)
        for observer in observers:
            observer.merge(processes, "")

    return run


def own_share(processes: Processes, batches: Sequence[Batch]) -> tuple[Batch, ...]:
    """What goes through this process: a share of the text, and every example.

    All processes enter the same layers in the same order, since they wait for each other behind each.
    """
    return (*examples_of(batches), *processes.share(texts(batches)))


@contextmanager
def headless(model: nn.Module, weights: Iterable[str]) -> Iterator[None]:
    """A context in which a pass ends where the head would begin, unless one of ``weights`` is the head's.

    The head is the largest product of many models, and nothing of what it makes is looked at.
    """
    head = output_embedding(model)
    names = set(weights)
    own = () if head is None else (name for name, module in model.named_modules() if module is head)
    if head is None or any(f"{path}.{last}" in names for path in own for last in head._parameters):
        yield
        return

    def stop(module: nn.Module, args: tuple[Any, ...]) -> None:
        raise _HeadReached

    handle = head.register_forward_pre_hook(stop)
    try:
        yield
    finally:
        handle.remove()


class _HeadReached(BaseException):
    """Ends a pass. No Exception, so that no model's code catches it."""


@dataclass(frozen=True, slots=True)
class LayerByLayer:
    """All batches side by side through one decoder layer after the other, whose parameters are read when it is entered.

    The model is on the meta device, its buffers on ``device``; ``inventory`` names its parameters, and buffers that are
    on the meta device too, and ``read`` makes them there; ``processes`` run a share of the batches each. Of the
    parameters outside of the layers the token tables are there while they are used, the others stay. ``progress`` is
    told of layers, ``outputs`` of what the model returns for a batch, by the batch's number, while its head is there.
    """

    inventory: ModelStructure
    read: Callable[[str], Tensor]
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    processes: Processes = ALONE
    outputs: Callable[[int, Any], None] = unused

    def __call__(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        observers: Sequence[Observer] = (),
        progress: Progress = silent,
    ) -> None:
        for _ in self.steps(model, batches, observers, progress):
            pass

    def steps(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        observers: Sequence[Observer] = (),
        progress: Progress = silent,
    ) -> Iterator[str]:
        """The run, which yields the path of each layer that all batches went through while its parameters are there."""
        check_fit(model, batches)
        layers = layer_paths(model)
        inside = tuple(f"{path}." for path in layers)
        tables = token_tables(model)
        there = _Parameters(self, model, observers)
        with ExitStack() as stack:
            for observer in observers:
                stack.enter_context(observer.attached(model))
            outside = [name for name in self.inventory.shapes if not name.startswith(inside)]
            for name in tables.intersection(outside):
                owner, _ = owner_of(model, name)
                handle = owner.register_forward_pre_hook(partial(there.bring, (name,)))
                stack.callback(handle.remove)
            there.put([name for name in outside if name not in tables])
            own = own_share(self.processes, batches)
            works = [
                partial(_pass, model, batch.to(self.device), observers, partial(self.outputs, number))
                for number, batch in enumerate(own)
            ]
            of_text = [number for number, batch in enumerate(own) if isinstance(batch, Tensor)]
            done = 0
            for path, passed in in_step(works, layers, last=of_text):
                names = [name for name in self.inventory.shapes if name.startswith(f"{path}.")]
                if not passed:
                    there.drop(tables)
                    there.put(names)
                    continue
                for observer in observers:
                    observer.merge(self.processes, f"{path}.")
                yield path
                there.drop(names)
                if self.device.type == "cpu":
                    give_back_memory()
                done += 1
                progress(done, len(layers))
            for observer in observers:
                observer.merge(self.processes, "")


def layer_paths(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of all of a model's stacks by their paths."""
    return {
        f"{stack.path}.{number}": module
        for stack in find_stacks(model)
        for number, module in enumerate(model.get_submodule(stack.path).children())
    }


@dataclass(slots=True, eq=False)
class _Parameters:
    """Which parameters, and buffers by name, of a model are in memory; tied ones are one. Mutable, and gone after the
    run.
    """

    runner: LayerByLayer
    model: nn.Module
    observers: Sequence[Observer]
    held: dict[str, nn.Parameter] = field(default_factory=dict)

    def put(self, names: Iterable[str]) -> None:
        for name in names:
            first = self.runner.inventory.canonical[name]
            if first not in self.held:
                self.held[first] = nn.Parameter(self.runner.read(name), requires_grad=False)
            _set(self.model, name, self.held[first])
        for observer in self.observers:
            observer.refresh(self.model)

    def drop(self, names: Iterable[str]) -> None:
        """Tied names of other layers keep the tensor until they are dropped themselves."""
        for name in names:
            shape, dtype = self.runner.inventory.shapes[name], _get(self.model, name).dtype
            empty = torch.empty(shape, dtype=dtype, device="meta")
            _set(self.model, name, nn.Parameter(empty, requires_grad=False))
            self.held.pop(self.runner.inventory.canonical[name], None)
        for observer in self.observers:
            observer.refresh(self.model)

    def bring(self, names: Sequence[str], module: nn.Module, args: tuple[Any, ...]) -> None:
        """A module's hook: its parameters are wanted now."""
        if any(_get(self.model, name).is_meta for name in names):
            self.put(names)


@torch.no_grad()  # here as well: a thread of its own begins with gradients
def _pass(
    model: nn.Module, batch: Batch, observers: Sequence[Observer], given: Callable[[Any], None] = lambda output: None
) -> None:
    with suppress(_HeadReached), ExitStack() as stack:
        for observer in observers:
            stack.enter_context(observer.passing())
        given(read(model, batch))


def _get(model: nn.Module, name: str) -> Tensor:
    owner, last = owner_of(model, name)
    buffer = owner._buffers.get(last)
    return owner.get_parameter(last) if buffer is None else buffer


def _set(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, last = owner_of(model, name)
    if last in owner._buffers:
        owner._buffers[last] = parameter.data
    else:
        owner.register_parameter(last, parameter)
