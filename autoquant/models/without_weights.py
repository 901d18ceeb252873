"""A user's module made without the memory of its weights: floats on the meta device, integers for real."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from autoquant.library_patches import device_constructors, pytree


class WithoutWeights(TorchFunctionMode):
    """Floating-point tensors are made on the meta device, integers for real: what an index picks is structure."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func not in device_constructors():
            return _on_one_device(func, args, kwargs)
        if kwargs.get("device") is not None:
            return func(*args, **kwargs)
        dtype = kwargs.get("dtype")
        if func in _BY_VALUE if dtype is None else not dtype.is_floating_point:
            return func(*args, **kwargs)
        return func(*args, **{**kwargs, "device": "meta"})


def _on_one_device(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The result of an operator; without values where some of its tensors have none: ``outer(positions, rates)``."""
    try:
        return func(*args, **kwargs)
    except RuntimeError:
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if len({tensor.is_meta for tensor in tensors}) < 2:
            raise
        args, kwargs = pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
        return func(*args, **kwargs)


_BY_VALUE = (torch.tensor, torch.as_tensor, torch.asarray, torch.arange, torch.randint, torch.randperm)
"""Constructors that make integers unless they are told otherwise."""


def drop_values_(module: nn.Module) -> None:
    """Move what is floating-point, and was made from values, to the meta device too."""
    for part in module.modules():
        for table in (part._parameters, part._buffers):
            for name, tensor in table.items():
                if tensor is None or tensor.is_meta:
                    continue
                if tensor.is_floating_point() or tensor.is_complex():
                    meta = tensor.detach().to("meta")
                    table[name] = nn.Parameter(meta) if isinstance(tensor, nn.Parameter) else meta  # type: ignore[assignment]  # of its own kind
