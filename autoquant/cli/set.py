from __future__ import annotations

from pathlib import Path

import click

from autoquant.cli import options


@click.command()
@click.argument("config", type=options.FILE)
@click.argument("assignments", nargs=-1, required=True, metavar="ASSIGNMENT...")
@options.output("Config to write.  [default: CONFIG itself]", required=False)
@options.force
@options.quiet
def command(config: Path, assignments: tuple[str, ...], output: Path | None, force: bool, quiet: bool) -> None:
    """Set knobs of a config, for scripts: all of them, or none where one is wrong.

    \N{BACKSPACE}
    autoquant set c.json smoothing.alpha=0.7 rotation.method=orthogonal
    autoquant set c.json 'layers 0-3: enable=false' 'layers 0: strategy=null'
    autoquant set c.json 'mlp.up_proj -> down_proj: alpha=0.6' 'layers 0: up_proj -> down_proj: enable=false'
    autoquant set c.json 'layers 0: mlp.down_proj: strategy=null' 'lm_head: strategy=null'
    autoquant set c.json quantization.exclude='["lm_head"]' -o d.json
    """
    from autoquant.api.configs import load_config, save_config
    from autoquant.cli.output import show
    from autoquant.config.assign import assign
    from autoquant.config.compare import differences
    from autoquant.io.files import check_target

    if output is not None:
        check_target(output, force=force)
    before = load_config(config)
    after = assign(before, assignments)
    save_config(after, output or config, force=force or output is None)
    if not quiet:
        show([one.line for one in differences(before, after)] or ["nothing changed"])
