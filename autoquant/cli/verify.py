from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from autoquant.cli import options
from autoquant.errors import AutoQuantError


@click.command()
@click.argument("model")
@click.argument("config", type=options.FILE)
@options.dtype(["float64", "float32"], "Of weights and activations; float32 tells less, in half the memory.")
@options.seed(0, "Draws inputs, scales and rotations.")
@click.option("--small", is_flag=True, help="On a small random model of the same structure, even if MODEL has weights.")
@options.layers
@options.task
@options.trust_remote_code
@options.format()
@options.quiet
def command(model: str, config: Path, form: str, quiet: bool, **how: Any) -> None:
    """Prove a config: apply each claim alone and all together, compare the logits.

    Each smoothing group, rotation space and online rotation is applied with random scales and rotations, enabled or
    not. MODEL is a folder with weights, which are used as they are; or all that analyze takes, and then a small random
    model of the same structure stands for it. Exit code 1 if any claim changes the logits.
    """
    from autoquant import api
    from autoquant.cli.progress import steps

    with steps(quiet) as shown:
        found = api.verify(model, config, progress=shown.progress, **how)
    options.print_result(found, form, quiet)
    if failed := found.failed:
        first, count = failed[0], f"{len(failed)} of {len(found.trials)} trials"
        if first.unreached:
            raise AutoQuantError(f"{count} do not hold: '{first.name}' {first.why()}")
        raise AutoQuantError(f"{count} changed the logits, '{first.name}' by {first.change:.1e}")
