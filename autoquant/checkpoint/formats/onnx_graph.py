"""From a quantized model to ``model.onnx``, weights in ``model.onnx.data`` beside it.

Inputs are ``input_ids``, ``attention_mask``, ``position_ids`` and ``past_key_values.N.key|value``, outputs ``logits``
and ``present.N.key|value``: the names that runtimes of generation go by. Batch and lengths are dynamic. Int8 values and
scales are the checkpoint's own; everything else is float32.
"""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path
from typing import Any

import torch

from autoquant.errors import AutoQuantError
from autoquant.models.cached_step import CachedStep, example_of
from autoquant.models.source import one_line, quiet
from autoquant.quantizer.qdq import OPSET, replace_by_qdq_

GRAPH = "model.onnx"
INSTALL = "`pip install 'autoquant[onnx]'`"
_PREFIX = "model."
"""Of every name within a step."""
_SCOPES = "pkg.torch.onnx.name_scopes"
_BATCH, _NEW, _EARLIER, _ALL = "batch_size", "sequence_length", "past_sequence_length", "total_sequence_length"


def check_installed(*packages: str) -> None:
    """Raise AutoQuantError for packages of the extra ``onnx`` that are not there."""
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise AutoQuantError(f"the format 'onnx' needs {' and '.join(missing)}, not installed here: {INSTALL}")


def write_graph(model: Any, folder: Path) -> None:
    """Trace a model with int8 linears, float32 otherwise, and write it; the model is changed on the way.

    Raises AutoQuantError where torch cannot express it, OSError as the system does.
    """
    replace_by_qdq_(model)
    step = CachedStep(model).eval()
    try:
        program = _exported(step)
    except Exception as error:  # the exporter's, or the model's own code
        raise AutoQuantError(
            f"{type(model).__name__}: cannot be expressed in ONNX: {one_line(error)}; the nearest is --format native"
        ) from error
    _tidy_(program.model)
    program.save(str(folder / GRAPH), external_data=True)


def _tidy_(made: Any) -> None:
    """Names as the checkpoint has them, and none of the exporter's notes, which tell of folders of this machine."""
    graph = made.graph
    noted = [made, graph, *graph, *graph.inputs, *graph.initializers.values()]
    noted += [value for node in graph for value in node.outputs]
    seen: dict[str, int] = {}
    for node in graph:
        scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
        inner = scopes[-2].removeprefix(_PREFIX) if len(scopes) > 1 else ""
        path = "model" if inner.startswith("_") else inner or "model"  # what the exporter made belongs to no module
        number = seen[f"{path}/{node.op_type}"] = seen.get(f"{path}/{node.op_type}", 0) + 1
        node.name = f"{path}/{node.op_type}" + (f"_{number}" if number > 1 else "")
    for value in list(graph.initializers.values()):
        value.name = value.name.removeprefix(_PREFIX)
    for one in noted:
        one.metadata_props.clear()


@torch.no_grad()
def _exported(step: CachedStep) -> Any:
    example = example_of(step)
    layers = len(example.past)
    pairs = [f"{number}.{which}" for number in range(layers) for which in ("key", "value")]
    tokens, cached = {0: _BATCH, 1: _NEW}, {0: _BATCH, 2: _EARLIER}
    with quiet():
        return torch.onnx.export(
            step,
            (example.input_ids, example.attention_mask, example.position_ids, list(example.past)),
            dynamo=True,
            opset_version=OPSET,
            input_names=["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{pair}" for pair in pairs)],
            output_names=["logits", *(f"present.{pair}" for pair in pairs)],
            dynamic_shapes=(tokens, {0: _BATCH, 1: _ALL}, tokens, [(cached, cached)] * layers),
            verbose=False,
        )
