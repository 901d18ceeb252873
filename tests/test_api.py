"""The public Python API: its names, its results, its documentation."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from syrupy.assertion import SnapshotAssertion
from torch import nn

import autoquant as aq
from autoquant.api.arguments import IMPORTING
from autoquant.cli.main import COMMANDS
from autoquant.config.format import edited
from autoquant.config.jsonschema import schema_text

if TYPE_CHECKING:
    from autoquant.config.format import Config

ROOT = Path(__file__).parents[1]
PACKAGED = ROOT / "autoquant" / "data" / "wikinano1m"
FUNCTIONS = sorted(set(aq.__all__) - {"__version__", "AutoQuantError"})
NEEDED = {
    "autoquant.quantizer.gluon_kernels": "triton",
    "autoquant.quantizer.triton_kernels": "triton",
    "autoquant.recipes.registry_llm_compressor": "llmcompressor",
    "autoquant.recipes.registry_quark": "quark",
}
"""Modules that are imported where another package is installed, and that package."""
OF_COMMAND = {"eval": "evaluate", "export": "export_recipe", "import": "import_recipe"}
STATIC = "w_int8_per_channel_a_int8_per_tensor_static"


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor, shift: torch.Tensor | None = None) -> torch.Tensor:
        y: torch.Tensor = self.down(torch.relu(self.up(self.norm(x))))
        return y if shift is None else y + shift


@pytest.fixture(scope="module")
def config() -> Config:
    return aq.analyze(PACKAGED).config


def test_the_signatures_are_frozen(snapshot: SnapshotAssertion) -> None:
    """A new or changed parameter shows here: update with --snapshot-update, and say why in the commit."""
    text = "\n".join(f"{name}{inspect.signature(getattr(aq, name))}" for name in FUNCTIONS)
    assert re.sub(r"<function (\S+) at \w+>", r"\1", text) == snapshot


def test_no_module_shadows_a_function() -> None:
    for module in pkgutil.walk_packages(aq.__path__, "autoquant."):
        if module.name != "autoquant.__main__" and importlib.util.find_spec(NEEDED.get(module.name, "autoquant")):
            importlib.import_module(module.name)
    for name in FUNCTIONS:
        assert inspect.isfunction(getattr(aq, name)), name
        assert name not in vars(aq), f"autoquant.{name} is a module as well"


def test_importing_imports_nothing_heavy() -> None:
    code = (
        "import autoquant, sys; dir(autoquant); print([n for n in ('torch', 'pydantic', 'click') if n in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'autoquant' has no attribute 'analyse'"):
        aq.analyse  # type: ignore[attr-defined]  # noqa: B018  # that is what is tested


@pytest.mark.parametrize("command", ["analyze", "apply", "check", "verify", "quantize", "search", "eval", "compare"])
def test_an_option_has_the_name_of_its_parameter(command: str) -> None:
    assert command in COMMANDS
    own = {"output", "force", "form", "quiet", "explain", "no_verify", "config", "model", "models", "data"}
    hidden = {"rotate", "smooth", "alpha", "kind", "means", "preopt", "window"}
    options = {p.name for p in importlib.import_module(f"autoquant.cli.{command}").command.params}
    parameters = inspect.signature(getattr(aq, OF_COMMAND.get(command, command))).parameters
    assert options - own - hidden <= set(parameters)


def test_a_module_of_ones_own(config: Config) -> None:
    block = Block().eval()
    before = {name: value.clone() for name, value in block.state_dict().items()}
    for example in ((torch.randn(2, 8),), {"x": torch.randn(2, 8)}, ((torch.randn(2, 8),), {"shift": torch.randn(8)})):
        found = aq.analyze(block, example_inputs=example)
        assert [group.name for group in found.config.smoothing.groups] == ["norm -> up", "up -> down"]
        assert found.config.certificate is not None and found.config.certificate.proved
        assert aq.verify(block, found.config, example_inputs=example).holds
        assert aq.check(found.config, block, example_inputs=example).model == "Block"
    assert all(torch.equal(before[name], value) for name, value in block.state_dict().items())
    with pytest.raises(aq.AutoQuantError, match="Block: needs example_inputs"):
        aq.analyze(block)
    with pytest.raises(aq.AutoQuantError, match="does not fit Block"):
        aq.check(config, block, example_inputs=(torch.randn(2, 8),))


def test_a_model_of_transformers_needs_no_inputs(config: Config) -> None:
    model = aq.load(PACKAGED)
    assert aq.analyze(model, verify=False).config.smoothing == config.smoothing
    model.model.layers = model.model.layers[:1]
    with pytest.raises(aq.AutoQuantError, match="is not what its configuration makes"):
        aq.analyze(model)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(torch.arange(24)[None] + 100).logits
    return out


def test_apply_in_memory_changes_a_copy_that_computes_the_same(config: Config) -> None:
    model = aq.load(PACKAGED, "float64")
    before = logits(model)
    batches = [torch.arange(64)[None]]
    for transforms in ("rotation:R1", "smooth+fc_fc"):
        changed = aq.apply(model, config, transforms=transforms, calibration=batches)
        assert changed is not model
        assert not torch.equal(changed.lm_head.weight, model.lm_head.weight) or transforms != "rotation:R1"
        difference = (logits(changed) - before).abs().max() / before.abs().max()
        assert difference < 1e-5, transforms  # the model's norms are in float32; a wrong one is beyond 1e-2
    assert torch.equal(logits(model), before)
    with pytest.raises(aq.AutoQuantError, match="smoothing needs calibration"):
        aq.apply(model, config)
    assert aq.apply(model, config, transforms="rotation:R1", inplace=True) is model


def test_apply_writes_a_folder_that_computes_the_same(config: Config, tmp_path: Path) -> None:
    before = logits(aq.load(PACKAGED, "float64"))
    batches = [torch.arange(64)[None]]
    told: list[str] = []
    written = aq.apply(
        PACKAGED, config, tmp_path / "out", calibration=batches, progress=lambda step, *at: told.append(step)
    )
    assert list(dict.fromkeys(told)) == [IMPORTING, "load", "calibrate", "apply"]
    assert repr(written).splitlines()[-1].startswith(f"{tmp_path / 'out'}: ")
    assert "tensors changed, 10 groups smoothed" in repr(written)
    facts = written.as_dict()
    assert facts["groups_smoothed"] == 10 and facts["transforms"] == "smooth+fc_fc+rotation"
    assert {"output", "tensors_changed", "untied", "rotations", "calibration", "dtype"} <= facts.keys()
    difference = (logits(aq.load(tmp_path / "out", "float64")) - before).abs().max() / before.abs().max()
    assert difference < 1e-2  # weights are stored in float16 again
    again = aq.apply(PACKAGED, config, tmp_path / "wide", calibration=batches, dtype=torch.float64)
    assert again.as_dict()["dtype"] == "float64"
    difference = (logits(aq.load(tmp_path / "wide")) - before).abs().max() / before.abs().max()
    assert difference < 1e-5  # the model's norms are in float32


def test_a_model_quantized_in_memory_saves_what_loads(config: Config, tmp_path: Path) -> None:
    model = aq.load(PACKAGED, "float32")
    quantized = aq.quantize(model, config, strategy=STATIC, calibration=[torch.arange(64)[None]])
    expected = logits(quantized)
    quantized.save_pretrained(tmp_path / "one")
    again = aq.load(tmp_path / "one")
    assert torch.equal(logits(again), expected)
    again.save_pretrained(str(tmp_path / "two"))
    assert torch.equal(logits(aq.load(tmp_path / "two")), expected)
    with pytest.raises(aq.AutoQuantError, match="exists already; give --force to replace it"):
        again.save_pretrained(tmp_path / "two")
    again.save_pretrained(tmp_path / "two", force=True)


def test_what_is_refused_says_so(config: Config) -> None:
    with pytest.raises(aq.AutoQuantError, match="needs an output"):
        aq.quantize(PACKAGED, config)
    with pytest.raises(aq.AutoQuantError, match="needs an output"):
        aq.apply(PACKAGED, config)
    with pytest.raises(aq.AutoQuantError, match="takes no output, media, maxima"):
        aq.apply(Block(), config, "out")
    with pytest.raises(aq.AutoQuantError, match="dtype 'float31': expected"):
        aq.load(PACKAGED, "float31")
    with pytest.raises(aq.AutoQuantError, match="needs the tokenizer that reads it"):
        aq.apply(Block(), config, calibration="a.txt")
    with pytest.raises(aq.AutoQuantError, match="device 'tpu:0:1': expected auto, cpu"):
        aq.load(PACKAGED, device="tpu:0:1")


def test_results_show_what_matters_and_names_are_inert(config: Config) -> None:
    checked = aq.check(config)
    assert repr(checked).startswith("config: valid; ")
    found = aq.analyze(PACKAGED, verify=False)
    assert repr(found).splitlines()[-1].endswith("0 operators without a rule")
    odd = type(checked)(config, "<b>[bold]\x1b[31m\n.json")
    assert repr(odd).startswith(r"<b>[bold]\x1b[31m\n.json: valid")
    assert odd._repr_html_().startswith(r"<pre>&lt;b&gt;[bold]\x1b[31m\n.json: valid")


def test_the_examples_of_the_documentation_run(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "python-api.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 6
    (tmp_path / "autoquant").mkdir()
    (tmp_path / "autoquant" / "data").symlink_to(ROOT / "autoquant" / "data")
    script = tmp_path / "examples" / "all.py"  # not beside the folder that stands for the package's data
    script.parent.mkdir()
    script.write_text("\n".join(blocks), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}
    result = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "perplexity" in result.stdout


def test_a_config_that_is_saved_has_its_schema_beside_it(example_config: Config, tmp_path: Path) -> None:
    aq.save_config(example_config, tmp_path / "c.json")
    written = json.loads((tmp_path / "c.json").read_text(encoding="utf-8"))
    assert written["$schema"] == "autoquant-config.v2.schema.json"
    assert (tmp_path / written["$schema"]).read_text(encoding="utf-8") == schema_text()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    aq.save_config(edited(example_config, schema_="../mine.json"), elsewhere / "c.json")
    assert [path.name for path in elsewhere.iterdir()] == ["c.json"]
