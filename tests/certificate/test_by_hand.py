"""Groups that the analysis misses: the proof takes those that hold and refuses the others, both with figures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from odd_units import WithHead, clamped, nearly, saturating, signed
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.activations import ACT2FN

import autoquant as aq
from autoquant.certificate.claims import digest_of, standing
from autoquant.cli.main import main
from autoquant.config.compare import merge
from autoquant.config.format import Config, edited
from autoquant.config.handmade import of_sizes
from autoquant.errors import AutoQuantError
from autoquant.io.folders import PROVENANCE

IDS = (torch.tensor([[3, 1, 4]]),)
UP, DOWN = ["up.weight", "up.bias"], ["down.weight"]
NAME = "up -> down"


def found(module: nn.Module) -> Config:
    return aq.analyze(module, example_inputs=IDS).config


def by_hand(module: nn.Module, sources: list[str] = UP, targets: list[str] = DOWN) -> Config:
    return aq.init_group(found(module), sources, targets, model=module, example_inputs=IDS)


def test_a_group_that_the_analysis_misses_and_that_holds() -> None:
    module = WithHead(signed)
    before = found(module)
    assert NAME not in [group.name for group in before.smoothing.groups]
    assert any(blocked.operator == "aten.copysign" for blocked in before.blocked)
    config = by_hand(module)
    group = config.smoothing.groups[-1]
    assert (group.name, group.by_hand, group.channels) == (NAME, True, 16)
    assert config.certificate is not None and config.certificate.coverage is not None
    (row,) = [row for row in config.certificate.rows if row.kind == "by_hand"]
    assert (row.count, row.worst_name) == (1, NAME) and row.worst < 1e-13
    assert config.certificate.coverage.lengths == (1, 3, 12, 64, 160)
    assert config.certificate.digest == digest_of(config) and standing(config) == "proved"


@pytest.mark.parametrize(
    ("act", "least"), [(clamped, 0.1), (saturating, 0.1), (nearly, 1e-5), (torch.tanh, 0.1), (torch.exp, 0.1)]
)
def test_a_group_that_does_not_hold_is_refused_with_figures(act: Callable[[Tensor], Tensor], least: float) -> None:
    """The first three hold to 1e-5 and better at the magnitudes that a small model has."""
    with pytest.raises(AutoQuantError, match=rf"'{NAME}' \(linear_linear\) changes the logits by") as error:
        by_hand(WithHead(act))
    figure = error.value.message.partition("logits by ")[2].partition(",")[0]
    assert not float(figure) <= least  # exp overflows
    assert "(1, 3, 12, 64, 160" in error.value.message


def test_half_a_group_is_refused() -> None:
    with pytest.raises(AutoQuantError, match="changes the logits by"):
        by_hand(WithHead(signed), ["up.weight"])  # its bias is scaled too, or nothing is


def test_a_member_that_changes_nothing_shows_nothing() -> None:
    """Without the trial of each member alone the group would hold: nothing reads ``spare``."""
    with pytest.raises(AutoQuantError, match=r"is about 'spare.weight', which no run reached"):
        by_hand(WithHead(signed), ["spare.weight", *UP])


def test_a_group_that_the_analysis_finds_is_none_by_hand() -> None:
    module = WithHead(torch.relu)
    config = found(module)
    groups = tuple(group for group in config.smoothing.groups if group.name != NAME)
    bare = edited(config, smoothing=edited(config.smoothing, groups=groups))
    again = aq.init_group(bare, UP, DOWN, model=module, example_inputs=IDS)
    assert again.smoothing.groups[-1] == next(g for g in config.smoothing.groups if g.name == NAME)
    assert again.certificate is not None and again.certificate.digest == digest_of(config)
    with pytest.raises(AutoQuantError, match=f"the config has this group already: '{NAME}'"):
        aq.init_group(config, UP, DOWN, model=module, example_inputs=IDS)


def test_other_commands_take_it_as_proved_and_prove_it_after_an_edit() -> None:
    module = WithHead(signed)
    config = by_hand(module)
    assert aq.check(config, module, example_inputs=IDS).lines()[0].endswith("; proved")
    assert "2 smoothing groups (1 by hand)" in aq.check(config).lines()[0]
    assert aq.verify(module, config, example_inputs=IDS).holds
    group = config.smoothing.groups[-1]
    unmarked = with_last(config, by_hand=False)
    assert standing(unmarked) == "edited"
    with pytest.raises(AutoQuantError, match=f"'{NAME}' is no smoothing group of"):
        aq.verify(module, unmarked, example_inputs=IDS)
    halved = with_last(config, sources=group.sources[:1])
    assert standing(halved) == "edited"
    assert not aq.verify(module, halved, example_inputs=IDS).holds


def with_last(config: Config, **updates: object) -> Config:
    *others, last = config.smoothing.groups
    return edited(config, smoothing=edited(config.smoothing, groups=(*others, edited(last, **updates))))


def test_a_group_told_by_numbers_is_not_carried_to_other_sizes() -> None:
    config = by_hand(WithHead(signed))
    group = config.smoothing.groups[-1]
    assert of_sizes(group, config, config) == group
    shifted = edited(group, sources=(edited(group.sources[0], size=8), *group.sources[1:]))
    with pytest.raises(AutoQuantError, match=r"its part of 'up\.weight' is told by numbers"):
        of_sizes(shifted, config, config)


def test_it_is_merged_into_a_newer_config_of_the_same_structure() -> None:
    module = WithHead(signed)
    new, old = found(module), with_last(by_hand(module), alpha=0.7)
    merged = merge(new, old)
    assert merged.config.smoothing.groups == old.smoothing.groups
    assert merged.carried == (f"group '{NAME}', by hand", f"smoothing.groups['{NAME}'].alpha = 0.7")
    assert standing(merged.config) == "edited"
    other = edited(new, provenance=edited(new.provenance, fingerprint="sha256:0"))
    assert merge(other, old).conflicts[0] == f"group '{NAME}', by hand: the new config is of another structure"


# A model of transformers: sizes, layers and decoding


class Signed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return signed(x)


class Bounded(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return clamped(x)


@pytest.fixture
def opt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the configuration of a model whose activation is none of transformers'."""
    monkeypatch.setitem(ACT2FN, "signed", Signed)
    monkeypatch.setitem(ACT2FN, "bounded", Bounded)
    folder = tmp_path / "model"
    folder.mkdir()
    return folder


def written(folder: Path, act: str) -> Path:
    settings = {"model_type": "opt", "num_hidden_layers": 3, "hidden_size": 64, "ffn_dim": 128, "vocab_size": 100}
    settings |= {"num_attention_heads": 4, "word_embed_proj_dim": 64, "activation_function": act}
    (folder / "config.json").write_text(json.dumps(settings))
    config = folder / "c.json"
    aq.save_config(aq.analyze(folder).config, config)
    return config


def run(*arguments: object) -> Any:
    return CliRunner().invoke(main, ["init-group", *map(str, arguments)])


LAYER = "model.decoder.layers.{layer}."
MEMBERS = ["--source", f"{LAYER}fc1.weight", "--source", f"{LAYER}fc1.bias", "--target", f"{LAYER}fc2.weight"]


def test_a_model_of_transformers(opt: Path) -> None:
    path = written(opt, "signed")
    done = run(path, *MEMBERS)
    assert done.exit_code == 0, done.output
    assert "128 channels, proved by hand (the analysis does not find it): outputs change by at most" in done.output
    config = aq.load_config(path)
    assert config.smoothing.groups[-1].layers == "0-2" and config.smoothing.groups[-1].by_hand
    assert config.certificate is not None and config.certificate.coverage is not None
    assert config.certificate.coverage.decode and len(config.certificate.coverage.lengths) > 2


def test_a_model_of_transformers_of_which_it_does_not_hold(opt: Path) -> None:
    path = written(opt, "bounded")
    before = path.read_bytes()
    done = run(path, *MEMBERS)
    assert done.exit_code == 1 and path.read_bytes() == before
    (line,) = done.stderr.splitlines()[-1:]
    assert line.startswith("error: ") and "changes the logits by" in line and "decoding with a cache" in line


@torch.no_grad()
def test_apply_and_quantize_take_it_by_its_certificate(opt: Path, tmp_path: Path) -> None:
    path, texts = written(opt, "signed"), [torch.arange(3, 35)[None]]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(opt)).eval()
    model.save_pretrained(opt)
    run(path, *MEMBERS)
    config = aq.load_config(path)
    aq.apply(opt, config, tmp_path / "out", transforms="fc_fc", calibration=texts)
    recorded = json.loads((tmp_path / "out" / PROVENANCE).read_text())
    assert recorded["proof"] == {"proved": True, "how": "by the certificate of the config"}
    smoothed = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    fc1 = "model.decoder.layers.1.fc1.weight"
    assert not torch.equal(smoothed.get_parameter(fc1), model.get_parameter(fc1))
    before, after = (one(texts[0]).logits for one in (model, smoothed))
    assert (after - before).norm() < 1e-5 * before.norm()
    aq.quantize(opt, config, tmp_path / "int8", transforms="fc_fc", calibration=texts)
    assert (tmp_path / "int8" / "config.json").exists()
