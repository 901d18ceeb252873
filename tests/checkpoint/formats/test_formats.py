"""A format is one class: quantize writes it, and autoquant.load reads it, with no other edit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized import PACKAGED, config_of
from safetensors.torch import load_file
from torch import nn

import autoquant
from autoquant.checkpoint import formats
from autoquant.checkpoint.formats import Changes, Contents, Wish, check_format, format_named, format_of, register
from autoquant.checkpoint.quantize import Recipe, quantize_checkpoint
from autoquant.config.format import Config, Strategy
from autoquant.errors import AutoQuantError
from autoquant.io.folders import PROVENANCE
from autoquant.io.safetensors_writer import write_tensors
from autoquant.pipeline.select import Transforms


class Plain:
    """Tensors in one file, and no more."""

    name = "plain"

    def reasons_against(self, config: Config, changes: Changes, model: Any = None) -> tuple[str, ...]:
        return tuple(f"{rotation.path}: no rotation at inference" for rotation in changes.online)

    def write(self, folder: Path, contents: Contents) -> None:
        write_tensors(folder / "plain.safetensors", contents.described, contents.tensors)

    def is_mine(self, folder: Path) -> bool:
        return (folder / "plain.safetensors").is_file()

    def contents(self, folder: Path, *, trust_remote_code: bool = False) -> Contents:
        raise AutoQuantError("plain tensors say nothing of a model")

    def load(self, folder: Path, dtype: torch.dtype | None, *, trust_remote_code: bool = False) -> Any:
        module: Any = nn.Module()
        module.tensors = load_file(folder / "plain.safetensors")
        return module


@pytest.fixture
def plain() -> Iterator[None]:
    register(Plain())
    yield
    del formats._formats["plain"]


def recipe() -> Recipe:
    return Recipe(config_of(PACKAGED), Strategy.PER_CHANNEL_PER_TOKEN, Transforms.parse("none"))


def test_a_second_format_is_one_class(tmp_path: Path, plain: None) -> None:
    for form in ("plain", "native"):
        quantize_checkpoint(PACKAGED, tmp_path / form, recipe(), {"seed": 1}, wish=Wish(form))
        found = format_of(tmp_path / form)
        assert found is not None and found.name == form
        assert json.loads((tmp_path / form / PROVENANCE).read_text())["options"] == {"seed": 1}
    plainly, model = autoquant.load(tmp_path / "plain"), autoquant.load(tmp_path / "native")
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in plainly.tensors.items())
    assert format_of(PACKAGED) is None


def test_what_a_format_cannot_hold_is_refused_with_its_reasons(tmp_path: Path, plain: None) -> None:
    from autoquant.executor.resolved import ResolvedOnline

    changes = Changes(online=(ResolvedOnline("R4", "model.layers.0.mlp.down_proj", 128, None),))
    with pytest.raises(AutoQuantError, match="the format 'plain' cannot hold the result") as caught:
        check_format("plain", config_of(PACKAGED), changes)
    assert caught.value.details == ("model.layers.0.mlp.down_proj: no rotation at inference",)
    assert check_format("native", config_of(PACKAGED), changes).name == "native"


def test_names(plain: None) -> None:
    with pytest.raises(ValueError, match="there is a format 'plain' already"):
        register(Plain())
    with pytest.raises(AutoQuantError, match=r"no format 'nativ'; did you mean 'native'\?$"):
        format_named("nativ")
