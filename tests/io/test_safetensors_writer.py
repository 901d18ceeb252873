from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from autoquant.io.safetensors_stream import INDEX, open_shards
from autoquant.io.safetensors_writer import write_checkpoint_tensors, write_tensors

TENSORS = {
    "b": torch.arange(6, dtype=torch.int8).view(2, 3),
    "a": torch.randn(5, generator=torch.Generator().manual_seed(0)),
    "c": torch.tensor(1.5),
    "d": torch.ones(3, dtype=torch.bfloat16),
    "e": torch.empty(0, 4),
}
DESCRIBED = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()}


def test_safetensors_reads_what_was_written_and_writes_the_same_bytes(tmp_path: Path) -> None:
    write_tensors(tmp_path / "ours", DESCRIBED, TENSORS.items())
    save_file(TENSORS, tmp_path / "theirs", metadata={"format": "pt"})
    loaded = load_file(tmp_path / "ours")
    assert set(loaded) == set(TENSORS)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in TENSORS.items())
    assert (tmp_path / "ours").stat().st_size == (tmp_path / "theirs").stat().st_size


def test_the_order_of_tensors_does_not_matter(tmp_path: Path) -> None:
    write_tensors(tmp_path / "forward", DESCRIBED, TENSORS.items())
    write_tensors(tmp_path / "backward", DESCRIBED, reversed(TENSORS.items()))
    assert (tmp_path / "forward").read_bytes() == (tmp_path / "backward").read_bytes()


def test_what_is_missing_or_of_another_shape_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="'e'"):
        write_tensors(tmp_path / "x", DESCRIBED, [item for item in TENSORS.items() if item[0] != "e"])
    with pytest.raises(AssertionError, match="a"):
        write_tensors(tmp_path / "x", DESCRIBED, [("a", torch.ones(6))])


def test_what_is_more_than_one_file_holds_becomes_shards_with_an_index(tmp_path: Path) -> None:
    for most, files in ((1000, 1), (20, 3), (1, 5)):
        folder = tmp_path / str(most)
        folder.mkdir()
        write_checkpoint_tensors(folder, DESCRIBED, reversed(TENSORS.items()), most)
        assert len(list(folder.glob("*.safetensors"))) == files and (folder / INDEX).exists() == (files > 1)
        shards = open_shards(folder)
        assert set(shards.entries) == set(TENSORS)
        assert all(torch.equal(shards.read(name), tensor) for name, tensor in TENSORS.items())
