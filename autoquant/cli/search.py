from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from autoquant.cli import options

KNOBS = "prefix,spikes,clip,rotation,online,alpha,descent,cache,weights,bias,float"


@click.command()
@click.argument("model", type=options.FILE)
@click.argument("config", type=options.FILE)
@options.output("Config to write.")
@options.strategy
@options.calibration(required=True)
@click.option("--budget", type=click.FloatRange(min=0), default=30.0, show_default=True, help="Minutes.")
@options.sequences(64)
@click.option("--held-out", type=click.IntRange(2), default=32, show_default=True, help="Further windows that judge.")
@options.length
@click.option(
    "--knobs",
    default=KNOBS,
    show_default=True,
    help="What to try, in this order whatever the order here; 'learned' (a learned R1) is there too, and slow.",
)
@options.renamed("--means", "--knobs")
@click.option(
    "--per-token",
    type=click.IntRange(0),
    help="So many linears of a static strategy may get per-token scales.  [default: 4 with --target, else 0]",
)
@click.option(
    "--in-float",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="So many linears may stay in floating point, those whose int8 costs most.",
)
@click.option("--offline", is_flag=True, help="No rotation at inference: neither R3 nor R4.")
@click.option(
    "--target",
    metavar="[vllm|sglang|transformers|any|onnxruntime]",
    help="What is to serve the result: only what it takes is tried.",
)
@options.seed(0, "Draws windows.")
@options.device
@options.unproved
@options.trust_remote_code
@options.force
@options.format()
@options.quiet
def command(model: Path, config: Path, output: Path, force: bool, form: str, quiet: bool, **how: Any) -> None:
    """Set a config's knobs for one strategy by what they do on held-out calibration text.

    Writes a config with every decision in it, and the evidence for each under "search". MODEL is a folder with
    safetensors. Fit and held-out windows are drawn from the calibration text; no other text is read. As long as the
    budget is not used up, the same seed gives the same config. What was judged is kept beside OUTPUT until that is
    written: the same command goes on after an interruption.
    """
    from autoquant import api
    from autoquant.cli.output import remark
    from autoquant.cli.progress import steps
    from autoquant.io.files import check_target

    check_target(output, force=force)
    kept = output.with_name(f".{output.name}.judged")
    with steps(quiet) as shown:
        found = api.search(model, config, tell=shown.say, progress=shown.progress, kept=kept, **how)
    api.save_config(found.config, output, force=force)
    kept.unlink(missing_ok=True)
    options.print_result(found, form, quiet)
    if not quiet:
        remark([f"wrote {output}"])
