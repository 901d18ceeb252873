from __future__ import annotations

from pathlib import Path

import click

from autoquant.cli import options


@click.command()
@click.argument("config", type=options.FILE)
@click.option("--layer", type=click.IntRange(0), help="This layer only.  [default: one of each kind]")
@click.option("--linear", metavar="PATH", help="All of one linear: its path, or an end of it.")
def command(config: Path, layer: int | None, linear: str | None) -> None:
    """Show a config in the terminal: changed knobs first, then a layer as a tree.

    \N{BACKSPACE}
    autoquant show llama.json --layer 3
    autoquant show llama.json --linear mlp.down_proj
    """
    from autoquant.api.configs import load_config
    from autoquant.cli.output import show, width
    from autoquant.report.tree import linear_lines, tree_lines

    loaded = load_config(config)
    show(linear_lines(loaded, linear, width()) if linear is not None else tree_lines(loaded, width(), layer))
