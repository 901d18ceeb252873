from __future__ import annotations

from pathlib import Path
from typing import Any

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
@click.option("--model", metavar="MODEL", help="Of which a small one is proved on.  [default: the config's own]")
@options.output("Config to write.  [default: CONFIG itself]", required=False)
@click.option("--verify/--no-verify", default=True, show_default=True, help="Prove it before anything is written.")
@options.which_task
@options.trust_remote_code
@options.force
@options.quiet
def command(
    config: Path,
    sources: tuple[str, ...],
    targets: tuple[str, ...],
    offset: str,
    output: Path | None,
    verify: bool,
    force: bool,
    quiet: bool,
    **how: Any,
) -> None:
    """Write a smoothing group by hand, which the proof takes or refuses.

    Sources and targets are parameters of the config's linears (a weight's rows make channels, its columns read them)
    or of norms, with {layer} for the layer. The proof runs on a small random model, at several lengths and while
    decoding; a group that the analysis does not find is tried at scales up to a million as well. It is refused where an
    output changes, and else kept as "by_hand". What applies the config takes it as proved.

    \N{BACKSPACE}
    autoquant init-group c.json --source model.layers.{layer}.mlp.up_proj.weight \N{REVERSE SOLIDUS}
        --target model.layers.{layer}.mlp.down_proj.weight
    """
    from autoquant import api
    from autoquant.api.configs import load_config, save_config
    from autoquant.cli.output import show
    from autoquant.cli.progress import steps
    from autoquant.config.handmade import said_of
    from autoquant.io.files import check_target

    if output is not None:
        check_target(output, force=force)
    with steps(quiet) as shown:
        changed = api.init_group(
            load_config(config),
            sources,
            targets,
            offset=1 if offset == "1" else 0,
            verify=verify,
            progress=shown.progress,
            **how,
        )
    save_config(changed, output or config, force=force or output is None)
    if not quiet:
        show([said_of(changed, verify), f"wrote {output or config}"])
