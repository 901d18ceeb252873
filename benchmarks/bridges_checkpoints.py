"""Our checkpoints and our mappings in LLM Compressor's formats: python benchmarks/bridges_checkpoints.py MODEL ...

What `autoquant apply` writes is given to LLM Compressor as any checkpoint is, and quantized to W4A16 (rounded, AWQ,
GPTQ) and FP8; beside it the model as it is, with the tool's own mapping, and with ours as the tool's recipe.
Each folder that the tool saves is loaded by transformers, and its perplexity compared window by window with float's.
Writes bridges_checkpoints.md.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import yaml

import autoquant
from autoquant.calibration.texts import read_text
from autoquant.calibration.windows import CalibrationOptions, Windows, calibration_windows, cut_windows, tokenize
from autoquant.evaluation.perplexity import exp_estimate, ratio_estimate
from autoquant.evaluation.serving import scores_elsewhere
from autoquant.models.tokenizer import load_tokenizer

PAGE = Path(__file__).with_suffix(".md")
CHILD = Path(__file__).with_name("bridges_checkpoints_child.py")
LENGTH = 512
IGNORED = {"targets": ["Linear"], "ignore": ["lm_head"]}
FORMATS: dict[str, dict[str, Any]] = {
    "no format": {},
    "W4A16, rounded": {"QuantizationModifier": {"scheme": "W4A16", **IGNORED}},
    "W4A16, GPTQ": {"GPTQModifier": {"scheme": "W4A16", **IGNORED}},
    "FP8": {"QuantizationModifier": {"scheme": "FP8", **IGNORED}},
}
APPLIED = ("fc_fc:0.5", "smooth:0.5+fc_fc:0.5", "rotation", "fc_fc:0.5+rotation")
SMOOTH = 0.5
ALL, INTEGER = tuple(FORMATS), ("no format", "W4A16, rounded")


@dataclass(frozen=True, slots=True)
class Row:
    """How a model is prepared: the folder that the tool is given, and the modifiers before those of the format."""

    said: str
    source: Path
    before: Mapping[str, Any]
    formats: Sequence[str] = ALL


def rows_of(model: Path, calibration: Path, sequences: int, work: Path) -> list[Row]:
    """The model as it is, with the tool's mapping, with ours, and with our transforms applied."""
    config = work / "config.json"
    if not config.exists():
        autoquant.save_config(autoquant.analyze(model).config, config)
    theirs = {"s_modifiers": {"SmoothQuantModifier": {"smoothing_strength": SMOOTH}}}
    rows = [
        Row("nothing", model, {}),
        Row(f"their mapping, SmoothQuant {SMOOTH}", model, theirs),
        Row(f"our mapping as their recipe, SmoothQuant {SMOOTH}", model, ours(config, "smoothquant")),
        Row("their mapping, AWQ", model, {"s_modifiers": {"AWQModifier": {}}}, INTEGER),
        Row("our mapping as their recipe, AWQ", model, ours(config, "awq"), INTEGER),
    ]
    (work / "applied").mkdir(exist_ok=True)
    for transforms in APPLIED:
        folder = work / "applied" / transforms.replace(":", "").replace("+", "-")
        how = {"transforms": transforms, "calibration": calibration, "sequences": sequences, "length": LENGTH}
        if not folder.exists():
            print(autoquant.apply(model, config, folder, dtype="float32", seed=0, **how), flush=True)
        rows.append(Row(f"`autoquant apply --transforms {transforms}`", folder, {}))
    turned = work / "applied" / "rotation"
    return [*rows, Row("the same with `rotation`, then our mapping, AWQ", turned, ours(config, "awq"), INTEGER)]


def ours(config: Path, algorithm: str) -> dict[str, Any]:
    """The smoothing of our recipe: what it rotates or quantizes is left out."""
    stage = yaml.safe_load(autoquant.export_recipe(config, "llm-compressor", algorithm=algorithm).text)
    return {name: part for name, part in stage["autoquant_stage"].items() if name.startswith("smooth")}


@dataclass(frozen=True, slots=True)
class Cell:
    """A row in a format, and the folder that the tool makes."""

    row: Row
    form: str
    output: Path

    @property
    def folder(self) -> Path:
        """What is measured: the source itself where there is no recipe."""
        return self.output if self.recipe() else self.row.source

    def recipe(self) -> str:
        stage: dict[str, Any] = dict(self.row.before)
        if FORMATS[self.form]:
            stage["format_modifiers"] = FORMATS[self.form]
        return yaml.safe_dump({"a_stage": stage}, sort_keys=False) if stage else ""


def cells_of(rows: Sequence[Row], work: Path) -> list[Cell]:
    found = []
    for at, row in enumerate(rows):
        for form in row.formats:
            if "AWQ" in row.said and form == "no format":
                continue  # AWQ searches its scales for a format
            name = f"{at}-{form.lower().replace(', ', '-').replace(' ', '-')}"
            found.append(Cell(row, form, work / "made" / name))
    return found


def make(cells: Sequence[Cell], python: Path, windows: list[list[int]], threads: int, work: Path) -> None:
    """The folders that LLM Compressor saves; those that are there already are kept."""
    missing = [cell for cell in cells if cell.recipe() and not (cell.output / "config.json").exists()]
    if not missing:
        return
    plan = {
        "threads": threads,
        "windows": windows,
        "cells": [
            {"source": str(cell.row.source), "recipe": cell.recipe(), "output": str(cell.output)} for cell in missing
        ],
    }
    (work / "made").mkdir(exist_ok=True)
    (work / "plan.json").write_text(json.dumps(plan))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([python, CHILD, work / "plan.json"], check=True, cwd=work, env=environment)


def measured(cells: Sequence[Cell], windows: Windows, python: Path, work: Path) -> dict[str, Any]:
    """The log-probabilities of each cell's folder, or what was said where there is none."""
    rows = [ids.tolist() for batch in windows.batches for ids in batch]
    kept = work / "scores.json"
    found: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {"versions": {}}
    for row in dict.fromkeys(cell.row.said for cell in cells):
        missing = []
        for folder in (cell.folder for cell in cells if cell.row.said == row and str(cell.folder) not in found):
            marker = folder.with_suffix(".error")
            if marker.exists() and not folder.exists():
                found[str(folder)] = {"error": marker.read_text()}
            else:
                missing.append(folder)
        if missing:
            scores, versions, _ = scores_elsewhere(missing, rows, "transformers", python, "float32")
            found |= dict(zip(map(str, missing), scores, strict=True))
            found["versions"] = versions
        kept.write_text(json.dumps(found))
        print(f"measured: {row}", flush=True)
    return found


def table(cells: Sequence[Cell], found: Mapping[str, Any], counts: Sequence[int]) -> list[str]:
    reference = [-sum(window) for window in found[str(cells[0].folder)]]
    plain = exp_estimate(ratio_estimate(reference, counts))
    lines = [
        f"Float: {plain.mean:.3f} ± {plain.standard_error:.3f}.",
        "",
        f"| prepared by | {' | '.join(FORMATS)} |",
        "| --- |" + " ---: |" * len(FORMATS),
    ]
    for row in dict.fromkeys(cell.row.said for cell in cells):
        texts = []
        for form in FORMATS:
            cell = next((one for one in cells if (one.row.said, one.form) == (row, form)), None)
            texts.append("" if cell is None else text(found[str(cell.folder)], reference, counts))
        lines.append(f"| {row} | {' | '.join(texts)} |")
    return lines


def text(scores: Any, reference: Sequence[float], counts: Sequence[int]) -> str:
    """A perplexity and what it is above float's, with the standard error of that difference."""
    if isinstance(scores, dict):
        return f"refused: {scores['error'][:160]}".replace("|", "\\|")
    nll = [-sum(window) for window in scores]
    ratio = exp_estimate(ratio_estimate([a - b for a, b in zip(nll, reference, strict=True)], counts))
    mean = exp_estimate(ratio_estimate(nll, counts)).mean
    return f"{mean:.3f} ({100 * (ratio.mean - 1):+.2f} ± {100 * ratio.standard_error:.2f} %)"


HEAD = """# Our checkpoints and mappings in LLM Compressor's formats

```
{command}
```

**{model}**, {tokens:,} tokens of {data} in {windows} windows of {length} behind BOS; calibrated on the first
{sequences} windows of {calibration}; LLM Compressor {llmc}, {versions}, CPU, float32.
Each folder that LLM Compressor saved is loaded by transformers through compressed-tensors. In brackets: what the
perplexity is above float's, with the standard error of that paired difference over windows. `lm_head` stays in float.
W4A16: groups of 128 along the input; FP8: one scale per tensor, of activations too (static). MXFP4 folders are written
too, but do not load there in float32. "no format" is the control: what is prepared computes what the model computes.
AWQ searches its scales for a format, so that it has none; its pinning of memory, which ends with an error where there
is no accelerator (awq/base.py, line 507), is left out. Why scales give FP8 nothing and a rotation costs it decibels:
[signal_to_noise.md](signal_to_noise.md).
"""


@click.command()
@click.argument("model", type=click.Path(exists=True, path_type=Path))
@click.option("--data", type=click.Path(path_type=Path), required=True, help="Test text.")
@click.option("--calibration", type=click.Path(path_type=Path), required=True)
@click.option("--llm-compressor", "python", type=click.Path(path_type=Path), required=True, help="Its interpreter.")
@click.option("--tokens", type=int, default=16384, show_default=True, help="The first so many of the text.")
@click.option("--sequences", type=int, default=8, show_default=True, help="Windows of calibration.")
@click.option(
    "--row", "only", multiple=True, help="Only rows that have this in their name, beside float.  [default: all]"
)
@click.option("--threads", type=int, default=2, show_default=True)
@click.option("--work", type=click.Path(path_type=Path), help="Where folders and scores are kept.")
@click.option("-o", "--output", type=click.Path(path_type=Path), default=PAGE, show_default=True)
def main(
    model: Path,
    data: Path,
    calibration: Path,
    python: Path,
    tokens: int,
    sequences: int,
    only: tuple[str, ...],
    threads: int,
    work: Path | None,
    output: Path,
) -> None:
    """Write the table."""
    tokenizer = load_tokenizer(model)
    windows = cut_windows(tokenize(tokenizer, read_text(data)), LENGTH, tokenizer.bos_token_id, tokens)
    options = CalibrationOptions(calibration, sequences, LENGTH, None)
    rows = [ids[0].tolist() for ids in calibration_windows(tokenizer, options)]
    with tempfile.TemporaryDirectory() as temporary:
        folder = (work or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        cells = cells_of(rows_of(model, calibration, sequences, folder), folder)
        if only:  # float is what all are compared with
            cells = [cells[0], *(cell for cell in cells[1:] if any(part in cell.row.said for part in only))]
        make(cells, python.absolute(), rows, threads, folder)
        found = measured(cells, windows, python.absolute(), folder)
    version = subprocess.run(
        [python, "-c", "import importlib.metadata as m; print(m.version('llmcompressor'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    head = HEAD.format(
        command=f"python benchmarks/bridges_checkpoints.py {model.name} --data {data.name} \\\n"
        f"    --calibration {calibration.name} --llm-compressor PYTHON --tokens {tokens} --sequences {sequences}",
        model=model.name,
        tokens=sum(windows.counts),
        windows=len(windows.counts),
        data=data.name,
        calibration=calibration.name,
        length=LENGTH,
        sequences=sequences,
        llmc=version,
        versions=", ".join(f"{name} {number}" for name, number in found["versions"].items()),
    )
    output.write_text("\n".join([*head.splitlines(), "", *table(cells, found, windows.counts)]) + "\n")
    print(output.read_text())


if __name__ == "__main__":
    main()
