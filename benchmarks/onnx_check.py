"""What onnxruntime computes from our ONNX folders: make test-onnx, or python benchmarks/onnx_check.py

Quantizes the packaged model, small random ones of several architectures and, where they are at hand, trained ones;
writes each as ONNX, runs it in onnxruntime on the CPU and here, and writes onnx.md. Needs `pip install
'autoquant[onnx]'`. Exit code 1 where one is not computed as promised.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import torch
from serve import model_of
from tables import short
from torch import Tensor

import autoquant
from autoquant.calibration.texts import read_text
from autoquant.calibration.windows import Windows, cut_windows, tokenize
from autoquant.checkpoint.formats.onnx_graph import GRAPH
from autoquant.config.format import Config, Strategy, edited
from autoquant.evaluation.perplexity import logits_of, perplexity_of
from autoquant.evaluation.serving import EQUAL, NEAR
from autoquant.models.tokenizer import load_tokenizer
from autoquant.quantizer.int8 import quantize_activations
from autoquant.quantizer.linear import Int8Linear

DATA = Path(__file__).parents[1] / "autoquant" / "data"
SHARED = Path(__file__).parents[2] / "shared" / "data"
TRAINED = ("stories260K", "babyllama361", "wikinano30m")
STATIC, TENSOR = Strategy.PER_CHANNEL_STATIC, Strategy.PER_TENSOR_STATIC
NEW = 16
"""Tokens that are decoded one by one."""


@dataclass(frozen=True, slots=True)
class Case:
    """One folder. ``online``: with the rotations of R4, which run in the graph."""

    model: str
    strategy: Strategy
    transforms: str = "smooth+fc_fc+rotation"
    online: bool = False

    @property
    def name(self) -> str:
        return "-".join([self.model, self.strategy.value, *["R4"] * self.online])


CASES = (
    Case("wikinano1m", STATIC),
    *(Case(kind, strategy) for kind in ("qwen2", "opt") for strategy in (STATIC, TENSOR)),
    Case("wikinano1m", TENSOR),
    Case("wikinano1m", STATIC, online=True),
    *(Case(name, STATIC) for name in TRAINED),
    Case("gemma2", STATIC),
    Case("phi3", TENSOR),
    Case("qwen3", STATIC),
    Case("cohere", STATIC, "smooth+fc_fc"),
)


@dataclass(frozen=True, slots=True)
class Found:
    """One case. ``median``, ``largest``: of the absolute differences of log-probabilities of the text's tokens;
    ``logits``: the largest difference of any logit, ``spread`` the largest logit; ``flipped`` the share of int8 inputs
    in the first window that differ, by ``steps`` at most; ``decoded`` the tokens that greedy decoding has in common.
    """

    ours: float
    theirs: float
    median: float
    largest: float
    equal: float
    logits: float
    spread: float
    flipped: float
    steps: int
    decoded: int

    @property
    def holds(self) -> bool:
        """True if it computes what was promised."""
        return abs(self.theirs / self.ours - 1) <= NEAR and self.median <= EQUAL


@cache
def analyzed(folder: Path) -> Config:
    return autoquant.analyze(folder).config


def config_of(case: Case, folder: Path) -> Config:
    config = analyzed(folder)
    online = tuple(edited(one, enable=case.online and one.kind == "R4") for one in config.rotation.online)
    return edited(config, rotation=edited(config.rotation, online=online))


@torch.no_grad()
def compare(quantized: Path, written: Path, windows: Windows) -> Found:
    ours, theirs = autoquant.load(quantized, "float32"), autoquant.load(written)
    ask, answer = logits_of(ours), logits_of(theirs)
    differences, logits, spread = [], 0.0, 0.0
    for ids in windows.batches:
        one, other = ask(ids), answer(ids)
        logits, spread = max(logits, (one - other).abs().max().item()), max(spread, one.abs().max().item())
        differences.append((_scores(one, ids) - _scores(other, ids)).abs())
    difference = torch.cat(differences)
    flipped, steps = rounded_alike(ours, written, windows.batches[0])
    prompt = windows.batches[0][:, :8]
    return Found(
        perplexity_of(ours, windows),
        perplexity_of(theirs, windows),
        difference.median().item(),
        difference.max().item(),
        (difference <= EQUAL).double().mean().item(),
        logits,
        spread,
        flipped,
        steps,
        int((decoded_here(ours, prompt) == decoded_there(theirs, prompt)).sum()),
    )


def _scores(logits: Tensor, ids: Tensor) -> Tensor:
    return logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).flatten()


def rounded_alike(ours: Any, written: Path, ids: Tensor) -> tuple[float, int]:
    """The share of the int8 inputs of all linears that differ, and by how many steps at most."""
    seen: dict[str, Tensor] = {}

    def keep(path: str) -> Any:
        def hook(module: Int8Linear, inputs: tuple[Tensor, ...]) -> None:
            assert module.weight.input_scale is not None
            seen[path] = quantize_activations(inputs[0], module.weight.input_scale)

        return hook

    linears = {path: module for path, module in ours.named_modules() if isinstance(module, Int8Linear)}
    handles = [module.register_forward_pre_hook(keep(path)) for path, module in linears.items()]
    ours(ids)
    for handle in handles:
        handle.remove()
    onnx: Any = importlib.import_module("onnx")
    graph = onnx.load(str(written / GRAPH), load_external_data=False)
    nodes = [node for node in graph.graph.node if node.op_type == "QuantizeLinear"]
    outputs = [onnx.helper.make_tensor_value_info(n.output[0], onnx.TensorProto.INT8, None) for n in nodes]
    graph.graph.output.extend(outputs)
    whole = (written / GRAPH).read_bytes()
    try:
        onnx.save(graph, str(written / GRAPH))
        present = autoquant.load(written)(ids).present
    finally:
        (written / GRAPH).write_bytes(whole)
    differing = total = most = 0
    for node in nodes:
        here = seen[node.name.rpartition("/")[0]].to(torch.int16)
        apart = (here - present[node.output[0]].to(torch.int16)).abs()
        differing, total, most = differing + int((apart > 0).sum()), total + apart.numel(), max(most, int(apart.max()))
    return differing / total, most


def decoded_here(model: Any, prompt: Tensor) -> Tensor:
    ids, cache = prompt, None
    for _ in range(NEW):
        out = model(ids if cache is None else ids[:, -1:], past_key_values=cache, use_cache=True)
        ids, cache = torch.cat([ids, out.logits[:, -1:].argmax(-1)], 1), out.past_key_values
    return ids[:, -NEW:]


def decoded_there(model: Any, prompt: Tensor) -> Tensor:
    ids, cache = prompt, None
    for _ in range(NEW):
        out = model(ids if cache is None else ids[:, -1:], past=cache)
        ids, cache = torch.cat([ids, out.logits[:, -1:].argmax(-1)], 1), out.present
    return ids[:, -NEW:]


def row(case: Case, found: Found) -> str:
    cells = [
        case.model,
        short(case.strategy.value) + (", R4 online" if case.online else ""),
        f"{found.ours:.3f}",
        f"{found.theirs:.3f} ({found.theirs / found.ours - 1:+.2%})",
        f"{found.median:.1e}",
        f"{found.largest:.1e}",
        f"{found.equal:.0%}",
        f"{found.logits:.1e} of {found.spread:.3g}",
        f"{found.flipped:.3%}, {found.steps}",
        f"{found.decoded} of {NEW}",
        "yes" if found.holds else "NO",
    ]
    return "| " + " | ".join(cells) + " |"


def measured(cases: Sequence[Case], work: Path, tokens: int) -> Iterator[tuple[Case, Found]]:
    for case in cases:
        folder = SHARED / case.model if case.model in TRAINED else model_of(case.model, work / case.model)
        if not folder.is_dir():
            print(f"{folder}: not there, left out")
            continue
        tokenizer = load_tokenizer(folder)
        ids = tokenize(tokenizer, read_text(DATA / "sample.evaluation.txt"))
        windows = cut_windows(ids, 64, tokenizer.bos_token_id, tokens)
        plain, written = work / case.name, work / f"{case.name}-onnx"
        how: dict[str, Any] = {"strategy": case.strategy.value, "transforms": case.transforms}
        text = DATA / "sample.calibration.txt"
        config = config_of(case, folder)
        autoquant.quantize(folder, config, plain, format="native", calibration=text, sequences=6, length=64, **how)
        print(autoquant.convert(plain, written, to="onnx"))
        yield case, compare(plain, written, windows)


@click.command()
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path(__file__).with_name("onnx.md"))
@click.option("--tokens", default=600, show_default=True)
@click.option("--only", default="", help="Cases whose name contains this.")
def main(output: Path, tokens: int, only: str) -> None:
    """Write the table."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("onnxruntime", "onnx", "onnxscript", "torch"))
    head = ("model", "strategy", "perplexity here", "onnxruntime", "median", "largest", "equal", "logits")
    head += ("int8 inputs", "decoded", "holds")
    lines = [HEAD.format(versions=versions), "| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    done = []
    with tempfile.TemporaryDirectory() as temporary:
        for case, found in measured([case for case in CASES if only in case.name], Path(temporary), tokens):
            done.append((case, found))
            lines.append(row(case, found))
            print(lines[-1], flush=True)
            output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    if failed := [case.name for case, found in done if not found.holds]:
        sys.exit(f"not computed as promised: {', '.join(failed)}")


HEAD = f"""# What onnxruntime computes from our ONNX folders

Written by `make test-onnx` (`python benchmarks/onnx_check.py`). The wikinanos, stories260K and babyllama361 are
trained; all other models are small and random, so that their perplexities say nothing but whether two programs compute
the same.

- Perplexity on the packaged text, windows of 64 behind BOS; in brackets what it is above ours.
- median, largest: of the absolute difference of the tokens' log-probabilities. 1e-6 and less is the rounding of
  float32: all int8 values were the same. equal: the share of tokens that differ by 1e-5 at most.
- logits: the largest difference of any logit, and the largest logit.
- int8 inputs: the share of all int8 inputs of linears in the first window that differ, and by how many steps at most.
- decoded: tokens in common of {NEW} decoded one by one from the cache, there and here.
- holds: perplexity within 0.5 % and a median of 1e-5 at most.
- A control, by hand: wikinano30m here with its float parameters changed by 1e-6 of themselves, four seeds, differs from
  itself by -0.45, -0.04, +0.15 and -0.53 %. A rounding that tips is carried on; what onnxruntime adds is of that size.
- One CPU with VNNI and AMX, `session.qdqisint8allowed` = 1. {{versions}}.
"""

if __name__ == "__main__":
    main()
