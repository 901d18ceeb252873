from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from autoquant.config.layers import did_you_mean
from autoquant.errors import AutoQuantError

if TYPE_CHECKING:
    from autoquant.config.format import Strategy

PREOPTS = "none,smooth:0.85,smooth:0.5,smooth:0.5+fc_fc,fc_fc:0.5+rotation"


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--config", "config_path", type=click.Path(path_type=Path), help="Of analyze.  [default: analyze now]")
@click.option("--strategies", default="all", show_default=True, help="Comma-separated names.")
@click.option(
    "--preopt",
    default=PREOPTS,
    show_default=True,
    help="Comma-separated; each is none or parts joined by +: smooth[:ALPHA] (norm -> linear), fc_fc[:ALPHA] "
    "(v -> o, up -> down), rotation or rotation:R1.",
)
@click.option("--data", type=click.Path(path_type=Path), required=True, help="Text to measure perplexity on, UTF-8.")
@click.option("--calibration", type=click.Path(path_type=Path), required=True, help="Text, JSONL or dataset folder.")
@click.option("--tokens", type=click.IntRange(1), help="Use the first so many tokens of the data.  [default: all]")
@click.option("--window", type=click.IntRange(1), default=512, show_default=True, help="Tokens per window, BOS apart.")
@click.option("--sequences", type=click.IntRange(1), default=16, show_default=True, help="Calibration windows.")
@click.option("--seed", type=click.IntRange(0), help="Replaces rotation.seed and picks random calibration windows.")
@click.option(
    "--batch",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Windows per forward pass; those with per-tensor dynamic scales go one by one.",
)
@click.option("--device", default="cpu", show_default=True, help="Where the models run: cpu, cuda.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder of the report.")
@click.option("--quiet", is_flag=True, help="No progress.")
def command(
    model: Path,
    config_path: Path | None,
    strategies: str,
    preopt: str,
    data: Path,
    calibration: Path,
    tokens: int | None,
    window: int,
    sequences: int,
    seed: int | None,
    batch: int,
    device: str,
    output: Path,
    quiet: bool,
) -> None:
    """Perplexity of every int8 strategy after every preparation, as one table.

    MODEL is a folder. The report's folder takes report.md, report.json and a file for each finished cell: after an
    interruption the same command goes on where it stopped.
    """
    from autoquant.pipeline.select import Transforms

    chosen = parse_strategies(strategies)
    transforms = tuple(Transforms.parse(text) for text in preopt.split(","))
    if not (model / "config.json").is_file():
        raise AutoQuantError(f"{model}: no config.json; expected a checkpoint folder of transformers")

    import json

    import torch

    from autoquant.calibration.texts import read_text
    from autoquant.calibration.windows import CalibrationOptions, calibration_windows, cut_windows, tokenize
    from autoquant.checkpoint.quantize import config_for, load_float32
    from autoquant.cli.progress import steps
    from autoquant.evaluation.compare import Task, compare, describe_inputs, markdown, report
    from autoquant.io.files import write_text
    from autoquant.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(model)
    windows = cut_windows(tokenize(tokenizer, read_text(data)), window, tokenizer.bos_token_id, tokens)
    batches = calibration_windows(tokenizer, CalibrationOptions(calibration, sequences, window, seed))
    with steps(quiet) as shown:
        config = config_for(str(model), config_path, lambda step: shown.progress(step, 0, 0))
    settings = {"tokens": tokens, "window": window, "sequences": sequences, "seed": seed, "device": device}
    inputs = describe_inputs(model, data, calibration, **settings)
    task = Task(config, transforms, chosen, windows, batches, seed, inputs, batch)

    def load() -> torch.nn.Module:
        return load_float32(model).to(device)

    cells = compare(task, load, output / "cells", lambda line: None if quiet else click.echo(line, err=True))
    write_text(output / "report.json", json.dumps(report(task, cells), indent=2) + "\n", force=True)
    write_text(output / "report.md", markdown(task, cells), force=True)
    click.echo(markdown(task, cells), nl=False)


def parse_strategies(text: str) -> tuple[Strategy, ...]:
    """Strategies by their names, ``all`` for the eight. Raises AutoQuantError with the nearest name."""
    from autoquant.config.format import Strategy

    names = [strategy.value for strategy in Strategy]
    if text == "all":
        return tuple(Strategy)
    for name in text.split(","):
        if name not in names:
            raise AutoQuantError(f"no strategy '{name}'{did_you_mean(name, names)}")
    return tuple(Strategy(name) for name in text.split(","))
