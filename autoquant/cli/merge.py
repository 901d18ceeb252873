from __future__ import annotations

from pathlib import Path

import click

from autoquant.cli import options


@click.command()
@click.argument("new", type=options.FILE)
@click.argument("old", type=options.FILE)
@options.output("Config to write.")
@click.option(
    "--take", type=click.Choice(["new", "old"]), help="Which of two choices for one knob.  [default: neither]"
)
@options.force
@options.quiet
def command(new: Path, old: Path, output: Path, take: str | None, force: bool, quiet: bool) -> None:
    """Carry the hand edits of OLD over to the newly generated NEW.

    What in OLD is not at its default goes into NEW. Where NEW has another choice, or nothing of that name, or refuses
    it, that is a conflict: each is named, the exit code is 1, and nothing is written unless --take says which to keep.
    """
    from autoquant.api.configs import load_config, save_config
    from autoquant.cli.output import show
    from autoquant.config.compare import merge
    from autoquant.errors import AutoQuantError
    from autoquant.io.files import check_target

    check_target(output, force=force)
    merged = merge(load_config(new), load_config(old), take)
    if merged.conflicts and take is None:
        count = f"{len(merged.conflicts)} {'conflict' if len(merged.conflicts) == 1 else 'conflicts'}"
        raise AutoQuantError(f"{output}: not written: {count}; --take new or old goes on", merged.conflicts)
    save_config(merged.config, output, force=force)
    if not quiet:
        show([*(f"left out: {one}" for one in merged.conflicts), *(f"carried: {one}" for one in merged.carried)])
        show([f"wrote {output}: {len(merged.carried)} of {len(merged.carried) + len(merged.conflicts)} edits carried"])
