from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from autoquant.cli import options


@click.command()
@click.argument("recipe", type=options.FILE)
@click.argument("model")
@click.option("--from", "tool", required=True, metavar="TOOL", help="llm-compressor, quark or brevitas.")
@options.output("Config to write.")
@options.layers
@options.which_task
@options.trust_remote_code
@options.force
@options.format()
@options.quiet
def command(recipe: Path, model: str, output: Path, force: bool, form: str, quiet: bool, **how: Any) -> None:
    """Make a config of a hand-made recipe: its groups are on, all others off.

    Each mapping is put to the proof on a small random model of MODEL's structure. Where one changes the logits, nothing
    is written; `autoquant audit` says more.
    """
    from autoquant import api
    from autoquant.cli.progress import steps
    from autoquant.io.files import check_target

    check_target(output, force=force)
    with steps(quiet) as shown:
        found = api.import_recipe(recipe, model=model, progress=shown.progress, **how)
    api.save_config(found.config, output, force=force)
    options.print_result(found, form, quiet)
