"""The survey's rows as a page: totals, a table for each kind of model, and what is impossible with the reason."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from statistics import median
from typing import Any

from autoquant.models.tasks import KINDS, full_name, split_name

Row = dict[str, Any]

TIMINGS = ("seconds", "steps")
"""Keys of a row that differ from run to run."""


def totals(rows: Sequence[Row]) -> dict[str, int]:
    """Counts over ``rows``."""
    captured = [row for row in rows if row.get("captured")]
    return {
        "types": len(rows),
        "captured": len(captured),
        "proved": sum(map(proved, captured)),
        "with a smoothing group": sum(row["groups"] > 0 for row in captured),
        "residual rotatable": sum(bool(row["residual"]) for row in captured),
        "with a claim that the proof refused": sum(bool(row.get("refused")) for row in captured),
        "with an operator without a rule": sum(bool(row["unknown_operators"]) for row in captured),
        "with a repaired default configuration": sum("repaired" in row for row in rows),
        "tracebacks": sum(row.get("crashed", False) for row in rows),
    }


def proved(row: Row) -> bool:
    """Whether the certificate holds and the config can be written; a row that says why not is not proved."""
    return "certificate" in row and "unproved" not in row


def offers(row: Row) -> bool:
    """Whether something is claimed and proved."""
    return proved(row) and row["groups"] + row["spaces"] > 0


def rows_text(rows: Sequence[Row]) -> str:
    """``coverage.json``: a row on each line, without what it took, so that a difference shows what was found."""
    kept = ({key: value for key, value in row.items() if key not in TIMINGS} for row in rows)
    return "[\n" + ",\n".join(map(json.dumps, kept)) + "\n]\n"


def coverage_text(rows: Sequence[Row], command: str, absent: Sequence[str] = ()) -> str:
    """``coverage.md``: what every type allows, what was measured, and what is impossible, in Markdown.

    ``absent``: full names of registered types that have no row; the page says so.
    """
    versions = ", ".join(
        f"{package} {' and '.join(sorted({row[package] for row in rows}))}" for package in ("transformers", "torch")
    )
    kinds = [kind for kind in KINDS if any(row["kind"] == kind for row in rows)]
    lines = [
        "# Coverage",
        "",
        f"The model types that are registered for each kind of language model ({versions}), at default size; a type of",
        "several kinds has a row in each table.",
        f"Made by `{command}`; every figure and every reason is also in [coverage.json](coverage.json).",
        "",
        *_incomplete(absent),
        f"| kind | {' | '.join(totals(rows))} |",
        f"|---|{'---:|' * len(totals(rows))}",
        *(_counts(kind, [row for row in rows if row["kind"] == kind]) for kind in kinds),
        _counts("**all**", rows),
        "",
        *_seconds(rows),
    ]
    for kind in kinds:
        mine = [row for row in rows if row["kind"] == kind]
        lines += [
            "",
            f"## {kind}",
            "",
            "| type | captured | linears smoothed | groups | residual rotation | spaces | online "
            "| certificate, worst |",
            "|---|---|---:|---:|---|---:|---:|---:|",
            *(_line(row) for row in mine),
            _sums(mine),
        ]
    lines += _listed_rows("Not captured", rows, lambda row: row.get("reason"))
    lines += _listed_rows("Not proved", rows, lambda row: row.get("unproved"))
    lines += _listed_rows("Claimed by the analysis, refused by the proof", rows, _refused)
    lines += _listed_rows("Nothing claimed", rows, _nothing)
    lines += _listed_rows("Default configurations that were repaired", rows, _repairs)
    lines += _listed_rows("Residual not rotatable", rows, _why)
    lines += _listed_rows("Encoders, decoders and towers", rows, _stacks, _ABOUT_STACKS)
    lines += _listed_rows("Parts that were not traced", rows, _untraced)
    unknown: dict[str, list[str]] = {}
    for row in rows:
        for name in row.get("unknown_operators", []):
            unknown.setdefault(name, []).append(_name(row))
    lines += ["", "## Operators without a rule", ""]
    lines += [f"- `{name}`: {', '.join(types)}" for name, types in sorted(unknown.items())] or ["None."]
    return "\n".join([*lines, ""])


_ABOUT_STACKS = (
    "Of every type with several stacks of layers: linears smoothed in each, and the size of the residual stream where "
    "it can be rotated."
)


def _name(row: Row) -> str:
    return full_name(row["type"], row["kind"])


def _incomplete(absent: Sequence[str]) -> list[str]:
    if not absent:
        return []
    listed = [
        f"{kind} {', '.join(of_kind)}"
        for kind in KINDS
        if (of_kind := [model_type for model_type, its in map(split_name, absent) if its == kind])
    ]
    return [f"**Incomplete**: {len(absent)} types were not run: {'; '.join(listed)}.", ""]


def _counts(title: str, rows: Sequence[Row]) -> str:
    return f"| {title} | {' | '.join(str(number) for number in totals(rows).values())} |"


def _listed_rows(
    title: str, rows: Sequence[Row], text: Callable[[Row], str | None], about: str | None = None
) -> list[str]:
    """A section with a line for each row that there is a ``text`` of."""
    lines = [f"- **{_name(row)}**: {said}" for row in rows if (said := text(row))]
    return ["", f"## {title}", "", *([about, ""] if about else []), *lines] if lines else []


def _seconds(rows: Sequence[Row]) -> list[str]:
    """What the steps cost, where the rows say it."""
    steps = [row["steps"] for row in rows if row.get("captured") and "steps" in row]
    if not steps:
        return [] if any(row.get("captured") for row in rows) else ["Nothing was captured."]
    ratio = median(step["analysis"] / max(step["capture"], 0.01) for step in steps)
    medians = ", ".join(f"{name} {median(step.get(name, 0) for step in steps):.1f} s" for name in steps[0])
    total = sum(row.get("seconds", 0) for row in rows)
    return [
        f"Medians: {medians}; analysis takes {ratio:.2f} of the capture's time at the median. The rows took "
        f"{total / 60:.0f} minutes in all, one after the other."
    ]


def _line(row: Row) -> str:
    if not row.get("captured"):
        return f"| {row['type']} | no | | | | | | |"
    if not proved(row):
        worst = "not proved"
    else:
        worst = f"{max(row['certificate'].values()):.0e}" if row["certificate"] else "nothing claimed"
    if refused := row.get("refused"):
        worst += f", {len(refused)} refused"
    cells = (
        row["type"],
        row["captured"],
        f"{row['smoothable']} of {row['linears']}",
        row["groups"],
        _sizes(row["residual"]) or "blocked",
        row["spaces"],
        row["online"],
        worst,
    )
    return f"| {' | '.join(map(str, cells))} |"


def _sums(rows: Sequence[Row]) -> str:
    """The table's last line: totals per column."""
    captured = [row for row in rows if row.get("captured")]
    holding = [row for row in captured if proved(row)]
    worst = max((change for row in holding for change in row["certificate"].values()), default=0.0)
    cells = (
        f"**{len(rows)}**",
        f"**{len(captured)}**",
        f"**{_sum(captured, 'smoothable')} of {_sum(captured, 'linears')}**",
        f"**{_sum(captured, 'groups')}**",
        f"**{sum(bool(row['residual']) for row in captured)}**",
        f"**{_sum(captured, 'spaces')}**",
        f"**{_sum(captured, 'online')}**",
        f"**{len(holding)} proved, worst {worst:.0e}**",
    )
    return f"| {' | '.join(cells)} |"


def _sum(rows: Sequence[Row], key: str) -> int:
    return sum(row[key] for row in rows)


def _sizes(sizes: Iterable[int]) -> str:
    return ", ".join(map(str, sizes))


def _why(row: Row) -> str | None:
    if not row.get("captured") or row["residual"]:
        return None
    return row["residual_blocked"] or "no table of embeddings is looked up and read as a vector by linears"


def _nothing(row: Row) -> str | None:
    """Why a certificate is empty: what was not traced, else what blocks."""
    if not row.get("captured") or not proved(row) or row["certificate"]:
        return None
    return _untraced(row) or "; ".join(row["blocked"]) or "it holds no linear that anything could be undone in"


def _refused(row: Row) -> str | None:
    return "; ".join(row.get("refused", ()))


def _stacks(row: Row) -> str | None:
    """``'encoder.block 48 of 72, residual 512; decoder.block 96 of 120'``, for a model of several stacks."""
    stacks = {path: stack for path, stack in row.get("stacks", {}).items() if path}
    if len(stacks) < 2:
        return None
    return "; ".join(
        f"{path} {stack['smoothable']} of {stack['linears']}"
        + (f", residual {_sizes(stack['residual'])}" if stack["residual"] else "")
        for path, stack in stacks.items()
    )


def _untraced(row: Row) -> str | None:
    return "; ".join(f"{path}: {reason}" for path, reason in row.get("untraced", {}).items())


def _repairs(row: Row) -> str | None:
    fields = row.get("repaired", {})
    values = {name: value if len(value) < 60 else f"{value[:57]}..." for name, value in fields.items()}
    return ", ".join(f"{name} = {value}" for name, value in values.items())
