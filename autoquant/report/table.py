"""What ``autoquant analyze`` prints: a table of linears, what is blocked and why, totals."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from autoquant.certificate.claims import ran
from autoquant.config.format import Certificate, Config
from autoquant.config.layers import layer_numbers
from autoquant.io.columns import columns, wrapped
from autoquant.report.summary import Section, Summary, summarise

_KEY = (
    ("R1 ", "R1: the residual stream, rotated once and for all in the weights that write and read it"),
    ("R2 ", "R2: the values of each attention head, rotated in the weights as well"),
    ("other ", "other: a vector that passes from one linear to another, rotated in the weights as well"),
    ("online R4", "online R4: a Hadamard rotation can be computed before the linear while the model runs"),
    ("online in", "online in: no rotation in the weights reaches it; one computed while the model runs can"),
)


def summary_lines(config: Config, unknown_operators: Sequence[str] = (), width: int = 100) -> list[str]:
    """What ``config`` says about each linear, what is blocked and why, and totals in the last line.

    ``unknown_operators`` had no rule. The totals are one line, for grep and tail -1.
    """
    summary = summarise(config, unknown_operators)
    lines = [*wrapped(_headline(config), width), "", *_linears(summary, width), ""]
    for title, remarks in _lists(config, summary):
        lines += [*wrapped(title, width), *(line for text in remarks for line in wrapped(text, width, indent=2)), ""]
    return [*lines, summary.totals]


def _headline(config: Config) -> str:
    facts = config.model
    parts = [_count(facts.layers, "layer")]
    if facts.hidden_size:
        parts.append(f"hidden size {facts.hidden_size}")
    if facts.heads and facts.head_size:
        over = f" over {facts.kv_heads} key/value heads" if facts.kv_heads and facts.kv_heads != facts.heads else ""
        parts.append(f"{_count(facts.heads, 'head')}{over} of {facts.head_size}")
    parts.append(f"{facts.parameters:,} parameters")
    parts += ["tied " + " = ".join(names) for names in facts.tied]
    return f"{config.provenance.model}: {', '.join(parts)}"


def _linears(summary: Summary, width: int) -> list[str]:
    rows: list[tuple[str, ...]] = []
    for section in summary.sections:
        rows += [("",) * 4] if rows else []
        rows.append((_section_title(section), "", "", ""))
        for row in section.rows:
            smoothing, rotation = "; ".join(row.smoothing) or "-", ", ".join(row.rotation) or "-"
            rows.append((f"  {row.name}", row.shape, smoothing, rotation))
    return columns(("linear", "in -> out", "smoothed by", "rotation"), rows, width, "<<<<")


def _section_title(section: Section) -> str:
    if section.layers is None:
        return "outside of the layers"
    where = f" of {section.stack}" if section.stack else ""
    return f"{_count(len(layer_numbers(section.layers)), 'layer')}{where}: {section.layers}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _lists(config: Config, summary: Summary) -> Iterator[tuple[str, list[str]]]:
    rotations = [text for section in summary.sections for row in section.rows for text in row.rotation]
    legend = [text for start, text in _KEY if any(rotation.startswith(start) for rotation in rotations)]
    if summary.notes:
        yield "Not smoothable", [f"[{number}] {text}" for number, text in enumerate(summary.notes, start=1)]
    if summary.query_keys:
        yield "Keys against queries, of use for int8 key caches (off by default)", list(summary.query_keys)
    if summary.spaces:
        yield "Rotations", list(summary.spaces)
    if summary.blocked_rotations:
        yield "Not rotatable", list(summary.blocked_rotations)
    if config.certificate is not None:
        yield "Proof", _proof(config.certificate)
    if legend:
        yield "In the table", legend


def _proof(certificate: Certificate) -> list[str]:
    if not certificate.proved:
        return ["none: --no-verify was given"]
    lines = [
        f"{row.kind}: {row.count} tried, logits change by {row.worst:.1e} at most (allowed {certificate.tolerance:.0e})"
        for row in certificate.rows
    ]
    return lines if certificate.coverage is None else [*lines, f"run: {ran(certificate.coverage)}"]
