"""Tensors on their way between a disk and a device while something else is computed."""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from autoquant.checkpoint.streamed import Weights

AHEAD = 1_000_000_000
"""Bytes that are read before they are asked for, and that wait to be written."""
READERS = 8


@contextmanager
def read_ahead(weights: Weights, names: Iterable[str], device: torch.device) -> Iterator[Weights]:
    """The same parameters on ``device``, those of ``names`` read before they are asked for, in this order."""
    parts = [part.name for name in names for part in weights.stored.get(name, ())]
    entries = {part: weights.shards.entries[part] for part in parts}
    sizes = {name: math.prod(entry.shape) * entry.dtype.itemsize for name, entry in entries.items()}
    with reading_ahead(weights.fetch or weights.shards.read, sizes, device) as fetch:
        yield dataclasses.replace(weights, fetch=fetch, device=device)


@contextmanager
def reading_ahead(
    read: Callable[[str], Tensor], sizes: Mapping[str, int], device: torch.device, most: int = AHEAD
) -> Iterator[Callable[[str], Tensor]]:
    """A context that gives a function as ``read``, whose tensors are on ``device``.

    ``sizes``: bytes by name, in the order in which they will be asked for; so many are read by other threads before
    they are. Any may be asked for again, or in another order, which takes its time. The CPU reads when it is asked:
    it has nothing to wait for.
    """
    if device.type == "cpu":
        yield read
        return
    with ThreadPoolExecutor(READERS, thread_name_prefix="read") as pool:
        ahead = _Ahead(lambda name: to_device(read(name), device), deque(sizes.items()), pool, most)
        try:
            yield ahead.get
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


@dataclass(slots=True, eq=False)
class _Ahead:
    """What is being read. Mutable, of one thread."""

    read: Callable[[str], Tensor]
    order: deque[tuple[str, int]]
    pool: ThreadPoolExecutor
    most: int
    coming: dict[str, tuple[Future[Tensor], int]] = field(default_factory=dict)
    held: int = 0

    def get(self, name: str) -> Tensor:
        self._go_on()
        if name not in self.coming:
            return self.read(name)
        future, size = self.coming.pop(name)
        self.held -= size
        tensor = future.result()
        self._go_on()
        return tensor

    def _go_on(self) -> None:
        while self.order and (not self.held or self.held + self.order[0][1] <= self.most):
            name, size = self.order.popleft()
            self.coming[name] = self.pool.submit(self.read, name), size
            self.held += size


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of a file on ``device``: to a GPU through memory that it can fetch from by itself."""
    if device.type != "cuda":
        return tensor.to(device)
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    # numpy copies on the thread that asks; torch would wake all of its own for each of several readers.
    np.copyto(pinned.reshape(-1).view(torch.uint8).numpy(), tensor.reshape(-1).view(torch.uint8).numpy())
    return pinned.to(device, non_blocking=True)


def to_host(tensors: Iterable[tuple[str, Tensor]], most: int = AHEAD) -> Iterator[tuple[str, Tensor]]:
    """The same tensors on the CPU, those of a GPU some later than they are made, so that it need not wait."""
    waiting: deque[tuple[str, Tensor, torch.cuda.Event]] = deque()
    held = 0
    for name, tensor in tensors:
        if tensor.device.type != "cuda":
            yield name, tensor
            continue
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        host.copy_(tensor, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(tensor.device))
        waiting.append((name, host, copied))
        held += host.nbytes
        while held > most:
            held -= waiting[0][1].nbytes
            yield _arrived(*waiting.popleft())
    while waiting:
        yield _arrived(*waiting.popleft())


def _arrived(name: str, host: Tensor, copied: torch.cuda.Event) -> tuple[str, Tensor]:
    copied.synchronize()
    return name, host
