"""Editing as people do it: a command line each, on a committed config, and what it comes to."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from autoquant.certificate.claims import standing
from autoquant.cli.main import main
from autoquant.config.file import load_config
from autoquant.config.format import Config

LLAMA = Path(__file__).parents[2] / "generated_configs" / "llama.json"
UP = "model.layers.{layer}.mlp.up_proj -> down_proj"
VALUES = "model.layers.{layer}.self_attn.v_proj -> o_proj"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    copy = tmp_path / "my.json"
    copy.write_text(LLAMA.read_text())
    return copy


def run(*arguments: object) -> Any:
    return CliRunner().invoke(main, [*map(str, arguments)])


def edited(path: Path, *assignments: str) -> Config:
    done = run("set", path, *assignments)
    assert done.exit_code == 0, done.output
    assert run("check", path).exit_code == 0
    return load_config(path)


def overrides(config: Config, name: str) -> list[tuple[str, bool | None, float | None]]:
    group = next(group for group in config.smoothing.groups if group.name == name)
    return [(one.layers, one.enable, one.alpha) for one in group.overrides]


def test_another_alpha_in_some_layers(path: Path) -> None:
    config = edited(path, "layers 0-3: alpha=0.8")
    assert overrides(config, UP) == overrides(config, VALUES) == [("0-3", None, 0.8)]
    assert standing(config) == "proved"


def test_one_group_in_some_layers(path: Path) -> None:
    config = edited(path, "layers 0: mlp.up_proj -> down_proj: alpha=0.3", "layers 1-5: down_proj: enable=false")
    assert overrides(config, UP) == [("0", None, 0.3), ("1-5", False, None)] and overrides(config, VALUES) == []


def test_what_diff_shows_can_be_set(path: Path, tmp_path: Path) -> None:
    edited(path, "smoothing.groups[2].enable=false")
    (line,) = re.findall(r"^  (.*): null -> false$", run("diff", LLAMA, path).stdout, re.MULTILINE)
    assert line == f"smoothing.groups['{VALUES}'].enable"
    assert run("set", LLAMA, f"{line}=false", "-o", tmp_path / "again.json").exit_code == 0
    assert load_config(tmp_path / "again.json") == load_config(path)


def test_linears_in_floating_point(path: Path) -> None:
    """One linear in a layer, one everywhere, and all that a layer has; a second time changes nothing."""
    texts = ("layers 0: mlp.down_proj: strategy=null", "v_proj: strategy=null", "layers 31: strategy=null")
    config = edited(path, *texts)
    found = [(one.path.rpartition(".")[2], one.layers, one.strategy) for one in config.quantization.overrides]
    assert found[:2] == [("down_proj", "0", None), ("v_proj", None, None)]
    assert len(found) == 2 + 7 and {layers for _, layers, _ in found[2:]} == {"31"}
    assert edited(path, *texts) == config
    shown = run("show", path, "--linear", "model.layers.0.mlp.down_proj").stdout
    assert "quantized: no, in floating point, by an override" in shown


def test_a_linear_with_a_strategy_of_its_own_outside_of_the_layers(path: Path) -> None:
    config = edited(path, "quantization.exclude=[]", "lm_head: strategy=w_int8_per_tensor_a_int8_per_tensor_static")
    (one,) = config.quantization.overrides
    assert (one.path, one.layers) == ("lm_head", None) and str(one.strategy).endswith("tensor_static")


def test_overrides_are_shown_one_by_one(path: Path) -> None:
    edited(path, "layers 0: mlp.down_proj: strategy=null", "layers 0-3: up_proj -> down_proj: alpha=0.8")
    done = run("set", path, "layers 0-3: up_proj -> down_proj: alpha=0.6")
    place = f"smoothing.groups['{UP}'].overrides"
    assert done.stdout.splitlines() == [
        f"- {place}: {{layers: 0-3, alpha: 0.8}}",
        f"+ {place}: {{layers: 0-3, alpha: 0.6}}",
    ]


def test_edits_go_over_to_a_config_of_a_newer_version(path: Path, tmp_path: Path) -> None:
    old = edited(path, "smoothing.alpha=0.7", f"{UP}: enable=false", "layers 0: strategy=null")
    newer = tmp_path / "newer.json"
    newer.write_text(re.sub(r'"torch": "[^"]*"', '"torch": "9.9"', LLAMA.read_text()))
    done = run("merge", newer, path, "-o", tmp_path / "merged.json")
    assert done.exit_code == 0 and "3 of 3 edits carried" in done.output
    merged = load_config(tmp_path / "merged.json")
    assert (merged.smoothing, merged.quantization) == (old.smoothing, old.quantization)
    assert merged.provenance.torch == "9.9"


@pytest.mark.parametrize(("take", "alpha"), [("new", 0.3), ("old", 0.8)])
def test_edits_against_each_other(take: str, alpha: float, path: Path, tmp_path: Path) -> None:
    edited(path, f"{UP}: alpha=0.8")
    new, out = tmp_path / "new.json", tmp_path / "merged.json"
    assert run("set", LLAMA, f"{UP}: alpha=0.3", "-o", new).exit_code == 0
    refused = run("merge", new, path, "-o", out)
    assert refused.exit_code == 1 and not out.exists()
    assert "the new config has 0.3; --take says which" in refused.output
    assert refused.stderr.splitlines()[-1].endswith("not written: 1 conflict; --take new or old goes on")
    assert run("merge", new, path, "-o", out, "--take", take).exit_code == 0
    assert next(group for group in load_config(out).smoothing.groups if group.name == UP).alpha == alpha


def test_an_edit_of_what_the_new_config_does_not_have(path: Path, tmp_path: Path) -> None:
    edited(path, f"{UP}: alpha=0.8")
    new = tmp_path / "new.json"
    new.write_text(LLAMA.read_text().replace(UP, UP.removesuffix("_proj")))
    refused = run("merge", new, path, "-o", tmp_path / "merged.json")
    assert refused.exit_code == 1 and not (tmp_path / "merged.json").exists()
    assert f"the new config has no such group; did you mean '{UP.removesuffix('_proj')}'?" in refused.output


def test_facts_that_were_edited_are_seen(path: Path) -> None:
    whole = path.read_text()
    path.write_text(whole.replace('"channels": 11008', '"channels": 11000'))
    refused = run("check", path)
    assert refused.exit_code == 1
    assert "$.claims.groups[4].sources[0].size: without index, expected one position for each of the 11000" in (
        refused.output
    )
    path.write_text(whole.replace('"in_features": 11008', '"in_features": 11000'))
    assert run("check", path).stdout.strip().endswith("; edited since it was proved")
    line = "linear model.layers.{layer}.mlp.down_proj (0-31): in_features 11008 -> in_features 11000"
    assert f"  {line}" in run("diff", LLAMA, path).stdout.splitlines()
