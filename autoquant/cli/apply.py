from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from autoquant.cli import options

DTYPES = ["as-stored", "float32", "bfloat16", "float16", "float64"]


@click.command()
@click.argument("model")
@click.argument("config", type=options.FILE)
@options.output("Folder to write.")
@options.transforms("smooth+fc_fc+rotation", options.TRANSFORMS)
@options.calibration()
@options.media()
@click.option("--maxima", type=options.FILE, help="Activation maxima of an earlier --save-maxima, in place of these.")
@click.option("--save-maxima", type=options.FILE, help="Keep the activation maxima (safetensors).")
@options.sequences(16)
@options.length
@options.seed()
@options.dtype(DTYPES, "Of the weights written; folding is in float64 always.")
@options.device
@options.workers
@options.unproved
@options.trust_remote_code
@options.force
@options.format()
@options.quiet
def command(model: str, config: Path, output: Path, form: str, quiet: bool, **how: Any) -> None:
    """Rotate and smooth a checkpoint by a config, its function unchanged.

    MODEL is a folder with safetensors, or a hub id. The result loads with plain transformers.
    """
    from autoquant import api
    from autoquant.cli.progress import importing_little, steps

    with steps(quiet) as shown, ExitStack() as held:
        written = api.apply(model, config, output, progress=importing_little(shown.progress, held), **how)
    options.print_result(written, form, quiet)
