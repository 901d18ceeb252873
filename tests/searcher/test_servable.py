"""A search for a server: what it finds can be written for it as it stands."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from quantized import DATA, PACKAGED, STATIC, config_of, search_task

from autoquant.cli.main import main
from autoquant.config.file import load_config, save_config
from autoquant.config.format import Config, Strategy, edited
from autoquant.errors import AutoQuantError
from autoquant.searcher.search import search
from autoquant.searcher.servable import served_by

CALIBRATION = str(DATA / "sample.calibration.txt")


def run(*arguments: str) -> str:
    result = CliRunner().invoke(main, list(arguments))
    assert result.exit_code == 0, result.output
    return result.output


def with_prefix(config: Config) -> Config:
    return edited(config, quantization=edited(config.quantization, prefix=(0,)))


def test_what_a_search_finds_is_written_for_the_target(tmp_path: Path) -> None:
    save_config(config_of(PACKAGED), tmp_path / "c.json")
    said = run(
        *("search", str(PACKAGED), str(tmp_path / "c.json"), "-o", str(tmp_path / "found.json")),
        *("--calibration", CALIBRATION, "--strategy", STATIC.value, "--target", "vllm", "--per-token", "2"),
        *("--sequences", "3", "--held-out", "3", "--length", "48", "--knobs", "prefix,spikes,clip,online,bias"),
    )
    assert re.search(r"quantization.prefix = \[0\]: not served: quantization.prefix: a prefix has no place", said)
    assert re.search(r"rotation.online\[R4\].enable = true: not served: .* has no place in the format", said)
    assert "bias_correction = true: not served: model.layers.0.self_attn.q_proj.bias: a bias that" in said
    found = load_config(tmp_path / "found.json")
    spiky = found.quantization.overrides[0]
    assert (spiky.path, spiky.layers) == ("model.layers.{layer}.mlp.down_proj", "0,4")
    small = ("--calibration", CALIBRATION, "--sequences", "3", "--length", "48")
    run("quantize", str(PACKAGED), str(tmp_path / "found.json"), "-o", str(tmp_path / "x"), "--target", "vllm", *small)
    groups = json.loads((tmp_path / "x" / "config.json").read_text())["quantization_config"]["config_groups"]
    assert sorted(len(group["targets"]) for group in groups.values()) == [2, 33]


def test_what_cannot_be_served_is_refused_before_the_work() -> None:
    config, judged = config_of(PACKAGED), []
    for changed, strategy, reason in (
        (with_prefix(config), STATIC, "a prefix has no place"),
        (config, Strategy.PER_CHANNEL_DYNAMIC, "nearest is w_int8_per_channel_a_int8_per_token_dynamic"),
    ):
        task = search_task("clip", strategy=strategy)
        served = served_by("vllm", PACKAGED, config, strategy)
        with pytest.raises(AutoQuantError, match="what is searched for cannot be served") as raised:
            search(replace(task, served=served), changed, tell=judged.append)
        assert reason in raised.value.details[0]
    assert judged == []


def test_transformers_keeps_no_linears_alike() -> None:
    config = config_of(PACKAGED)
    assert served_by("transformers", PACKAGED, config, STATIC).alike == ()
    assert len(served_by("any", PACKAGED, config, Strategy.PER_CHANNEL_PER_TOKEN).alike) == 10
    with pytest.raises(AutoQuantError, match="no target 'vlm'; did you mean 'vllm'"):
        served_by("vlm", PACKAGED, config, STATIC)
