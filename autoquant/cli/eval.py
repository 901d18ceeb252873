from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from autoquant.errors import AutoQuantError

if TYPE_CHECKING:
    from autoquant.evaluation.perplexity import Estimate, Evaluation

PIPE_WIDTH = 160


@click.command()
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option("--data", type=click.Path(path_type=Path), required=True, help="Text file, UTF-8.")
@click.option("--window", type=click.IntRange(1), default=512, show_default=True, help="Tokens per window, BOS apart.")
@click.option("--tokens", type=click.IntRange(1), help="Use the first so many tokens only.  [default: all]")
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Windows per forward pass.")
@click.option("--reference", metavar="MODEL", help="Also compare the logits with this model's.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16", "auto"]),
    default="float32",
    show_default=True,
    help="Of everything that is not int8; auto: as stored.",
)
@click.option("--format", "form", type=click.Choice(["table", "json"]), default="table", show_default=True)
def command(
    models: tuple[str, ...],
    data: Path,
    window: int,
    tokens: int | None,
    batch: int,
    reference: str | None,
    dtype: str,
    form: str,
) -> None:
    """Perplexity of models on a text, with standard errors over windows.

    The text is tokenized once; windows do not overlap; each starts with the BOS token if the tokenizer has one. MODEL
    is a folder written by `autoquant quantize`, or any model that transformers loads.
    """
    text = _read(data)
    import torch
    from rich.console import Console
    from rich.progress import Progress

    from autoquant import load
    from autoquant.calibration.windows import cut_windows, tokenize
    from autoquant.evaluation.perplexity import evaluate, logits_of
    from autoquant.models.tokenizer import load_tokenizer

    def tokens_of(name: str) -> tuple[list[int], int | None]:
        tokenizer = load_tokenizer(name)
        return tokenize(tokenizer, text), tokenizer.bos_token_id

    precision = None if dtype == "auto" else getattr(torch, dtype)
    expected = None if reference is None else tokens_of(reference)
    reference_logits = None if reference is None else logits_of(load(reference, precision))
    results: dict[str, Evaluation] = {}
    errors = Console(stderr=True)
    for name in models:
        ids, bos = tokens_of(name)
        if expected is not None and expected != (ids, bos):
            raise AutoQuantError(f"{name}: its tokenizer differs from that of {reference}, so their logits do too")
        windows = cut_windows(ids, window, bos, tokens, batch)
        model = logits_of(load(name, precision))
        with Progress(console=errors, transient=True, disable=not errors.is_terminal) as progress:
            task = progress.add_task(name, total=sum(len(rows) for rows in windows.batches))
            results[name] = evaluate(model, windows, reference_logits, partial(progress.advance, task))
    if form == "json":
        settings = {"data": str(data), "window": window, "tokens": tokens, "batch": batch, "reference": reference}
        _print_json(settings, results)
    else:
        _print_table(results)


def _read(data: Path) -> str:
    try:
        return data.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise AutoQuantError(f"{data}: cannot be read as UTF-8 text: {error}") from error


def _columns(result: Evaluation) -> dict[str, Estimate | None]:
    return {
        "perplexity": result.perplexity,
        "perplexity_ratio": result.perplexity_ratio,
        "nll": result.nll,
        "kl": result.kl,
        "top1_agreement": result.top1,
    }


def _print_json(settings: dict[str, Any], results: dict[str, Evaluation]) -> None:
    import json
    import math

    def plain(value: float) -> float | None:
        return value if math.isfinite(value) else None  # JSON has no NaN

    rows = [
        {"model": name, "tokens": result.tokens, "windows": result.windows}
        | {
            key: {"mean": plain(estimate.mean), "standard_error": plain(estimate.standard_error)}
            for key, estimate in _columns(result).items()
            if estimate is not None
        }
        for name, result in results.items()
    ]
    click.echo(json.dumps({"settings": settings, "results": rows}, indent=2))


def _print_table(results: dict[str, Evaluation]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("model", "tokens", "windows")
    rows = [[_cell(key, estimate) for key, estimate in _columns(result).items()] for result in results.values()]
    for key, cell in zip(_columns(next(iter(results.values()))), rows[0], strict=True):
        if cell:
            table.add_column(key.replace("_", " "), justify="right", no_wrap=True)
    for (name, result), row in zip(results.items(), rows, strict=True):
        table.add_row(name, f"{result.tokens:,}", str(result.windows), *filter(None, row))
    console = Console()
    console.print(table) if console.is_terminal else Console(width=PIPE_WIDTH).print(table)


def _cell(key: str, estimate: Estimate | None) -> str:
    if estimate is None:
        return ""
    digits = 3 if key == "perplexity" else 5
    return f"{estimate.mean:.{digits}f} ± {estimate.standard_error:.{digits}f}"
