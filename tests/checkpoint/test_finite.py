from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized import PACKAGED, config_of, windows
from safetensors.torch import load_file, save_file

import autoquant
from autoquant.checkpoint.apply import apply_checkpoint
from autoquant.checkpoint.finite import find_unused
from autoquant.checkpoint.formats.native import TENSORS
from autoquant.checkpoint.quantize import Recipe, quantize_checkpoint
from autoquant.config.format import Strategy
from autoquant.errors import AutoQuantError
from autoquant.pipeline.select import Transforms

TABLE, Q = "model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.weight"
STATIC = Strategy("w_int8_per_channel_a_int8_per_tensor_static")


def source(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    shutil.copytree(PACKAGED, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def recipe(last: int = 5) -> Recipe:
    batches = (torch.cat([windows(1)[0], torch.tensor([[last]])], 1),)
    return Recipe(config_of(PACKAGED), STATIC, Transforms.parse("fc_fc+rotation"), batches)


def unused_row(tensors: dict[str, torch.Tensor]) -> None:
    tensors[TABLE][2047] = torch.nan
    tensors[TABLE][2046, 5] = torch.inf


@torch.no_grad()
def test_unused_rows_are_kept_and_change_nothing_else(tmp_path: Path) -> None:
    folder = source(tmp_path / "in", unused_row)
    said = r"embed_tokens.weight: row 2046, 2047 holds a NaN or an infinity; it is kept"
    with pytest.warns(UserWarning, match=said):
        apply_checkpoint(folder, config_of(PACKAGED), tmp_path / "applied")
    apply_checkpoint(PACKAGED, config_of(PACKAGED), tmp_path / "wanted")
    found, wanted = (load_file(tmp_path / name / "model.safetensors") for name in ("applied", "wanted"))
    for name in (TABLE, "lm_head.weight"):
        assert found[name][2047].isnan().all() and torch.equal(found[name][:2046], wanted[name][:2046])
        found.pop(name)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.items())


@pytest.mark.parametrize("low_memory", [False, True])
def test_quantize_keeps_them_too(tmp_path: Path, low_memory: bool) -> None:
    folder = source(tmp_path / "in", unused_row)
    with pytest.warns(UserWarning, match="row 2046, 2047 holds a NaN"):
        quantize_checkpoint(folder, tmp_path / "out", recipe(), {}, low_memory=low_memory)
    quantize_checkpoint(PACKAGED, tmp_path / "wanted", recipe(), {})
    found, wanted = (load_file(tmp_path / name / TENSORS) for name in ("out", "wanted"))
    assert found[TABLE][2047].isnan().all() and found["lm_head.weight"][2047].isnan().all()
    assert all(torch.equal(found[name][:2046], wanted[name][:2046]) for name in found if found[name].dim())
    logits = autoquant.load(tmp_path / "out")(windows()[0]).logits
    assert logits[..., :2046].isfinite().all() and logits[..., 2047].isnan().all()
    with pytest.warns(UserWarning), pytest.raises(AutoQuantError, match=r"row 2047 holds a NaN.*text has that token"):
        quantize_checkpoint(folder, tmp_path / "used", recipe(2047), {}, low_memory=low_memory)
    assert not (tmp_path / "used").exists()


@pytest.mark.parametrize(("value", "said"), [(torch.nan, "a NaN"), (-torch.inf, "an infinity")])
def test_all_else_is_named_before_the_work(tmp_path: Path, value: float, said: str) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[Q][3, 5] = value
        tensors["model.norm.weight"][:2] = value

    folder = source(tmp_path / "in", change)
    steps: list[str] = []
    for low_memory in (False, True):
        with pytest.raises(AutoQuantError) as caught:
            quantize_checkpoint(
                folder, tmp_path / "out", recipe(), {}, low_memory=low_memory, progress=lambda *at: steps.append(at[0])
            )
        for text in (f"{Q} holds {said} (1 of 16384 elements)", f"model.norm.weight holds {said} (2 of 128 elements)"):
            assert text in caught.value.message
    assert set(steps) == {"load"} and not (tmp_path / "out").exists()
    with pytest.raises(AutoQuantError, match=rf"{Q} holds {said}"):
        apply_checkpoint(folder, config_of(PACKAGED), tmp_path / "out")


def test_a_table_that_is_mostly_not_finite_is_no_padding() -> None:
    tables = {"t": torch.full((4, 2), torch.nan), "w": torch.full((2, 2), 1e308, dtype=torch.float64)}
    tables["t"][0] = 1
    with pytest.raises(AutoQuantError, match=r"f: t holds a NaN \(6 of 8 elements\)"):
        find_unused(Path("f"), tables, tables.__getitem__, {"t"})
    assert not find_unused(Path("f"), {"w"}, tables.__getitem__, ()).rows, "their sum alone is infinite"
