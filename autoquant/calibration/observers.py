"""What one forward sweep over calibration data finds: the largest inputs of every linear, per channel.

Both smoothing and static scales need maxima, and both follow from these: SmoothQuant's scales per channel, and after
channels were scaled by s the maximum of a tensor is ``max_j(maximum_j * s_j)``. So nothing is swept twice.

Matrix products are caught where they run, by the storage of the weight they multiply with, so that every kind of linear
is seen: ``nn.Linear``, Conv1D, ``x @ W.T``, experts inside a grouped product. Nothing is attached to the model, so
nothing can be left on it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from autoquant.executor.online import key_rotations
from autoquant.models.caches import DynamicCache
from autoquant.models.locate import locate
from autoquant.quantizer import int8
from autoquant.quantizer.kv_cache import rotated

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


class InputMaxima(TorchDispatchMode):
    """Collects, while the context is open, into ``maxima``: weight name -> float32 [I], or [E, I] for 3-D weights.

    A product tells itself which dimension of the weight is summed over. Experts without tokens stay at 0; a weight that
    multiplied nothing is absent.
    """

    def __init__(self, weights: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self.watched: dict[int, list[tuple[str, Tensor]]] = {}  # by storage, which several parameters may share
        self.maxima: dict[str, Tensor] = {}
        for name, weight in (weights or {}).items():
            self.watch(name, weight)

    def watch(self, name: str, weight: Tensor) -> None:
        """Look for products with ``weight`` from now on."""
        self.watched.setdefault(weight.untyped_storage().data_ptr(), []).append((name, weight.detach()))

    def twin(self) -> InputMaxima:
        """Another context for another thread, which watches the same and collects into the same."""
        other = InputMaxima()
        other.watched, other.maxima = self.watched, self.maxima
        return other

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
        for name, parameter in self.watched.get(weight.untyped_storage().data_ptr(), ()):
            offset = int(weight.storage_offset()) - int(parameter.storage_offset())
            strides = parameter.stride()[-2:]
            if 0 <= offset < parameter.numel() and weight.stride(weight_dim) in strides:
                dim = parameter.dim() - 2 + strides.index(weight.stride(weight_dim))
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
        stack = parameter.shape[0] if parameter.dim() == 3 else 1
        if name not in self.maxima:
            shape = (stack, parameter.shape[dim]) if parameter.dim() == 3 else (parameter.shape[dim],)
            self.maxima[name] = torch.zeros(shape, dtype=torch.float32, device=inputs.device)
        maxima = self.maxima[name].view(stack, -1)
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


@contextmanager
def observe_cache(model: nn.Module) -> Iterator[dict[str, dict[int, Tensor]]]:
    """Collect, while the context is open, the maxima of the keys and values that attention layers store.

    Yields ``key`` and ``value``, each a dictionary layer -> float32 [H, D], empty while nothing was stored. By
    channel, because the values' channels may be smoothed afterwards.
    """
    maxima: dict[str, dict[int, Tensor]] = {}

    def hook(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        cache = kwargs.get("past_key_values")
        if cache is None:
            cache = DynamicCache(config=module.config)  # type: ignore[arg-type]  # a PreTrainedConfig
        update = cache.update

        def recording(keys: Tensor, values: Tensor, layer: int, *rest: Any, **named: Any) -> Any:
            for name, states in (("key", rotated(keys, rotations.get(layer))), ("value", values)):
                seen = maxima.setdefault(name, {})
                maximum = int8.absmax(states.detach(), (0, 2))[0, :, 0]
                seen[layer] = torch.maximum(seen[layer], maximum) if layer in seen else maximum
            return update(keys, values, layer, *rest, **named)

        cache.update = recording  # type: ignore[method-assign]  # on this one cache object, for this one pass
        return args, {**kwargs, "past_key_values": cache}

    rotations = key_rotations(model)
    handle = model.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield maxima
    finally:
        handle.remove()
