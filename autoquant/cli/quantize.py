from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import click

from autoquant.errors import AutoQuantError

DEFAULT_STRATEGY = "w_int8_per_channel_a_int8_per_token_dynamic"


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("config", type=click.Path(path_type=Path), required=False)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@click.option("--strategy", metavar="NAME", help=f"One of the eight.  [default: the config's, {DEFAULT_STRATEGY}]")
@click.option("--calibration", type=click.Path(path_type=Path), help="Text, JSONL or dataset folder.")
@click.option("--sequences", type=click.IntRange(1), default=16, show_default=True, help="Calibration windows.")
@click.option("--length", type=click.IntRange(1), default=512, show_default=True, help="Tokens each, BOS apart.")
@click.option("--seed", type=click.IntRange(0), help="Replaces rotation.seed and picks random calibration windows.")
@click.option("--rotate/--no-rotate", default=True, show_default=True, help="Apply the config's enabled rotations.")
@click.option(
    "--smooth",
    type=click.Choice(["fc_fc", "all", "none"]),
    default="all",
    show_default=True,
    help="fc_fc: only v -> o, up -> down, fc1 -> fc2; all: also norm -> linear where no rotation took the norm's gain.",
)
@click.option("--alpha", type=click.FloatRange(0, 1), help="SmoothQuant's alpha for every group.  [default: config]")
@click.option("--low-memory", is_flag=True, help="Hold one decoder layer at a time; the same bytes are written.")
@click.option("--force", is_flag=True, help="Replace the folder if it exists.")
@click.option("--quiet", is_flag=True, help="No progress, no summary.")
def command(
    model: Path,
    config: Path | None,
    output: Path,
    strategy: str | None,
    calibration: Path | None,
    sequences: int,
    length: int,
    seed: int | None,
    rotate: bool,
    smooth: Literal["fc_fc", "all", "none"],
    alpha: float | None,
    low_memory: bool,
    force: bool,
    quiet: bool,
) -> None:
    """Rotate, smooth and quantize a checkpoint to int8; autoquant.load makes a runnable model of the result.

    MODEL is a folder with safetensors. Without CONFIG the model is analyzed first.
    """
    from autoquant.cli.compare import parse_strategies
    from autoquant.pipeline.select import Transforms

    chosen = None if strategy is None else parse_strategies(strategy)
    if chosen is not None and len(chosen) != 1:
        raise AutoQuantError("--strategy: expected one strategy")
    transforms = Transforms.of(rotate=rotate, smooth=smooth, alpha=alpha)

    with _steps(quiet) as tell:
        tell("importing torch and transformers", 0, 1)
        from autoquant.calibration.windows import CalibrationOptions, calibration_windows
        from autoquant.checkpoint.quantize import Recipe, config_for, quantize_checkpoint
        from autoquant.io.folders import check_target
        from autoquant.models.tokenizer import load_tokenizer

        check_target(model, output, force)
        loaded = config_for(str(model), config, lambda step: tell(step, 0, 1))
        windows = (
            ()
            if calibration is None
            else calibration_windows(load_tokenizer(model), CalibrationOptions(calibration, sequences, length, seed))
        )
        used = loaded.quantization.strategy if chosen is None else chosen[0]
        recipe = Recipe(loaded, used, transforms, windows, seed)
        options = {
            "strategy": used.value,
            "rotate": rotate,
            "smooth": smooth,
            "alpha": alpha,
            "seed": seed,
            "sequences": sequences,
            "length": length,
            "calibration": None if calibration is None else calibration.name,
        }
        quantize_checkpoint(model, output, recipe, options, low_memory=low_memory, force=force, progress=tell)
    if not quiet:
        before, after = (_bytes(folder) for folder in (model, output))
        click.echo(f"{output}: {used.value} after {transforms}, {before / 1e6:.2f} MB -> {after / 1e6:.2f} MB")


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@contextmanager
def _steps(quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar with the time left on a terminal's stderr, nothing elsewhere."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), disable=quiet or not sys.stderr.isatty(), transient=True) as progress:
        task = progress.add_task("", total=None)
        yield lambda step, done, total: progress.update(
            task, description=step, completed=done, total=total if total > 1 else None
        )
