from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--model", metavar="MODEL", help="Check it against this model too, as named for analyze; no weights.")
@click.option("--layers", type=click.IntRange(1), help="Check against a model with so many layers only.")
@click.option("--trust-remote-code", is_flag=True, help="Run the code that a checkpoint brings along.")
def command(config: Path, model: str | None, layers: int | None, trust_remote_code: bool) -> None:
    """Check a config file and print all of its problems.

    With --model also every path, shape, range and tie, and the fingerprint of the structure.
    """
    from autoquant.config.file import load_config

    loaded = load_config(config)
    fits = ""
    if model is not None:
        from autoquant.executor.fit import model_problems, problems_error, structure_of
        from autoquant.models.repair import resolve
        from autoquant.models.source import build_structure

        source = resolve(model, layers=layers, trust_remote_code=trust_remote_code)
        found = model_problems(loaded, structure_of(build_structure(source)))
        if found:
            raise problems_error(config, model, found)
        fits = f" and fits {model}"
    click.echo(
        f"{config}: valid{fits}; {len(loaded.smoothing.groups)} smoothing groups, {len(loaded.rotation.spaces)} "
        f"rotation spaces, {len(loaded.model.linears)} linears, {len(loaded.blocked)} blocked"
    )
