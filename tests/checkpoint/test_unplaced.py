from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from quantized import PACKAGED, config_of, windows
from safetensors.torch import load_file, save_file

from autoquant.checkpoint.apply import apply_checkpoint
from autoquant.checkpoint.quantize import Recipe, quantize_checkpoint
from autoquant.config.format import Config, Strategy, edited
from autoquant.errors import AutoQuantError
from autoquant.io.folders import PROVENANCE
from autoquant.pipeline.select import Transforms

FREQUENCIES = "model.layers.0.self_attn.rotary_emb.inv_freq"
MASK = "model.layers.1.self_attn.bias"
INSIDE = "model.layers.2.self_attn.extra.weight"


def source(folder: Path, **more: torch.Tensor) -> Path:
    shutil.copytree(PACKAGED, folder)
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | more, folder / "model.safetensors", {"format": "pt"})
    return folder


def mtp() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = {"mtp.fc.weight": (128, 256), "mtp.norm.weight": (128,)}
    tensors = {name: torch.rand(shape, generator=generator) for name, shape in made.items()}
    mask = torch.ones(1, 1, 128, 128).tril()
    return tensors | {FREQUENCIES: torch.rand(16, generator=generator), MASK: mask}


def heads_alone() -> Config:
    """The config with the rotation of the heads' values and without that of the residual."""
    config = config_of(PACKAGED)
    spaces = tuple(edited(space, enable=space.kind == "R2") for space in config.rotation.spaces)
    return edited(config, rotation=edited(config.rotation, spaces=spaces))


def test_what_may_read_the_rotated_residual_is_refused(tmp_path: Path) -> None:
    folder = source(tmp_path / "in", **mtp())
    said = "no place for mtp.fc.weight, mtp.norm.weight, which may read what residual changes.*delete them, or disable"
    with pytest.raises(AutoQuantError, match=said):
        apply_checkpoint(folder, config_of(PACKAGED), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_reads_nothing_that_changes_is_copied_as_it_is(tmp_path: Path) -> None:
    folder = source(tmp_path / "in", **mtp())
    with pytest.warns(UserWarning, match=r"no place for mtp.fc.weight, mtp.norm.weight: copied as is"):
        apply_checkpoint(folder, heads_alone(), tmp_path / "out")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(after[name], tensor) for name, tensor in mtp().items())


def test_a_reader_inside_of_the_layer_is_refused_there_alone(tmp_path: Path) -> None:
    folder = source(tmp_path / "in", **{INSIDE: torch.rand(4, 32)})
    with pytest.raises(AutoQuantError, match=f"no place for {INSIDE}, which may read"):
        apply_checkpoint(folder, heads_alone(), tmp_path / "out")


def test_buffers_of_older_classes_are_no_readers(tmp_path: Path) -> None:
    folder = source(tmp_path / "in", **{name: tensor for name, tensor in mtp().items() if "mtp" not in name})
    apply_checkpoint(folder, config_of(PACKAGED), tmp_path / "out")
    assert {FREQUENCIES, MASK} < load_file(tmp_path / "out" / "model.safetensors").keys()


@pytest.mark.parametrize("low_memory", [False, True])
def test_quantize_says_and_records_what_it_leaves_behind(tmp_path: Path, low_memory: bool) -> None:
    folder = source(tmp_path / "in", **mtp())
    dynamic = Strategy("w_int8_per_channel_a_int8_per_token_dynamic")
    made = Recipe(config_of(PACKAGED), dynamic, Transforms.parse("rotation"), windows(1, 8))
    with pytest.warns(UserWarning, match=r"no place for .*mtp.fc.weight.*: not loaded"):
        quantize_checkpoint(folder, tmp_path / "out", made, {}, low_memory=low_memory)
    left = json.loads((tmp_path / "out" / PROVENANCE).read_text())["result"]["left_behind"]
    assert sorted(left) == sorted(mtp())
