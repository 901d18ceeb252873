"""An ONNX folder as a model that can be called: token ids in, logits out, computed by onnxruntime on the CPU."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autoquant.checkpoint.formats.onnx_graph import GRAPH, check_installed
from autoquant.errors import AutoQuantError
from autoquant.models.source import one_line

INT8_ACTIVATIONS = "session.qdqisint8allowed"
"""Without it onnxruntime on x86 takes int8 kernels only for inputs that one linear reads, and floats for others."""

_CALLS = ((1, 7, 1), (3, 4, 2))
"""Of a proof: sequences, tokens, and further tokens. None of it is what the graph was traced with."""
_NEAR = 0.1
"""Of the logits' norm: a rounding that tips may carry on, a wrong graph is off by more than all of it."""
_NEAREST = "the nearest is --format native"


@dataclass(frozen=True, slots=True)
class Output:
    """What a call gives: ``logits`` [B, S, V], and the cache as it is named in the graph."""

    logits: Tensor
    present: dict[str, Tensor]


class OnnxModel(nn.Module):
    """A session with the interface that evaluation asks of a causal language model."""

    def __init__(self, session: Any, config: Any) -> None:
        super().__init__()
        self.session, self.config = session, config
        self.place = nn.Parameter(torch.empty(0), requires_grad=False)  # a model is asked where its parameters are

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, past: dict[str, Tensor] | None = None
    ) -> Output:
        """``past``: what an earlier call gave as ``present``; ``attention_mask`` [B, P + S]: of all tokens."""
        batch, new = input_ids.shape
        earlier = next(iter(past.values())).shape[2] if past else 0
        mask = torch.ones(batch, earlier + new, dtype=torch.long) if attention_mask is None else attention_mask.cpu()
        positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, earlier:]
        given = {"input_ids": input_ids.cpu(), "attention_mask": mask, "position_ids": positions}
        feed = {}
        for wanted in self.session.get_inputs():
            if wanted.name in given:
                feed[wanted.name] = given[wanted.name].numpy()
            else:
                name = wanted.name.replace("past_key_values", "present", 1)
                empty = torch.empty(batch, wanted.shape[1], 0, wanted.shape[3])
                feed[wanted.name] = (past[name] if past else empty).numpy()
        names = [output.name for output in self.session.get_outputs()]
        made = dict(zip(names, map(torch.from_numpy, self.session.run(None, feed)), strict=True))
        return Output(made.pop("logits").to(input_ids.device), made)


def open_session(folder: Path, config: Any) -> OnnxModel:
    """The folder's graph, ready to run. Raises AutoQuantError where onnxruntime is missing or does not take it."""
    check_installed("onnxruntime")
    runtime: Any = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    options.add_session_config_entry(INT8_ACTIVATIONS, "1")
    try:
        session = runtime.InferenceSession(str(folder / GRAPH), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # whatever onnxruntime says to a file
        raise AutoQuantError(f"{folder}: onnxruntime does not take {GRAPH}: {one_line(error)}") from error
    return OnnxModel(session, config).eval()


def answers_of(model: Any) -> list[Tensor]:
    """Logits of a model in memory for the calls of a proof."""

    def call(ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
        out = model(ids, past_key_values=cache, use_cache=True)
        return out.logits, out.past_key_values

    return _answers(call, model.config)


def check_answers(session: OnnxModel, expected: list[Tensor]) -> None:
    """Raise AutoQuantError where a graph runs at some shape only, or computes something else than its model."""

    def call(ids: Tensor, past: Any) -> tuple[Tensor, Any]:
        out = session(ids, past=past)
        return out.logits, out.present

    try:
        found = _answers(call, session.config)
    except Exception as error:  # whatever onnxruntime says to a graph
        raise AutoQuantError(f"the ONNX graph does not run at every shape: {one_line(error)}; {_NEAREST}") from error
    apart = [(one - other).norm() / one.norm() for one, other in zip(expected, found, strict=True)]
    far = torch.stack(apart).amax().item()  # NaN where one is
    if not far <= _NEAR:
        raise AutoQuantError(f"the ONNX graph computes other logits than its model, by {far:.0%}; {_NEAREST}")


@torch.no_grad()
def _answers(call: Callable[[Tensor, Any], tuple[Tensor, Any]], config: Any) -> list[Tensor]:
    """Logits of some tokens, and of further ones on the cache that these left."""
    words = config.get_text_config(decoder=True).vocab_size
    answers = []
    for batch, first, more in _CALLS:
        ids = torch.randint(words, (batch, first + more), generator=torch.Generator().manual_seed(first))
        logits, cache = call(ids[:, :first], None)
        answers += [logits, call(ids[:, first:], cache)[0]]
    return answers
