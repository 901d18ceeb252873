from __future__ import annotations

from typing import Any

import click

from autoquant.cli import options
from autoquant.errors import AutoQuantError


@click.command()
@click.argument("recipe")
@click.argument("model", required=False)
@click.option("--tool", default="llm-compressor", show_default=True, metavar="TOOL", help="llm-compressor or quark.")
@click.option("--python", type=options.FILE, metavar="PYTHON", help="Where TOOL is installed, to read its registry.")
@options.which_task
@options.trust_remote_code
@options.format()
@options.quiet
def command(recipe: str, model: str | None, form: str, quiet: bool, **how: Any) -> None:
    """Judge hand-made mappings: right, incomplete, wrong, and what each changes.

    RECIPE is a file of TOOL's, put to MODEL; or a class of TOOL's registry (a model type for Quark), or `all` of it,
    read from the environment of --python. Every mapping is applied with random scales to a small float64 model, as the
    tool does it, and the logits are compared. Exit code 1 unless all hold.
    """
    from autoquant import api
    from autoquant.cli.progress import steps

    with steps(quiet) as shown:
        found = api.audit(recipe, model=model, progress=shown.progress, **how)
    options.print_result(found, form, quiet)
    if not found.holds:
        raise AutoQuantError("not every mapping holds")
