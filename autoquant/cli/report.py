from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from autoquant.cli import options


@click.command()
@click.argument("config", type=options.FILE)
@click.option("--model", type=options.FILE, help="A folder: also show what goes into its linears, before and after.")
@options.calibration()
@options.sequences(8)
@click.option("--length", type=click.IntRange(1), default=256, show_default=True, help="Tokens in a window, BOS apart.")
@click.option("--compare", type=options.FILE, metavar="REPORT", help="Folder of `autoquant compare`: its table too.")
@options.output("HTML file to write.")
@options.trust_remote_code
@options.force
@options.format()
@options.quiet
def command(config: Path, output: Path, form: str, quiet: bool, **how: Any) -> None:
    """Show a config as a page: layers, groups, what is blocked, the proof.

    With --model also outliers over depth, attention sinks, signal to noise in int8 and what each linear costs. The page
    is one file that loads nothing.

    \N{BACKSPACE}
    autoquant report llama.json -o llama.html
    autoquant report my.json --model my-model -o my.html
    """
    from autoquant import api
    from autoquant.cli.progress import steps

    with steps(quiet) as shown:
        written = api.write_page(config, output, progress=shown.progress, **how)
    options.print_result(written, form, quiet)
