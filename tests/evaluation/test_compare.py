from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from quantized import DATA, PACKAGED, config_of

from autoquant.cli.main import main
from autoquant.config.file import save_config
from autoquant.config.format import edited
from autoquant.evaluation.compare import Cell

TOKEN, STATIC = "w_int8_per_channel_a_int8_per_token_dynamic", "w_int8_per_channel_a_int8_per_tensor_static"


def run(folder: Path, *options: str, prefix: tuple[int, ...] = ()) -> Result:
    config = config_of(PACKAGED)
    section = edited(config.quantization, prefix=prefix)
    save_config(edited(config, quantization=section), folder / "c.json", force=True)
    arguments = ["compare", str(PACKAGED), "--config", str(folder / "c.json"), "-o", str(folder / "out")]
    arguments += ["--data", str(DATA / "sample.evaluation.txt"), "--calibration", str(DATA / "sample.calibration.txt")]
    arguments += ["--tokens", "128", "--length", "32", "--sequences", "2", "--strategies", f"{TOKEN},{STATIC}"]
    return CliRunner().invoke(main, [*arguments, "--transforms", "none,fc_fc:0.5+rotation", *options])


def test_paired_ratios_are_surer_than_unpaired_ones() -> None:
    mine = Cell("none", TOKEN, (10.1, 30.2, 20.3), (10, 10, 10), 1, 0.0)
    other = Cell("", "float", (10.0, 30.0, 20.0), (10, 10, 10), 1, 0.0)
    assert mine.ratio(other).mean == pytest.approx(mine.perplexity.mean / other.perplexity.mean)
    assert mine.ratio(other).standard_error < 0.05 * mine.perplexity.standard_error


def test_a_table_and_going_on_after_an_interruption(tmp_path: Path) -> None:
    first = run(tmp_path)
    assert first.exit_code == 0, first.output
    assert "5/5 fc_fc:0.5+rotation" in first.stderr and "0 s left" in first.stderr
    assert first.stderr.splitlines()[-1].startswith("cells: ")  # what they took is not said of the imports
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    perplexity = {(cell["transforms"], cell["strategy"]): cell["perplexity"]["mean"] for cell in report["cells"]}
    assert next(iter(perplexity)) == (None, "float") and len(perplexity) == 5
    assert perplexity["none", STATIC] > 3 * perplexity[None, "float"]
    assert perplexity["fc_fc:0.5+rotation", STATIC] < 1.2 * perplexity[None, "float"]
    assert report["cells"][1]["bytes"] < report["cells"][0]["bytes"]
    table = (tmp_path / "out" / "report.md").read_text()
    assert first.stdout == table and f"| `{STATIC}` | " in table

    cells = tmp_path / "out" / "cells"
    (cells / f"none.{STATIC}.json").unlink()
    cut = cells / f"none.{TOKEN}.json"
    cut.write_text(cut.read_text()[:100])
    kept = (cells / "float.json").stat().st_mtime_ns
    second = run(tmp_path)
    assert "\n3 of 5 cells are there already\n4/5 none" in second.stderr
    assert (cells / "float.json").stat().st_mtime_ns == kept
    assert (
        json.loads((tmp_path / "out" / "report.json").read_text())["cells"][2]["perplexity"]["mean"]
        == (perplexity["none", STATIC])
    )
    assert run(tmp_path, "--quiet").stderr == ""
    assert "cells are there already" not in run(tmp_path, "--sequences", "3").stderr, "other inputs, other cells"


def test_a_prefix_has_a_control_and_helps(tmp_path: Path) -> None:
    result = run(tmp_path, "--strategies", STATIC, "--transforms", "fc_fc:0.5+rotation", prefix=(0,))
    assert result.exit_code == 0, result.output
    cells = json.loads((tmp_path / "out" / "report.json").read_text())["cells"]
    assert [cell["strategy"] for cell in cells] == ["float", "float+prefix", STATIC]
    assert cells[1]["ratio_to_float"]["mean"] == pytest.approx(1, abs=1e-5)
    assert cells[2]["ratio_to_float"]["mean"] < 1.05
    assert "begins with the fixed prefix of tokens 0; float + prefix" in result.stdout
    assert "0.00 ± 0.00 % against float." in result.stdout


def test_mistakes_are_told_before_any_work(tmp_path: Path) -> None:
    assert "no 'rotaton'; did you mean 'rotation'" in run(tmp_path, "--transforms", "fc_fc+rotaton").stderr
    assert "no strategy 'x'" in run(tmp_path, "--strategies", "x").stderr
    assert not (tmp_path / "out").exists()
