"""Float8 in blocks and MXFP4 are read as transformers dequantizes them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from autoquant.errors import AutoQuantError
from autoquant.io.safetensors_stream import open_shards
from autoquant.io.scaled_shards import as_numbers

ROWS, COLUMNS, BLOCK = 96, 64, 32


def write(folder: Path, tensors: dict[str, Tensor]) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


def float8(rows: int, columns: int, *more: int) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(*more, rows, columns).to(torch.float8_e4m3fn)


@pytest.mark.parametrize("kind", [torch.float32, torch.float8_e8m0fnu])
@pytest.mark.parametrize("more", [(), (2,)])
def test_float8_in_blocks(tmp_path: Path, kind: torch.dtype, more: tuple[int, ...]) -> None:
    values = float8(ROWS, COLUMNS, *more)
    scales = (2.0 ** torch.randint(-3, 3, (*more, ROWS // BLOCK, COLUMNS // BLOCK))).to(kind)
    plain = torch.ones(3)
    write(
        tmp_path, {"a.weight": values, "a.weight_scale_inv": scales, "norm": plain, "a.activation_scale": torch.ones(1)}
    )
    found = as_numbers(open_shards(tmp_path), "fp8", (BLOCK, BLOCK), torch.bfloat16)
    assert set(found.entries) == {"a.weight", "norm"}
    entry = found.entries["a.weight"]
    assert (entry.dtype, entry.shape) == (torch.bfloat16, tuple(values.shape))
    expected = Fp8Dequantize(None)._dequantize_one(values, scales.float(), torch.bfloat16)
    assert torch.equal(found.read("a.weight"), expected)
    assert torch.equal(found.rows("a.weight", 1, 2), expected[1:2])
    assert torch.equal(found.read("norm"), plain) and torch.equal(found.rows("norm", 1, None), plain[1:])


def test_blocks_that_are_cut_off_and_one_factor_for_all(tmp_path: Path) -> None:
    values = float8(5, 7)
    scales = torch.tensor([[1.0, 2.0, 4.0, 8.0], [0.5, 3.0, 5.0, 7.0]])
    whole = torch.tensor(3.0)
    write(tmp_path, {"a": values, "a_scale_inv": scales, "b": values.clone(), "b_scale_inv": whole})
    found = as_numbers(open_shards(tmp_path), "fp8", (3, 2), torch.float32)
    factor = scales.repeat_interleave(3, 0).repeat_interleave(2, 1)[:5, :7]
    assert torch.equal(found.read("a"), values.float() * factor)
    assert torch.equal(found.rows("a", 2, 4), (values.float() * factor)[2:4])
    assert torch.equal(found.read("b"), values.float() * 3)


def test_mxfp4(tmp_path: Path) -> None:
    torch.manual_seed(0)
    blocks = torch.randint(0, 256, (3, 10, 2, 16), dtype=torch.uint8)
    scales = torch.randint(110, 140, (3, 10, 2), dtype=torch.uint8)
    write(tmp_path, {"up_blocks": blocks, "up_scales": scales, "other_blocks": torch.ones(2)})
    found = as_numbers(open_shards(tmp_path), "mxfp4", None, torch.bfloat16)
    expected = convert_moe_packed_tensors(blocks, scales)
    assert set(found.entries) == {"up", "other_blocks"} and found.entries["up"].shape == tuple(expected.shape)
    assert torch.equal(found.read("up"), expected)
    assert torch.equal(found.rows("up", 1, 3), expected[1:3])


@pytest.mark.parametrize(
    ("tensors", "method", "message"),
    [
        ({"a": float8(4, 4)}, "fp8", "a is float8, and there is no a_scale_inv"),
        ({"a": float8(4, 4), "a_scale_inv": torch.ones(3, 3)}, "fp8", r"blocks of \[2, 2\], got \[3, 3\]"),
        ({"a_blocks": torch.ones(2, 3, 16, dtype=torch.uint8)}, "mxfp4", "expected four dimensions"),
    ],
)
def test_scales_that_do_not_fit(tmp_path: Path, tensors: dict[str, Tensor], method: str, message: str) -> None:
    write(tmp_path, tensors)
    with pytest.raises(AutoQuantError, match=message):
        as_numbers(open_shards(tmp_path), method, (2, 2), torch.bfloat16)


def test_without_scales_nothing_changes(tmp_path: Path) -> None:
    write(tmp_path, {"a": torch.ones(2)})
    shards = open_shards(tmp_path)
    assert as_numbers(shards, "mxfp4", None, torch.bfloat16) is shards
