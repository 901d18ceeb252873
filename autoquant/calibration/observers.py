"""What one forward sweep over calibration data finds: the largest inputs of every linear, per channel.

Both smoothing and static scales need maxima, and both follow from these: SmoothQuant's scales per channel, and after
channels were scaled by s the maximum of a tensor is ``max_j(maximum_j * s_j)``. So nothing is swept twice.

Matrix products are caught where they run, by the storage of the weight they multiply with, so that every kind of linear
is seen: ``nn.Linear``, Conv1D, ``x @ W.T``, experts inside a grouped product. Nothing is attached to the model, so
nothing can be left on it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from autoquant.aten import FACTORS
from autoquant.calibration.processes import Processes
from autoquant.calibration.runner import Progress, Runner, headless, silent, whole
from autoquant.executor.online import key_rotations
from autoquant.library_patches import TorchDispatchMode
from autoquant.models.caches import DynamicCache
from autoquant.models.locate import locate
from autoquant.models.reading import Batch
from autoquant.quantizer import int8
from autoquant.quantizer.kv_cache import CacheMaxima, check_one_stack, rotated
from autoquant.quantizer.linear import Maxima


@dataclass(frozen=True, slots=True)
class Sweep:
    """What one calibration sweep found: the linears' inputs by weight name, and the cached keys and values."""

    inputs: Maxima = field(default_factory=dict)
    cache: CacheMaxima = field(default_factory=dict)


def sweep(
    model: nn.Module,
    weights: Iterable[str],
    batches: Sequence[Batch],
    *,
    cache: bool,
    runner: Runner = whole,
    progress: Progress = silent,
) -> Sweep:
    """Run ``batches``, token ids [B, S] or examples, through the model once; ``cache``: keys and values too."""
    inputs, stored = LinearInputs(weights), CachedStates()
    with headless(model, inputs.names):
        runner(model, batches, (inputs, stored) if cache else (inputs,), progress)
    return Sweep(inputs.maxima, stored.maxima)


class LinearInputs:
    """Observer of the per-channel maxima of all inputs of the weights in ``names``.

    ``maxima`` fills up: weight name -> float32 [I], or [E, I] for 3-D weights. Experts without tokens stay at 0; a
    weight that multiplied nothing is absent. A linear in a wrapper goes by the wrapper's name and is observed inside
    it. Raises AutoQuantError for a name that the model lacks.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.names = tuple(names)
        self.watched: dict[int, list[tuple[str, Tensor]]] = {}  # by storage, which several parameters may share
        self.maxima: dict[str, Tensor] = {}
        self.merged: set[str] = set()

    @contextmanager
    def attached(self, model: nn.Module) -> Iterator[None]:
        self.refresh(model)
        try:
            yield
        finally:
            self.watched.clear()

    def passing(self) -> _Products:
        return _Products(self)

    def refresh(self, model: nn.Module) -> None:
        self.watched.clear()
        for name in self.names:
            weight = locate(model, name).parameter.detach()
            if not weight.is_meta:
                self.watched.setdefault(weight.untyped_storage().data_ptr(), []).append((name, weight))

    def merge(self, processes: Processes, prefix: str) -> None:
        """For no prefix those that were not merged under another."""
        if processes.count > 1:
            names = [n for n in self.maxima if (n.startswith(prefix) if prefix else n not in self.merged)]
            found = processes.largest({name: self.maxima[name] for name in names})
            self.maxima |= found
            self.merged |= found.keys()


class CachedStates:
    """Observer of the keys and values that attention layers store; ``maxima`` fills up as of :func:`observe_cache`."""

    def __init__(self) -> None:
        self.maxima: dict[str, dict[int, Tensor]] = {}

    def attached(self, model: nn.Module) -> AbstractContextManager[object]:
        return observe_cache(model, self.maxima)

    def passing(self) -> AbstractContextManager[object]:
        return nullcontext()

    def refresh(self, model: nn.Module) -> None:
        """Nothing: no parameter is looked at."""

    def merge(self, processes: Processes, prefix: str) -> None:
        """All layers' every time: what is stored does not tell by whom."""
        if processes.count > 1:
            flat = {f"{kind} {layer}": one for kind, seen in self.maxima.items() for layer, one in seen.items()}
            for key, maximum in processes.largest(flat).items():
                kind, _, layer = key.partition(" ")
                self.maxima.setdefault(kind, {})[int(layer)] = maximum


class _Products(TorchDispatchMode):
    """Hands the products of one pass to the inputs' observer. A product tells itself which dimension of the weight is
    summed over. A context of one thread.
    """

    def __init__(self, inputs: LinearInputs) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self.inputs = inputs

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name in FACTORS:
            first, second = (args[i] for i in FACTORS[name])
            offsets = None
            if "grouped_mm" in name:
                offsets = args[2] if len(args) > 2 else (kwargs or {}).get("offs")
            # aten::linear holds its weight as [out, in]; everywhere else the second factor is summed over dimension -2.
            self._observe(second, first, -1 if name == "linear" else -2, -1, offsets)
            if name != "linear":
                self._observe(first, second, -1, -2, None)
        return func(*args, **(kwargs or {}))

    def _observe(self, weight: Tensor, x: Tensor, weight_dim: int, x_dim: int, offsets: Tensor | None) -> None:
        for name, parameter in self.inputs.watched.get(weight.untyped_storage().data_ptr(), ()):
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
        if name not in self.inputs.maxima:
            shape = (stack, parameter.shape[dim]) if parameter.dim() == 3 else (parameter.shape[dim],)
            self.inputs.maxima[name] = torch.zeros(shape, dtype=torch.float32, device=inputs.device)
        maxima = self.inputs.maxima[name].view(stack, -1)
        matrix = offset // parameter.stride(0) if stack > 1 else 0
        start = offset // parameter.stride(dim) % parameter.shape[dim]
        length = inputs.shape[-1]
        if weight.dim() == 3 and offsets is not None:  # rows of x up to offsets[e] go to expert e
            ends = offsets.to(inputs.device)
            rows = torch.arange(inputs.shape[0], device=inputs.device)
            owners = torch.searchsorted(ends, rows, right=True).clamp_max(stack - 1)
            kept = torch.where(rows[:, None] < ends[-1], inputs, 0.0)  # what is behind the last is of no expert
            maxima[:, start : start + length].scatter_reduce_(0, owners[:, None].expand_as(kept), kept, "amax")
        elif weight.dim() == 3 and stack > 1 and weight.shape[0] == stack:
            self._raise(maxima[:, start : start + length], inputs.reshape(stack, -1, length).transpose(0, 1))
        elif inputs.numel():
            self._raise(maxima[matrix, start : start + length], inputs)

    @staticmethod
    def _raise(maxima: Tensor, inputs: Tensor) -> None:
        """``inputs`` [..., *maxima.shape]."""
        torch.maximum(maxima, inputs.reshape(-1, *maxima.shape).amax(0), out=maxima)


@contextmanager
def observe_linears(model: nn.Module, weights: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Collect, while the context is open, the per-channel maxima of all inputs of the named weights.

    Yields the ``maxima`` of a :class:`LinearInputs`.
    """
    observer = LinearInputs(weights)
    with observer.attached(model), observer.passing():
        yield observer.maxima


@contextmanager
def observe_cache(
    model: nn.Module, maxima: dict[str, dict[int, Tensor]] | None = None
) -> Iterator[dict[str, dict[int, Tensor]]]:
    """Collect, while the context is open, the maxima of the keys and values that attention layers store.

    Yields ``maxima``: ``key`` and ``value``, each a dictionary layer -> float32 [H, D], empty while nothing was stored.
    By channel, because the values' channels may be smoothed afterwards. Raises AutoQuantError for an encoder-decoder.
    """
    check_one_stack(model)
    maxima = {} if maxima is None else maxima

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
