from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from autoquant.errors import AutoQuantError
from autoquant.models.tasks import KINDS, Kind

if TYPE_CHECKING:
    from autoquant.certificate.verify import Verified

PIPE_WIDTH = 120


@click.command()
@click.argument("model")
@click.argument("config", type=click.Path(path_type=Path))
@click.option(
    "--dtype",
    type=click.Choice(["float64", "float32"]),
    default="float64",
    show_default=True,
    help="Of weights and activations; float32 tells less, in half the memory.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of inputs, scales and rotations.")
@click.option("--small", is_flag=True, help="On a small random model of the same structure, even if MODEL has weights.")
@click.option("--layers", type=click.IntRange(1), help="As given to analyze; for small models.")
@click.option("--kind", type=click.Choice(KINDS), help="What to take MODEL for, where its type is of several kinds.")
@click.option("--trust-remote-code", is_flag=True, help="Run the code that a checkpoint brings along.")
@click.option("--format", "form", type=click.Choice(["table", "json"]), default="table", show_default=True)
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
def command(
    model: str,
    config: Path,
    dtype: str,
    seed: int,
    small: bool,
    layers: int | None,
    kind: Kind | None,
    trust_remote_code: bool,
    form: str,
    quiet: bool,
) -> None:
    """Prove a config: apply each claim alone and all together, compare the logits.

    Each smoothing group, rotation space and online rotation is applied with random scales and rotations, enabled or
    not. MODEL is a folder with weights, which are used as they are; or all that analyze takes, and then a small random
    model of the same structure stands for it. Exit code 1 if any claim changes the logits.
    """
    from autoquant.cli.progress import steps
    from autoquant.config.file import load_config

    loaded = load_config(config)
    folder = Path(model).expanduser()
    weights = not small and folder.is_dir() and any(folder.glob("*.safetensors*"))
    with steps(quiet) as shown:

        def progress(step: str) -> None:
            shown.progress(step, 0, 0)

        progress("importing torch and transformers")
        import torch

        from autoquant.certificate.verify import verify_small, verify_weights
        from autoquant.models.repair import resolve

        precision: torch.dtype = getattr(torch, dtype)
        if weights:
            verified = verify_weights(
                folder, loaded, dtype=precision, seed=seed, trust_remote_code=trust_remote_code, progress=progress
            )
        else:
            source = resolve(model, layers=layers, trust_remote_code=trust_remote_code, kind=kind)
            verified = verify_small(source, loaded, dtype=precision, seed=seed, progress=progress)
    if not quiet:
        subject = f"{model}: {'its own weights' if weights else 'a small random model of its structure'}"
        _print_json(verified, weights) if form == "json" else _print_table(verified, subject)
    trials, _, tolerance = verified
    if failed := [trial for trial in trials if not trial.holds(tolerance)]:
        raise AutoQuantError(
            f"{len(failed)} of {len(trials)} trials changed the logits, '{failed[0].name}' by {failed[0].change:.1e}"
        )


def _print_table(verified: Verified, subject: str) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    trials, refused, tolerance = verified
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=PIPE_WIDTH, color_system=None)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("claim", overflow="fold")
    table.add_column("kind")
    table.add_column("change of the logits", justify="right")
    table.add_column("")
    for trial in trials:
        verdict = "ok" if trial.holds(tolerance) else "[red]FAILED[/red]"
        table.add_row(trial.name, trial.kind, f"{trial.change:.1e}", verdict)
    console.print(table)
    for path, reason in refused.items():
        console.print(f"not tried: {path}: {reason}", soft_wrap=True, markup=False)
    held = sum(trial.holds(tolerance) for trial in trials)
    console.print(f"{held} of {len(trials)} hold (at most {tolerance:.0e}) on {subject}", soft_wrap=True, markup=False)


def _print_json(verified: Verified, weights: bool) -> None:
    import json
    import math

    trials, refused, tolerance = verified
    rows = [
        {
            "name": trial.name,
            "kind": trial.kind,
            "change": trial.change if math.isfinite(trial.change) else None,  # JSON has no NaN
            "ok": trial.holds(tolerance),
        }
        for trial in trials
    ]
    content = {"weights": "own" if weights else "random", "tolerance": tolerance, "trials": rows, "not_tried": refused}
    click.echo(json.dumps(content, indent=2))
