from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from autoquant.cli import options


@click.command()
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option("--data", type=options.FILE, metavar="TEXT", help="Text to measure on.")
@options.media("Images or sounds in its place: the words in a .txt of the same name are predicted.")
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
def command(models: tuple[str, ...], data: Path | None, media: Path | None, form: str, quiet: bool, **how: Any) -> None:
    """Perplexity of models on a text, with standard errors over windows.

    The text is tokenized once; windows do not overlap; each starts with the BOS token if the tokenizer has one. With
    --media the words beside images or sounds are predicted in its place. MODEL is a folder written by
    `autoquant quantize`, or any model that transformers loads.
    """
    if (data is None) is (media is None):
        raise click.UsageError("give either --data TEXT or --media FOLDER")
    from autoquant import api
    from autoquant.cli.progress import steps

    with steps(quiet) as shown:
        found = api.evaluate(models, data, media=media, progress=shown.progress, **how)
    options.print_result(found, form)
