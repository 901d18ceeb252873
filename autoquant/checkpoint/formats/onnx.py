"""ONNX: a graph with int8 weights and static scales in QDQ nodes, which onnxruntime runs and toolchains of NPUs read.

A folder holds ``model.onnx`` and ``model.onnx.data`` (see ``onnx_graph``), transformers' ``config.json`` and tokenizer
files, the AutoQuant config and the record of how it was made. It is an end: nothing is read back from it but by running
it.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autoquant.checkpoint.formats import ONNX, Changes, Contents, register
from autoquant.checkpoint.formats.assembled import assembled
from autoquant.checkpoint.formats.model_card import onnx_card
from autoquant.checkpoint.formats.onnx_graph import GRAPH, check_installed, write_graph
from autoquant.checkpoint.formats.onnx_session import answers_of, check_answers, open_session
from autoquant.checkpoint.formats.surroundings import write_surroundings
from autoquant.checkpoint.formats.transposed import transposed_reasons
from autoquant.checkpoint.targets import nearest, reasons_against, target_named
from autoquant.config.format import Config
from autoquant.errors import AutoQuantError
from autoquant.io.folders import PROVENANCE
from autoquant.models.cached_step import reason_against_step
from autoquant.models.load import load_settings
from autoquant.quantizer.strategies import PlannedLinear, kv_granularity, plan_linears

TARGET = "onnxruntime"


class Onnx:
    """The format of this module: dense causal models, static scales per tensor of activations."""

    name = ONNX

    def reasons_against(self, config: Config, changes: Changes, model: Any = None) -> tuple[str, ...]:
        """Without a reason, raises AutoQuantError where the packages that write and check it are not installed."""
        planned = plan_linears(config)
        reasons = [*_config_reasons(config, planned), *reasons_against(TARGET, config), *transposed_reasons(planned)]
        if model is not None and not reasons:
            reasons += _module_reasons(model, planned)
            reason = reason_against_step(model)
            reasons += [] if reason is None else [f"{reason}; the nearest is --format native"]
        if not reasons:
            check_installed("onnx", "onnxscript", "onnxruntime")
        return tuple(reasons)

    def write(self, folder: Path, contents: Contents) -> None:
        write_surroundings(folder, contents)
        (folder / "README.md").write_text(onnx_card(contents), encoding="utf-8")
        model = assembled(contents, folder)
        expected = answers_of(model)
        write_graph(model, folder)
        check_answers(open_session(folder, model.config), expected)

    def is_mine(self, folder: Path) -> bool:
        return (folder / GRAPH).is_file() and (folder / PROVENANCE).is_file()

    def contents(self, folder: Path, *, trust_remote_code: bool = False) -> Contents:
        raise AutoQuantError(
            f"{folder}: is an ONNX graph, from which no checkpoint is made; convert the folder that it was made of"
        )

    def load(self, folder: Path, dtype: torch.dtype | None, *, trust_remote_code: bool = False) -> Any:
        if dtype not in (None, torch.float32):
            raise AutoQuantError(f"{folder}: an ONNX graph computes in float32 beside int8, not in {dtype}")
        return open_session(folder, load_settings(folder, trust_remote_code=trust_remote_code))


register(Onnx())


def _config_reasons(config: Config, planned: Iterable[PlannedLinear]) -> list[str]:
    """What a config asks for that the graph does not express."""
    reasons = []
    if kv_granularity(config) is not None:
        base = nearest(config.quantization.strategy, target_named(TARGET))
        reasons.append(
            "quantization.strategy: the graph's keys and values are float32, without an int8 cache; the nearest is "
            f"{base.value}"
        )
    if config.quantization.prefix:
        reasons.append("quantization.prefix: a prefix has no place in the graph; set it to []")
    if not planned:
        reasons.append("quantization: no linear is quantized")
    return reasons


def _module_reasons(model: nn.Module, planned: Iterable[PlannedLinear]) -> list[str]:
    """Linears whose module does more than a linear does."""
    owners = {linear.path: model.get_submodule(linear.weight.rpartition(".")[0]) for linear in planned}
    return [
        f"{path}: {type(owner).__name__} has code of its own around its weight; exclude it"
        for path, owner in owners.items()
        if type(owner).forward is not nn.Linear.forward
    ]
