from __future__ import annotations

from pathlib import Path

import click

from autoquant.cli import options


@click.command()
@click.argument("config", type=options.FILE)
@click.option("--source", "sources", multiple=True, required=True, metavar="PATH", help="What makes the channels.")
@click.option("--target", "targets", multiple=True, required=True, metavar="PATH", help="A weight that reads them.")
@click.option("--layers", metavar="SET", help="As '0-31'.  [default: those of the first target]")
@click.option("--name", help="Of the group.  [default: its sources and targets]")
@click.option(
    "--offset", type=click.Choice(["0", "1"]), default="0", show_default=True, help="1: the gain is 1 + source."
)
@options.output("Config to write.  [default: CONFIG itself]", required=False)
@click.option("--verify/--no-verify", default=True, show_default=True, help="Prove it before anything is written.")
@options.trust_remote_code
@options.force
@options.quiet
def command(
    config: Path,
    sources: tuple[str, ...],
    targets: tuple[str, ...],
    layers: str | None,
    name: str | None,
    offset: str,
    output: Path | None,
    verify: bool,
    trust_remote_code: bool,
    force: bool,
    quiet: bool,
) -> None:
    """Write a smoothing group by hand; the checker helps, and the proof decides whether it holds.

    Sources and targets are parameters of the config's linears (a weight's rows make channels, its columns read them)
    or of norms, with {layer} for the layer. The proof runs on a small random model of the config's type.

    \N{BACKSPACE}
    autoquant init-group c.json --source model.layers.{layer}.mlp.up_proj.weight \N{REVERSE SOLIDUS}
        --target model.layers.{layer}.mlp.down_proj.weight
    """
    from autoquant import api
    from autoquant.api.configs import load_config, save_config
    from autoquant.cli.output import show
    from autoquant.cli.progress import steps
    from autoquant.config.handmade import with_group
    from autoquant.errors import AutoQuantError
    from autoquant.io.files import check_target

    if output is not None:
        check_target(output, force=force)
    changed = with_group(load_config(config), sources, targets, layers, name, int(offset))
    group = changed.smoothing.groups[-1]
    if verify:
        with steps(quiet) as shown:
            found = api.verify(
                changed.provenance.model, changed, trust_remote_code=trust_remote_code, progress=shown.progress
            )
        failed = [trial for trial in found.failed if trial.name == group.name]
        if failed:
            raise AutoQuantError(
                f"'{group.name}' does not hold: outputs change by {failed[0].change:.1e}; nothing was written"
            )
    save_config(changed, output or config, force=force or output is None)
    if not quiet:
        said = "proved" if verify else "not proved"
        show([f"{group.name}: {group.channels:,} channels, {said}", f"wrote {output or config}"])
