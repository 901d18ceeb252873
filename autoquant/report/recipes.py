"""What the commands for other tools' recipes return: values that say in a few lines what was found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from autoquant.io.columns import columns, wrapped
from autoquant.report.results import WIDTH, shown

if TYPE_CHECKING:
    from autoquant.config.format import Config
    from autoquant.recipes.audit import Judged
    from autoquant.recipes.auditing import Entry
    from autoquant.recipes.matching import WrittenMapping
    from autoquant.recipes.pairs import Refusal


@shown
@dataclass(frozen=True, slots=True, repr=False)
class Recipe:
    """A config for another tool: ``text`` is the file, ``refused`` what the tool cannot be told."""

    tool: str
    text: str
    refused: tuple[Refusal, ...]

    def lines(self, width: int = WIDTH) -> list[str]:
        """What is left out, a line each, and how much that is."""
        left = [line for refusal in self.refused for line in wrapped(f"left out: {refusal}", width)]
        return [*left, f"{self.tool}: {len(self.refused)} left out, all else is in the recipe"]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        refused = [{"name": refusal.name, "reason": refusal.reason} for refusal in self.refused]
        return {"tool": self.tool, "recipe": self.text, "left_out": refused}


@shown
@dataclass(frozen=True, slots=True, repr=False)
class Imported:
    """A proved config that uses the groups of a hand-made recipe alone; ``unused``: mappings that take nothing."""

    config: Config
    used: tuple[str, ...]
    unused: tuple[WrittenMapping, ...]

    def lines(self, width: int = WIDTH) -> list[str]:
        """The groups that are on, and the mappings that take nothing."""
        unused = [line for mapping in self.unused for line in wrapped(f"takes nothing: {mapping}", width)]
        return [*(f"used: {name}" for name in self.used), *unused]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"used": list(self.used), "unused": [str(mapping) for mapping in self.unused]}


@shown
@dataclass(frozen=True, slots=True, repr=False)
class Audited:
    """Hand-made mappings judged: those of one file, or of a tool's registry, entry by entry.

    ``patch``: a unified diff that mends the registry, empty where nothing is to be mended.
    """

    tool: str
    version: str
    entries: tuple[Entry, ...]
    patch: str = ""

    @property
    def holds(self) -> bool:
        """True if no mapping is wrong, incomplete or stops the tool."""
        return all(entry.audit is not None and entry.audit.verdict in ("right", "skipped") for entry in self.entries)

    def lines(self, width: int = WIDTH) -> list[str]:
        """A row for each mapping, then totals."""
        rows = [row for entry in self.entries for row in _rows(entry)]
        counts = Counter(row[2] for row in rows)
        said = ", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items()))
        name = f"{self.tool} {self.version}".strip()
        idle = [line for entry in self.entries for line in _idle(entry, width)]
        return [
            *columns(("entry", "mapping", "", "change of the logits", "why"), rows, width, "<<<><"),
            *idle,
            f"{name}: {said}",
        ]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"tool": self.tool, "version": self.version, "entries": [_entry(entry) for entry in self.entries]}


def _rows(entry: Entry) -> Iterator[tuple[str, str, str, str, str]]:
    name = " ".join(part for part in (entry.name, entry.modifier) if part)
    if entry.audit is None:
        yield name, "", "not judged", "", entry.why
        return
    for one in entry.audit.judged:
        yield name, str(one.mapping), one.verdict.value, change_of(one), one.why


def change_of(one: Judged) -> str:
    """The relative change of the logits, as a table has it."""
    return "" if one.change is None else f"{one.change:.1e}"


def _idle(entry: Entry, width: int) -> list[str]:
    if entry.audit is None or not entry.audit.idle:
        return []
    return wrapped(f"{entry.name} {entry.modifier}: no mapping uses {'; '.join(entry.audit.idle)}".strip(), width)


def _entry(entry: Entry) -> dict[str, Any]:
    judged = [] if entry.audit is None else entry.audit.judged
    return {
        "name": entry.name,
        "modifier": entry.modifier,
        "model": entry.model,
        "verdict": None if entry.audit is None else entry.audit.verdict.value,
        "why": entry.why,
        "idle": [] if entry.audit is None else list(entry.audit.idle),
        "mappings": [
            {
                "smooth": one.mapping.smooth,
                "balance": list(one.mapping.balance),
                "verdict": one.verdict.value,
                "sets": one.sets,
                "change": one.change,
                "why": one.why,
            }
            for one in judged
        ],
    }
