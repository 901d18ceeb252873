"""Several processes that share the windows of one calibration: each runs some, and what they saw is merged.

``torchrun --nproc-per-node N -m autoquant quantize ...`` starts them, on one host or several. A batch goes through the
model of one process as it would have gone through that of the only one, and a maximum of maxima is exact, so that the
result is the same, bit for bit, where all run on devices of one kind.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, distributed

from autoquant.errors import AutoQuantError

One = TypeVar("One")


@dataclass(frozen=True, slots=True)
class Processes:
    """Which of how many this process is; ``device``: what it computes on."""

    rank: int = 0
    count: int = 1
    device: torch.device | None = None

    @property
    def is_first(self) -> bool:
        """True if this is the process that writes and speaks."""
        return self.rank == 0

    def share(self, batches: Sequence[One]) -> Sequence[One]:
        """The batches that go through this process. Raises AutoQuantError where some process would have none."""
        if batches and len(batches) < self.count:
            raise AutoQuantError(
                f"{self.count} processes for {len(batches)} batches of windows: start fewer, or give more --sequences"
            )
        return batches[self.rank :: self.count]

    def largest(self, maxima: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Elementwise maxima over all processes, float32, by name; a name may be known to some of them only.

        All have to ask at once. NaN is returned as infinity, to which it is the same here.
        """
        if self.count == 1:
            return dict(maxima)
        shapes: list[dict[str, tuple[int, ...]]] = [{} for _ in range(self.count)]
        distributed.all_gather_object(shapes, {name: tuple(tensor.shape) for name, tensor in maxima.items()})
        every = {name: shape for known in shapes for name, shape in known.items()}
        names = sorted(every)
        parts = [maxima[name] if name in maxima else torch.zeros(every[name], device=self.device) for name in names]
        if not parts:
            return {}
        flat = torch.cat([part.float().flatten() for part in parts]).nan_to_num(torch.inf, torch.inf)
        distributed.all_reduce(flat, distributed.ReduceOp.MAX)
        cut = flat.split([part.numel() for part in parts])
        return {name: one.view(every[name]).clone() for name, one in zip(names, cut, strict=True)}


ALONE = Processes()


def is_first() -> bool:
    """True unless torchrun started this process as a further one: the first writes, and claims what is written."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def joined(device: torch.device) -> Iterator[Processes]:
    """A context in which the processes that torchrun started know each other, and which all leave together; one process
    is alone in it.

    Raises AutoQuantError where they cannot be joined.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield ALONE
        return
    own = device if device.type == "cuda" else None
    if own is not None:
        torch.cuda.set_device(own)
    try:
        distributed.init_process_group("gloo" if own is None else "nccl", device_id=own)
    except (RuntimeError, ValueError) as error:
        raise AutoQuantError(f"the {count} processes cannot be joined: {' '.join(str(error).split())[:200]}") from error
    try:
        yield Processes(distributed.get_rank(), count, device)
        distributed.barrier()
    finally:
        distributed.destroy_process_group()
