"""On a GPU the kernels themselves; without one, where Triton is installed, the same kernels under its interpreter:

TRITON_INTERPRET=1 pytest tests/quantizer/test_cuda_linear.py
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from autoquant.quantizer import cuda_linear, int8
from autoquant.quantizer.cuda_linear import Flags
from autoquant.quantizer.strategies import Granularity
from autoquant.quantizer.tilings import LARGE, LARGEST, MEDIUM, Tiling
from autoquant.quantizer.weight import Int8Weight, grouped_product, linear

CUDA = torch.cuda.is_available()
TRITON = importlib.util.find_spec("triton") is not None and (CUDA or os.environ.get("TRITON_INTERPRET") == "1")
DEVICE = torch.device("cuda" if CUDA else "cpu")
# The interpreter cuts bfloat16 off where the card rounds it.
DTYPE = torch.bfloat16 if CUDA else torch.float32
with_triton = pytest.mark.skipif(not TRITON, reason="needs Triton")
with_cuda = pytest.mark.skipif(not CUDA, reason="needs a GPU")

TOKEN = Flags(DTYPE, True, False, True, None)
FLAGS = {
    "per token": TOKEN,
    "per token, weight per tensor, bias": Flags(DTYPE, True, False, False, torch.float32),
    "static, bias": Flags(DTYPE, False, False, True, DTYPE),
    "whole tensor": Flags(DTYPE, False, True, True, None),
}
SMALL = {
    "plain": Tiling(16, 32, 128, 4, 2),
    "weight on the left": Tiling(16, 64, 256, 4, 2, swap=True),
    "split": Tiling(16, 32, 128, 4, 2, split=3),
    "one row": Tiling(1, 8, 256, 4, 1),
}


@pytest.fixture(autouse=True)
def nothing_remembered() -> Iterator[None]:
    yield
    cuda_linear.EXACT.clear()
    cuda_linear.CHOSEN.clear()


@with_triton
@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
@pytest.mark.parametrize("tiling", SMALL.values(), ids=SMALL)
def test_kernels_give_what_the_cpu_computes_bit_for_bit(tiling: Tiling, flags: Flags) -> None:
    if flags.whole and tiling.rows == 1:
        pytest.skip("one row's scale is its own")
    for inputs in (2048, 2064):
        assert cuda_linear.is_exact(tiling, flags, DEVICE, inputs)


@with_cuda
@pytest.mark.skipif(CUDA and torch.cuda.get_device_capability() != (9, 0), reason="needs Hopper")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_specialized_kernels_give_what_the_cpu_computes_bit_for_bit(flags: Flags, dtype: torch.dtype) -> None:
    for tiling in {tiling for tiling in (*MEDIUM, *LARGE, *LARGEST) if tiling.specialized}:
        for inputs in (2048, 2064):
            assert cuda_linear.is_exact(tiling, replace(flags, dtype=dtype), DEVICE, inputs), f"{tiling}"


@with_triton
@pytest.mark.parametrize("flags", [FLAGS["per token"], Flags(DTYPE, False, False, False, None)])
def test_grouped_kernels_give_what_the_cpu_computes_bit_for_bit(flags: Flags) -> None:
    for inputs in (2048, 2064):
        assert cuda_linear.is_exact(SMALL["weight on the left"], flags, DEVICE, inputs, experts=3)


@with_triton
def test_a_kernel_that_rounds_otherwise_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = cuda_linear.run

    def off(*args: Any) -> Tensor:
        out = honest(*args)
        return torch.where(out == out[0, 0], out * (1 + 2.0**-7), out)

    monkeypatch.setattr(cuda_linear, "run", off)
    assert not cuda_linear.is_exact(SMALL["plain"], TOKEN, DEVICE, 2048)


def test_where_no_tiling_is_exact_torch_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_linear, "is_exact", lambda *args: False)
    x, values, scale, bias = cuda_linear.probe(5, 32, 64, Flags(torch.bfloat16, True, False, True, torch.float32))
    for given, token in ((None, True), (None, False), (torch.tensor(0.1), False)):
        input_scale = given if given is not None else int8.absmax_scale(x, (1,) if token else None)
        wanted = int8.linear(x, values, scale, input_scale, bias)
        got = cuda_linear.linear(x, values, scale, given, token, bias)
        assert torch.equal(got.view(torch.int16), wanted.view(torch.int16))
    offs = torch.tensor([2, 2, 4], dtype=torch.int32)
    got = cuda_linear.grouped_linear(x, values.expand(3, -1, -1).contiguous(), scale.expand(3, -1, -1), None, offs)
    wanted = int8.linear(x, values, scale, int8.absmax_scale(x, (1,)), None)
    wanted[4:] = 0
    assert torch.equal(got.view(torch.int16), wanted.view(torch.int16))


def test_the_first_of_equal_candidates_is_used_and_the_fastest_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = dict(zip(LARGE[:3], (3.0, 1.0, 2.0), strict=True))
    assert cuda_linear._least(LARGE[:3], seconds.__getitem__) == LARGE[1]
    assert cuda_linear._least(LARGE, lambda tiling: 1.0) == LARGE[0]
    assert cuda_linear._least([], lambda tiling: 1.0) is None

    def too_little_memory(tiling: Tiling) -> float:
        raise torch.OutOfMemoryError("no")

    assert cuda_linear._least(LARGE, too_little_memory) == LARGE[0]


@pytest.mark.parametrize(
    ("dtype", "capability", "wanted"),
    [
        (torch.bfloat16, (9, 0), True),
        (torch.float32, (9, 0), False),  # no room in shared memory
        (torch.bfloat16, (10, 0), False),  # other instructions
        (torch.bfloat16, (8, 0), False),
    ],
)
def test_specialized_kernels_are_for_hopper_and_half_sized_floats(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, capability: tuple[int, int], wanted: bool
) -> None:
    tried: list[Tiling] = []

    def no(tiling: Tiling, *rest: Any) -> bool:
        tried.append(tiling)
        return False

    monkeypatch.setattr(cuda_linear, "_capability", lambda device: capability)
    monkeypatch.setattr(cuda_linear, "_hopper", lambda device: capability >= (9, 0))
    monkeypatch.setattr(cuda_linear, "is_exact", no)
    flags = Flags(dtype, True, False, True, None)
    x, values, scale, bias = cuda_linear.probe(2000, 16, 16, flags)
    assert cuda_linear._chosen(x, values, scale, None, bias, flags) is None
    assert any(tiling.specialized for tiling in tried) == wanted
    assert any(not tiling.specialized for tiling in tried)


def test_a_cpu_is_not_taken() -> None:
    assert not cuda_linear.takes(torch.ones(2, 32), torch.ones(16, 32, dtype=torch.int8))


def test_fake_tensors_have_the_shapes_of_real_ones() -> None:
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        x = torch.empty(5, 32, dtype=torch.bfloat16, device="cuda")
        values, scale = torch.empty(16, 32, dtype=torch.int8, device="cuda"), torch.empty(16, 1, device="cuda")
        out = torch.ops.autoquant.int8_linear(x, values, scale, None, True, None)
        assert out.shape == (5, 16) and out.dtype == torch.bfloat16
        offs = torch.empty(3, dtype=torch.int32, device="cuda")
        stacks = values.expand(3, -1, -1), scale.expand(3, -1, -1)
        assert torch.ops.autoquant.int8_grouped_linear(x, *stacks, None, offs).shape == (5, 16)


def weight(shape: tuple[int, ...], activation: Granularity, static: Tensor | None) -> Int8Weight:
    generator = torch.Generator().manual_seed(sum(shape))
    values = torch.randint(-128, 128, shape, dtype=torch.int8, generator=generator)
    scale = torch.rand(*shape[:-1], 1, generator=generator) * 1e-3
    return Int8Weight(values, scale, static, activation, torch.bfloat16, transposed=False)


@with_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", Granularity)
def test_linears_on_a_gpu_are_those_of_the_cpu(activation: Granularity, dtype: torch.dtype) -> None:
    static = torch.tensor(0.02) if activation.is_static else None
    for rows in (1, 7, 16, 40, 200, 1000):
        made = weight((144, 528), activation, static)
        x = torch.randn(rows, 528, generator=torch.Generator().manual_seed(rows)).to(dtype)
        bias = torch.randn(144, generator=torch.Generator().manual_seed(1)).to(dtype)
        wanted = linear(x, made.view(), bias)
        got = linear(x.cuda(), made.cuda().view(), bias.cuda())
        assert torch.equal(got.cpu(), wanted), f"{rows} rows"


@with_cuda
@pytest.mark.parametrize("activation", [Granularity.TOKEN_DYNAMIC, Granularity.TENSOR_STATIC])
def test_grouped_linears_on_a_gpu_are_those_of_the_cpu(activation: Granularity) -> None:
    static = torch.tensor([0.02, 0.03, 0.01, 0.02]) if activation.is_static else None
    for ends in ((3, 3, 7, 10), (100, 200, 200, 300), (0, 0, 0, 50)):
        made, offs = weight((4, 96, 64), activation, static), torch.tensor(ends, dtype=torch.int32)
        x = torch.randn(ends[-1] + 2, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
        wanted = grouped_product(x, made.view().mT, offs)
        assert torch.equal(grouped_product(x.cuda(), made.cuda().view().mT, offs.cuda()).cpu(), wanted)


@with_cuda
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")  # Inductor's own, of torch 2.11
def test_torch_compile_keeps_the_operator_whole() -> None:
    made = weight((144, 528), Granularity.TOKEN_DYNAMIC, None).cuda()
    x = torch.randn(5, 528, device="cuda", dtype=torch.bfloat16)
    compiled = torch.compile(lambda x: linear(x, made.view()) * 2, fullgraph=True)
    assert torch.equal(compiled(x), linear(x, made.view()) * 2)
