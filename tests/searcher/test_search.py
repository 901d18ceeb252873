from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from quantized import DATA, PACKAGED, STATIC, config_of, search_task
from torch import nn

from autoquant.checkpoint.trial import open_trials
from autoquant.cli.main import main
from autoquant.config.file import load_config, save_config
from autoquant.config.format import Config, Strategy, edited
from autoquant.pipeline.held import InMemory
from autoquant.searcher.judge import Judged, Searcher
from autoquant.searcher.kept import Kept, open_kept
from autoquant.searcher.search import TOO_LARGE, search


def test_a_choice_is_taken_if_it_is_better_by_more_than_chance() -> None:
    counts = (10, 10, 10)
    base = Judged(config_of(PACKAGED), (1.0, 2.0, 3.0), (1.0, 2.0, 3.0), counts)
    assert replace(base, kl=(0.9, 1.9, 2.9)).better_than(base), "the same gain in each window is no chance"
    assert not replace(base, kl=(0.2, 2.4, 3.1)).better_than(base), "a mean gain within its standard error is"
    assert not base.better_than(base)
    assert base.divergence == pytest.approx(0.2)
    assert base.perplexity_ratio.mean == pytest.approx(math.exp(0.2))


def test_float_is_at_no_distance_from_itself() -> None:
    """Every linear in floating point: what is left is rounding, rotation and smoothing in float32."""
    config = config_of(PACKAGED)
    section = edited(config.quantization, exclude=tuple(linear.path for linear in config.model.linears))
    judged = Searcher(search_task(), lambda line: None).judge(edited(config, quantization=section))
    assert abs(judged.divergence) < 1e-6
    assert judged.perplexity_ratio.mean == pytest.approx(1, abs=1e-4)


def test_the_search_turns_knobs_keeps_the_evidence_and_repeats_itself() -> None:
    config, lines = config_of(PACKAGED), []
    found = search(search_task("prefix", "clip"), config, tell=lines.append)
    assert found.quantization.prefix == (0,), "the packaged model's sink is BOS"
    assert found.quantization.strategy is STATIC
    record = found.search
    assert record is not None and (record.fitted, record.held_out) == (3, 3)
    assert record.after < record.before
    first = record.decisions[0]
    assert (first.where, first.choice) == ("quantization.prefix", "[0]")
    assert first.after < 0.8 * first.before
    assert first.cost == "the prefix's keys and values, stored in floating point"
    assert re.match(r"as it is: perplexity [+-]\d+\.\d\d ± \d+\.\d\d %, KL 0\.\d+ nats$", lines[0])
    assert search(search_task("prefix", "clip"), config) == found


def test_a_search_that_goes_on_from_another_keeps_its_evidence() -> None:
    lines: list[str] = []
    first = search(search_task("prefix"), config_of(PACKAGED))
    found = search(search_task("alpha"), first, tell=lines.append)
    assert first.search is not None and found.search is not None
    assert [one.where for one in first.search.decisions] == ["quantization.prefix"]
    assert [one.where.split(".")[0] for one in found.search.decisions] == ["quantization", "smoothing"]
    assert (found.search.before, found.search.decisions[0]) == (first.search.before, first.search.decisions[0])
    assert found.search.decisions[1].before == first.search.decisions[0].after
    assert lines[1] == "goes on from 1 decisions of an earlier search with the same windows"


def test_evidence_of_another_strategy_or_of_other_windows_is_not_kept() -> None:
    first = search(search_task("prefix"), config_of(PACKAGED))
    task = search_task("bias")
    for other in (replace(task, strategy=Strategy.PER_TENSOR_STATIC), replace(task, fit=task.fit[:2])):
        record = search(other, first).search
        assert record is not None
        assert "quantization.prefix" not in [one.where for one in record.decisions]


def test_no_budget_changes_no_knob() -> None:
    config = config_of(PACKAGED)
    found = search(search_task("prefix", "clip"), config, budget=0)
    assert found.search is not None and found.search.decisions == ()
    assert found.quantization.prefix == ()


def test_offline_rotates_nothing_at_inference() -> None:
    lines: list[str] = []
    only = replace(search_task("online", "bias"), offline=True)
    search(only, config_of(PACKAGED), tell=lines.append)
    assert [line.partition(":")[0] for line in lines] == ["as it is", "quantization.weights.bias_correction = true"]


def run(folder: Path, *options: str) -> Result:
    save_config(config_of(PACKAGED), folder / "c.json", force=True)
    arguments = ["search", str(PACKAGED), str(folder / "c.json"), "-o", str(folder / "found.json")]
    arguments += ["--calibration", str(DATA / "sample.calibration.txt"), "--strategy", STATIC.value]
    arguments += ["--sequences", "3", "--held-out", "3", "--length", "48", "--knobs", "prefix,clip"]
    return CliRunner().invoke(main, [*arguments, *options])


def test_an_interrupted_search_goes_on_and_sweeps_are_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, sweeps, judged = config_of(PACKAGED), [], []
    sweep, compared = InMemory.sweep, Searcher.compared
    monkeypatch.setattr(InMemory, "sweep", lambda *at, **named: sweeps.append(1) or sweep(*at, **named))
    monkeypatch.setattr(Searcher, "compared", lambda *at: judged.append(1) or compared(*at))
    wanted = search(search_task("clip", "weights"), config)
    whole = len(judged)
    assert whole > 3 and len(sweeps) == 1, "no candidate rotates"

    def interrupted(line: str) -> None:
        if len(judged) == whole + 2:
            raise KeyboardInterrupt

    path = tmp_path / "kept"
    for said in ("one model", "another"):
        with pytest.raises(KeyboardInterrupt):
            search(replace(search_task("clip", "weights"), kept=open_kept(path, said)), config, tell=interrupted)
        assert len(open_kept(path, said).known) == 2
        judged.clear()
        whole = 0
    path.write_text(path.read_text() + '["cut sho')
    kept = open_kept(path, "another")
    assert open_kept(path, "one model").known == {}
    judged.clear()
    assert search(replace(search_task("clip", "weights"), kept=kept), config) == wanted
    assert len(judged) == len(kept.known) - 2


@pytest.mark.parametrize(
    ("knobs", "candidate"),
    [
        (("clip", "alpha"), "smoothing.alpha = 0.3"),
        (("online", "descent"), "rotation.online[R4].enable = true"),
        (("weights", "bias"), "quantization.weights = rounding gptq, clip absmax"),
    ],
)
def test_layer_by_layer_the_same_is_decided(
    knobs: tuple[str, ...], candidate: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, task, lines = config_of(PACKAGED), search_task(*knobs), ([], [])
    wanted = search(task, config, tell=lines[0].append)
    trials = open_trials(PACKAGED, STATIC, task.fit, torch.device("cpu"))
    in_memory, told = [], []
    quantized = Searcher.quantized
    monkeypatch.setattr(Searcher, "quantized", lambda *at, **named: in_memory.append(1) or quantized(*at, **named))
    layered = replace(task, kept=Kept(), trials=trials)
    assert search(layered, config, tell=lines[1].append, progress=lambda *at: told.append(at)) == wanted
    assert lines[0] == lines[1]
    assert not in_memory
    assert ("float", 5, 5) in told and ("as it is: judge", 5, 5) in told
    assert (f"{candidate}: judge", 1, 5) in told


def test_what_the_device_does_not_hold_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A candidate that needs the whole model, and a knob that needs it to think of candidates."""
    config, lines, task = config_of(PACKAGED), [], replace(search_task("learned", "float"), in_float=1)

    def full() -> nn.Module:
        raise torch.OutOfMemoryError("CUDA out of memory")

    trials = open_trials(PACKAGED, STATIC, task.fit, torch.device("cpu"))
    found = search(replace(task, load=full, trials=trials), config, tell=lines.append)
    assert found.search is not None and found.search.decisions == ()
    assert [line.partition(": ")[::2] for line in lines[1:]] == [
        ("rotation.spaces[R1].method = learned", TOO_LARGE),
        ("float", TOO_LARGE),
    ]


def test_the_command_writes_a_config_that_says_why(tmp_path: Path) -> None:
    result = run(tmp_path)
    assert result.exit_code == 0, result.output
    found: Config = load_config(tmp_path / "found.json")
    assert found.search is not None and found.search.calibration == "sample.calibration.txt"
    assert "quantization.prefix = [0] (" in result.stdout
    assert re.search(r"^as it is: judge(?: \(\d+\))?: \d+\.\d s$", result.stderr, re.MULTILINE), "what it is at"
    assert "held-out perplexity " in result.stdout
    assert result.stderr.endswith("found.json\n")
    again = run(tmp_path)
    assert again.exit_code == 1 and "exists already; give --force to replace it" in again.stderr


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    result = run(tmp_path, "--knobs", "prefix,clib")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: no knob 'clib'; did you mean 'clip'?")
    assert not (tmp_path / "found.json").exists()
    assert run(tmp_path, "--sequences", "10000").exit_code == 1
