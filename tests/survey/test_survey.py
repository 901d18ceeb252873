"""The survey: one process a type, whose failures cost one row; the page; and the committed rows, sampled."""

from __future__ import annotations

import faulthandler
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path

import pytest

from autoquant.analyzer.analyze import Analyzed, analyze
from autoquant.config.format import Blocked, Config, edited
from autoquant.errors import AutoQuantError
from autoquant.models.repair import find_source
from autoquant.models.source import ModelSource
from autoquant.models.tasks import KINDS, full_name, split_name
from autoquant.report.coverage import coverage_text, offers, rows_text, totals
from autoquant.survey.survey import Row, chosen_names, examine, finished, name_of, registered, stacks_of, survey

COMMITTED = Path(__file__).parents[2] / "docs" / "coverage.json"
SLOW = {"minicpm_ocr", "minicpmv4_6", "minicpmv4_7"}
"""Of few linears, and yet minutes each: many tokens to an image. `make survey` makes their rows anew."""
VERSIONS = {"torch": version("torch").partition("+")[0], "transformers": version("transformers")}


def fine(name: str) -> Row:
    print("noise")  # goes nowhere
    model_type, kind = split_name(name)
    return {"kind": kind, "type": model_type, **VERSIONS, "captured": "export", "process": os.getpid()}


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


def tell_and_hang(file: Path, name: str) -> Row:
    file.write_text(str(os.getpid()))
    time.sleep(60)
    return fine(name)


def until(done: Callable[[], bool], seconds: float = 20) -> bool:
    """Whether ``done`` comes true in time."""
    deadline = time.monotonic() + seconds
    while not done() and time.monotonic() < deadline:
        time.sleep(0.05)
    return done()


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


def test_a_type_of_several_kinds_has_a_row_for_each(tmp_path: Path) -> None:
    names = ["bart", "seq2seq-lm/bart", "speech-seq2seq/whisper"]
    rows = survey(names, tmp_path, jobs=2, make=fine)
    assert [(row["kind"], row["type"]) for row in rows] == [
        ("causal-lm", "bart"), ("seq2seq-lm", "bart"), ("speech-seq2seq", "whisper"),
    ]  # fmt: skip
    files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.json"))
    assert files == ["bart.json", "seq2seq-lm/bart.json", "speech-seq2seq/whisper.json"]
    assert sorted(map(name_of, finished(tmp_path))) == names
    assert survey(names, tmp_path, jobs=1, make=misbehaving) == rows, "none is made again"


def test_rows_without_a_kind_are_made_again(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"type": "a", **VERSIONS, "captured": "export"}))
    assert list(finished(tmp_path)) == []


def test_every_registered_type_of_every_kind_has_a_name_of_its_own() -> None:
    names = registered()
    assert len(set(names)) == len(names)
    assert all(full_name(*split_name(name)) == name for name in names)
    assert {split_name(name)[1] for name in names} == set(KINDS)
    assert {"llama", "bart", "seq2seq-lm/bart", "speech-seq2seq/whisper", "image-text-to-text/llava"} <= set(names)


def test_types_are_chosen_by_kind_and_by_name() -> None:
    names = ["bart", "llama", "seq2seq-lm/bart", "seq2seq-lm/t5"]
    assert chosen_names(names, None, None) == names
    assert chosen_names(names, ["seq2seq-lm"], None) == names[2:]
    assert chosen_names(names, None, ["seq2seq-lm/t5", "bart"]) == ["bart", "seq2seq-lm/bart", "seq2seq-lm/t5"]
    assert chosen_names(names, None, ["causal-lm/bart"]) == ["bart"]
    assert chosen_names(names, ["seq2seq-lm"], ["bart"]) == ["seq2seq-lm/bart"]
    for kinds, types, message in (
        (["seq2seq"], None, r"^--kinds: there is no kind 'seq2seq'; did you mean 'seq2seq-lm'\?$"),
        (None, ["lama"], r"^--types: there is no model type 'lama'; did you mean 'llama'\?$"),
        (None, ["seq2seq-lm/t6"], r"no model type 'seq2seq-lm/t6'; did you mean 'seq2seq-lm/t5'\?$"),
        (["seq2seq-lm"], ["llama"], r"^--types: there is no model type 'llama' of seq2seq-lm"),
    ):
        with pytest.raises(AutoQuantError, match=message):
            chosen_names(names, kinds, types)


@pytest.mark.skipif(sys.platform != "linux", reason="other kernels do not end a process with the one that started it")
@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGKILL])
def test_what_ends_the_survey_ends_what_it_started(tmp_path: Path, ending: signal.Signals) -> None:
    told = tmp_path / "process"
    started = multiprocessing.get_context("fork").Process(
        target=survey, args=(["hangs"], tmp_path), kwargs={"jobs": 1, "make": partial(tell_and_hang, told)}
    )
    started.start()
    assert until(lambda: told.is_file() and bool(told.read_text()))
    assert started.pid is not None
    os.kill(started.pid, ending)
    started.join()
    child = Path("/proc") / told.read_text() / "stat"
    assert until(lambda: not child.is_file() or child.read_text().rpartition(") ")[2][0] == "Z")


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


STACKS = {
    "": {"linears": 1, "smoothable": 1, "residual": []},
    "encoder.block": {"linears": 2, "smoothable": 1, "residual": [64]},
    "decoder.block": {"linears": 2, "smoothable": 2, "residual": []},
}
ROWS: list[Row] = [
    {
        "kind": "causal-lm", "type": "good", **VERSIONS, "captured": "dynamo", "linears": 5, "smoothable": 4,
        "stacks": {}, "untraced": {}, "groups": 2, "residual": [64],
        "residual_blocked": None, "spaces": 1, "online": 0, "blocked": [], "unknown_operators": [], "seconds": 3.5,
        "steps": {"build": 0.1, "capture": 2.0, "analysis": 0.5}, "certificate": {"R1": 2.5e-15, "all": 1e-15},
        "repaired": {"experts": "8"},
    },
    {
        "kind": "causal-lm", "type": "odd", **VERSIONS, "captured": "export", "linears": 3, "smoothable": 0,
        "stacks": {}, "untraced": {}, "groups": 0, "residual": [],
        "residual_blocked": "it is normalised (aten.add at norm)", "spaces": 0, "online": 0, "blocked": [],
        "unknown_operators": ["aten.fold"], "seconds": 1.0, "steps": {"build": 0.1, "capture": 1.0, "analysis": 0.1},
        "unproved": "the small model cannot be run",
    },
    {"kind": "causal-lm", "type": "none", **VERSIONS, "captured": None, "reason": "no graph", "seconds": 0.5},
    {
        "kind": "seq2seq-lm", "type": "good", **VERSIONS, "captured": "dynamo", "linears": 5, "smoothable": 4,
        "stacks": STACKS, "untraced": {"vision": "it is not traced"}, "groups": 3, "residual": [64, 32],
        "residual_blocked": None, "spaces": 2, "online": 0, "blocked": [], "unknown_operators": ["aten.fold"],
        "seconds": 4.0, "steps": {"build": 0.1, "capture": 2.0, "analysis": 0.4}, "certificate": {"all": 1e-15},
    },
]  # fmt: skip


def test_totals() -> None:
    assert totals(ROWS) == {
        "types": 4,
        "captured": 3,
        "proved": 2,
        "with a smoothing group": 2,
        "residual rotatable": 2,
        "with a claim that the proof refused": 0,
        "with an operator without a rule": 2,
        "with a repaired default configuration": 1,
        "tracebacks": 0,
    }
    assert [offers(row) for row in ROWS] == [True, False, False, True]


def test_the_page_has_every_row_totals_and_reasons() -> None:
    text = coverage_text(ROWS, "make survey")
    for line in (
        "| causal-lm | 3 | 2 | 1 | 1 | 1 | 0 | 1 | 1 | 0 |",
        "| seq2seq-lm | 1 | 1 | 1 | 1 | 1 | 0 | 1 | 0 | 0 |",
        "| **all** | 4 | 3 | 2 | 2 | 2 | 0 | 2 | 1 | 0 |",
        "## causal-lm",
        "| good | dynamo | 4 of 5 | 2 | 64 | 1 | 0 | 2e-15 |",
        "| odd | export | 0 of 3 | 0 | blocked | 0 | 0 | not proved |",
        "| none | no | | | | | | |",
        "| **3** | **2** | **4 of 8** | **2** | **1** | **1** | **0** | **1 proved, worst 2e-15** |",
        "## seq2seq-lm",
        "| good | dynamo | 4 of 5 | 3 | 64, 32 | 2 | 0 | 1e-15 |",
        "- **none**: no graph",
        "- **odd**: the small model cannot be run",
        "- **odd**: it is normalised (aten.add at norm)",
        "- **good**: experts = 8",
        "- **seq2seq-lm/good**: encoder.block 1 of 2, residual 64; decoder.block 2 of 2",
        "- **seq2seq-lm/good**: vision: it is not traced",
        "- `aten.fold`: odd, seq2seq-lm/good",
    ):
        assert f"\n{line}\n" in text, line
    assert "Incomplete" not in text
    incomplete = coverage_text(ROWS, "make survey", ["a", "b", "seq2seq-lm/a"])
    assert "\n**Incomplete**: 3 types were not run: causal-lm a, b; seq2seq-lm a.\n" in incomplete
    assert "analysis takes 0.20 of the capture's time at the median" in text


def test_rows_are_a_line_each_without_what_they_took() -> None:
    text = rows_text(ROWS)
    assert len(text.splitlines()) == len(ROWS) + 2
    assert [name_of(row) for row in json.loads(text)] == [name_of(row) for row in ROWS]
    assert not any({"seconds", "steps"} & row.keys() for row in json.loads(text))


def test_the_committed_page_is_that_of_the_committed_rows() -> None:
    rows = json.loads(COMMITTED.read_text(encoding="utf-8"))
    assert COMMITTED.read_text(encoding="utf-8") == rows_text(rows)
    page = COMMITTED.with_suffix(".md").read_text(encoding="utf-8").splitlines()
    expected = coverage_text(rows, "make survey").splitlines()
    timings = [line for line in page if line not in expected]
    assert [line.partition(":")[0] for line in timings] == ["Medians"]
    assert [line for line in page if line not in timings and line] == [line for line in expected if line]


def test_a_row_whose_config_cannot_be_written_is_not_proved() -> None:
    refused = ROWS[0] | {"unproved": "2 problems: the config is not valid"}
    rows = [refused, *ROWS[1:]]
    assert "certificate" in refused
    assert totals(rows)["proved"] == totals(ROWS)["proved"] - 1
    assert not offers(refused)
    text = coverage_text(rows, "make survey")
    assert "\n| good | dynamo | 4 of 5 | 2 | 64 | 1 | 0 | not proved |\n" in text
    assert "**0 proved, worst 0e+00**" in text
    _, _, after = text.partition("\n## Not proved\n")
    assert "\n- **good**: 2 problems: the config is not valid\n" in after.partition("\n## ")[0]


def test_claims_that_the_proof_refused_are_in_the_table_and_listed() -> None:
    said = "smoothing of layers.{layer}.down in layers 0-1: claimed by the analysis, refused by the proof"
    text = coverage_text([ROWS[0] | {"refused": [said, "rotation of table: so it is"]}, *ROWS[1:]], "make survey")
    for line in (
        "| good | dynamo | 4 of 5 | 2 | 64 | 1 | 0 | 2e-15, 2 refused |",
        "| **all** | 4 | 3 | 2 | 2 | 2 | 1 | 2 | 1 | 0 |",
        f"## Claimed by the analysis, refused by the proof\n\n- **good**: {said}; rotation of table: so it is",
    ):
        assert f"\n{line}\n" in text, line
    assert "refused by the proof" not in coverage_text(ROWS, "make survey")


def test_a_row_counts_what_is_written_and_names_what_was_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A proof that takes out the first group of two, and leaves the rest."""
    first = "claimed by the analysis, refused by the proof ('a' changes the logits): please report"

    def refusing(analyzed: Analyzed, source: ModelSource) -> Config:
        config = analyzed.config
        gone = config.smoothing.groups[0]
        blocked = Blocked(path="lm_head", what="smoothing", reason=first, operator=gone.kind.value, at="lm_head")
        rest = edited(config.smoothing, groups=config.smoothing.groups[1:])
        return edited(config, smoothing=rest, blocked=(*config.blocked, blocked))

    whole = examine("llama")
    monkeypatch.setattr("autoquant.certificate.certify.certify", refusing)
    row = examine("llama")
    assert "refused" not in whole
    assert row["refused"] == [f"smoothing of lm_head: {first}"]
    assert row["groups"] == whole["groups"] - 1
    assert row["smoothable"] < whole["smoothable"]


def test_a_row_that_claims_nothing_says_why() -> None:
    nothing = ROWS[0] | {"groups": 0, "spaces": 0, "certificate": {}, "repaired": {}}
    for reasons, said in (
        ({"untraced": {"model": "its forward cannot be traced"}}, "model: its forward cannot be traced"),
        ({"blocked": ["smoothing: no", "rotation: neither"]}, "smoothing: no; rotation: neither"),
        ({}, "it holds no linear that anything could be undone in"),
    ):
        text = coverage_text([nothing | reasons], "make survey")
        assert "| nothing claimed |" in text
        assert f"\n## Nothing claimed\n\n- **good**: {said}\n" in text
    assert "## Nothing claimed" not in coverage_text(ROWS, "make survey")


def test_stacks_tell_encoder_and_decoder_apart() -> None:
    """T5: the encoder's and the decoder's residual stream start at one table, so that one space is in both."""
    stacks = stacks_of(analyze(find_source("t5", layers=2)).config)
    assert list(stacks) == ["encoder.block", "decoder.block", ""]
    assert [(stack["linears"], stack["smoothable"]) for stack in stacks.values()] == [(12, 12), (20, 20), (1, 1)]


def comparable(row: Row) -> Row:
    """What does not depend on the machine: no seconds, and of the certificate that it holds."""
    proved = {kind: change < 1e-5 for kind, change in row.get("certificate", {}).items()}
    return {key: value for key, value in row.items() if key not in ("seconds", "steps", "certificate")} | {"ok": proved}


def test_a_sample_of_the_committed_rows_is_what_is_found_now() -> None:
    """After a change of the analyzer: `make survey`. AUTOQUANT_SEED draws others of the smallest fifth of each kind."""
    rows: list[Row] = json.loads(COMMITTED.read_text(encoding="utf-8"))
    rows = [row for row in rows if (row["torch"], row["transformers"]) == tuple(VERSIONS.values())]
    if not rows:
        pytest.skip("the committed rows were made with other versions")
    seed = int(os.environ.get("AUTOQUANT_SEED", "0"))
    drawn = [row for kind in KINDS for row in sample([row for row in rows if row["kind"] == kind], seed)]
    assert {row["kind"] for row in drawn} == {row["kind"] for row in rows}
    for row in drawn:
        found = json.loads(json.dumps(examine(name_of(row))))
        assert comparable(found) == comparable(row), f"seed {seed}: run 'make survey'"


def sample(rows: list[Row], seed: int) -> list[Row]:
    """Two of the fifth of the captured rows with the fewest linears, or as many as there are; none of SLOW."""
    captured = [row for row in rows if row.get("captured") and row["type"] not in SLOW]
    captured.sort(key=lambda row: (row["linears"], name_of(row)))
    quick = sorted(captured[: -(-len(captured) // 5)], key=name_of)
    return random.Random(seed).sample(quick, min(2, len(quick)))
