from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from autoquant.cli import options
from autoquant.cli.output import remark, show, show_text, width
from autoquant.cli.progress import steps

PARTLY_REFUSED = 3
"""Exit code where the proof refused a claim of the analysis and the rest was written."""


@click.command()
@click.argument("model")
@options.output("Write the config to this file.", required=False)
@options.force
@click.option(
    "--capture",
    type=click.Choice(["auto", "dynamo", "export"]),
    default="auto",
    show_default=True,
    help="How the graph is captured; auto takes the first that succeeds.",
)
@options.layers
@click.option("--full", is_flag=True, help="Trace every layer, not one or two of each kind.")
@options.task
@options.trust_remote_code
@options.format("Of what is printed; json: the config.")
@options.quiet
@click.option("--explain", metavar="PATH", help="Say why this linear is or is not smoothable and rotatable.")
@click.option("--no-verify", is_flag=True, help="Do not prove the config on a small model of the same structure.")
def command(
    output: Path | None, force: bool, form: str, quiet: bool, explain: str | None, no_verify: bool, **how: Any
) -> None:
    """Find what can be smoothed and rotated in a model, without its weights.

    MODEL is a model type of transformers ('llama'), a folder or config.json, a hub id, or package.module:factory, a
    callable that returns a module and its example inputs. Without -o nothing is written.

    Exit code 3: a claim of the analysis was refused by the proof and left out; the rest was proved and written.
    """
    from autoquant import api
    from autoquant.certificate.claims import refused_claims
    from autoquant.config.file import config_text
    from autoquant.io.files import check_target

    if output == Path("-"):
        raise click.BadParameter("expected a file; --format json prints the config", param_hint="-o")
    if output is not None:
        check_target(output, force=force)
    kept = output is not None or (form == "json" and explain is None)
    with steps(quiet) as shown:
        found = api.analyze(verify=kept and not no_verify, progress=shown.progress, **how)
        lines = None if explain is None else found.explain(explain).splitlines()
    if output is not None:
        api.save_config(found.config, output, force=force)
    if form == "json" and explain is None and not (quiet and output is not None):
        show_text(config_text(found.config))
    elif not quiet:
        show(found.lines(width(), proof=kept) if lines is None else lines)
    if not quiet:
        remark([found.timing(), "nothing was written; -o FILE writes the config" if not kept else f"wrote {output}"])
    if refused := refused_claims(found.config):
        remark(f"left out: {blocked.path}: {blocked.reason}" for blocked in refused)
        raise click.exceptions.Exit(PARTLY_REFUSED)
