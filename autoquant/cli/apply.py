from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from autoquant.cli import options
from autoquant.cli.output import remark, show

DTYPES = ["as-stored", "float32", "bfloat16", "float16", "float64"]


@click.command()
@click.argument("model")
@click.argument("config", type=options.FILE)
@options.output("Folder to write.")
@options.transforms("smooth+fc_fc+rotation", options.TRANSFORMS)
@options.calibration()
@click.option("--maxima", type=options.FILE, help="Activation maxima of an earlier --save-maxima, in place of text.")
@click.option("--save-maxima", type=options.FILE, help="Keep the activation maxima (safetensors).")
@options.sequences(16)
@options.length
@options.seed()
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    default="as-stored",
    show_default=True,
    help="Of the weights written; folding is in float64 always.",
)
@options.unproved
@options.force
@options.quiet
def command(
    model: str,
    config: Path,
    output: Path,
    dtype: str,
    unproved: bool,
    force: bool,
    quiet: bool,
    **how: Any,
) -> None:
    """Rotate and smooth a checkpoint by a config, its function unchanged.

    MODEL is a folder with safetensors, or a hub id. The result loads with plain transformers.
    """
    from autoquant.cli.progress import steps
    from autoquant.config.file import load_config

    loaded = load_config(config)
    with steps(quiet) as shown:
        shown.progress("importing torch and transformers", 0, 0)
        import torch

        from autoquant.api.arguments import proof_of
        from autoquant.calibration.windows import CalibrationOptions
        from autoquant.checkpoint.transform import TransformOptions, transform_checkpoint
        from autoquant.io.folders import check_target
        from autoquant.models.checkpoint_source import checkpoint_folder
        from autoquant.pipeline.select import Transforms

        chosen = Transforms.parse(how["transforms"])
        text = CalibrationOptions(how["calibration"], how["sequences"], how["length"], how["seed"])
        precision = None if dtype == "as-stored" else getattr(torch, dtype)
        folder = checkpoint_folder(model)
        check_target(folder, output, force)
        proof = proof_of(loaded, folder, None, unproved, shown.progress)
        wanted = TransformOptions(chosen, text, how["maxima"], how["save_maxima"], how["seed"], precision, proof)
        recorded = {name: str(value) if isinstance(value, Path) else value for name, value in how.items()}
        recorded |= {"transforms": str(chosen), "dtype": dtype}
        del recorded["save_maxima"]
        done = transform_checkpoint(
            folder,
            loaded,
            output,
            wanted,
            recorded=recorded,
            force=force,
            progress=shown.progress,
            warn=lambda message: remark([f"warning: {message}"]),
        )
    if not quiet:
        applied = done.applied
        untied = f", untied: {', '.join(applied.untied)}" if applied.untied else ""
        counts = f"{output}: {applied.tensors} tensors changed, {done.smoothed} groups smoothed{untied}"
        show([*(f"{space}: {text}" for space, text in applied.constructions.items()), counts])
