"""Every command that applies a config: claims that were edited are proved again before the first write."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from torch import nn

import autoquant as aq
from autoquant.analyzer.analyze import Analyzed, analyze
from autoquant.certificate import ensure
from autoquant.certificate.certify import certify
from autoquant.cli.main import main
from autoquant.config.file import config_text
from autoquant.config.format import Config, edited
from autoquant.errors import AutoQuantError
from autoquant.models.repair import find_source

PACKAGED = Path(__file__).parents[2] / "autoquant" / "data" / "wikinano1m"
DYNAMIC = "w_int8_per_channel_a_int8_per_token_dynamic"
TEXT = "A small text that is repeated to fill the windows. " * 400
BEFORE_THE_PROOF = "error: the config is edited since it was proved, and the config claims what the model does not: "


@pytest.fixture(scope="module")
def analyzed() -> Analyzed:
    return analyze(find_source(str(PACKAGED)))


@pytest.fixture(scope="module")
def config(analyzed: Analyzed) -> Config:
    return certify(analyzed, find_source(str(PACKAGED)))


@pytest.fixture(autouse=True)
def analyzed_once(analyzed: Analyzed, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(ensure, "analyze", lambda source, progress: analyzed)
    yield


def without_a_target(config: Config) -> Config:
    """The deleted target that took a perplexity from 20.3 to 101.8 with ``proved: true`` in the output."""
    group, *rest = config.smoothing.groups
    group = edited(group, targets=group.targets[1:])
    return edited(config, smoothing=edited(config.smoothing, groups=(group, *rest)))


def without_a_group(config: Config) -> Config:
    return edited(config, smoothing=edited(config.smoothing, groups=config.smoothing.groups[1:]))


def run(folder: Path, config: Config, command: str, *options: Any) -> Result:
    given, text, out = folder / "config.json", folder / "text.txt", folder / "out"
    given.write_text(config_text(config))
    text.write_text(TEXT)
    tail = {
        "apply": (PACKAGED, given, "--transforms", "rotation"),
        "quantize": (PACKAGED, given, "--strategy", DYNAMIC, "--transforms", "rotation"),
        "search": (PACKAGED, given, "--calibration", text, "--length", 16),
        "compare": (PACKAGED, "--config", given, "--calibration", text, "--data", text, "--length", 16),
    }[command]
    return CliRunner().invoke(main, [command, *map(str, (*tail, "-o", out, *options))])


def proof_in(folder: Path) -> Any:
    return json.loads((folder / "out" / "autoquant_provenance.json").read_text())["proof"]


@pytest.mark.parametrize("command", ["apply", "quantize", "search", "compare"])
def test_a_deleted_target_is_refused_before_anything_is_written(command: str, config: Config, tmp_path: Path) -> None:
    wrong = without_a_target(config)
    result = run(tmp_path, wrong, command)
    assert result.exit_code == 1
    name = config.smoothing.groups[0].name
    assert BEFORE_THE_PROOF + f"'{name}': its targets differ from the analysis of {PACKAGED}" in result.stderr
    assert result.stderr.endswith("undo the edit, analyze the model anew, or go on with --unproved\n")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["apply", "quantize"])
def test_unproved_goes_on_and_is_recorded(command: str, config: Config, tmp_path: Path) -> None:
    result = run(tmp_path, without_a_target(config), command, "--unproved")
    assert result.exit_code == 0, result.stderr
    said = {"proved": False, "how": "unproved, as asked for: the config is edited since it was proved"}
    assert proof_in(tmp_path) == said


def test_an_unedited_config_costs_no_proof(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ensure, "analyze", None)
    louder = edited(config, smoothing=edited(config.smoothing, alpha=0.9))
    for command in ("apply", "quantize"):
        result = run(tmp_path, louder, command, "--force")
        assert result.exit_code == 0, result.stderr
        assert proof_in(tmp_path) == {"proved": True, "how": "by the certificate of the config"}


def test_fewer_claims_are_proved_now(config: Config, tmp_path: Path) -> None:
    result = run(tmp_path, without_a_group(config), "apply")
    assert result.exit_code == 0, result.stderr
    assert "the config is edited since it was proved: proving it" in result.stderr
    assert proof_in(tmp_path) == {"proved": True, "how": "proved now: the config is edited since it was proved"}


def test_a_config_of_another_structure_is_refused(config: Config, tmp_path: Path) -> None:
    provenance = edited(config.provenance, fingerprint="sha256:0")
    for command in ("apply", "quantize", "compare"):
        for wrong in (edited(config, provenance=provenance), edited(without_a_target(config), provenance=provenance)):
            result = run(tmp_path, wrong, command)
            assert result.exit_code == 1 and not (tmp_path / "out" / "config.json").exists()
            assert "the config is for another structure" in result.stderr or "$.provenance.fingerprint" in result.stderr


def test_check_says_how_the_claims_stand(config: Config, tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    for given, said in ((config, "proved"), (without_a_target(config), "edited since it was proved")):
        path.write_text(config_text(given))
        result = CliRunner().invoke(main, ["check", str(path), "--model", str(PACKAGED)])
        assert (result.exit_code, result.stdout.endswith(f" blocked; {said}\n")) == (0, True), result.stdout
    assert aq.check(path).as_dict()["claims"] == "edited"


def test_a_module_in_memory(config: Config) -> None:
    model: nn.Module = aq.load(PACKAGED)
    wrong, batch = without_a_target(config), [torch.arange(24)[None]]
    with pytest.raises(AutoQuantError, match="its targets differ from the analysis"):
        aq.apply(model, wrong, transforms="rotation")
    with pytest.raises(AutoQuantError, match="its targets differ from the analysis"):
        aq.quantize(model, wrong, strategy=DYNAMIC, transforms="rotation")
    assert aq.apply(model, wrong, calibration=batch, unproved=True) is not model


def test_a_module_of_ones_own_needs_inputs_for_a_proof(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.test_api import Block

    monkeypatch.setattr(ensure, "analyze", analyze)
    block, inputs = Block().eval(), (torch.randn(2, 8),)
    found = aq.analyze(block, example_inputs=inputs).config
    fewer = without_a_group(found)
    batches = [inputs[0]]
    assert aq.apply(block, found, transforms="none") is not block
    with pytest.raises(AutoQuantError, match=r"Block: needs example_inputs.*--unproved"):
        aq.apply(block, fewer, transforms="none", calibration=batches)
    assert aq.apply(block, fewer, transforms="none", calibration=batches, example_inputs=inputs) is not block
