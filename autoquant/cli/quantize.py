from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from autoquant.cli import options


@click.command()
@click.argument("model", type=options.FILE)
@click.argument("config", type=options.FILE, required=False)
@options.output("Folder to write.")
@options.strategy
@options.transforms("smooth+fc_fc+rotation", options.TRANSFORMS)
@options.calibration()
@options.media()
@options.sequences(16)
@options.length
@options.seed()
@click.option("--low-memory", is_flag=True, help="Refuse what needs the whole model in memory.")
@options.device
@options.dtype(["auto", "float32", "bfloat16"], "Of the sweep; auto: bfloat16 on a GPU where MODEL is stored in it.")
@options.unproved
@options.checkpoint_format
@options.target
@options.trust_remote_code
@options.force
@options.quiet
def command(model: Path, config: Path | None, output: Path, form: str, quiet: bool, **how: Any) -> None:
    """Rotate, smooth and quantize a checkpoint to int8, for vLLM and others to serve.

    MODEL is a folder with safetensors. Without CONFIG the model is analyzed first. autoquant.load makes a runnable
    model of the result, `autoquant eval` measures it. `torchrun --nproc-per-node N -m autoquant quantize ...` shares
    the calibration among N processes, on N GPUs where there are some.
    """
    from autoquant import api
    from autoquant.cli.progress import importing_little, steps

    first = os.environ.get("RANK", "0") == "0"  # of the processes that torchrun starts
    with steps(quiet or not first) as shown, ExitStack() as held:
        progress = shown.progress if config is None else importing_little(shown.progress, held)
        written = api.quantize(model, config, output, progress=progress, **how)
    if first:
        options.print_result(written, form, quiet)
