from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from autoquant.cli import options

TRANSFORMS = "none,smooth:0.85,smooth:0.5,smooth:0.5+fc_fc,fc_fc:0.5+rotation"


@click.command()
@click.argument("model", type=options.FILE)
@click.option("--config", type=options.FILE, help="Of analyze.  [default: analyze now]")
@click.option("--strategies", default="all", show_default=True, help="Comma-separated names.")
@click.option(
    "--transforms",
    default=TRANSFORMS,
    show_default=True,
    metavar="EXPR,EXPR",
    help=f"Comma-separated; each is {options.TRANSFORMS}",
)
@options.renamed("--preopt", "--transforms")
@click.option("--data", type=options.FILE, required=True, metavar="TEXT", help="Text to measure on.")
@options.calibration(required=True)
@options.sequences(16)
@options.length
@options.renamed("--window", "--length", click.IntRange(1))
@options.tokens
@options.seed()
@options.batch
@options.device
@options.unproved
@options.trust_remote_code
@options.output("Folder of the report.")
@options.format()
@options.quiet
def command(model: Path, output: Path, form: str, quiet: bool, **how: Any) -> None:
    """Perplexity of every int8 strategy after every preparation, as one table.

    MODEL is a folder. The report's folder takes report.md, report.json and a file for each finished cell: after an
    interruption the same command goes on where it stopped.
    """
    from autoquant import api
    from autoquant.cli.output import has_width, show_text
    from autoquant.cli.progress import steps

    with steps(quiet) as shown:
        found = api.compare(model, output, progress=shown.progress, tell=shown.say, **how)
    if form == "json" or quiet or has_width():
        options.print_result(found, form, quiet)
    else:
        show_text(found.markdown)
