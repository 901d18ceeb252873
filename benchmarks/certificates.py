"""The certificates of many architectures and of trained models in one table: python benchmarks/certificates.py

Writes benchmarks/certificates.md. Trained models are read from ../shared/data, or from AUTOQUANT_DATA.
"""

from __future__ import annotations

import datetime
import os
import platform
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import click
import torch
from mistakes import MUTATIONS, figures

from autoquant.analyzer.analyze import analyze
from autoquant.certificate.certify import certify
from autoquant.certificate.prove import TOLERANCE
from autoquant.certificate.verify import verify_weights
from autoquant.config.format import Blocked, Config
from autoquant.models.repair import find_source
from autoquant.report.summary import because

HERE = Path(__file__).parent
DATA = Path(os.environ.get("AUTOQUANT_DATA", HERE.parent.parent / "shared" / "data"))
TRAINED = ("wikinano1m", "wikinano30m", "stories260K", "babyllama361")
TYPES = """llama mistral qwen2 granite olmo qwen3 phi3 gemma gemma2 gemma3_text glm4 olmo2 cohere opt gpt2 gpt_neox
falcon phi stablelm nemotron starcoder2 bloom mixtral qwen3_moe qwen2_moe deepseek_v3 mamba falcon_h1 bamba"""
KINDS = {
    "norm -> linear": ("norm_linear",),
    "fc -> fc": ("linear_linear",),
    "q <-> k": ("query_key",),
    "R1": ("R1",),
    "R2": ("R2", "other"),
    "R3": ("R3",),
    "R4": ("R4",),
    "input": ("input",),
    "all together": ("all",),
}


@dataclass(frozen=True, slots=True)
class Row:
    """A model's trials: (kind, worst relative change, number of claims)."""

    name: str
    dtype: str
    trials: tuple[tuple[str, float, int], ...]
    blocked: tuple[Blocked, ...] = ()

    def worst(self) -> float:
        return max(change for _, change, _ in self.trials)


@click.command()
@click.option("-o", "--output", type=click.Path(path_type=Path), default=HERE / "certificates.md", show_default=True)
@click.argument("types", nargs=-1)
def main(output: Path, types: tuple[str, ...]) -> None:
    """Prove TYPES (default: those of the committed table) and the trained models, and write the tables."""
    torch.set_num_threads(1)
    small, own = [], []
    for name in types or TYPES.split():
        small.append(random_row(name)[0])
        click.echo(f"{name}: {small[-1].worst():.1e}", err=True)
    for name in TRAINED:
        row, config = random_row(str(DATA / name), name)
        small.append(row)
        own.append(weights_row(DATA / name, name, config))
        click.echo(f"{name}: {row.worst():.1e}, own weights {own[-1].worst():.1e}", err=True)
    text = report(small, own)
    output.write_text(text, encoding="utf-8")
    click.echo(text)
    if any(row.worst() > 1e-6 for row in (*small, *own)):
        sys.exit("a certificate is above 1e-6")


def random_row(model: str, name: str | None = None) -> tuple[Row, Config]:
    """The certificate on the small random model, as `autoquant analyze` makes it."""
    source = find_source(model)
    config = certify(analyze(source), source)
    assert config.certificate is not None
    trials = tuple((row.kind, row.worst, row.count) for row in config.certificate.rows)
    return Row(name or model, config.certificate.dtype, trials, config.blocked), config


def weights_row(folder: Path, name: str, config: Config) -> Row:
    """The same claims on the checkpoint's own weights, as `autoquant verify` tries them."""
    trials = verify_weights(folder, config).trials
    return Row(name, "float64", tuple((trial.kind, trial.change, 1) for trial in trials))


def report(small: Sequence[Row], own: Sequence[Row]) -> str:
    """Everything as markdown."""
    worst = max((*small, *own), key=Row.worst)
    parts = [
        "# Certificates",
        f"`python benchmarks/certificates.py`, {datetime.date.today()}, torch {version('torch')}, transformers "
        f"{version('transformers')}, Python {platform.python_version()}, CPU. Largest relative change of the logits, "
        "`|new - old| / |old|`, when each claim is applied alone (and all together) by the executor with random scales "
        f"in [1/2, 2] and random Hadamard rotations. Allowed: {TOLERANCE:.0e}. Worst of all: {worst.worst():.1e} "
        f"({worst.name}). A dash: the model has no such claim; what is blocked is below.",
        "The certificates of all model types are in [coverage.md](../docs/coverage.md).",
        "## Small random models of the same structure",
        "What `autoquant analyze` proves before it writes a config: reduced sizes, random norm weights, biases and "
        "routers, float64. In brackets the number of claims, each of which covers all layers of its kind.",
        table(small, counts=True),
        "## Trained models, their own weights",
        "`autoquant verify MODEL CONFIG`: two sequences of 16 random tokens, float64.",
        table(own, counts=False),
        "## Mistakes",
        "Each put into one proved claim (or, where the executor refuses such a config, into the executor); two layers, "
        "small as above (`benchmarks/mutations.py`). The last column is the same mistake on a model with the gains 1 "
        "and biases 0 of default initialisation: a certificate on such a model is blind to those in bold.",
        mistakes(),
        "## Blocked",
        "What the analyzer lists as impossible, in its own words; online rotations that the executor cannot place too.",
        *(f"**{row.name}**\n\n{reasons(row.blocked)}" for row in small if row.blocked),
    ]
    return "\n\n".join(parts) + "\n"


def table(rows: Iterable[Row], counts: bool) -> str:
    lines = ["| model | " + " | ".join(KINDS) + " |", "|---" * (len(KINDS) + 1) + "|"]
    for row in rows:
        cells = []
        for kinds in KINDS.values():
            found = [(change, count) for kind, change, count in row.trials if kind in kinds]
            number = f" ({sum(count for _, count in found)})" if counts and kinds != ("all",) else ""
            cells.append(f"{max(change for change, _ in found):.1e}{number}" if found else "-")
        name = row.name if row.dtype == "float64" else f"{row.name} ({row.dtype})"
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def mistakes() -> str:
    lines = ["| mistake | model | right | mistaken | mistaken, default initialisation |", "|---|---|---|---|---|"]
    for mutation in MUTATIONS:
        right, wrong, default = figures(mutation)
        blind = f"**{default:.1e}**" if default <= TOLERANCE else f"{default:.1e}"
        lines.append(f"| {mutation.title} | {mutation.model} | {right:.1e} | {wrong:.1e} | {blind} |")
    return "\n".join(lines)


def reasons(blocked: Iterable[Blocked]) -> str:
    return "\n".join(
        f"- {b.what} of `{b.path}`{f' (layers {b.layers})' if b.layers else ''}: {because(b)}" for b in blocked
    )


if __name__ == "__main__":
    main()
