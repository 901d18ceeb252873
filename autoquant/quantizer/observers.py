"""Per-channel maxima of what linears read and caches store, collected in one sweep.

Maxima are kept per channel because everything else follows from them without a second sweep: SmoothQuant's scales need
them per channel, and after smoothing by s the per-tensor maximum of a static scale is ``max_j(maximum_j / s_j)``.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from autoquant.errors import AutoQuantError
from autoquant.quantizer.locate import locate

Maxima = Mapping[str, Tensor]
"""Largest input magnitude per channel by weight name: float32 [I], or [E, I] for a stack of experts."""


def smoothed(maximum: Tensor, scale: Tensor) -> Tensor:
    """Per-channel maxima after the channels were divided by ``scale``: [I] or [E, I], scale broadcasts."""
    return maximum / scale


@contextmanager
def observe_linears(model: nn.Module, weights: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Collect, while the context is open, the per-channel maxima of all inputs of the named weights.

    The weights are recognised wherever a product takes them or a view of them (transposed, one expert of a stack), so
    that linears, ``addmm``, ``x @ W.T`` and grouped products need no hooks and no knowledge of modules. Yields a
    dictionary weight name -> float32 [I] ([E, I] for 3-D weights) that fills up; experts without tokens stay at 0.

    Raises AutoQuantError for a name that the model lacks, and for a product of a shape that has no rule.
    """
    chosen = {name: locate(model, name).parameter for name in weights}
    maxima: dict[str, Tensor] = {}
    with _InputRecorder(chosen, maxima):
        yield maxima


class _InputRecorder(TorchFunctionMode):
    """Looks at every torch function on its way; those in ``PRODUCTS`` that take a known weight are recorded."""

    def __init__(self, weights: Mapping[str, Tensor], maxima: dict[str, Tensor]) -> None:
        super().__init__()
        self.maxima = maxima
        # Views share memory with their parameter, so the address tells which weight a tensor is; tied names share it.
        spans: dict[int, tuple[Tensor, list[str]]] = {}
        for name, weight in weights.items():
            spans.setdefault(weight.data_ptr(), (weight, []))[1].append(name)
        self.starts = sorted(spans)
        self.spans = [spans[start] for start in self.starts]

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        operands = PRODUCTS.get(getattr(func, "__name__", str(func)).strip("_").removesuffix(".default"))
        if operands is not None:
            left, right = (_argument(args, kwargs, position) for position in operands)
            offs = kwargs.get("offs", args[2] if len(args) > 2 else None)
            for x, weight in ((left, right), (right, left)):
                found = self._find(weight)
                if found is not None and isinstance(x, Tensor):
                    self._record(x if x is left else x.mT, weight, found, offs)
        return func(*args, **kwargs)

    def _find(self, tensor: Any) -> tuple[Tensor, list[str]] | None:
        if type(tensor) not in (Tensor, nn.Parameter) or not tensor.numel():
            return None
        address = tensor.data_ptr()
        index = bisect_right(self.starts, address) - 1
        if index < 0:
            return None
        weight, _ = self.spans[index]
        inside = address < self.starts[index] + weight.numel() * weight.element_size()
        return self.spans[index] if inside else None

    def _record(self, x: Tensor, view: Tensor, found: tuple[Tensor, list[str]], offs: Tensor | None) -> None:
        weight, names = found
        seen = x.detach().abs().float()
        if weight.dim() == 2:
            maximum = seen.reshape(-1, x.shape[-1]).amax(0) if seen.numel() else seen.new_zeros(x.shape[-1])
        elif view.dim() == 2:  # one expert
            expert = (view.data_ptr() - weight.data_ptr()) // (weight[0].numel() * weight.element_size())
            maximum = seen.new_zeros(weight.shape[0], x.shape[-1])
            if seen.numel():
                maximum[expert] = seen.reshape(-1, x.shape[-1]).amax(0)
        elif x.dim() == 3 and x.shape[0] == weight.shape[0]:  # all experts, batched
            maximum = seen.amax(1)
        elif x.dim() == 2 and isinstance(offs, Tensor):  # tokens sorted by expert
            maximum = seen.new_zeros(weight.shape[0], x.shape[-1])
            start = 0
            for expert, end in enumerate(offs.tolist()):
                if end > start:
                    maximum[expert] = seen[start:end].amax(0)
                start = end
        else:
            raise AutoQuantError(f"{names[0]}: no rule for a product of {tuple(x.shape)} with {tuple(view.shape)}")
        for name in names:
            before = self.maxima.get(name)
            self.maxima[name] = maximum if before is None else torch.maximum(before, maximum)


# Positions of the two factors among each product's arguments, by the operation's name.
PRODUCTS: Mapping[str, tuple[int, int]] = {
    "linear": (0, 1),
    "matmul": (0, 1),
    "rmatmul": (1, 0),
    "mm": (0, 1),
    "bmm": (0, 1),
    "addmm": (1, 2),
    "grouped_mm": (0, 1),
    "grouped_mm_fallback": (0, 1),
}
KEYWORDS = (("input", "mat1"), ("weight", "other", "mat2"))


def _argument(args: tuple[Any, ...], kwargs: Mapping[str, Any], position: int) -> Any:
    if position < len(args):
        return args[position]
    return next((value for keys in KEYWORDS for key, value in kwargs.items() if key in keys), None)
