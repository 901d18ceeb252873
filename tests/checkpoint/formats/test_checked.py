"""Quantized folders that someone edited: each ends in one line, none in a traceback or in wrong numbers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized import PACKAGED, STATIC_KV, config_of, windows
from safetensors.torch import load_file, save_file
from torch import Tensor

import autoquant
from autoquant.checkpoint.formats.native import FACTS, TENSORS
from autoquant.checkpoint.provenance import CONFIG
from autoquant.checkpoint.quantize import Recipe, quantize_checkpoint
from autoquant.config.format import Strategy
from autoquant.errors import AutoQuantError
from autoquant.pipeline.select import Transforms

Q = "model.layers.1.self_attn.q_proj.weight"
NORM, TABLE = "model.norm.weight", "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantized") / "out"
    recipe = Recipe(config_of(PACKAGED), Strategy(STATIC_KV), Transforms.parse("rotation"), windows(1, 8))
    quantize_checkpoint(PACKAGED, folder, recipe, {})
    return folder


@pytest.fixture
def folder(quantized: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(quantized, tmp_path / "out"))


def refused(folder: Path) -> str:
    with pytest.raises(AutoQuantError) as caught:
        autoquant.load(folder)
    assert caught.value.message.isprintable(), caught.value.message
    return caught.value.message


FACT_EDITS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no dtype": (lambda f: f.pop("dtype"), "dtype: Field required"),
    "a dtype that is none": (lambda f: f.update(dtype="nn"), "'nn' is no dtype of a model"),
    "an integer dtype": (lambda f: f.update(dtype="int8"), "'int8' is no dtype of a model"),
    "a dtype that is a number": (lambda f: f.update(dtype=3), "dtype: Input should be a valid string"),
    "names that are a list": (lambda f: f.update(shared=["a"]), "shared: Input should be a valid dictionary"),
    "a name that is a number": (
        lambda f: f.update(shared={"lm_head.weight": 1}),
        "shared.lm_head.weight: Input should",
    ),
    "a name that is nowhere": (lambda f: f.update(shared={"lm_head.weight": "x"}), "do not fit its config: 'x'"),
    "a made bias of nothing": (lambda f: f.update(created=["no.such.bias"]), "do not belong together"),
    "a made bias without a weight": (lambda f: f.update(created=["model.layers.bias"]), "do not belong together"),
    "norms that are a word": (lambda f: f.update(identities="model"), "identities: Input should be a valid"),
    "a norm that is the model": (lambda f: f.update(identities=["model"]), "do not belong together"),
    "a norm without a name": (lambda f: f.update(identities=[""]), "identities.0: String should have"),
    "a rotation of a kind that is none": (
        lambda f: f.update(online=[{"kind": "R9", "path": "x", "size": 4}]),
        "online.0.kind: Input should be 'R3', 'R4' or 'input'",
    ),
    "a rotation of nothing": (lambda f: f.update(online=[{"kind": "R4", "path": "x", "size": 4}]), "belong together"),
    "a rotation of no size": (
        lambda f: f.update(online=[{"kind": "R4", "path": "model.layers.0.mlp.down_proj", "size": 0}]),
        "online.0.size: Input should be greater than 0",
    ),
    "a rotation of another size": (
        lambda f: f.update(online=[{"kind": "R4", "path": "model.layers.0.mlp.down_proj", "size": 7}]),
        "do not",
    ),
    "rotations that are a number": (lambda f: f.update(online=7), "online: Input should be a valid tuple"),
}


@pytest.mark.parametrize("edit", FACT_EDITS)
def test_facts(folder: Path, edit: str) -> None:
    change, message = FACT_EDITS[edit]
    facts = json.loads((folder / FACTS).read_text())
    change(facts)
    (folder / FACTS).write_text(json.dumps(facts))
    assert message in refused(folder)


@pytest.mark.parametrize("text", ["", "[]", "null", "3", "[" * 200_000, "\x00", '{"online": {}}'])
@pytest.mark.parametrize("name", [FACTS, CONFIG, "config.json"])
def test_files_that_are_something_else(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)
    assert name in refused(folder)


@pytest.mark.parametrize("name", [CONFIG, "config.json", TENSORS])
def test_files_that_are_no_files(folder: Path, name: str) -> None:
    import os

    (folder / name).unlink()
    os.mkfifo(folder / name)  # would be waited for
    assert name in refused(folder)


TENSOR_EDITS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "a scale that is negative": (lambda t: t[f"{Q}.scale"].neg_(), f"{Q}.scale is not positive and finite"),
    "a scale that is no number": (lambda t: t[f"{Q}.scale"].fill_(torch.nan), f"{Q}.scale is not positive and finite"),
    "a scale in half": (lambda t: t.update({f"{Q}.scale": t[f"{Q}.scale"].half()}), f"{Q}.scale is not positive"),
    "an input scale of 0": (lambda t: t[f"{Q}.input_scale"].zero_(), f"{Q}.input_scale is not positive"),
    "values in float": (lambda t: t.update({f"{Q}.values": t[f"{Q}.values"].float()}), "values is torch.float32, not"),
    "values of another shape": (lambda t: t.update({f"{Q}.values": t[f"{Q}.values"][:5]}), "do not fit"),
    "a norm that is no number": (lambda t: t[NORM].fill_(torch.nan), f"{NORM} holds a NaN"),
    "a norm in int8": (lambda t: t.update({NORM: t[NORM].to(torch.int8)}), f"{NORM} is torch.int8, not"),
    "a table without numbers": (lambda t: t[TABLE].fill_(torch.inf), f"{TABLE} holds a NaN or an infinity"),
    "no scale": (lambda t: t.pop(f"{Q}.scale"), f"{Q}.scale"),
    "one tensor more": (lambda t: t.update(more=torch.ones(1)), "more"),
    "another name": (lambda t: t.update({"a\x1b[2J": t.pop(NORM)}), r"'a\x1b[2J' holds what cannot be printed"),
}


@pytest.mark.parametrize("edit", TENSOR_EDITS)
def test_tensors(folder: Path, edit: str) -> None:
    change, message = TENSOR_EDITS[edit]
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / TENSORS)
    assert message in refused(folder)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_hidden_layers", 9000, "config.json says num_hidden_layers 9000, the file holds"),
        ("num_hidden_layers", 4, "do not"),
        ("hidden_size", 10**12, "cannot be built"),
        ("vocab_size", 5, "do not fit"),
        ("model_type", "\x1b[2J", "model_type"),
    ],
)
def test_the_model_s_own_config(folder: Path, key: str, value: object, message: str) -> None:
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {key: value}))
    assert message in refused(folder)


def test_an_unused_row_is_no_damage(folder: Path) -> None:
    tensors = load_file(folder / TENSORS)
    tensors[TABLE][5] = torch.nan
    save_file(tensors, folder / TENSORS)
    assert autoquant.load(folder).get_input_embeddings().weight[5].isnan().all()
