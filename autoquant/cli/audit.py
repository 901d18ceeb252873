from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from autoquant.cli import options
from autoquant.errors import AutoQuantError


@click.command()
@click.argument("recipe")
@click.argument("model", required=False)
@click.option(
    "--tool",
    default="llm-compressor",
    show_default=True,
    metavar="TOOL",
    help="llm-compressor, quark; a file of brevitas.",
)
@click.option("--python", type=options.FILE, metavar="PYTHON", help="Where TOOL is installed, to read its registry.")
@click.option("--patch", type=options.FILE, help="Write what mends the registry of llm-compressor: a unified diff.")
@options.which_task
@options.trust_remote_code
@options.force
@options.format()
@options.quiet
def command(
    recipe: str, model: str | None, patch: Path | None, force: bool, form: str, quiet: bool, **how: Any
) -> None:
    """Judge hand-made mappings: right, incomplete, wrong, and what each changes.

    RECIPE is a file of TOOL's, put to MODEL. Given --python, it is a class of TOOL's registry there (a model type for
    Quark), or `all` of it, put to the types of transformers that have the classes, or to MODEL. Every mapping is
    applied with random scales to a small float64 model, as the tool does it, and the logits are compared. Exit code 1
    unless all hold.
    """
    from autoquant import api
    from autoquant.cli.progress import steps
    from autoquant.io.files import check_target, write_text

    if patch is not None:
        if how["python"] is None:
            raise click.UsageError("--patch is for a registry: name the --python that has it")
        check_target(patch, force=force)
    with steps(quiet) as shown:
        found = api.audit(recipe, model=model, progress=shown.progress, **how)
    if patch is not None:
        write_text(patch, found.patch, force=force)
    options.print_result(found, form, quiet)
    if not found.holds:
        raise AutoQuantError("not every mapping holds")
