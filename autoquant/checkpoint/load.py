"""Runnable models from folders of ``autoquant quantize``, online rotations and new biases included."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autoquant.checkpoint.formats.native import FACTS, is_quantized, load_model
from autoquant.config.format import Config
from autoquant.errors import AutoQuantError
from autoquant.executor.online import install_
from autoquant.executor.resolved import ResolvedOnline


def load(model: str | Path, dtype: torch.dtype | None = None) -> Any:
    """A runnable model in evaluation mode: a folder of ``autoquant quantize``, or any that transformers loads.

    ``dtype`` is that of everything that is not int8 (as stored: null). Raises AutoQuantError where there is no such
    model.
    """
    if not is_quantized(model):
        return load_model(model, dtype)
    facts = Path(model) / FACTS
    try:
        made = json.loads(facts.read_text(encoding="utf-8"))["provenance"]
        online = [ResolvedOnline(o["kind"], o["path"], o["size"], None) for o in made.get("online", ())]
        created, identities = tuple(made.get("created", ())), tuple(made.get("identities", ()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AutoQuantError(f"{facts}: damaged: {error}") from error

    def prepare(built: nn.Module, config: Config) -> None:
        for name in created:
            owner = built.get_submodule(name.rpartition(".")[0])
            weight = owner.get_parameter("weight")
            owner.register_parameter(name.rpartition(".")[2], nn.Parameter(weight.new_zeros(weight.shape[0])))
        for path in identities:
            parent, _, name = path.rpartition(".")
            setattr(built.get_submodule(parent), name, nn.Identity())
        install_(built, online)

    return load_model(model, dtype, prepare)
