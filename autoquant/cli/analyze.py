from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from autoquant.models.tasks import KINDS, Kind

if TYPE_CHECKING:
    from autoquant.analyzer.analyze import Analyzed
    from autoquant.config.format import Config
    from autoquant.models.source import ModelSource


@click.command()
@click.argument("model")
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="FILE", help="Write the config to this file.")
@click.option("--force", is_flag=True, help="Replace the file where it exists.")
@click.option(
    "--capture",
    "how",
    type=click.Choice(["auto", "dynamo", "export"]),
    default="auto",
    show_default=True,
    help="How the graph is captured; auto takes the first that succeeds.",
)
@click.option("--layers", type=click.IntRange(1), help="Analyze a model with so many layers only.")
@click.option("--full", is_flag=True, help="Trace every layer, not one or two of each kind.")
@click.option("--kind", type=click.Choice(KINDS), help="What to take MODEL for, where its type is of several kinds.")
@click.option("--trust-remote-code", is_flag=True, help="Run the code that a checkpoint brings along.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["table", "json"]),
    default="table",
    show_default=True,
    help="Of what is printed; json: the config.",
)
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
@click.option("--explain", metavar="PATH", help="Say why this linear is or is not smoothable and rotatable.")
@click.option("--no-verify", is_flag=True, help="Do not prove the config on a small model of the same structure.")
def command(
    model: str,
    output: Path | None,
    force: bool,
    how: Literal["auto", "dynamo", "export"],
    layers: int | None,
    full: bool,
    kind: Kind | None,
    trust_remote_code: bool,
    form: str,
    quiet: bool,
    explain: str | None,
    no_verify: bool,
) -> None:
    """Find what can be smoothed and rotated in a model, without its weights.

    MODEL is a model type of transformers ('llama'), a folder or config.json, a hub id, or package.module:factory, a
    callable that returns a module and its example inputs. Without -o nothing is written.
    """
    from autoquant.cli.progress import steps
    from autoquant.config.file import config_text, save_config
    from autoquant.io.files import check_target

    if output == Path("-"):
        raise click.BadParameter("expected a file; --format json prints the config", param_hint="-o")
    if output is not None:
        check_target(output, force=force)
    with steps(quiet) as shown:

        def progress(step: str) -> None:
            shown.progress(step, 0, 0)

        progress("importing torch and transformers")
        from autoquant.analyzer.analyze import analyze
        from autoquant.models.repair import resolve

        source = resolve(model, layers=layers, trust_remote_code=trust_remote_code, kind=kind)
        analyzed = analyze(source, how=how, full=full, progress=progress)
        explanation = None if explain is None else _explain(analyzed, explain)
        config = analyzed.config
        if output is not None or (form == "json" and explain is None):
            config = _unproved(config) if no_verify else prove(analyzed, source, progress)
    if output is not None:
        save_config(config, output, force=force)
    if quiet and not (form == "json" and output is None):
        return
    if explanation is not None:
        click.echo(explanation)
    elif form == "json":
        click.echo(config_text(config), nl=False)
    else:
        from autoquant.report.table import print_summary

        print_summary(config, analyzed.findings.unknown_operators)
    if not quiet:
        click.echo(_timing(analyzed), err=True)
        if output is not None:
            click.echo(f"wrote {output}", err=True)
        elif form == "table" and explain is None:
            click.echo("nothing was written; -o FILE writes the config", err=True)


def prove(analyzed: Analyzed, source: ModelSource, progress: Callable[[str], None]) -> Config:
    """The config with its certificate. Raises AutoQuantError naming the group where a claim fails."""
    from autoquant.certificate.certify import certify

    return certify(analyzed, source, progress=progress)


def _unproved(config: Config) -> Config:
    from autoquant.config.format import Certificate, edited

    return edited(config, certificate=Certificate(proved=False))


def _explain(analyzed: Analyzed, path: str) -> str:
    from autoquant.analyzer.explain import explain
    from autoquant.report.explanation import explanation_text

    return explanation_text(explain(analyzed.analysis, analyzed.stacks, path), path)


def _timing(analyzed: Analyzed) -> str:
    times = ", ".join(f"{step} {seconds:.1f} s" for step, seconds in analyzed.seconds.items())
    return f"captured by {analyzed.captured.how}: {times}"
