"""Shards written tensor by tensor are what safetensors itself reads; broken ones are said to be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from autoquant.errors import AutoQuantError
from autoquant.io.safetensors_stream import open_shards
from autoquant.io.safetensors_writer import places

TENSORS = {
    "a": torch.arange(6.0).reshape(2, 3),
    "b": torch.tensor([1.5, -2, 3]).bfloat16(),
    "scalar": torch.tensor(7, dtype=torch.int64),
    "empty": torch.zeros(0, 4, dtype=torch.float16),
    "mask": torch.tensor([True, False]),
}


def write(path: Path) -> None:
    described = {name: (t.dtype, tuple(t.shape)) for name, t in TENSORS.items()}
    with places({path: described}, ordered=True) as opened:
        for name, tensor in TENSORS.items():
            opened.put(name, tensor)


def test_safetensors_reads_what_is_written(tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors")
    loaded = load_file(tmp_path / "model.safetensors")
    assert list(loaded) == list(TENSORS)
    assert all(torch.equal(loaded[n], t) and loaded[n].dtype is t.dtype for n, t in TENSORS.items())
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_tensor_that_is_not_contiguous_is_written_in_order(tmp_path: Path) -> None:
    tensor = torch.arange(6.0).reshape(2, 3).mT
    with places({tmp_path / "model.safetensors": {"t": (torch.float32, (3, 2))}}, {}) as opened:
        opened.put("t", tensor[1:], 1)
        assert not opened.is_whole("t")
        opened.put("t", tensor[:1])
        assert opened.is_whole("t")
    assert torch.equal(load_file(tmp_path / "model.safetensors")["t"], tensor)


def test_headers_and_tensors_are_read_back(tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors")
    shards = open_shards(tmp_path)
    assert shards.files == ("model.safetensors",) and dict(shards.metadata) == {"format": "pt"}
    assert shards.entries["b"].dtype is torch.bfloat16 and shards.entries["a"].shape == (2, 3)
    assert torch.equal(shards.read("a"), TENSORS["a"])


def sharded(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    save_file({"b": torch.ones(3)}, tmp_path / "two.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))


def test_an_index_names_the_shards(tmp_path: Path) -> None:
    sharded(tmp_path)
    shards = open_shards(tmp_path)
    assert shards.files == ("one.safetensors", "two.safetensors")
    assert shards.entries["b"].file == "two.safetensors"


def test_a_missing_shard_is_one_line(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / "two.safetensors").unlink()
    with pytest.raises(AutoQuantError, match=r"^.*two.safetensors: shard is missing$"):
        open_shards(tmp_path)


def test_an_index_that_does_not_fit_its_shards(tmp_path: Path) -> None:
    sharded(tmp_path)
    index = {"weight_map": {"a": "one.safetensors", "c": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(AutoQuantError, match=r"two.safetensors: lacks the tensor c that the index names"):
        open_shards(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../one.safetensors"}}')
    with pytest.raises(AutoQuantError, match="names a shard outside of the folder"):
        open_shards(tmp_path)


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    with pytest.raises(AutoQuantError, match="only safetensors checkpoints can be read"):
        open_shards(tmp_path)


@pytest.mark.parametrize("index", ["{", "{}", '{"weight_map": 3}'])
def test_a_bad_index(tmp_path: Path, index: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(AutoQuantError, match="not an index of shards"):
        open_shards(tmp_path)


def test_a_shard_cut_short(tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors")
    content = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[:-1])
    with pytest.raises(AutoQuantError, match=r"model.safetensors: corrupt: \d+ bytes, its header describes \d+"):
        open_shards(tmp_path)


@pytest.mark.parametrize("content", [b"", b"abc", b"\xff" * 8, b"\x02\0\0\0\0\0\0\0[]", b"\x03\0\0\0\0\0\0\0{,}"])
def test_what_is_no_safetensors_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(AutoQuantError, match=r"not a safetensors file|corrupt"):
        open_shards(tmp_path)


def test_a_pointer_of_git_lfs_is_named_as_that(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 8\n")
    with pytest.raises(AutoQuantError, match=r"model.safetensors: not a safetensors file \(a pointer of git-lfs: run"):
        open_shards(tmp_path)
