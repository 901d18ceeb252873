from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from autoquant.cli import main as cli
from autoquant.config.file import load_config

TINY = Path(__file__).parents[1] / "report"


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TINY))


def analyze(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.main, ["analyze", *map(str, arguments), "--capture", "export"])


def test_the_table_ends_in_totals_and_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = analyze("tiny:plain")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[0] == "tiny:plain: 3 layers, hidden size 16, 4,620 parameters"
    totals = "10 of 11 linears smoothable, residual rotatable (16), 0 operators without a rule"
    assert result.stdout.splitlines()[-1] == totals
    assert "captured by export: build" in result.stderr
    assert result.stderr.endswith("nothing was written; -o FILE writes the config\n")
    assert list(tmp_path.iterdir()) == []


def test_a_config_is_proved_and_written_and_fits_its_model(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    result = analyze("tiny:plain", "-o", path, "--quiet")
    assert (result.exit_code, result.output) == (0, "")
    certificate = load_config(path).certificate
    assert certificate is not None and certificate.proved
    assert max(row.worst for row in certificate.rows) < 1e-10
    again = CliRunner().invoke(cli.main, ["check", str(path), "--model", "tiny:plain"])
    assert again.output.startswith(f"{path}: valid and fits tiny:plain; ")
    other = CliRunner().invoke(cli.main, ["check", str(path), "--model", "tiny:post"])
    assert other.exit_code == 1
    assert f"error: {path}: does not fit tiny:post: 2 problems" in other.stderr


def test_json_alone_goes_to_stdout(tmp_path: Path) -> None:
    result = analyze("tiny:plain", "--format", "json", "--no-verify")
    assert json.loads(result.stdout)["certificate"]["proved"] is False


def test_an_existing_file_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c.json"
    path.write_text("mine")
    result = analyze("tiny:no_such_factory", "-o", path)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == f"error: {path}: exists already; give --force to replace it\n"
    assert path.read_text() == "mine"


def test_a_dash_is_no_file() -> None:
    result = analyze("tiny:plain", "-o", "-")
    assert result.exit_code == 2
    assert "--format json prints the config" in result.stderr


def test_explain_replaces_the_table() -> None:
    result = analyze("tiny:plain", "--explain", "steps.{layer}.fall")
    assert result.stdout.startswith("steps.0.fall: a linear from 24 to 16 channels\n")
    assert "linears smoothable" not in result.stdout


def test_explain_names_the_nearest_path() -> None:
    result = analyze("tiny:plain", "--explain", "steps.0.fal")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.endswith("error: steps.0.fal: no linear of the model; did you mean 'steps.0.fall'?\n")


def test_an_unknown_model_is_one_line() -> None:
    result = analyze("tiny:plian")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.splitlines()[-1].startswith("error: tiny:plian: ")
