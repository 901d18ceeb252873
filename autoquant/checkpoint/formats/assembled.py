"""A runnable model of a built one and the tensors of a folder, or of what is about to be written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autoquant.checkpoint.formats import Changes, Contents
from autoquant.checkpoint.formats.checked import check_tensors
from autoquant.errors import AutoQuantError
from autoquant.executor.online import install_ as install_rotations_
from autoquant.models.load import built_anew
from autoquant.quantizer.linear import replace_with_empty_
from autoquant.quantizer.strategies import plan_linears


def assembled(contents: Contents, folder: Path) -> Any:
    """The runnable model of what is about to be written, floats in float32; its cache and prefix are left out."""
    model = built_anew(contents.model)
    change_(model, contents.changes)
    replace_with_empty_(model, plan_linears(contents.config))
    return as_loaded_(fill_(model, dict(contents.tensors), contents.shared, folder), torch.float32)


def change_(model: nn.Module, changes: Changes) -> None:
    """Give a model built by its class the structure of the quantized one."""
    for name in changes.created:
        owner = model.get_submodule(name.rpartition(".")[0])
        weight = owner.get_parameter("weight")
        owner.register_parameter(name.rpartition(".")[2], nn.Parameter(weight.new_zeros(weight.shape[0])))
    for path in changes.identities:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, nn.Identity())
    install_rotations_(model, changes.online)


def fill_(model: Any, tensors: Mapping[str, Tensor], shared: Mapping[str, str], directory: Path) -> Any:
    """Put all tensors in and go to evaluation mode; ``shared`` maps further names to those that are stored.

    Raises AutoQuantError where names or shapes differ, and for what :func:`check_tensors` refuses.
    """
    check_tensors(directory, model, tensors)
    try:
        also = {name: tensors[source] for name, source in shared.items()}
        model.load_state_dict({**tensors, **also}, assign=True)
        for name, source in shared.items():  # one parameter again, not two that share memory
            path, _, last = name.rpartition(".")
            setattr(model.get_submodule(path), last, model.get_parameter(source))
    except (RuntimeError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise AutoQuantError(f"{directory}: its tensors do not fit its config: {reason}") from error
    return model.eval()


def as_loaded_(model: Any, dtype: torch.dtype | None) -> Any:
    """Give every parameter ``dtype``, or for None what transformers loads it as."""
    # Buffers are left alone: rotary frequencies stay float32, as transformers has it.
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(dtype or _loaded_dtype(model, name, parameter))
    return model


def _loaded_dtype(model: Any, name: str, parameter: Tensor) -> torch.dtype:
    """What transformers loads a parameter as: the checkpoint's dtype, whatever the tensor's own, since the code around
    may take one dtype only; its own where the class keeps the module in float32.
    """
    kept = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
    own: torch.dtype = parameter.dtype
    wanted: torch.dtype = model.config.dtype
    return own if kept.intersection(name.split(".")) or not own.is_floating_point else wanted
