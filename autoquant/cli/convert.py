from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from autoquant.cli import options


@click.command()
@click.argument("folder", type=options.FILE)
@options.output("Folder to write.")
@click.option("--to", required=True, metavar="[native|compressed-tensors|onnx]", help="Format of the folder to write.")
@options.target
@options.trust_remote_code
@options.force
@options.format()
@options.quiet
def command(folder: Path, output: Path, form: str, quiet: bool, **how: Any) -> None:
    """Write a quantized folder in another format, where nothing is lost.

    FOLDER is one of `autoquant quantize`. There and back again gives the same bytes; from ONNX there is no way back.
    """
    from autoquant import api

    options.print_result(api.convert(folder, output, **how), form, quiet)
