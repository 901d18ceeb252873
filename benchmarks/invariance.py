"""Perplexity before and after `autoquant apply`: python benchmarks/invariance.py

Runs the command line (analyze, apply, eval) on trained models and writes benchmarks/invariance.md. Models and texts
are read from ../shared/data, or from AUTOQUANT_DATA.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import click

HERE = Path(__file__).parent
DATA = Path(os.environ.get("AUTOQUANT_DATA", HERE.parent.parent / "shared" / "data"))
MODELS = ("wikinano1m", "wikinano30m")
RECIPES = {
    "R1 + R2, fc_fc 0.5": (),
    "no rotation, smooth all 0.5": ("--no-rotate",),
}
TOKENS, SEQUENCES = 16_384, 16


@click.command()
@click.option("-o", "--output", type=click.Path(path_type=Path), default=HERE / "invariance.md", show_default=True)
@click.argument("models", nargs=-1)
def main(output: Path, models: tuple[str, ...]) -> None:
    """Compare perplexities of MODELS (default: both) before and after each recipe."""
    lines = [
        "# Perplexity before and after `autoquant apply`",
        "",
        f"`python benchmarks/invariance.py`, {datetime.date.today()}, torch {version('torch')}, transformers "
        f"{version('transformers')}, Python {platform.python_version()}, CPU. WikiText-2 raw test, the first "
        f"{TOKENS:,} tokens in windows of 512; calibrated on {SEQUENCES} sequences of valid; seed 0. `apply --dtype` "
        "writes the weights in the dtype that `eval --dtype` computes in; the originals are stored in float16. In "
        "float32 the two agree to 5 significant digits or the script fails.",
        "",
        "| model | recipe | dtype | before | after | difference |",
        "|---|---|---|---|---|---|",
    ]
    failed = []
    for model in models or MODELS:
        for recipe, dtype, before, after in measured(model):
            lines.append(
                f"| {model} | {recipe} | {dtype} | {before:.6f} | {after:.6f} | {(after - before) / before:+.1e} |"
            )
            click.echo(lines[-1])
            if dtype == "float32" and f"{before:.4e}" != f"{after:.4e}":
                failed.append(f"{model}, {recipe}: {before} and {after} differ in 5 digits")
    output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    if failed:
        sys.exit("\n".join(failed))


def measured(model: str) -> list[tuple[str, str, float, float]]:
    """(recipe, dtype, perplexity before, perplexity after) of everything."""
    rows = []
    source, text = str(DATA / model), DATA / "wikitext2"
    with tempfile.TemporaryDirectory() as folder:
        config = f"{folder}/config.json"
        autoquant("analyze", source, "-o", config, "--quiet")
        for dtype in ("float32", "bfloat16"):
            targets = [f"{folder}/{dtype}-{number}" for number, _ in enumerate(RECIPES)]
            for target, options in zip(targets, RECIPES.values(), strict=True):
                calibration = ["--calibration", str(text / "wiki.valid.raw"), "--sequences", str(SEQUENCES)]
                autoquant("apply", source, config, "-o", target, "--dtype", dtype, "--quiet", *calibration, *options)
            data = ["--data", str(text / "wiki.test.raw"), "--tokens", str(TOKENS), "--dtype", dtype]
            found = json.loads(autoquant("eval", source, *targets, *data, "--format", "json"))["results"]
            before, *after = (row["perplexity"]["mean"] for row in found)
            rows += [(recipe, dtype, before, value) for recipe, value in zip(RECIPES, after, strict=True)]
    return rows


def autoquant(*arguments: str) -> str:
    """Run a command of the command line; its standard output."""
    command = [sys.executable, "-m", "autoquant", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


if __name__ == "__main__":
    main()
