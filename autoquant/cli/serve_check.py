from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from autoquant.cli import options
from autoquant.errors import AutoQuantError


@click.command()
@click.argument("folders", nargs=-1, required=True, type=options.FILE, metavar="DIR...")
@click.option("--data", type=options.FILE, metavar="TEXT", help="Text to measure on.  [default: a packaged sample]")
@click.option(
    "--length", type=click.IntRange(1), default=64, show_default=True, help="Tokens of text in a window, BOS apart."
)
@options.tokens
@click.option(
    "--engine",
    type=click.Choice(["vllm", "transformers"]),
    default="vllm",
    show_default=True,
    help="What to load the folders with.",
)
@click.option(
    "--python",
    type=options.FILE,
    metavar="PATH",
    help="Interpreter of an environment that has the engine.  [default: the one that runs this]",
)
@options.dtype(["float32", "bfloat16"], "Of floats in the engine; a CPU with AMX uses it in bfloat16 only.")
@options.format()
@options.quiet
def command(folders: tuple[Path, ...], form: str, quiet: bool, **how: Any) -> None:
    """Load quantized folders in vLLM and compare what it computes with what autoquant does.

    DIR is a folder of `autoquant quantize` in the format compressed-tensors. Exit code 1 where a perplexity differs by
    more than 0.5 % or, with static scales, the median log-probability by more than the rounding of float32. Windows are
    short, since a rounding that tips carries on through those that are long.
    """
    from autoquant import api
    from autoquant.cli.progress import steps

    with steps(quiet) as shown:
        found = api.serve_check(folders, progress=shown.progress, **how)
    options.print_result(found, form, quiet)
    if failed := found.failed:
        raise AutoQuantError(f"{len(failed)} of {len(found.found)} folders are not served as promised")
