from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import click


@click.command()
@click.argument("model")
@click.argument("config", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@click.option("--rotate/--no-rotate", default=True, show_default=True, help="Apply the config's enabled rotations.")
@click.option(
    "--smooth",
    type=click.Choice(["fc_fc", "all", "none"]),
    default="all",
    show_default=True,
    help="fc_fc: only v -> o, up -> down, fc1 -> fc2; all: also norm -> linear where no rotation took the norm's gain.",
)
@click.option("--alpha", type=click.FloatRange(0, 1), help="SmoothQuant's alpha for every group.  [default: config]")
@click.option("--calibration", type=click.Path(path_type=Path), help="Text, JSONL or dataset folder for smoothing.")
@click.option("--maxima", type=click.Path(path_type=Path), help="Activation maxima of an earlier --save-maxima.")
@click.option("--save-maxima", type=click.Path(path_type=Path), help="Keep the activation maxima (safetensors).")
@click.option("--sequences", type=click.IntRange(1), default=16, show_default=True, help="Calibration windows.")
@click.option("--length", type=click.IntRange(1), default=512, show_default=True, help="Tokens each, BOS apart.")
@click.option("--seed", type=click.IntRange(0), help="Replaces rotation.seed and picks random calibration windows.")
@click.option(
    "--dtype",
    type=click.Choice(["as-stored", "float32", "bfloat16", "float16", "float64"]),
    default="as-stored",
    show_default=True,
    help="Of the weights written; folding is in float64 always.",
)
@click.option("--force", is_flag=True, help="Replace the folder if it exists.")
@click.option("--quiet", is_flag=True, help="No progress bars, no summary.")
def command(
    model: str,
    config: Path,
    output: Path,
    rotate: bool,
    smooth: Literal["fc_fc", "all", "none"],
    alpha: float | None,
    calibration: Path | None,
    maxima: Path | None,
    save_maxima: Path | None,
    sequences: int,
    length: int,
    seed: int | None,
    dtype: str,
    force: bool,
    quiet: bool,
) -> None:
    """Rotate and smooth a checkpoint by a config, its function unchanged.

    MODEL is a folder with safetensors, or a hub id. The result loads with plain transformers.
    """
    from autoquant.config.file import load_config

    loaded = load_config(config)

    import torch

    from autoquant.calibration.windows import CalibrationOptions
    from autoquant.checkpoint.transform import TransformOptions, transform_checkpoint
    from autoquant.models.checkpoint_source import checkpoint_folder
    from autoquant.pipeline.select import Transforms

    source = checkpoint_folder(model)

    options = TransformOptions(
        Transforms.of(rotate=rotate, smooth=smooth, alpha=alpha),
        CalibrationOptions(calibration, sequences, length, seed),
        maxima,
        save_maxima,
        seed,
        None if dtype == "as-stored" else getattr(torch, dtype),
    )
    recorded = {
        "rotate": rotate,
        "smooth": smooth,
        "alpha": alpha,
        "seed": seed,
        "sequences": sequences,
        "length": length,
        "dtype": dtype,
        "calibration": calibration and str(calibration),
        "maxima": maxima and str(maxima),
    }
    with _bar(quiet) as tell:
        done = transform_checkpoint(
            source,
            loaded,
            output,
            options,
            recorded=recorded,
            force=force,
            progress=tell,
            warn=lambda message: click.echo(f"warning: {message}", err=True),
        )
    if not quiet:
        for space, construction in done.applied.constructions.items():
            click.echo(f"{space}: {construction}")
        untied = f", untied: {', '.join(done.applied.untied)}" if done.applied.untied else ""
        click.echo(f"{output}: {done.applied.tensors} tensors changed, {done.smoothed} groups smoothed{untied}")


@contextmanager
def _bar(quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar with the time left on a terminal's stderr, nothing elsewhere."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, disable=quiet or not sys.stderr.isatty(), transient=True) as progress:
        task = progress.add_task("")
        yield lambda step, done, of: progress.update(task, description=step, completed=done, total=of)
