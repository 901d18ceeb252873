"""Tables of benchmarks/README.md from reports of `autoquant compare`: python benchmarks/tables.py REPORT.json ..."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

SHORT = {
    "tensor": "t",
    "channel": "c",
    "tensor_static": "t static",
    "tensor_dynamic": "t dynamic",
    "token_dynamic": "token",
}


def short(strategy: str) -> str:
    """``w_int8_per_channel_a_int8_per_token_dynamic_kv_...`` as ``c/token, KV``."""
    weight, _, rest = strategy.removeprefix("w_int8_per_").partition("_a_int8_per_")
    activation, _, cache = rest.partition("_kv_cache_int8_per_")
    return f"{SHORT[weight]}/{SHORT[activation]}" + (f", KV {SHORT[cache]}" if cache else "")


def table(report: dict[str, Any]) -> str:
    """Each cell: perplexity, and what it is above float's in percent with the standard error of that difference."""
    cells = {(cell["transforms"], cell["strategy"]): cell for cell in report["cells"]}
    names = list(dict.fromkeys(name for name, _ in cells if name))
    strategies = list(dict.fromkeys(strategy for name, strategy in cells if name))
    perplexity = cells[None, "float"]["perplexity"]
    name, versions = report["inputs"]["model"], report["inputs"]["versions"]
    lines = [
        f"**{name}**, float {perplexity['mean']:.3f} ± {perplexity['standard_error']:.3f}: "
        f"{report['tokens']:,} tokens, {report['windows']} windows; torch {versions['torch']}, "
        f"transformers {versions['transformers']}, on {report['inputs']['device']}",
        "",
        "| | MB | " + " | ".join(names) + " |",
        "| --- | --- |" + " --- |" * len(names),
    ]
    for strategy in strategies:
        row = [cells.get((name, strategy)) for name in names]
        size = max(cell["bytes"] for cell in row if cell) / 1e6
        lines.append(f"| {short(strategy)} | {size:.1f} | {' | '.join(map(cell_text, row))} |")
    return "\n".join(lines) + "\n"


def cell_text(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return ""
    ratio = cell["ratio_to_float"]
    return (
        f"{cell['perplexity']['mean']:.2f} ({(ratio['mean'] - 1) * 100:+.2f} ± {ratio['standard_error'] * 100:.2f} %)"
    )


@click.command()
@click.argument("reports", nargs=-1, required=True, type=click.Path(path_type=Path))
def main(reports: tuple[Path, ...]) -> None:
    """Print a table for each report."""
    click.echo("\n".join(table(json.loads(path.read_text(encoding="utf-8"))) for path in reports), nl=False)


if __name__ == "__main__":
    main()
