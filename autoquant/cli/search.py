from __future__ import annotations

from pathlib import Path

import click

from autoquant.config.layers import did_you_mean
from autoquant.errors import AutoQuantError

JUDGED_TOGETHER = 8
"""Held-out windows in one forward pass, where no scale spans them."""
MEANS = "prefix,clip,rotation,online,alpha,descent,cache,weights,bias,spikes"


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("config", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Config to write.")
@click.option("--strategy", metavar="NAME", help="One of the eight.  [default: the config's]")
@click.option("--calibration", type=click.Path(path_type=Path), required=True, help="Text, JSONL or dataset folder.")
@click.option("--budget", type=click.FloatRange(min=0), default=30.0, show_default=True, help="Minutes.")
@click.option("--sequences", type=click.IntRange(1), default=64, show_default=True, help="Windows to fit on.")
@click.option("--held-out", type=click.IntRange(2), default=32, show_default=True, help="Further windows that judge.")
@click.option("--length", type=click.IntRange(1), default=512, show_default=True, help="Tokens each, BOS apart.")
@click.option(
    "--means",
    default=MEANS,
    show_default=True,
    help="What to try, in this order whatever the order here; 'learned' (a learned R1) is there too, and slow.",
)
@click.option(
    "--per-token",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="So many linears of a static strategy may get per-token scales.",
)
@click.option("--offline", is_flag=True, help="No rotation at inference: neither R3 nor R4.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Draws the windows.")
@click.option("--device", default="cpu", show_default=True, help="Where the models run: cpu, cuda.")
@click.option("--force", is_flag=True, help="Replace the output if it exists.")
@click.option("--quiet", is_flag=True, help="No progress, no summary.")
def command(
    model: Path,
    config: Path,
    output: Path,
    strategy: str | None,
    calibration: Path,
    budget: float,
    sequences: int,
    held_out: int,
    length: int,
    means: str,
    per_token: int,
    offline: bool,
    seed: int,
    device: str,
    force: bool,
    quiet: bool,
) -> None:
    """Set a config's knobs for one strategy by what they do on held-out calibration text.

    Writes a config with every decision in it, and the evidence for each under "search". MODEL is a folder with
    safetensors. Fit and held-out windows are drawn from the calibration text; no other text is read. As long as the
    budget is not used up, the same seed gives the same config.
    """
    from autoquant.cli.compare import parse_strategies
    from autoquant.config.file import load_config, save_config

    if output.exists() and not force:
        raise AutoQuantError(f"{output}: exists already; give --force to replace it")
    loaded = load_config(config)
    chosen = (loaded.quantization.strategy,) if strategy is None else parse_strategies(strategy)
    if len(chosen) != 1:
        raise AutoQuantError("--strategy: expected one strategy")

    from autoquant.calibration.windows import CalibrationOptions, Windows, calibration_windows, rebatched
    from autoquant.checkpoint.quantize import load_float32
    from autoquant.evaluation.compare import shares_scale
    from autoquant.models.tokenizer import load_tokenizer
    from autoquant.searcher.search import MEANS as KNOWN
    from autoquant.searcher.search import Task, search

    names = means.split(",")
    for name in names:
        if name not in KNOWN:
            raise AutoQuantError(f"--means: no '{name}'{did_you_mean(name, list(KNOWN))}; there are {', '.join(KNOWN)}")
    tokenizer = load_tokenizer(model)
    windows = calibration_windows(tokenizer, CalibrationOptions(calibration, sequences + held_out, length, seed))
    fit = windows[:sequences]
    judging = Windows(windows[sequences:], tokenizer.bos_token_id is not None)
    if not shares_scale(chosen[0]):
        judging = rebatched(judging, JUDGED_TOGETHER)
    task = Task(
        load=lambda: load_float32(model).to(device),
        strategy=chosen[0],
        fit=fit,
        held_out=judging.batches,
        calibration=calibration.name,
        seed=seed,
        per_token=per_token,
        bos=tokenizer.bos_token_id,
        offline=offline,
        means=frozenset(names),
    )
    found = search(task, loaded, budget, lambda line: None if quiet else click.echo(line, err=True))
    save_config(found, output, force=force)
    if quiet or found.search is None:
        return
    for decision in found.search.decisions:
        click.echo(f"{decision.where} = {decision.choice} ({decision.before:g} -> {decision.after:g}; {decision.cost})")
    result = found.search
    click.echo(
        f"{output}: held-out perplexity {result.before:+.2f} % -> {result.after:+.2f} ± {result.standard_error:.2f} % "
        f"above float, {len(result.decisions)} decisions"
    )
