from __future__ import annotations

import random
from pathlib import Path

import click

from autoquant.cli import options

COMMAND = "make survey"


@click.command()
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("docs"), show_default=True, metavar="DIR")
@click.option(
    "--configs",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    metavar="DIR",
    help="Also write each type's proved config to DIR, with an index.",
)
@click.option("--task", metavar="A,B", help="Only these kinds of models (default: all).")
@options.renamed("--kinds", "--task")
@click.option("--types", metavar="A,B", help="Only these model types: t5 of all kinds, or seq2seq-lm/t5.")
@click.option("--sample", type=click.IntRange(1), metavar="N", help="Only N rows, drawn by --seed.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--jobs", type=click.IntRange(1), default=2, show_default=True, help="Types at a time.")
@click.option("--timeout", type=float, default=600.0, show_default=True, help="Seconds that one type may take.")
def command(
    output: Path,
    configs: Path | None,
    task: str | None,
    types: str | None,
    sample: int | None,
    seed: int,
    jobs: int,
    timeout: float,
) -> None:
    """Analyze and prove every type of language model in transformers.

    Kinds: causal-lm, image-text-to-text, seq2seq-lm, speech-seq2seq; a type of several has a row for each. Writes
    coverage.md and coverage.json; finished rows are kept in DIR/rows, and a second run goes on from there. Every type
    runs in a process of its own: what it costs, or how it fails, is one row.
    """
    from functools import partial

    from autoquant.cli.output import remark, show
    from autoquant.io.files import write_text
    from autoquant.report.coverage import coverage_text, offers, proved, rows_text, totals
    from autoquant.survey.generate import write_index
    from autoquant.survey.survey import chosen_names, examine, finished, name_of, registered, survey

    everything = registered()
    chosen = chosen_names(everything, task.split(",") if task else None, types.split(",") if types else None)
    if sample is not None:
        picked = set(random.Random(seed).sample(chosen, min(sample, len(chosen))))
        chosen = [name for name in chosen if name in picked]
    absent = [name for name in everything if name not in chosen]
    left = len(set(chosen) - {name_of(row) for row in finished(output / "rows")})

    def done(row: dict[str, object]) -> None:
        nonlocal left
        left -= 1
        verdict = "not captured" if not row["captured"] else "proved" if proved(row) else "not proved"
        remark([f"{name_of(row)}: {verdict} ({row.get('seconds', '?')} s), {left} to go"])

    rows = survey(
        chosen, output / "rows", jobs=jobs, timeout=timeout, done=done, make=partial(examine, configs=configs)
    )
    if configs is not None:
        for row in rows:
            if not offers(row):
                (configs / f"{name_of(row)}.json").unlink(missing_ok=True)
        write_index(configs)
    write_text(output / "coverage.json", rows_text(rows), force=True)
    write_text(output / "coverage.md", coverage_text(rows, COMMAND, absent), force=True)
    show([", ".join(f"{number} {what}" for what, number in totals(rows).items())])
