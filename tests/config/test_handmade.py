from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from autoquant.cli.main import main
from autoquant.config.file import load_config, save_config
from autoquant.config.format import Config, edited
from autoquant.config.handmade import with_group
from autoquant.errors import AutoQuantError

CONFIGS = Path(__file__).parents[2] / "generated_configs"
LAYER = "model.layers.{layer}."


def bare(name: str) -> Config:
    """A config without groups."""
    config = load_config(CONFIGS / f"{name}.json")
    return edited(config, smoothing=edited(config.smoothing, groups=()))


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3_moe", "gpt2", "mistral"])
def test_groups_by_hand_are_those_that_were_found(name: str) -> None:
    """Wherever the slots of a found group are whole axes, or repeated as in grouped-query attention."""
    found = load_config(CONFIGS / f"{name}.json").smoothing.groups
    tried = 0
    for group in found:
        whole = all(slot.index is None for slot in group.sources) and group.kind.value != "query_key"
        if not whole or any(slot.power != 1 for slot in (*group.sources, *group.targets)):
            continue
        sources, targets = [slot.path for slot in group.sources], [slot.path for slot in group.targets]
        made = with_group(bare(name), sources, targets, group.layers, group.name, group.sources[0].offset)
        assert made.smoothing.groups == (edited(group, by_hand=True),)
        tried += 1
    assert tried >= 2


def test_the_name_and_the_layers_are_those_of_the_members() -> None:
    made = with_group(bare("llama"), [f"{LAYER}mlp.up_proj.weight"], [f"{LAYER}mlp.down_proj.weight"])
    (group,) = made.smoothing.groups
    assert (group.name, group.layers) == (f"{LAYER}mlp.up_proj -> down_proj", "0-31")


@pytest.mark.parametrize(
    ("sources", "targets", "message"),
    [
        ([f"{LAYER}mlp.up_proj.weight"], [f"{LAYER}mlp.down_porj.weight"], "did you mean"),
        (["up"], [f"{LAYER}mlp.down_proj.weight"], "no parameter 'up' in model.linears"),
        ([f"{LAYER}mlp.up_proj.weight"], [f"{LAYER}mlp.up_proj.weight"], "does not fit together"),
    ],
)
def test_what_cannot_be_a_group(sources: list[str], targets: list[str], message: str) -> None:
    with pytest.raises(AutoQuantError) as error:
        with_group(bare("llama"), sources, targets)
    assert message in error.value.message


def run(*arguments: object) -> Any:
    return CliRunner().invoke(main, ["init-group", *map(str, arguments)])


def test_the_proof_decides(tmp_path: Path) -> None:
    path, out = tmp_path / "c.json", tmp_path / "o.json"
    save_config(bare("llama"), path)
    down = f"{LAYER}mlp.down_proj.weight"
    wrong = run(path, "--source", f"{LAYER}mlp.gate_proj.weight", "--target", down, "-o", out, "--quiet")
    assert wrong.exit_code == 1 and "(linear_linear) changes the logits by 0." in wrong.output and not out.exists()
    right = run(path, "--source", f"{LAYER}mlp.up_proj.weight", "--target", down, "-o", out)
    assert right.exit_code == 0 and "11,008 channels, proved; the analysis finds it too" in right.output, right.output
    (group,) = load_config(out).smoothing.groups
    assert group.channels == 11008 and not group.by_hand
    assert run(path, "--source", f"{LAYER}mlp.gate_proj.weight", "--target", down, "--no-verify").exit_code == 0
