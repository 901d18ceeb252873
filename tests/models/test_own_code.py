"""A checkpoint whose model is code of its own: no command runs it unasked, and what is written of it loads again."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from quantized import DATA, PACKAGED

import autoquant as aq
from autoquant.cli.main import main
from autoquant.models.own_code import copy_code

TEXT = DATA / "sample.calibration.txt"
NAMES = {"AutoConfig": "its_config.ItsConfig", "AutoModelForCausalLM": "its_model.ItsForCausalLM"}
CONFIG = "from transformers import LlamaConfig\n\n\nclass ItsConfig(LlamaConfig):\n    model_type = 'of_its_own'\n"
MODEL = """from transformers import LlamaForCausalLM

from .its_config import ItsConfig
from .its_parts import HALF


class ItsForCausalLM(LlamaForCausalLM):
    config_class = ItsConfig

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * HALF
        return out
"""
CODE = {"its_config.py": CONFIG, "its_model.py": MODEL, "its_parts.py": "HALF = 0.5\n"}


@pytest.fixture(scope="module", autouse=True)
def _copies_elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """transformers copies code into the user's home; here elsewhere, whatever other tests have imported from there."""
    from transformers import dynamic_module_utils
    from transformers.utils.hub import TRANSFORMERS_DYNAMIC_MODULE_NAME

    place = str(tmp_path_factory.mktemp("modules"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", place)
        patch.syspath_prepend(place)
        for name in [name for name in sys.modules if name.split(".")[0] == TRANSFORMERS_DYNAMIC_MODULE_NAME]:
            patch.delitem(sys.modules, name)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("models") / "its"
    shutil.copytree(PACKAGED, made)
    settings = json.loads((made / "config.json").read_text())
    settings |= {"model_type": "of_its_own", "architectures": ["ItsForCausalLM"], "auto_map": NAMES, "dtype": "float32"}
    (made / "config.json").write_text(json.dumps(settings))
    for name, text in CODE.items():
        (made / name).write_text(text)
    return made


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(torch.arange(24)[None] + 100).logits
    return out


@pytest.fixture(scope="module")
def config(folder: Path) -> Any:
    return aq.analyze(folder, trust_remote_code=True, verify=False).config


def test_what_is_written_brings_the_code_along_and_loads(folder: Path, config: Any, tmp_path: Path) -> None:
    original = logits(aq.load(folder, trust_remote_code=True))
    assert torch.allclose(original, logits(aq.load(PACKAGED, "float32")) / 2)
    some: dict[str, Any] = {"calibration": TEXT, "sequences": 2, "length": 32, "trust_remote_code": True}
    quantized: dict[str, Any] = {"strategy": "w_int8_per_channel_a_int8_per_token_dynamic", **some}
    aq.apply(folder, config, tmp_path / "applied", **some)
    aq.quantize(folder, config, tmp_path / "whole", format="native", **quantized)
    aq.quantize(folder, config, tmp_path / "layers", format="native", low_memory=True, **quantized)
    aq.quantize(folder, config, tmp_path / "served", format="compressed-tensors", target="any", **quantized)
    aq.convert(tmp_path / "whole", tmp_path / "converted", to="compressed-tensors", trust_remote_code=True)
    aq.load(tmp_path / "whole", trust_remote_code=True).save_pretrained(tmp_path / "again")
    for name, largest in {
        "applied": 2e-3,
        "whole": 0.2,
        "layers": 0.2,
        "served": 0.2,
        "converted": 0.2,
        "again": 0.2,
    }.items():
        assert {path.name: path.read_text() for path in (tmp_path / name).glob("*.py")} == CODE, name
        changed = logits(aq.load(tmp_path / name, trust_remote_code=True))
        assert (changed - original).norm() / original.norm() < largest, name  # without its code: 1
        with pytest.raises(aq.AutoQuantError, match=r"code of its own \(its_config.py, its_model.py\)"):
            aq.load(tmp_path / name)
    assert (tmp_path / "whole" / "autoquant.safetensors").read_bytes() == (
        tmp_path / "layers" / "autoquant.safetensors"
    ).read_bytes()


@pytest.mark.parametrize(
    "arguments",
    [
        ["analyze", "MODEL"],
        ["apply", "MODEL", "CONFIG", "-o", "OUT", "--transforms", "rotation"],
        ["quantize", "MODEL", "-o", "OUT"],
        ["quantize", "MODEL", "CONFIG", "-o", "OUT", "--low-memory"],
        ["search", "MODEL", "CONFIG", "-o", "OUT", "--calibration", "TEXT", "--sequences", "1", "--length", "16"],
        ["eval", "MODEL", "--data", "TEXT"],
        ["compare", "MODEL", "-o", "OUT", "--data", "TEXT", "--calibration", "TEXT", "--length", "16"],
        ["verify", "MODEL", "CONFIG"],
        ["check", "CONFIG", "--model", "MODEL"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_no_command_runs_it_unasked(arguments: list[str], folder: Path, config: Any, tmp_path: Path) -> None:
    aq.save_config(config, tmp_path / "config.json")
    names = {"MODEL": folder, "CONFIG": tmp_path / "config.json", "OUT": tmp_path / "out", "TEXT": TEXT}
    result = CliRunner().invoke(main, [str(names.get(argument, argument)) for argument in arguments], input="y\n")
    assert result.exit_code == 1, result.output
    assert "give --trust-remote-code to run it" in result.output.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_a_class_of_transformers_has_no_code(tmp_path: Path) -> None:
    """A folder that names code, which was not run: what is written of it does not name what it has not."""
    folder = tmp_path / "its"
    shutil.copytree(PACKAGED, folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "auto_map": NAMES}))
    model = aq.load(folder)
    model.config.save_pretrained(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["auto_map"] == NAMES
    copy_code(model, tmp_path / "out")
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["config.json"]
