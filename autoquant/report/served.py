"""What `autoquant serve-check` prints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from autoquant.evaluation.serving import NEAR, Agreement
from autoquant.io.columns import columns
from autoquant.report.results import WIDTH, shown

HEADER = ("folder", "perplexity here", "there", "change", "median difference", "equal tokens", "int8 bits", "")


@shown
@dataclass(frozen=True, slots=True, repr=False)
class ServeCheck:
    """Folders in one engine and here."""

    found: tuple[Agreement, ...]

    @property
    def failed(self) -> tuple[Agreement, ...]:
        """Those that the engine computes otherwise, or not at all."""
        return tuple(one for one in self.found if not one.holds)

    def lines(self, width: int = WIDTH) -> list[str]:
        """A row for each folder, what the engine refused, the versions."""
        refused = [f"{one.folder}: {one.engine} says {one.error}" for one in self.found if one.error is not None]
        first = self.found[0]
        versions = ", ".join(f"{name} {number}" for name, number in first.versions.items())
        return [
            *columns(HEADER, [row_of(one) for one in self.found], width),
            *refused,
            f"{first.tokens} tokens in {versions}",
        ]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"near": NEAR, "folders": [_facts(one) for one in self.found]}


def row_of(one: Agreement) -> tuple[str, ...]:
    """The cells of :data:`HEADER`."""
    if one.theirs is None or one.change is None or one.median is None or one.equal is None:
        return (str(one.folder), f"{one.ours:.3f}", "", "", "", "", "", "refused")
    cells = (f"{one.ours:.3f}", f"{one.theirs:.3f}", f"{one.change:+.2%}", f"{one.median:.1e}", f"{one.equal:.0%}")
    return (str(one.folder), *cells, bits_text(one), verdict(one))


def bits_text(one: Agreement) -> str:
    """How much of what the int8 linears gave is equal bit for bit; nothing where the engine has none."""
    if one.bits is None:
        return ""
    return "equal" if one.bits == 1 else f"{one.bits:.2%}"


def verdict(one: Agreement) -> str:
    """In words."""
    if one.error is not None:
        return "refused"
    if not one.holds:
        return "DIFFERENT"
    return "equal" if one.is_equal else "same"


def _facts(one: Agreement) -> dict[str, Any]:
    return {
        "folder": str(one.folder),
        "engine": one.engine,
        "versions": dict(one.versions),
        "static": one.static,
        "tokens": one.tokens,
        "perplexity": one.ours,
        "perplexity_there": one.theirs,
        "median_difference": one.median,
        "equal_tokens": one.equal,
        "equal_bits": one.bits,
        "holds": one.holds,
        "error": one.error,
    }
