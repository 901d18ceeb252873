"""Tensors that modules keep as plain attributes: caches, tables of angles.

To a tracer such a tensor is a constant, whatever the forward writes into it; and one on the meta device stays there
while parameters and buffers become fake ones. Registered as buffers they are what they are used as.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from autoquant.capture.fake_tensors import fakeify_, undisturbed


@contextlib.contextmanager
def attributes_as_buffers(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Buffers in place of the tensors in plain attributes that a call writes to, or that are on the meta device."""
    held = _held(module)
    written = _written(module, args, kwargs) if held else set()
    moved = [(part, name, tensor) for part, name, tensor in held if tensor.is_meta or (id(part), name) in written]
    for part, name, tensor in moved:
        del part.__dict__[name]
        part._buffers[name] = tensor
    try:
        yield
    finally:
        for part, name, tensor in moved:
            part._buffers.pop(name, None)
            part.__dict__[name] = tensor


def _held(module: nn.Module) -> list[tuple[nn.Module, str, torch.Tensor]]:
    return [
        (part, name, value)
        for part in module.modules()
        for name, value in vars(part).items()
        if isinstance(value, torch.Tensor)
    ]


def _written(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> set[tuple[int, str]]:
    """Module (by its id) and name of each attribute that a call writes to or replaces, as far as the call gets."""
    values = [(tensor, tensor.clone()) for _, _, tensor in _held(module) if not tensor.is_meta]
    found: set[tuple[int, str]] = set()
    with undisturbed(module):
        inputs, mode = fakeify_(module, (tuple(args), dict(kwargs)))
        for part, name, tensor in _held(module):
            if tensor.is_meta:
                with mode:
                    part.__dict__[name] = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
        before = [(part, name, tensor, tensor._version) for part, name, tensor in _held(module)]
        with contextlib.suppress(Exception):  # the model's own code; what it did until then is seen all the same
            module(*inputs[0], **inputs[1])
        for part, name, tensor, version in before:
            if vars(part).get(name) is not tensor or tensor._version != version:
                found.add((id(part), name))
    for tensor, value in values:
        with torch.no_grad():
            tensor.copy_(value)
    return found
