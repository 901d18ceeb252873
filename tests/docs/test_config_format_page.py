"""docs/config-format.md: its command runs, its message is printed, its examples are what configs hold."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from autoquant.cli.main import main
from autoquant.config.file import load_config, save_config
from autoquant.config.format import Slot, edited
from autoquant.config.slots import channels_of, positions_of

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "config-format.md").read_text(encoding="utf-8")
CONFIGS = ROOT / "generated_configs"


@pytest.mark.slow
def test_the_group_by_hand_is_taken_by_the_proof(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of OPT, whose parameters it names; the analysis' own group is taken out first, and once with a wrong reader."""
    (command,) = re.findall(r"^    (autoquant init-group .*?)\n\n", PAGE, re.MULTILINE | re.DOTALL)
    words = shlex.split(command.replace("\\\n", " "))[1:]
    config, mine = load_config(CONFIGS / "opt.json"), "model.decoder.layers.{layer}.fc1 -> fc2"
    groups = tuple(group for group in config.smoothing.groups if group.name != mine)
    assert len(groups) == len(config.smoothing.groups) - 1
    monkeypatch.chdir(tmp_path)
    save_config(edited(config, smoothing=edited(config.smoothing, groups=groups)), Path("my.json"))
    wrong = CliRunner().invoke(main, [word.replace("fc2", "self_attn.out_proj") for word in words])
    assert wrong.exit_code == 1 and "fc1" in wrong.output, wrong.output
    assert len(load_config(Path("my.json")).smoothing.groups) == len(groups)
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    assert load_config(Path("my.json")).smoothing.groups[-1].channels == 3072


def test_the_message_is_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (message,) = re.findall(r"^(error: llama\.json:.*)$", PAGE, re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    text = (CONFIGS / "llama.json").read_text(encoding="utf-8")
    Path("llama.json").write_text(text.replace('"alpha"', '"alhpa"', 1), encoding="utf-8")
    result = CliRunner().invoke(main, ["check", "llama.json"])
    assert result.exit_code == 1
    assert result.output.splitlines() == [message]


def test_the_slot_of_grouped_queries_has_the_layout_that_is_said() -> None:
    """32 query heads over 8: column (4 h + j) 128 + d carries channel 128 h + d."""
    (block,) = (one for one in re.findall(r"^```json\n(.*?)^```", PAGE, re.M | re.S) if '"index"' in one)
    slot = Slot.model_validate_json(block)
    carried = dict(zip(positions_of(slot).tolist(), channels_of(slot).tolist(), strict=True))
    assert carried == {(4 * h + j) * 128 + d: 128 * h + d for h in range(8) for j in range(4) for d in range(128)}
