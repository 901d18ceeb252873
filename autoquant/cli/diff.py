from __future__ import annotations

from pathlib import Path

import click

from autoquant.cli import options


@click.command()
@click.argument("before", type=options.FILE)
@click.argument("after", type=options.FILE)
@options.format()
def command(before: Path, after: Path, form: str) -> None:
    """What differs between two configs: knobs, claims and facts.

    Files of either format version, whatever they look like; the order of entries does not count.
    """
    from dataclasses import asdict

    from autoquant.api.configs import load_config
    from autoquant.cli.output import show, show_json
    from autoquant.config.compare import differences

    found = differences(load_config(before), load_config(after))
    if form == "json":
        show_json([asdict(one) for one in found])
        return
    for part in dict.fromkeys(one.part for one in found):
        show([part, *(f"  {one.line}" for one in found if one.part == part)])
    if not found:
        show(["they say the same"])
