from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner
from syrupy.assertion import SnapshotAssertion

from autoquant.cli.main import main
from autoquant.config.assign import assign
from autoquant.config.file import load_config
from autoquant.config.format import Config, edited
from autoquant.errors import AutoQuantError
from autoquant.report.tree import linear_lines, tree_lines

CONFIGS = Path(__file__).parents[2] / "generated_configs"


def config(name: str = "llama") -> Config:
    return load_config(CONFIGS / f"{name}.json")


@pytest.mark.parametrize("width", [80, 40])
@pytest.mark.parametrize("name", ["llama", "deepseek_v3", "gemma2", "speech-seq2seq/whisper"])
def test_trees(name: str, width: int, snapshot: SnapshotAssertion) -> None:
    lines = tree_lines(config(name), width)
    assert "\n".join(lines) == snapshot
    words = [word for line in lines for word in line.split()]
    shown = {linear.path.partition("{layer}.")[2] or linear.path for linear in config(name).model.linears}
    assert shown <= set(words)  # no name is cut or broken


def test_changed_knobs_come_first_and_a_layer_shows_its_overrides() -> None:
    edits = ["smoothing.alpha=0.7", "layers 3: enable=false"]
    lines = tree_lines(assign(config(), edits), 100, 3)
    assert lines[:2] == ["5 knobs differ from the defaults", "  smoothing.alpha = 0.7 (default 0.5)"]
    assert "layer 3, as 32 layers of model.layers: 0-31" in lines
    assert "│    norm_linear: 4,096 scales a layer; off" in lines
    assert "│    norm_linear: 4,096 scales a layer; on, alpha 0.7" in tree_lines(assign(config(), edits), 100, 2)


def test_one_linear() -> None:
    found = linear_lines(config("deepseek_v3"), "mlp.experts.down_proj", 200)
    assert found == [
        "mlp.experts.down_proj: 2,048 -> 7,168 x 256, linear, layers 3-60",
        "  quantized: w_int8_per_channel_a_int8_per_token_dynamic",
        "  smoothed by model.layers.{layer}.mlp.experts.gate_up_proj -> down_proj (linear_linear): 524,288 scales a "
        "layer; on, alpha 0.5",
        "  writes into R1 residual: 7,168 channels; on, hadamard",
        "  no rotation: no rotation in the weights reaches its input, and it is no module that an online one could "
        "precede (transformers.grouped_mm_fallback at model.layers.{layer}.mlp.experts)",
    ]
    kept = assign(config(), ["layers 0: strategy=null"])
    assert "  quantized: no, in floating point, by an override" in linear_lines(
        kept, "model.layers.0.mlp.down_proj", 100
    )
    assert "by an override" not in "".join(linear_lines(kept, "model.layers.1.mlp.down_proj", 100))
    assert "  quantized: no, excluded" in linear_lines(config(), "lm_head", 100)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("mlp.down_porj", "no linear 'mlp.down_porj'; did you mean 'mlp.down_proj'?"),
        ("down_proj", "3 end so: model.layers.{layer}.mlp.down_proj, "),
    ],
)
def test_no_such_linear(path: str, message: str) -> None:
    with pytest.raises(AutoQuantError) as error:
        linear_lines(config("deepseek_v3"), path, 80)
    assert message in error.value.message


def test_no_such_layer() -> None:
    with pytest.raises(AutoQuantError, match="no layer 32: there are 32, counted from 0"):
        tree_lines(config(), 80, 32)


def test_names_are_inert(example_config: Config) -> None:
    name = "net\x1b[31m\n[bold]red"
    group = edited(example_config.smoothing.groups[0], name=name, enable=False)
    wild = edited(example_config, smoothing=edited(example_config.smoothing, groups=(group,)))
    text = "\n".join(tree_lines(wild, 200))
    assert "\x1b" not in text and "net\\x1b[31m\\n[bold]red" in text


def test_the_command() -> None:
    path = str(CONFIGS / "llama.json")
    shown = CliRunner().invoke(main, ["show", path, "--layer", "3"]).output
    assert shown == "\n".join(tree_lines(config(), 140, 3)) + "\n"
    assert CliRunner().invoke(main, ["show", path, "--linear", "lm_head"]).output.startswith("lm_head: 4,096 -> 32,000")
