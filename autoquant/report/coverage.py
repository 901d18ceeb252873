"""The survey's rows as a page: totals, a table, and what is impossible with the reason."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

Row = dict[str, Any]


def totals(rows: Sequence[Row]) -> dict[str, int]:
    """Counts over all types."""
    captured = [row for row in rows if row.get("captured")]
    return {
        "types": len(rows),
        "captured": len(captured),
        "proved": sum("certificate" in row for row in captured),
        "with a smoothing group": sum(row["groups"] > 0 for row in captured),
        "residual rotatable": sum(row["residual"] is not None for row in captured),
        "with an operator without a rule": sum(bool(row["unknown_operators"]) for row in captured),
        "with a repaired default configuration": sum("repaired" in row for row in rows),
        "tracebacks": sum(row.get("crashed", False) for row in rows),
    }


def coverage_text(rows: Sequence[Row], command: str, absent: Sequence[str] = ()) -> str:
    """``coverage.md``: what every type allows, what was measured, and what is impossible, in Markdown.

    ``absent``: registered types that have no row; the page says so.
    """
    versions = f"transformers {rows[0]['transformers']}, torch {rows[0]['torch']}"
    lines = [
        "# Coverage",
        "",
        f"The model types that are registered for causal language modelling ({versions}), at default size.",
        f"Made by `{command}`; every figure and every reason is also in [coverage.json](coverage.json).",
        "",
        *([f"**Incomplete**: {len(absent)} types were not run: {', '.join(absent)}.", ""] if absent else []),
        *(f"- {number} {what}" for what, number in totals(rows).items()),
        "",
        *_seconds(rows),
        "",
        "| type | captured | linears smoothed | groups | residual rotation | spaces | online | certificate, worst "
        "| seconds |",
        "|---|---|---:|---:|---|---:|---:|---:|---:|",
        *(_line(row) for row in rows),
        _sums(rows),
    ]
    for title, key in (("Not captured", "reason"), ("Not proved", "unproved")):
        failed = [row for row in rows if row.get(key)]
        if failed:
            lines += ["", f"## {title}", "", *(f"- **{row['type']}**: {row[key]}" for row in failed)]
    repaired = [row for row in rows if row.get("repaired")]
    if repaired:
        lines += ["", "## Default configurations that were repaired", ""]
        lines += [f"- **{row['type']}**: {_listed(row['repaired'])}" for row in repaired]
    blocked = [row for row in rows if row.get("captured") and row["residual"] is None]
    lines += ["", "## Residual not rotatable", "", *(f"- **{row['type']}**: {_why(row)}" for row in blocked)]
    unknown: dict[str, list[str]] = {}
    for row in rows:
        for name in row.get("unknown_operators", []):
            unknown.setdefault(name, []).append(row["type"])
    lines += ["", "## Operators without a rule", ""]
    lines += [f"- `{name}`: {', '.join(types)}" for name, types in sorted(unknown.items())] or ["None."]
    return "\n".join([*lines, ""])


def _seconds(rows: Sequence[Row]) -> list[str]:
    """What the steps cost."""
    steps = [row["steps"] for row in rows if row.get("captured")]
    if not steps:
        return ["Nothing was captured."]
    ratio = median(step["analysis"] / max(step["capture"], 0.01) for step in steps)
    medians = ", ".join(f"{name} {median(step.get(name, 0) for step in steps):.1f} s" for name in steps[0])
    total = sum(row.get("seconds", 0) for row in rows)
    return [
        f"Medians: {medians}; analysis takes {ratio:.2f} of the capture's time at the median. The rows took "
        f"{total / 60:.0f} minutes in all, one after the other."
    ]


def _line(row: Row) -> str:
    if not row.get("captured"):
        return f"| {row['type']} | no | | | | | | | {row.get('seconds', '')} |"
    if "certificate" not in row:
        worst = "not proved"
    else:
        worst = f"{max(row['certificate'].values()):.0e}" if row["certificate"] else "nothing claimed"
    cells = (
        row["type"],
        row["captured"],
        f"{row['smoothable']} of {row['linears']}",
        row["groups"],
        row["residual"] or "blocked",
        row["spaces"],
        row["online"],
        worst,
        row["seconds"],
    )
    return f"| {' | '.join(map(str, cells))} |"


def _sums(rows: Sequence[Row]) -> str:
    """The table's last line: totals per column."""
    captured = [row for row in rows if row.get("captured")]
    proved = [row for row in captured if "certificate" in row]
    worst = max((change for row in proved for change in row["certificate"].values()), default=0.0)
    cells = (
        f"**{len(rows)}**",
        f"**{len(captured)}**",
        f"**{_sum(captured, 'smoothable')} of {_sum(captured, 'linears')}**",
        f"**{_sum(captured, 'groups')}**",
        f"**{sum(row['residual'] is not None for row in captured)}**",
        f"**{_sum(captured, 'spaces')}**",
        f"**{_sum(captured, 'online')}**",
        f"**{len(proved)} proved, worst {worst:.0e}**",
        f"**{sum(row.get('seconds', 0) for row in rows):.0f}**",
    )
    return f"| {' | '.join(cells)} |"


def _sum(rows: Sequence[Row], key: str) -> int:
    return sum(row[key] for row in rows)


def _why(row: Row) -> str:
    return row["residual_blocked"] or "no table of embeddings is looked up and read as a vector by linears"


def _listed(fields: dict[str, str]) -> str:
    values = {name: value if len(value) < 60 else f"{value[:57]}..." for name, value in fields.items()}
    return ", ".join(f"{name} = {value}" for name, value in values.items())
