from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from autoquant.cli import options


@click.command()
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option("--data", type=options.FILE, required=True, metavar="TEXT", help="Text to measure on.")
@options.field
@options.length
@options.renamed("--window", "--length", click.IntRange(1))
@options.tokens
@options.batch
@click.option("--reference", metavar="MODEL", help="Also compare the logits with this model's.")
@options.dtype(["float32", "bfloat16", "float16", "auto"], "Of everything that is not int8; auto: as stored.")
@options.device
@options.trust_remote_code
@options.format()
@options.quiet
def command(models: tuple[str, ...], data: Path, form: str, quiet: bool, **how: Any) -> None:
    """Perplexity of models on a text, with standard errors over windows.

    The text is tokenized once; windows do not overlap; each starts with the BOS token if the tokenizer has one. MODEL
    is a folder written by `autoquant quantize`, or any model that transformers loads.
    """
    from autoquant import api
    from autoquant.cli.progress import steps

    with steps(quiet) as shown:
        found = api.evaluate(models, data, progress=shown.progress, **how)
    options.print_result(found, form)
