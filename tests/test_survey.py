"""The survey: one process a type, whose failures cost one row; the page; and the committed rows, sampled."""

from __future__ import annotations

import faulthandler
import json
import os
import random
import signal
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest

from autoquant.report.coverage import coverage_text, totals
from autoquant.survey import Row, examine, finished, survey

COMMITTED = Path(__file__).parents[1] / "docs" / "coverage.json"
VERSIONS = {"torch": version("torch").partition("+")[0], "transformers": version("transformers")}


def fine(name: str) -> Row:
    print("noise")  # goes nowhere
    return {"type": name, **VERSIONS, "captured": "export", "process": os.getpid()}


def misbehaving(name: str) -> Row:
    ways: dict[str, Callable[[], object]] = {
        "raises": lambda: 1 // 0,
        "exits": lambda: os._exit(3),
        "segfaults": lambda: (faulthandler.disable(), os.kill(os.getpid(), signal.SIGSEGV)),
        "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
        "hangs": lambda: time.sleep(60),
    }
    if name in ways:
        ways[name]()
    return fine(name)


def test_each_type_has_a_process_and_a_row_in_the_given_order(tmp_path: Path) -> None:
    rows = survey(["c", "a", "b"], tmp_path, jobs=2, make=fine)
    assert [row["type"] for row in rows] == ["c", "a", "b"]
    assert len({os.getpid(), *(row["process"] for row in rows)}) == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "b.json", "c.json"]


def test_what_goes_wrong_costs_one_row(tmp_path: Path) -> None:
    names = ["raises", "exits", "fine", "segfaults", "killed", "hangs"]
    found = {row["type"]: row for row in survey(names, tmp_path, jobs=3, timeout=2, make=misbehaving)}
    assert {name: row.get("reason") for name, row in found.items()} == {
        "raises": "crashed: ZeroDivisionError: integer division or modulo by zero",
        "exits": "crashed: exit code 3",
        "fine": None,
        "segfaults": "crashed: signal SIGSEGV",
        "killed": "crashed: killed, most likely for want of memory",
        "hangs": "not finished after 2 s",
    }
    assert totals([{**row, "captured": None} for row in found.values()])["tracebacks"] == 4


def test_finished_rows_are_kept_and_those_of_other_versions_are_not(tmp_path: Path) -> None:
    first = survey(["a", "b"], tmp_path, jobs=1, make=fine)
    old = {**first[0], "transformers": "4.0.0"}
    (tmp_path / "a.json").write_text(json.dumps(old))
    assert [row["type"] for row in finished(tmp_path)] == ["b"]
    told: list[Row] = []
    second = survey(["a", "b"], tmp_path, jobs=1, done=told.append, make=fine)
    assert [row["type"] for row in told] == ["a"]
    assert second[1] == first[1]
    assert second[0] != old


def test_an_interruption_leaves_no_process_and_no_half_row(tmp_path: Path) -> None:
    def interrupt(row: Row) -> None:
        raise KeyboardInterrupt

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        survey(["fine", "hangs", "later"], tmp_path, jobs=2, done=interrupt, make=misbehaving)
    assert time.monotonic() - started < 30
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fine.json"]
    with pytest.raises(ChildProcessError):  # no child is left to wait for
        os.waitpid(-1, os.WNOHANG)


ROWS: list[Row] = [
    {
        "type": "good", **VERSIONS, "captured": "dynamo", "linears": 5, "smoothable": 4, "groups": 2, "residual": 64,
        "residual_blocked": None, "spaces": 1, "online": 0, "blocked": [], "unknown_operators": [], "seconds": 3.5,
        "steps": {"build": 0.1, "capture": 2.0, "analysis": 0.5}, "certificate": {"R1": 2.5e-15, "all": 1e-15},
        "repaired": {"experts": "8"},
    },
    {
        "type": "odd", **VERSIONS, "captured": "export", "linears": 3, "smoothable": 0, "groups": 0, "residual": None,
        "residual_blocked": "it is normalised (aten.add at norm)", "spaces": 0, "online": 0, "blocked": [],
        "unknown_operators": ["aten.fold"], "seconds": 1.0, "steps": {"build": 0.1, "capture": 1.0, "analysis": 0.1},
        "unproved": "the small model cannot be run",
    },
    {"type": "none", **VERSIONS, "captured": None, "reason": "its recurrence is no graph", "seconds": 0.5},
]  # fmt: skip


def test_totals() -> None:
    assert totals(ROWS) == {
        "types": 3,
        "captured": 2,
        "proved": 1,
        "with a smoothing group": 1,
        "residual rotatable": 1,
        "with an operator without a rule": 1,
        "with a repaired default configuration": 1,
        "tracebacks": 0,
    }


def test_the_page_has_every_row_totals_and_reasons() -> None:
    text = coverage_text(ROWS, "make survey")
    for line in (
        "| good | dynamo | 4 of 5 | 2 | 64 | 1 | 0 | 2e-15 | 3.5 |",
        "| odd | export | 0 of 3 | 0 | blocked | 0 | 0 | not proved | 1.0 |",
        "| none | no | | | | | | | 0.5 |",
        "| **3** | **2** | **4 of 8** | **2** | **1** | **1** | **0** | **1 proved, worst 2e-15** | **5** |",
        "- **none**: its recurrence is no graph",
        "- **odd**: the small model cannot be run",
        "- **odd**: it is normalised (aten.add at norm)",
        "- **good**: experts = 8",
        "- `aten.fold`: odd",
    ):
        assert f"\n{line}\n" in text, line
    assert "Incomplete" not in text
    assert "\n**Incomplete**: 2 types were not run: a, b.\n" in coverage_text(ROWS, "make survey", ["a", "b"])
    assert "analysis takes 0.17 of the capture's time at the median" in text


def comparable(row: Row) -> Row:
    """What does not depend on the machine: no seconds, and of the certificate that it holds."""
    proved = {kind: change < 1e-5 for kind, change in row.get("certificate", {}).items()}
    return {key: value for key, value in row.items() if key not in ("seconds", "steps", "certificate")} | {"ok": proved}


def test_a_sample_of_the_committed_rows_is_what_is_found_now() -> None:
    """After a change of the analyzer: `make survey`. AUTOQUANT_SEED draws another sample of the quickest fifth."""
    rows: list[Row] = json.loads(COMMITTED.read_text(encoding="utf-8"))
    rows = [row for row in rows if (row["torch"], row["transformers"]) == tuple(VERSIONS.values())]
    if not rows:
        pytest.skip("the committed rows were made with other versions")
    captured = sorted((row for row in rows if row.get("captured")), key=lambda row: float(row["seconds"]))
    quick = sorted(captured[: len(captured) // 5], key=lambda row: str(row["type"]))
    seed = int(os.environ.get("AUTOQUANT_SEED", "0"))
    for row in random.Random(seed).sample(quick, 3):
        assert comparable(examine(row["type"])) == comparable(row), f"seed {seed}: run 'make survey'"
