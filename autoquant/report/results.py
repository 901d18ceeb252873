"""What the Python API returns: values that say in a few lines what was found, on a console, in a notebook, as JSON."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from autoquant.certificate.claims import IN_WORDS, ran, standing
from autoquant.config.format import Config, Coverage, edited
from autoquant.io.columns import columns, wrapped
from autoquant.io.inert import inert

if TYPE_CHECKING:
    from autoquant.certificate.prove import Trial
    from autoquant.evaluation.perplexity import Estimate, Evaluation

Result = TypeVar("Result")

WIDTH = 100
"""Columns of a repr."""


def shown(result: type[Result]) -> type[Result]:
    """A class whose ``lines()`` are its ``repr`` and, as text in which nothing is markup, its look in a notebook."""

    def text(self: Any) -> str:
        return "\n".join(map(inert, self.lines()))

    def html(self: Any) -> str:
        return f"<pre>{escape(text(self))}</pre>"

    for name, method in {"__repr__": text, "_repr_html_": html}.items():
        setattr(result, name, method)
    return result


@shown
@dataclass(frozen=True, slots=True, repr=False)
class Analysis:
    """What can be smoothed and rotated in a model. ``config`` is what the other functions take."""

    config: Config
    capture: str
    seconds: Mapping[str, float]
    unknown_operators: tuple[str, ...] = ()
    explaining: Callable[[str], str] = field(default=str, compare=False)

    def explain(self, path: str) -> str:
        """Why a linear is or is not smoothable and rotatable. Raises AutoQuantError with the nearest path."""
        return self.explaining(path)

    def lines(self, width: int = WIDTH, proof: bool = True) -> list[str]:
        """The table of linears, what is blocked and why, totals; ``proof`` False says nothing of the certificate."""
        from autoquant.report.table import summary_lines  # imports numpy

        return summary_lines(
            self.config if proof else edited(self.config, certificate=None), self.unknown_operators, width
        )

    def timing(self) -> str:
        """How the graph was captured and what each step took."""
        return f"captured by {self.capture}: {', '.join(f'{step} {s:.1f} s' for step, s in self.seconds.items())}"


@shown
@dataclass(frozen=True, slots=True, repr=False)
class Checked:
    """A config that is valid and, where a model was given, fits it."""

    config: Config
    file: str
    model: str | None = None

    def lines(self, width: int = WIDTH) -> list[str]:
        """One line of counts, and how its claims stand to their proof."""
        handmade = sum(group.by_hand for group in self.config.smoothing.groups)
        extra = {"smoothing groups": f" ({handmade} by hand)"} if handmade else {}
        counts = ", ".join(f"{number} {what}{extra.get(what, '')}" for what, number in self._counts().items())
        fits = f" and fits {self.model}" if self.model else ""
        return [f"{self.file}: valid{fits}; {counts}; {IN_WORDS[standing(self.config)]}"]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        counts = {what.replace(" ", "_"): number for what, number in self._counts().items()}
        return {"config": self.file, "valid": True, "model": self.model, "claims": standing(self.config), **counts}

    def _counts(self) -> dict[str, int]:
        return {
            "smoothing groups": len(self.config.smoothing.groups),
            "rotation spaces": len(self.config.rotation.spaces),
            "linears": len(self.config.model.linears),
            "blocked": len(self.config.blocked),
        }


@shown
@dataclass(frozen=True, slots=True, repr=False)
class Verification:
    """Every claim of a config, tried; ``refused``: online rotations that cannot be placed, and why."""

    model: str
    own_weights: bool
    trials: tuple[Trial, ...]
    refused: Mapping[str, str]
    tolerance: float
    coverage: Coverage | None = None

    @property
    def failed(self) -> tuple[Trial, ...]:
        """The trials that changed the logits."""
        return tuple(trial for trial in self.trials if not trial.holds(self.tolerance))

    @property
    def holds(self) -> bool:
        """True if every claim holds."""
        return not self.failed

    def lines(self, width: int = WIDTH) -> list[str]:
        """A row for each trial, then totals."""
        failed = self.failed
        rows = [(t.name, t.kind, f"{t.change:.1e}", _verdict(t, t in failed)) for t in self.trials]
        subject = "its own weights" if self.own_weights else "a small random model of its structure"
        held = len(self.trials) - len(failed)
        return [
            *columns(("claim", "kind", "change of the logits", ""), rows, width, "<<><"),
            *(line for path, why in self.refused.items() for line in wrapped(f"not tried: {path}: {why}", width)),
            *([] if self.coverage is None else wrapped(f"run: {ran(self.coverage)}", width)),
            f"{held} of {len(self.trials)} hold (at most {self.tolerance:.0e}) on {self.model}: {subject}",
        ]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        rows = [
            {"name": t.name, "kind": t.kind, "change": _finite(t.change), "ok": t.holds(self.tolerance)}
            for t in self.trials
        ]
        weights = "own" if self.own_weights else "random"
        coverage = None if self.coverage is None else self.coverage.model_dump(mode="json")
        return {
            "weights": weights,
            "tolerance": self.tolerance,
            "trials": rows,
            "not_tried": dict(self.refused),
            "coverage": coverage,
        }


@shown
@dataclass(frozen=True, slots=True, repr=False)
class Written:
    """A folder that was written: what was done, and ``facts`` of it for JSON."""

    folder: Path
    said: tuple[str, ...]
    facts: Mapping[str, Any]

    def lines(self, width: int = WIDTH) -> list[str]:
        """What was done."""
        return list(self.said)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"output": str(self.folder), **self.facts}


@shown
@dataclass(frozen=True, slots=True, repr=False)
class Found:
    """A config with every knob set that helped on held-out text; the evidence is in ``config.search``."""

    config: Config

    def lines(self, width: int = WIDTH) -> list[str]:
        """A line for each decision, then what all of them did."""
        result = self.config.search
        assert result is not None
        return [
            *(f"{d.where} = {d.choice} ({d.before:g} -> {d.after:g}; {d.cost})" for d in result.decisions),
            f"held-out perplexity {result.before:+.2f} % -> {result.after:+.2f} ± {result.standard_error:.2f} % "
            f"above float, {len(result.decisions)} decisions",
        ]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        assert self.config.search is not None
        return self.config.search.model_dump(mode="json")


@shown
@dataclass(frozen=True, slots=True, repr=False)
class Evaluated:
    """Perplexity of models on one text, with standard errors over windows."""

    results: Mapping[str, Evaluation]
    settings: Mapping[str, Any]
    in_halves: tuple[str, ...] = ()
    """Models that have an encoder and a decoder, each of which reads one half of a window."""

    def lines(self, width: int = WIDTH) -> list[str]:
        """A row for each model; columns that have no value are left out."""
        shown = [key for key in _COLUMNS if any(_estimates(r)[key] is not None for r in self.results.values())]
        rows = [
            (name, f"{r.tokens:,}", str(r.windows), *(_cell(key, _estimates(r)[key]) for key in shown))
            for name, r in self.results.items()
        ]
        from autoquant.models.reading import IN_HALVES

        table = columns(("model", "tokens", "windows", *(key.replace("_", " ") for key in shown)), rows, width)
        said = [f"{name}: {IN_HALVES}" for name in self.in_halves]
        return [*table, *(line for one in said for line in wrapped(one, width))]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        rows = [
            {"model": name, "tokens": result.tokens, "windows": result.windows}
            | {
                key: {"mean": _finite(estimate.mean), "standard_error": _finite(estimate.standard_error)}
                for key, estimate in _estimates(result).items()
                if estimate is not None
            }
            for name, result in self.results.items()
        ]
        return {"settings": dict(self.settings), "results": rows, "in_halves": list(self.in_halves)}


@shown
@dataclass(frozen=True, slots=True, repr=False)
class Compared:
    """Perplexity of every strategy after every preparation: ``markdown`` for people, ``report`` for JSON."""

    markdown: str
    report: Mapping[str, Any]

    def lines(self, width: int = WIDTH) -> list[str]:
        """The page; a table that is wider than that becomes a paragraph for each row."""
        parts = groupby(self.markdown.splitlines(), key=lambda line: line.startswith("|"))
        return [line for is_table, part in parts for line in (_narrowed(list(part), width) if is_table else part)]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dict(self.report)


_COLUMNS = ("perplexity", "perplexity_ratio", "nll", "kl", "top1_agreement")


def _estimates(result: Evaluation) -> dict[str, Estimate | None]:
    values = (result.perplexity, result.perplexity_ratio, result.nll, result.kl, result.top1)
    return dict(zip(_COLUMNS, values, strict=True))


def _cell(key: str, estimate: Estimate | None) -> str:
    if estimate is None:
        return ""
    return estimate.said(3 if key == "perplexity" else 5)


def _verdict(trial: Trial, failed: bool) -> str:
    if trial.unreached:
        return f"FAILED: no run reached {trial.unreached}"
    return f"FAILED: {trial.stops}" if trial.stops else "FAILED" if failed else "ok"


def _narrowed(table: Sequence[str], width: int) -> list[str]:
    """A table in Markdown as it is where it fits."""
    if max(map(len, table)) <= width:
        return list(table)
    header, _, *rows = ([cell.strip(" `") for cell in line.split("|")[1:-1]] for line in table)
    return columns(header, rows, width)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no NaN
