"""Compiled for Hopper, which takes no card; what the kernels compute is tested in test_cuda_linear.py."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest

pytest.importorskip("triton.experimental.gluon", reason="needs Triton")


@pytest.mark.parametrize(("rows", "outputs", "stages"), [(128, 256, 4), (256, 128, 4), (128, 128, 6)])
@pytest.mark.parametrize("kinds", [(True, False, True, False), (False, True, False, True)])
def test_the_product_compiles_for_hopper_without_spilling(
    rows: int, outputs: int, stages: int, kinds: tuple[bool, bool, bool, bool]
) -> None:
    triton, runtime = import_module("triton"), import_module("triton.experimental.gluon._runtime")
    gpu = import_module("triton.backends.compiler").GPUTarget("cuda", 90, 32)
    gluon_kernels: Any = import_module("autoquant.quantizer.gluon_kernels")
    gl, half = gluon_kernels.gl, rows // 2
    columns = outputs // (rows * outputs // gluon_kernels.AT_ONCE)
    tiles = {
        "a": ("i8", gl.int8, half, 128),
        "w": ("i8", gl.int8, outputs, 128),
        "out": ("bf16", gl.bfloat16, half, columns),
    }
    signature: dict[str, str] = {}
    for name, (short, dtype, height, width) in tiles.items():
        layout = gl.NVMMASharedLayout.get_default_for([height, width], dtype)
        signature[name] = f"tensordesc<{short}[{height},{width}],{layout!r}>"
    signature |= {"scale": "*fp32", "weight_scale": "*fp32", "bias": "*fp32", "M": "i32", "N": "i32", "K": "i32"}
    names = gluon_kernels.product.arg_names
    constants: dict[str, Any] = dict(zip(names[9:], (rows, outputs, 128, 8, stages, *kinds), strict=True))
    if not kinds[-1]:
        constants["bias"] = None
    signature |= dict.fromkeys(constants, "constexpr")
    aligned: dict[tuple[int, ...], Any] = {(names.index(name),): [["tt.divisibility", 16]] for name in ("N", "K")}
    keyed = {(names.index(name),): value for name, value in constants.items()}
    source = runtime.GluonASTSource(gluon_kernels.product, signature, keyed, aligned)
    options = {"num_warps": 4, "enable_fp_fusion": False}
    compiled = triton.compile(source, target=gpu, options=options)
    assert "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8" in compiled.asm["ptx"]
    assert ".local" not in compiled.asm["ptx"] and "fma.rn" not in compiled.asm["ptx"]
    assert compiled.metadata.shared <= 232_448  # of an H100's block
