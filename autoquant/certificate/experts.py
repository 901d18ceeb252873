"""Every expert of a model is made to run, and whether each did is measured."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from autoquant.config.format import Config, Linear
from autoquant.config.layers import fill, layer_numbers

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")

Unit = tuple[str, int]
"""A parameter that belongs to one expert (and 0), or one that holds several stacked and the number of the expert."""


def choices_of(config: Config) -> frozenset[int]:
    """Among how many experts the routers of a config choose: outputs of routers, and matrices that are stacked."""
    linears = config.model.linears
    return frozenset(
        [linear.out_features for linear in linears if linear.role == "router" and linear.out_features > 1]
        + [linear.stack for linear in linears if linear.stack is not None and linear.stack > 1]
    )


@contextmanager
def force_choices(counts: Collection[int]) -> Iterator[None]:
    """Within it, what ranks ``counts`` candidates chooses each of them in turn, whatever their scores.

    The scores of the chosen are the ones that they have, so that what a router weighs by is computed as ever.
    """

    class Force(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = dict(kwargs or {})
            forced = _forced(func, args, kwargs, counts)
            return func(*args, **kwargs) if forced is None else forced

    with Force():
        yield


def _forced(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], counts: Collection[int]) -> Any:
    top, largest = func in (torch.topk, Tensor.topk), func in (torch.argmax, Tensor.argmax)
    if not (top or largest):
        return None
    named = dict(zip(("input", "k", "dim") if top else ("input", "dim", "keepdim"), args, strict=False)) | kwargs
    scores, dim = named.get("input", named.get("self")), named.get("dim", -1 if top else None)
    if not isinstance(scores, Tensor) or dim is None or scores.dim() == 0 or scores.shape[dim] not in counts:
        return None
    chosen = _in_turn(scores, int(dim), int(named["k"]) if top else 1)
    if largest:
        return chosen if named.get("keepdim") else chosen.squeeze(dim)
    return torch.return_types.topk((scores.gather(dim, chosen), chosen))


def _in_turn(scores: Tensor, dim: int, k: int) -> Tensor:
    """Indices along ``dim``: row r of all rows takes k candidates from number r * k on, and begins anew at the end."""
    moved = scores.movedim(dim, -1)
    rows = moved.shape[:-1].numel()
    chosen = (torch.arange(rows * k, device=scores.device) % moved.shape[-1]).reshape(*moved.shape[:-1], k)
    return chosen.movedim(-1, dim).contiguous()


def units_of(config: Config, module: nn.Module) -> list[Unit]:
    """The weights of single experts among a config's linears: matrices of a stack, and numbered parts of a layer."""
    held = dict(module.named_parameters(remove_duplicate=False))
    found: list[Unit] = []
    for linear in config.model.linears:
        for name in _names(linear):
            if name not in held:
                continue
            if linear.stack is not None and held[name].shape[0] == linear.stack:
                found += [(name, number) for number in range(linear.stack)]
            elif linear.stack is None and len(_NUMBER.findall(name)) > 1 and "expert" in name:
                found.append((name, 0))
    return found


def _names(linear: Linear) -> Iterable[str]:
    return [linear.weight] if linear.layers is None else [fill(linear.weight, n) for n in layer_numbers(linear.layers)]


def reached(outputs: Iterable[Tensor], module: nn.Module, units: Collection[Unit]) -> set[Unit]:
    """Those of ``units`` that some output depends on: whose gradient is not zero."""
    names = list(dict.fromkeys(name for name, _ in units))
    parameters = [module.get_parameter(name) for name in names]
    generator = torch.Generator().manual_seed(0)
    scalars = [
        (tensor * torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype)).sum()
        for tensor in outputs
        if tensor.requires_grad
    ]
    if not scalars:
        return set()
    total = torch.stack(scalars).sum()
    found = dict(zip(names, torch.autograd.grad(total, parameters, allow_unused=True), strict=True))
    hit: set[Unit] = set()
    for name, number in units:
        gradient = found[name]
        if gradient is None:
            continue
        stacked = (name, 1) in units
        if bool((gradient[number] if stacked else gradient).any()):
            hit.add((name, number))
    return hit
