from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("config", type=click.Path(path_type=Path))
def command(config: Path) -> None:
    """Check a config file and print all of its problems."""
    from autoquant.configfile import load_config

    loaded = load_config(config)
    click.echo(
        f"{config}: valid; {len(loaded.smoothing.groups)} smoothing groups, {len(loaded.rotation.spaces)} rotation "
        f"spaces, {len(loaded.model.linears)} linears, {len(loaded.blocked)} blocked"
    )
