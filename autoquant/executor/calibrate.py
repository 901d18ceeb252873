"""Activation maxima from one forward sweep over calibration data.

Matrix products are caught where they run, by the storage of the weight they multiply with, so that every kind of linear
is seen: ``nn.Linear``, Conv1D, ``x @ W.T``, experts inside a grouped product. Nothing is attached to the model, so
nothing can be left on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from autoquant.errors import AutoQuantError
from autoquant.executor.resolved import Resolved, SmoothedSlot
from autoquant.executor.smooth import merge_channels

# Operator -> positions of its two factors. `offsets` marks products of row ranges of x with one matrix each.
PRODUCTS = {
    "aten::mm": (0, 1),
    "aten::addmm": (1, 2),
    "aten::bmm": (0, 1),
    "aten::baddbmm": (1, 2),
    "aten::matmul": (0, 1),
    "aten::linear": (0, 1),
    "aten::_grouped_mm": (0, 1),
    "transformers::grouped_mm_fallback": (0, 1),
}


def collect_activation_maxima(
    model: nn.Module,
    resolved: Resolved,
    batches: Iterable[Tensor],
    progress: Callable[[int], None] | None = None,
) -> dict[tuple[str, int | None], Tensor]:
    """Largest absolute activation per channel at the targets of every selected group.

    ``batches``: token ids ``[sequences, length]``. ``progress(done)`` is called after each batch. Returns float64
    ``[channels]`` per (group name, layer); tied channels are merged by the maximum. Raises AutoQuantError where a
    target was never reached, naming it.
    """
    observer = InputMaxima(model, {slot.name: slot for group in resolved.groups for slot in group.targets})
    device = next(model.parameters()).device
    with torch.no_grad(), observer:
        for done, batch in enumerate(batches, 1):
            model(batch.to(device))
            if progress is not None:
                progress(done)
    result = {}
    for group in resolved.groups:
        channels = torch.zeros(group.channels, dtype=torch.float64)
        for slot in group.targets:
            positions = observer.positions(slot.name)
            if positions is None:
                raise AutoQuantError(f"{group.name}: {slot.name} multiplied nothing in the calibration sweep")
            if len(positions) != len(slot.axis.channels):
                positions = positions.reshape(-1, len(slot.axis.channels)).amax(0)
            channels = merge_channels(channels, slot, positions)
        result[group.name, group.layer] = channels
    return result


class InputMaxima(TorchDispatchMode):
    """Absolute maxima of what is multiplied along one dimension of each watched parameter, per matrix of a stack."""

    def __init__(self, model: nn.Module, slots: dict[str, SmoothedSlot]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self.watched: dict[int, list[tuple[str, Tensor, int]]] = {}  # by storage, which several parameters may share
        self.maxima: dict[str, Tensor] = {}
        for name, slot in slots.items():
            parameter = model.get_parameter(name).detach()
            entry = (name, parameter, slot.axis.dim)
            self.watched.setdefault(parameter.untyped_storage().data_ptr(), []).append(entry)

    def positions(self, name: str) -> Tensor | None:
        """Maxima per position, float64 on the CPU: ``[size]``, or ``[stack * size]`` for a 3-D parameter."""
        found = self.maxima.get(name)
        return None if found is None else found.flatten().double().cpu()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name in PRODUCTS:
            first, second = (args[i] for i in PRODUCTS[name])
            offsets = None
            if "grouped_mm" in name:
                offsets = args[2] if len(args) > 2 else (kwargs or {}).get("offs")
            # aten::linear holds its weight as [out, in]; everywhere else the second factor is summed over dimension -2.
            self._observe(second, first, -1 if name == "aten::linear" else -2, -1, offsets)
            if name != "aten::linear":
                self._observe(first, second, -1, -2, None)
        return func(*args, **(kwargs or {}))

    def _observe(self, weight: Tensor, x: Tensor, weight_dim: int, x_dim: int, offsets: Tensor | None) -> None:
        for name, parameter, dim in self.watched.get(weight.untyped_storage().data_ptr(), ()):
            offset = int(weight.storage_offset()) - int(parameter.storage_offset())
            if 0 <= offset < parameter.numel() and weight.stride(weight_dim) == parameter.stride(dim):
                self._record(name, parameter, dim, offset, weight, x.detach().abs().movedim(x_dim, -1).float(), offsets)

    def _record(
        self,
        name: str,
        parameter: Tensor,
        dim: int,
        offset: int,
        weight: Tensor,
        inputs: Tensor,
        offsets: Tensor | None,
    ) -> None:
        stack = parameter.shape[0] if parameter.dim() == 3 and dim > 0 else 1
        if name not in self.maxima:
            self.maxima[name] = torch.zeros(stack, parameter.shape[dim], dtype=torch.float32, device=inputs.device)
        maxima = self.maxima[name]
        matrix = offset // parameter.stride(0) if stack > 1 else 0
        start = offset // parameter.stride(dim) % parameter.shape[dim]
        length = inputs.shape[-1]
        if weight.dim() == 3 and offsets is not None:  # rows of x up to offsets[e] go to expert e
            bounds = [0, *offsets.tolist()]
            for e, (begin, end) in enumerate(pairwise(bounds)):
                if end > begin:
                    self._raise(maxima[e, start : start + length], inputs[begin:end])
        elif weight.dim() == 3 and stack > 1 and weight.shape[0] == stack:
            for e in range(stack):
                self._raise(maxima[e, start : start + length], inputs[e])
        elif inputs.numel():
            self._raise(maxima[matrix, start : start + length], inputs)

    @staticmethod
    def _raise(maxima: Tensor, inputs: Tensor) -> None:
        torch.maximum(maxima, inputs.reshape(-1, inputs.shape[-1]).amax(0), out=maxima)
