"""Symmetric int8 arithmetic: tensors in, tensors out.

A tensor x is stored as ``q = clamp(round(x / scale), -127, 127)`` with ``scale = max|x| / 127`` and no zero point, so
that ``x ~ q * scale`` (Jacob et al. 2018, section 2.1, with Z = 0). Rounding is half to even. Weights, keys and values
never use -128, so that negation stays exact. Activations saturate at -128 and 127, as vLLM and compressed-tensors do:
only behind a static scale can one get there, and with it a static checkpoint gives the same bits there and here.

What a scale is for awkward groups of values:

- all zeros, or so small that ``max|x| / 127`` is no normal float32: the smallest normal float32, q = round(x / scale);
- with a NaN or an infinity among them: NaN, and q = 0. Whatever is computed from that group is NaN, as it would be in
  floating point. A *static* scale cannot know: infinities saturate and NaN becomes 0.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

from autoquant.errors import AutoQuantError
from autoquant.library_patches import constant_in_traces, int_mm

QMAX = 127
QMIN = -128
"""Of activations, and of the weights of other tools; ours end at -127."""
TINY = torch.finfo(torch.float32).tiny
# All partial sums of 1024 products of int8 values, -128 among both, are integers of at most 128**2 * 1024 = 2**24,
# hence exact in float32 in any order of summation.
EXACT_FLOAT32_DEPTH = 1024
# 128**2 * 131,072 = 2**31: beyond this an int32 accumulator can overflow.
EXACT_INT32_DEPTH = 131_071
FAR = 4.0
"""So many times quicker is another kernel; less is what else runs on the machine."""


def absmax(x: Tensor, dims: tuple[int, ...] | None = None) -> Tensor:
    """Largest magnitude over ``dims`` (all: None), float32, the reduced dimensions kept with extent 1; 0 if empty."""
    dims = tuple(range(x.dim())) if dims is None else dims
    if x.numel() == 0:
        shape = [1 if d in {k % x.dim() for k in dims} else n for d, n in enumerate(x.shape)]
        return x.new_zeros(shape, dtype=torch.float32)
    return x.abs().amax(dims, keepdim=True).float() if dims else x.abs().float()


def scale_of(maximum: Tensor) -> Tensor:
    """Float32 scale of values up to ``maximum`` in magnitude, any shape; the module's text has the awkward cases."""
    maximum = maximum.float()
    # A tensor to divide by: CUDA would multiply by the rounded reciprocal of a number, and differ in the last bit.
    scale = (maximum / torch.full_like(maximum, QMAX)).clamp_min(TINY)  # clamp_min passes NaN on
    return torch.where(scale.isinf(), torch.nan, scale)


def absmax_scale(x: Tensor, dims: tuple[int, ...] | None = None) -> Tensor:
    """Scale ``max|x| / 127`` over ``dims`` (all: None), kept with extent 1; float32, error at most scale / 2."""
    return scale_of(absmax(x, dims))


def mse_scale(x: Tensor, dims: tuple[int, ...] | None = None, *, steps: int = 60, smallest: float = 0.4) -> Tensor:
    """Scale with the least mean squared error among clippings of the maximum to ``smallest`` ... 1 of itself.

    A grid search as in Banner et al. 2019 (section 4.1 has the closed form that it replaces). Never worse than
    :func:`absmax_scale`, which is the first candidate and wins ties. Shapes and dtypes as there.
    """
    full = absmax_scale(x, dims)
    over = tuple(range(x.dim())) if dims is None else dims
    best, least = full, torch.full_like(full, torch.inf)
    for ratio in torch.linspace(1.0, smallest, steps).tolist():
        scale = (full * ratio).clamp_min(TINY)
        error = (dequantize(quantize(x, scale), scale) - x.float()).square().mean(over, keepdim=True)
        better = error < least
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
    return best


def quantize(x: Tensor, scale: Tensor) -> Tensor:
    """int8 tensor of x's shape; ``scale`` is float32 and broadcasts. NaN becomes 0, what is out of range +-127."""
    return _rounded(x, scale, -QMAX)


def quantize_activations(x: Tensor, scale: Tensor) -> Tensor:
    """What :func:`quantize` gives, but that what is out of range becomes -128 or 127."""
    return _rounded(x, scale, QMIN)


def _rounded(x: Tensor, scale: Tensor, least: int) -> Tensor:
    return (x.float() / scale).round_().clamp_(least, QMAX).nan_to_num_(0.0).to(torch.int8)


def dequantize(q: Tensor, scale: Tensor) -> Tensor:
    """``q * scale`` in float32; ``scale`` broadcasts."""
    return q.float() * scale


def fake_quantize(x: Tensor, scale: Tensor) -> Tensor:
    """The float32 values that :func:`quantize_activations` keeps of x."""
    return dequantize(quantize_activations(x, scale), scale)


def linear(x_TI: Tensor, values: Tensor, scale: Tensor, input_scale: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ W.T + b`` in int8, [T, O] in x's dtype: what every faster path must give bit for bit.

    ``values`` is int8 [O, I], ``scale`` float32 [O or 1, 1], ``input_scale`` float32 and broadcasts against [T, 1]. A
    static one, [], is multiplied with the weight's first, one product for each sum; else a sum is multiplied by the
    weight's scale, then by the input's: as oneDNN, CUTLASS and vLLM do.
    """
    sums = matmul(quantize_activations(x_TI, input_scale), values.t()).float()
    out_TO = sums * (input_scale * scale.t()) if input_scale.dim() == 0 else sums * scale.t() * input_scale
    return (out_TO if bias is None else out_TO + bias.float()).to(x_TI.dtype)


def matmul(a_MK: Tensor, b_KN: Tensor) -> Tensor:
    """Exact product of two int8 matrices, int32 [M, N], on the fastest kernel that proved itself exact on the device.

    Raises AutoQuantError for a K at which int32 could overflow.
    """
    if a_MK.shape[1] > EXACT_INT32_DEPTH:
        raise AutoQuantError(
            f"an int8 product over {a_MK.shape[1]} channels can overflow int32: at most {EXACT_INT32_DEPTH}"
        )
    if a_MK.numel() and b_KN.numel() and int_mm_serves(a_MK.device.type):
        return _int_mm(a_MK, b_KN)
    return reference_matmul(a_MK, b_KN)


def reference_matmul(a_MK: Tensor, b_KN: Tensor) -> Tensor:
    """Exact int32 [M, N] on any backend with a float32 product: chunks of K whose every partial sum is below 2**24."""
    out_MN = torch.zeros(a_MK.shape[0], b_KN.shape[1], dtype=torch.int32, device=a_MK.device)
    chunks = zip(torch.split(a_MK, EXACT_FLOAT32_DEPTH, 1), torch.split(b_KN, EXACT_FLOAT32_DEPTH, 0), strict=True)
    with torch.autocast(a_MK.device.type, enabled=False):  # it would round the sums to bfloat16
        for a, b in chunks:
            out_MN += (a.float() @ b.float()).to(torch.int32)
    return out_MN


def probes() -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of int8 matrices [M, K], [K, N] that a kernel must multiply exactly.

    They hold extreme values: AVX2 kernels shift one factor to 0 ... 255 and multiply by ``vpmaddubsw``, which saturates
    the sum of two products to int16 in silence; random data rarely shows it. They cover single rows, ragged sizes and
    several K.
    """
    generator = torch.Generator().manual_seed(0)
    for m, k, n in ((1, 64, 64), (3, 70, 5), (32, 2048, 64), (65, 1100, 33)):
        ones = torch.ones(m, k, dtype=torch.int8), torch.ones(k, n, dtype=torch.int8)
        random = [torch.randint(QMIN, QMAX + 1, s, generator=generator, dtype=torch.int8) for s in ((m, k), (k, n))]
        yield from ((ones[0] * a, ones[1] * b) for a in (QMIN, QMAX) for b in (QMIN, QMAX))
        yield random[0], random[1]


def probe_int_mm(device: str) -> bool:
    """True if ``torch._int_mm`` exists on the device type and gets every probe right."""
    for a, b in probes():
        try:
            product = _int_mm(a.to(device), b.to(device)).cpu()
        except RuntimeError:  # no kernel for this device or these shapes
            return False
        if not torch.equal(product.long(), a.long() @ b.long()):
            return False
    return True


def is_a_loop() -> bool:
    """True if ``torch._int_mm`` of a CPU is many times slower than products in float32: without VNNI it is a plain
    loop over elements.
    """
    a, b = torch.ones(64, 256, dtype=torch.int8), torch.ones(256, 256, dtype=torch.int8)
    return least_seconds(lambda: _int_mm(a, b)) > FAR * least_seconds(lambda: reference_matmul(a, b))


def least_seconds(run: Callable[[], object]) -> float:
    """The least of three runs, after one that makes the kernel."""
    took = []
    for _ in range(4):
        begun = time.perf_counter()
        run()
        took.append(time.perf_counter() - begun)
    return min(took[1:])


def _remembered_probe(device: str) -> bool:
    if device not in PROBED:
        PROBED[device] = probe_int_mm(device) and not (device == "cpu" and is_a_loop())
    return PROBED[device]


PROBED: dict[str, bool] = {}
# True if `torch._int_mm` is exact on a device type and no loop. Marked so that torch.compile asks once and goes on,
# instead of tracing the probes.
int_mm_serves: Callable[[str], bool] = constant_in_traces(_remembered_probe)


def _int_mm(a_MK: Tensor, b_KN: Tensor) -> Tensor:
    """``torch._int_mm``; on CUDA brought to what its kernel takes: M > 16, K and N multiples of 8, b column-major."""
    if a_MK.device.type != "cuda":
        return int_mm(a_MK, b_KN)
    (m, k), n = a_MK.shape, b_KN.shape[1]
    a = functional.pad(a_MK, (0, -k % 8, 0, max(0, 17 - m)))
    b = functional.pad(b_KN.t(), (0, -k % 8, 0, -n % 8)).contiguous().t()  # row-major fails for some shapes
    return int_mm(a, b)[:m, :n]
