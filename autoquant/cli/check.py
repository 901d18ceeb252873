from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from autoquant.cli import options


@click.command()
@click.argument("config", type=options.FILE)
@click.option("--model", metavar="MODEL", help="Check it against this model too, as named for analyze; no weights.")
@options.layers
@options.task
@options.trust_remote_code
@options.format()
def command(config: Path, form: str, **how: Any) -> None:
    """Check a config file and print all of its problems.

    With --model also every path, shape, range and tie, and the fingerprint of the structure.
    """
    from autoquant import api

    options.print_result(api.check(config, **how), form)
