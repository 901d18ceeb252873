"""Every causal language model type that transformers registers: analysed, proved, and one row each.

Each type runs in a process of its own, so that a crash, a hang or a model that eats memory costs one row. Finished rows
are kept in a folder and used again, so that an interrupted survey goes on where it stopped.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib.metadata import version
from pathlib import Path
from typing import Any

from autoquant.files import write_text

Row = dict[str, Any]
TIMEOUT = 300.0
"""Seconds that one type may take."""


def registered_types() -> list[str]:
    """Every model type of ``AutoModelForCausalLM``, sorted."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def examine(model_type: str) -> Row:
    """One row: how the type was captured, what it allows, what is proved, or why not. Never raises AutoQuantError."""
    from autoquant.analyze import analyze
    from autoquant.certify import certify
    from autoquant.errors import AutoQuantError
    from autoquant.models import resolve
    from autoquant.report.summary import because, reached

    row: Row = {"type": model_type, "torch": version("torch"), "transformers": version("transformers")}
    start = time.perf_counter()
    try:
        source = resolve(model_type)
        analyzed = analyze(source)
    except AutoQuantError as error:
        return row | {"captured": None, "reason": error.message, "seconds": round(time.perf_counter() - start, 1)}
    config = analyzed.config
    linears = [whole for linear in config.model.linears for whole in reached(config, linear).values()]
    residual = [space.size for space in config.rotation.spaces if space.kind == "R1"]
    row |= {
        "captured": analyzed.captured.how,
        "layers": config.model.layers,
        "parameters": config.model.parameters,
        "linears": len(linears),
        "smoothable": sum(linears),
        "groups": len(config.smoothing.groups),
        "residual": residual[0] if residual else None,
        "spaces": len(config.rotation.spaces),
        "online": len(config.rotation.online),
        "blocked": sorted({f"{b.what}: {because(b)}" for b in config.blocked}),
        "unknown_operators": list(analyzed.findings.unknown_operators),
        "steps": {step: round(seconds, 2) for step, seconds in analyzed.seconds.items()},
    }
    try:
        certificate = certify(analyzed, source).certificate
        if certificate is not None:
            row["certificate"] = {line.kind: line.worst for line in certificate.rows}
            row["dtype"] = certificate.dtype
    except AutoQuantError as error:
        row["unproved"] = error.message
    return row | {"seconds": round(time.perf_counter() - start, 1)}


def survey(
    types: Sequence[str],
    folder: Path,
    *,
    jobs: int,
    timeout: float = TIMEOUT,
    done: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """Examine ``types``, ``jobs`` at a time, each in a process of its own; rows of ``folder`` are not made again."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = {row["type"]: row for row in _finished(folder) if row["type"] in types}
    with ThreadPoolExecutor(jobs) as pool:
        pending = {pool.submit(_in_process, name, timeout): name for name in types if name not in rows}
        for future in as_completed(pending):
            row = future.result()
            rows[row["type"]] = row
            write_text(folder / f"{row['type']}.json", json.dumps(row, indent=2) + "\n", force=True)
            done(row)
    return [rows[name] for name in types]


def _finished(folder: Path) -> Iterator[Row]:
    """Rows that were made with the versions at hand."""
    for path in sorted(folder.glob("*.json")):
        row: Row = json.loads(path.read_text())
        if (row.get("torch"), row.get("transformers")) == (version("torch"), version("transformers")):
            yield row


def _in_process(model_type: str, timeout: float) -> Row:
    """Run ``python -m autoquant.survey TYPE`` and read the row that it prints."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    row: Row = {"type": model_type, "torch": version("torch"), "transformers": version("transformers")}
    try:
        ran = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "autoquant.survey", model_type],
            capture_output=True,
            text=True,
            timeout=timeout,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        return row | {"captured": None, "reason": f"not finished after {timeout:.0f} s", "seconds": timeout}
    lines = ran.stdout.strip().splitlines()
    if ran.returncode == 0 and lines:
        found: Row = json.loads(lines[-1])
        return found
    last = (ran.stderr.strip().splitlines() or [f"exit code {ran.returncode}"])[-1]
    return row | {"captured": None, "reason": f"crashed: {last}", "crashed": True}


def totals(rows: Sequence[Row]) -> dict[str, int]:
    """Counts over all types."""
    captured = [row for row in rows if row.get("captured")]
    return {
        "types": len(rows),
        "captured": len(captured),
        "proved": sum("certificate" in row for row in captured),
        "with a smoothing group": sum(row["groups"] > 0 for row in captured),
        "residual rotatable": sum(row["residual"] is not None for row in captured),
        "tracebacks": sum(row.get("crashed", False) for row in rows),
    }


def coverage_text(rows: Sequence[Row], command: str) -> str:
    """The survey as Markdown: totals, a table, and what is impossible with the reason."""
    count = totals(rows)
    lines = [
        "# Coverage",
        "",
        f"Every model type that transformers {rows[0]['transformers']} registers for causal language modelling, at its",
        f"default size, with torch {rows[0]['torch']}. Made by `{command}`.",
        "",
        ", ".join(f"{number} {what}" for what, number in count.items()) + ".",
        "",
        "| type | captured | linears smoothed | groups | residual rotation | spaces | certificate, worst | seconds |",
        "|---|---|---:|---:|---|---:|---:|---:|",
    ]
    for row in rows:
        if not row.get("captured"):
            lines.append(f"| {row['type']} | no | | | | | | {row.get('seconds', '')} |")
            continue
        worst = f"{max(row['certificate'].values(), default=0):.0e}" if "certificate" in row else "not proved"
        cells = [
            row["type"],
            row["captured"],
            f"{row['smoothable']} of {row['linears']}",
            str(row["groups"]),
            str(row["residual"] or "blocked"),
            str(row["spaces"]),
            worst,
            str(row["seconds"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    for title, key in (("Not captured", "reason"), ("Not proved", "unproved")):
        failed = [row for row in rows if row.get(key)]
        if failed:
            lines += ["", f"## {title}", "", *(f"- **{row['type']}**: {row[key]}" for row in failed)]
    unknown = sorted({name for row in rows for name in row.get("unknown_operators", [])})
    lines += ["", "## Operators without a rule", "", ", ".join(f"`{name}`" for name in unknown) or "None."]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    print(json.dumps(examine(sys.argv[1])))
