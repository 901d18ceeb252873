"""The perplexity of every strategy after every preparation: one model, one table.

Each cell of the table is a JSON file that holds the negative log-likelihood of every window, so that any two cells can
be compared window by window. A cell is computed again only if what it was made from has changed.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autoquant.calibration.observers import Sweep
from autoquant.calibration.windows import Windows, rebatched
from autoquant.config.file import config_text
from autoquant.config.format import Config, Strategy
from autoquant.evaluation.perplexity import Estimate, exp_estimate, logits_of, nll_per_window, ratio_estimate
from autoquant.io.files import write_text
from autoquant.models.reading import IN_HALVES
from autoquant.pipeline.quantize import quantize_model_
from autoquant.pipeline.select import Transforms
from autoquant.pipeline.transform import depends_on_strategy, prepare_
from autoquant.quantizer.prefix import fix_prefix_
from autoquant.quantizer.strategies import Granularity, kv_granularity, scheme_of
from autoquant.version import __version__

FLOAT = "float"
FLOAT_PREFIX = "float+prefix"


@dataclass(frozen=True, slots=True)
class Cell:
    """One measured model. ``nll``: per window, in nats; ``bytes``: all of its tensors, shared ones once."""

    transforms: str
    strategy: str
    nll: tuple[float, ...]
    counts: tuple[int, ...]
    bytes: int
    seconds: float

    @property
    def name(self) -> str:
        return f"{self.transforms}.{self.strategy}" if self.transforms else self.strategy

    @property
    def perplexity(self) -> Estimate:
        """Its standard error is over windows."""
        return exp_estimate(ratio_estimate(self.nll, self.counts))

    def ratio(self, other: Cell) -> Estimate:
        """Perplexity divided by that of ``other`` on the same windows; the error is that of the paired difference."""
        differences = [mine - theirs for mine, theirs in zip(self.nll, other.nll, strict=True)]
        return exp_estimate(ratio_estimate(differences, self.counts))


@dataclass(frozen=True, slots=True)
class Task:
    """What :func:`compare` measures. ``calibration``: token ids [1, S] each; ``inputs`` identifies all of it."""

    config: Config
    transforms: tuple[Transforms, ...]
    strategies: tuple[Strategy, ...]
    windows: Windows
    calibration: tuple[Tensor, ...]
    seed: int | None
    inputs: Mapping[str, Any]
    batch: int = 1
    """Windows in one forward pass, where no scale spans them."""
    in_halves: bool = False
    """The model has an encoder, which reads the first half of each window, and a decoder, which predicts the second."""


def compare(
    task: Task, load: Callable[[], nn.Module], folder: Path, tell: Callable[[str], None] = lambda line: None
) -> tuple[Cell, ...]:
    """Every cell of the table, the float model's first; finished cells are read from ``folder``.

    Where the config has a prefix, the second is the float model with it: the control.
    ``load`` makes the float model in evaluation mode, anew each time. ``tell`` is told of each finished cell and of
    the time left.
    """
    folder.mkdir(parents=True, exist_ok=True)
    prefixes = [("", FLOAT_PREFIX)] if task.config.quantization.prefix else []
    wanted = [("", FLOAT), *prefixes, *((str(t), s.value) for t in task.transforms for s in task.strategies)]
    digest = _digest(task)
    cells = {key: found for key in wanted if (found := _read_cell(folder, key, digest)) is not None}
    if cells:
        tell(f"{len(cells)} of {len(wanted)} cells are there already")
    start, before = time.monotonic(), len(cells)
    for cell in _missing(task, load, [key for key in wanted if key not in cells]):
        cells[cell.transforms, cell.strategy] = cell
        _write_cell(folder, cell, digest, task.inputs)
        left = (time.monotonic() - start) / (len(cells) - before) * (len(wanted) - len(cells))
        tell(
            f"{len(cells)}/{len(wanted)} {cell.name}: {cell.perplexity.said(3)} "
            f"({cell.seconds:.0f} s; {_duration(left)} left)"
        )
    return tuple(cells[key] for key in wanted)


def _missing(task: Task, load: Callable[[], nn.Module], missing: Sequence[tuple[str, str]]) -> Iterator[Cell]:
    if ("", FLOAT) in missing:
        yield _measure(task, load(), "", FLOAT)
    if ("", FLOAT_PREFIX) in missing:
        model = load()
        fix_prefix_(model, task.config.quantization.prefix)
        yield _measure(task, model, "", FLOAT_PREFIX)
    for transforms in task.transforms:
        strategies = [s for s in task.strategies if (str(transforms), s.value) in missing]
        if not strategies:
            continue
        prepared: tuple[nn.Module, Sweep] | None = None
        for strategy in strategies:
            if prepared is None or depends_on_strategy(task.config):
                prepared = _prepare(task, load, transforms, strategy)
            model = copy.deepcopy(prepared[0])
            quantize_model_(model, task.config, strategy, prepared[1], task.calibration)
            yield _measure(task, model, str(transforms), strategy.value)


def _prepare(
    task: Task, load: Callable[[], nn.Module], transforms: Transforms, strategy: Strategy
) -> tuple[nn.Module, Sweep]:
    """The rotated and smoothed model, behind its prefix, with its maxima."""
    model = load()
    cache = any(kv_granularity(task.config, one) is not None for one in task.strategies)
    prepared = prepare_(model, task.config, strategy, transforms, task.calibration, task.seed, cache=cache)
    return model, prepared.swept


def _measure(task: Task, model: nn.Module, transforms: str, strategy: str) -> Cell:
    start = time.monotonic()
    windows = task.windows if shares_scale(strategy) else rebatched(task.windows, task.batch)
    found = nll_per_window(logits_of(model), windows)
    return Cell(transforms, strategy, found.nll, found.counts, model_bytes(model), time.monotonic() - start)


def shares_scale(strategy: str) -> bool:
    """True if what is in one forward pass has one scale: windows then go one by one."""
    if strategy not in list(Strategy):
        return False
    scheme = scheme_of(Strategy(strategy))
    return Granularity.TENSOR_DYNAMIC in (scheme.activation, scheme.kv_cache)


def model_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers as a checkpoint holds them, shared ones once."""
    tensors = {(t.data_ptr(), t.numel()): t for t in model.state_dict().values()}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def report(task: Task, cells: Sequence[Cell]) -> dict[str, Any]:
    """The table as JSON: each cell's perplexity, its ratio to float's, with standard errors, and its size."""
    reference = cells[0]
    rows = []
    for cell in cells:
        ratio = cell.ratio(reference)
        rows.append(
            {
                "transforms": cell.transforms or None,
                "strategy": cell.strategy,
                "perplexity": _plain(cell.perplexity),
                "ratio_to_float": _plain(ratio),
                "bytes": cell.bytes,
                "seconds": round(cell.seconds, 1),
            }
        )
    return {
        "inputs": dict(task.inputs),
        "tokens": sum(reference.counts),
        "windows": len(reference.counts),
        "cells": rows,
    }


def markdown(task: Task, cells: Sequence[Cell]) -> str:
    """The table as markdown: perplexities, then what each costs against float."""
    reference = cells[0]
    by_key = {(cell.transforms, cell.strategy): cell for cell in cells[1:]}
    inputs = task.inputs
    float_cell = reference.perplexity
    lines = [
        f"# {inputs['model']}",
        "",
        f"Perplexity of the first {task.windows.predicted:,} tokens of `{inputs['data']}` in windows of "
        f"{inputs['window']}"
        + (", each behind BOS" if task.windows.has_bos else "")
        + (f"; {IN_HALVES}" if task.in_halves else "")
        + f"; calibrated on {inputs['sequences']} windows of `{inputs['calibration']}`. Float "
        f"{float_cell.said(3)}, {_megabytes(reference.bytes)}." + _control(task, reference, by_key),
        "",
        *_table(task, lambda c: _pm(c.perplexity, 3), by_key, size=True),
        "",
        "Against float, window by window: perplexity divided by float's, minus 1, with the standard error of that "
        "paired difference.",
        "",
        *_table(task, lambda c: _percent(c.ratio(reference)), by_key, size=False),
        "",
        "Made by `autoquant compare` with " + ", ".join(f"{k} {v}" for k, v in inputs["versions"].items()) + ".",
    ]
    return "\n".join(lines) + "\n"


def _control(task: Task, reference: Cell, cells: Mapping[tuple[str, str], Cell]) -> str:
    """The float model with the prefix, where there is one."""
    cell = cells.get(("", FLOAT_PREFIX))
    if cell is None:
        return ""
    tokens = ", ".join(map(str, task.config.quantization.prefix))
    return (
        f" Every model but float begins with the fixed prefix of tokens {tokens}; float + prefix "
        f"{_pm(cell.perplexity, 3)}, {_percent(cell.ratio(reference))} against float."
    )


def _table(
    task: Task, show: Callable[[Cell], str], cells: Mapping[tuple[str, str], Cell], *, size: bool
) -> Iterator[str]:
    names = [str(transforms) for transforms in task.transforms]
    header = ["strategy", *(["size"] if size else []), *names]
    yield f"| {' | '.join(header)} |"
    yield "|" + " --- |" * len(header)
    for strategy in task.strategies:
        row = [cells[name, strategy.value] for name in names]
        columns = [f"`{strategy.value}`", *([_megabytes(max(c.bytes for c in row))] if size else []), *map(show, row)]
        yield f"| {' | '.join(columns)} |"


def _pm(estimate: Estimate, digits: int) -> str:
    if not math.isfinite(estimate.mean):
        return "inf"
    return estimate.said(digits)


def _percent(ratio: Estimate) -> str:
    error = "" if math.isnan(ratio.standard_error) else f" ± {ratio.standard_error * 100:.2f}"
    return f"{(ratio.mean - 1) * 100:+.2f}{error} %"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.2f} MB"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _plain(estimate: Estimate) -> dict[str, float | None]:
    values = {"mean": estimate.mean, "standard_error": estimate.standard_error}
    return {name: value if math.isfinite(value) else None for name, value in values.items()}  # JSON has no NaN


def describe_inputs(model: Path, data: Path, calibration: Path, **settings: Any) -> dict[str, Any]:
    """What a table is made from: names for people and digests for machines."""
    return {
        "model": model.name,
        "data": data.name,
        "calibration": calibration.name,
        **settings,
        "versions": {"autoquant": __version__, "torch": torch.__version__, "transformers": version("transformers")},
        "sha256": {
            "model": _files_digest(
                sorted(path for path in model.iterdir() if path.suffix in (".safetensors", ".json"))
            ),
            "data": _files_digest([data]),
            "calibration": _files_digest([calibration]),
        },
    }


def _files_digest(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode())
        with open(path, "rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _digest(task: Task) -> str:
    text = json.dumps([dict(task.inputs), task.seed, task.windows.counts], sort_keys=True) + config_text(task.config)
    return hashlib.sha256(text.encode()).hexdigest()


def _path(folder: Path, key: tuple[str, str]) -> Path:
    name = ".".join(part for part in key if part)
    return folder / f"{name.replace(':', '_')}.json"


def _read_cell(folder: Path, key: tuple[str, str], digest: str) -> Cell | None:
    """The cell, unless it is not there, was made from something else, or was cut short."""
    try:
        stored = json.loads(_path(folder, key).read_text(encoding="utf-8"))
        if stored["digest"] != digest:
            return None
        nll, counts = tuple(stored["nll"]), tuple(stored["counts"])
        return Cell(*key, nll, counts, stored["bytes"], stored["seconds"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write_cell(folder: Path, cell: Cell, digest: str, inputs: Mapping[str, Any]) -> None:
    content = {
        "digest": digest,
        "transforms": cell.transforms,
        "strategy": cell.strategy,
        "bytes": cell.bytes,
        "seconds": cell.seconds,
        "nll": cell.nll,
        "counts": cell.counts,
        "inputs": dict(inputs),
    }
    write_text(_path(folder, (cell.transforms, cell.strategy)), json.dumps(content) + "\n", force=True)
