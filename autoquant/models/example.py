"""A module that somebody holds, with inputs to call it by, as a source like any other."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from autoquant.capture.copies import copied
from autoquant.errors import AutoQuantError
from autoquant.models.source import ModelSource, build_structure
from autoquant.models.structure import structure_of


def module_source(module: nn.Module, example_inputs: Any = None) -> ModelSource:
    """``module`` as a source; it is never changed. ``example_inputs``: a tuple, a dict, or ``(args, kwargs)``.

    Without inputs a model of transformers is built anew from its own configuration. Raises AutoQuantError where that
    makes another structure, and where there is no configuration.
    """
    name = type(module).__name__
    if example_inputs is not None:
        return ModelSource(name, factory=lambda: (_copied(module), example_inputs))
    config = getattr(module, "config", None)
    if not callable(getattr(config, "to_dict", None)):
        raise AutoQuantError(f"{name}: needs example_inputs: a tuple, a dict, or (args, kwargs) to call it by")
    source = ModelSource(name, config)
    if structure_of(build_structure(source)).fingerprint != structure_of(module).fingerprint:
        raise AutoQuantError(f"{name}: is not what its configuration makes: give example_inputs to take it as it is")
    return source


def _copied(module: nn.Module) -> nn.Module:
    """A copy that holds no weights where a copy is being made for the meta device, else one that does.

    A factory is called in a context that makes new floating-point tensors meta tensors; copying knows none of that.
    """
    if not torch.empty(0).is_meta:
        return copied(module)
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
    return copied(module, memo)
