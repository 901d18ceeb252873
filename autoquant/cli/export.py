from __future__ import annotations

from pathlib import Path

import click

from autoquant.cli import options


@click.command()
@click.argument("config", type=options.FILE)
@click.option("--to", required=True, metavar="TOOL", help="llm-compressor, quark, modelopt, brevitas or auto-round.")
@click.option("--algorithm", metavar="NAME", help="Which of the tool's gets the groups.  [default: its SmoothQuant]")
@options.output("File to write.  [default: standard output]", required=False)
@options.force
@options.format()
@options.quiet
def command(
    config: Path, to: str, algorithm: str | None, output: Path | None, force: bool, form: str, quiet: bool
) -> None:
    """Write a config as a recipe of another tool, and say what that tool cannot be told.

    Groups and spaces that a tool does not know (index maps, gains that are 1 + weight, routers, stacked experts, biases
    in a rotation) are left out by name, never approximated.
    """
    from autoquant import api
    from autoquant.cli.output import remark, show_text, width
    from autoquant.io.files import write_text

    found = api.export_recipe(config, to, algorithm=algorithm)
    if output is not None:
        write_text(output, found.text, force=force)
        options.print_result(found, form, quiet)
    elif form == "json":
        options.print_result(found, form, quiet)
    else:
        show_text(found.text)
        if not quiet:
            remark(found.lines(width()))
