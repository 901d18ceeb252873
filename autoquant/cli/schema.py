from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), metavar="DIR", help="Write the schema into this folder."
)
@click.option("--force", is_flag=True, help="Replace the file where it exists.")
def command(output: Path | None, force: bool) -> None:
    """Print the JSON Schema of the config file, or write it."""
    from autoquant.cli.output import show, show_text
    from autoquant.config.format import SCHEMA_NAME
    from autoquant.config.jsonschema import schema_text
    from autoquant.io.files import write_text

    if output is None:
        show_text(schema_text())
        return
    write_text(output / SCHEMA_NAME, schema_text(), force=force)
    show([f"wrote {output / SCHEMA_NAME}"])
