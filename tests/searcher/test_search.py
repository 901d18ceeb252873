from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from quantized import DATA, PACKAGED, config_of, windows

from autoquant.checkpoint.quantize import load_float32
from autoquant.cli.main import main
from autoquant.config.file import load_config, save_config
from autoquant.config.format import Config, Strategy, edited
from autoquant.pipeline.select import EVERYTHING
from autoquant.searcher.candidates.knobs import KNOBS
from autoquant.searcher.judge import Judged, Searcher, Task
from autoquant.searcher.search import search

STATIC = Strategy.PER_CHANNEL_STATIC


def task(*knobs: str, strategy: Strategy = STATIC, per_token: int = 0) -> Task:
    found = windows(6, 40)
    return Task(
        load=lambda: load_float32(PACKAGED),
        strategy=strategy,
        fit=found[:3],
        held_out=(torch.cat(found[3:]),),
        calibration="random tokens",
        per_token=per_token,
        bos=0,
        knobs=frozenset(knobs),
    )


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
    judged = Searcher(task(), lambda line: None).judge(edited(config, quantization=section))
    assert abs(judged.divergence) < 1e-6
    assert judged.perplexity_ratio.mean == pytest.approx(1, abs=1e-4)


def test_the_search_turns_knobs_keeps_the_evidence_and_repeats_itself() -> None:
    config, lines = config_of(PACKAGED), []
    found = search(task("prefix", "clip"), config, tell=lines.append)
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
    assert search(task("prefix", "clip"), config) == found


def test_no_budget_changes_no_knob() -> None:
    config = config_of(PACKAGED)
    found = search(task("prefix", "clip"), config, budget=0)
    assert found.search is not None and found.search.decisions == ()
    assert found.quantization.prefix == ()


def test_offline_rotates_nothing_at_inference() -> None:
    lines: list[str] = []
    only = replace(task("online", "bias"), offline=True)
    search(only, config_of(PACKAGED), tell=lines.append)
    assert [line.partition(":")[0] for line in lines] == ["as it is", "quantization.weights.bias_correction = true"]


@pytest.mark.parametrize(
    ("name", "strategy", "expected"),
    [
        ("clip", STATIC, ["output", "mse", "percentile"]),
        ("clip", Strategy.PER_CHANNEL_PER_TOKEN, []),
        ("rotation", STATIC, ["false", "false", "1", "2", "3"]),
        ("online", STATIC, ["true"]),
        ("descent", STATIC, ["descent"]),
        ("learned", STATIC, ["learned"]),
        ("cache", STATIC, []),
        ("cache", Strategy.PER_CHANNEL_STATIC_KV, ["true", "true"]),
        ("bias", STATIC, ["true"]),
        ("spikes", STATIC, []),
    ],
)
def test_candidates_of_each_knob(name: str, strategy: Strategy, expected: list[str]) -> None:
    config = config_of(PACKAGED)
    searcher = Searcher(replace(task(strategy=strategy), held_out=()), lambda line: None)
    judged = Judged(config, (), (), ())
    found = list(KNOBS[name](searcher, judged))
    assert [candidate.choice for candidate in found] == expected
    assert all(candidate.config != config for candidate in found)


def test_spikes_go_to_the_linears_with_the_largest_error() -> None:
    config = config_of(PACKAGED)
    searcher = Searcher(replace(task(per_token=2), held_out=()), lambda line: None)
    errors = {f"model.layers.{i}.mlp.down_proj.weight": error for i, error in enumerate((0.1, 0.4, 0.2))}
    one, two = KNOBS["spikes"](searcher, Judged(config, (), (), (), errors))
    assert [entry.path for entry in one.config.quantization.overrides] == ["model.layers.1.mlp.down_proj"]
    assert [entry.path for entry in two.config.quantization.overrides] == [
        "model.layers.1.mlp.down_proj",
        "model.layers.2.mlp.down_proj",
    ]
    assert two.config.quantization.overrides[0].strategy is Strategy.PER_CHANNEL_PER_TOKEN
    assert "2 linears" in two.cost


def test_alphas_of_groups_and_layers_are_overrides() -> None:
    config = config_of(PACKAGED)
    searcher = Searcher(replace(task(), held_out=()), lambda line: None)
    *uniform, each = KNOBS["alpha"](searcher, Judged(config, (), (), ()))
    assert [candidate.choice for candidate in uniform] == ["0.3", "0.4", "0.6", "0.7", "0.8", "0.9"]
    overrides = {group.name: group.overrides for group in each.config.smoothing.groups if group.overrides}
    assert {name.rpartition(".")[2] for name in overrides} == {"v_proj -> o_proj", "up_proj -> down_proj"}
    assert all([entry.layers for entry in entries] == list("01234") for entries in overrides.values())
    alphas = [entry.alpha for entries in overrides.values() for entry in entries]
    assert all(alpha is not None and 0 <= alpha <= 1 for alpha in alphas)
    assert EVERYTHING.rotation == "all"


def run(folder: Path, *options: str) -> Result:
    save_config(config_of(PACKAGED), folder / "c.json", force=True)
    arguments = ["search", str(PACKAGED), str(folder / "c.json"), "-o", str(folder / "found.json")]
    arguments += ["--calibration", str(DATA / "sample.calibration.txt"), "--strategy", STATIC.value]
    arguments += ["--sequences", "3", "--held-out", "3", "--length", "48", "--knobs", "prefix,clip"]
    return CliRunner().invoke(main, [*arguments, *options])


def test_the_command_writes_a_config_that_says_why(tmp_path: Path) -> None:
    result = run(tmp_path)
    assert result.exit_code == 0, result.output
    found: Config = load_config(tmp_path / "found.json")
    assert found.search is not None and found.search.calibration == "sample.calibration.txt"
    assert "quantization.prefix = [0] (" in result.stdout
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
