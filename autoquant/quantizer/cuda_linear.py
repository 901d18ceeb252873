"""Int8 linears on CUDA: rows to int8 in one kernel, product, scales, bias and rounding in another; one row in one.

The kernels are Triton's (:mod:`autoquant.quantizer.triton_kernels`; of many rows on Hopper
:mod:`autoquant.quantizer.gluon_kernels`), bound as the operators ``autoquant::int8_linear``
and ``autoquant::int8_grouped_linear`` that torch.compile keeps whole. Which tiles are used is measured once for each
shape and each power of two of rows, in each process; a tiling takes part only after it gave, bit for bit, what the CPU
computes from inputs with extreme, tiny, NaN and zero rows. Where none does, or there is no Triton, torch's operations
do the same arithmetic (:func:`autoquant.quantizer.int8.linear`).

Shapes: E experts, O output channels, I input channels, T tokens.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.library import Library, register_fake

from autoquant.quantizer import int8
from autoquant.quantizer.tilings import Tiling, power_of_two, tilings

DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))
ALIGNED = 16
"""O and I must be multiples: bytes of a vector load, and of a row that a tensor descriptor takes."""
MOST_EXPERTS = 1024
HAS_TRITON = importlib.util.find_spec("triton") is not None and torch.version.hip is None
"""A number, since Dynamo traces through functions that remember (``lru_cache``), and warns of them."""


def takes(x: Tensor, values: Tensor) -> bool:
    """True if the operators can compute with an input of x's dtype and device and a weight of these int8 values."""
    outputs, inputs = values.shape[-2:]
    return (
        x.is_cuda
        and values.is_cuda
        and x.dtype in DTYPES
        and x.numel() > 0
        and outputs % ALIGNED == 0
        and inputs % ALIGNED == 0
        and inputs <= int8.EXACT_INT32_DEPTH
        and values.is_contiguous()
        and not (x.requires_grad and torch.is_grad_enabled())
        and HAS_TRITON
    )


def linear(
    x_TI: Tensor, values: Tensor, scale: Tensor, input_scale: Tensor | None, per_token: bool, bias: Tensor | None
) -> Tensor:
    """``x @ W.T + b`` in x's dtype, bit for bit as :func:`autoquant.quantizer.int8.linear` on a CPU.

    ``scale`` is float32 [O or 1, 1]. ``input_scale`` [] is a static one; None: one per token, else one for all of x.
    """
    x_TI, values, outputs = _aligned(x_TI), _aligned(values), values.shape[0]
    per_token = input_scale is None and (per_token or x_TI.shape[0] == 1)
    flags = Flags(x_TI.dtype, per_token, input_scale is None and not per_token, scale.numel() > 1, _dtype(bias))
    with _on(x_TI.device):
        tiling = _chosen(x_TI, values, scale, input_scale, bias, flags)
        if tiling is None:
            return int8.linear(x_TI, values, scale, _torch_scale(x_TI, input_scale, per_token), bias)
        return run(tiling, x_TI, values, scale, input_scale, bias, flags).view(-1, outputs)


def _torch_scale(x_TI: Tensor, input_scale: Tensor | None, per_token: bool) -> Tensor:
    if input_scale is not None:
        return input_scale
    return int8.absmax_scale(x_TI, (1,) if per_token else None)


def grouped_linear(x_TI: Tensor, values: Tensor, scale: Tensor, input_scale: Tensor | None, offs: Tensor) -> Tensor:
    """Rows sorted by expert, expert e's from ``offs[e - 1]`` to ``offs[e]`` (int32 [E]), each by its expert's weight.

    ``values`` is [E, O, I], ``scale`` [E, O or 1, 1], ``input_scale`` [E] static or None for one per token. Rows behind
    the last expert become zero. Nothing waits for the device.
    """
    x_TI, values, (experts, outputs, inputs) = _aligned(x_TI), _aligned(values), values.shape
    flags = Flags(x_TI.dtype, input_scale is None, False, scale.shape[-2] > 1, None)
    with _on(x_TI.device):
        candidates = tilings(max(2, min(-(-x_TI.shape[0] // experts), 64)), outputs, _hopper(x_TI.device))
        whole = [
            tiling for tiling in candidates if tiling.split == 1 and is_exact(tiling, flags, x_TI.device, inputs, 3)
        ]
        if not whole:
            return _one_by_one(x_TI, values, scale, input_scale, offs)
        return run_grouped(whole[0], x_TI, values, scale, input_scale, offs, flags)


def run_grouped(
    tiling: Tiling,
    x_TI: Tensor,
    values: Tensor,
    scale: Tensor,
    input_scale: Tensor | None,
    offs: Tensor,
    flags: Flags,
) -> Tensor:
    """A grouped linear through the kernels of one tiling, [T, O]."""
    out_TO = x_TI.new_zeros(x_TI.shape[0], values.shape[1])
    q, row_scale, _ = _quantized(x_TI, input_scale, flags, 0, offs)
    _product(tiling, q, values, row_scale, scale, None, out_TO, None, flags, offs)
    return out_TO


def _one_by_one(x_TI: Tensor, values: Tensor, scale: Tensor, input_scale: Tensor | None, offs: Tensor) -> Tensor:
    out_TO, start = x_TI.new_zeros(x_TI.shape[0], values.shape[1]), 0
    for expert, end in enumerate(offs.tolist()):
        x = x_TI[start:end]
        given = _torch_scale(x, None if input_scale is None else input_scale[expert], True)
        out_TO[start:end] = int8.linear(x, values[expert], scale[expert], given, None)
        start = end
    return out_TO


@dataclass(frozen=True, slots=True)
class Flags:
    """What a kernel is compiled for: dtype of x, kind of scale (``token``, ``whole`` tensor, else given), weight scale
    per channel, dtype of the bias.
    """

    dtype: torch.dtype
    token: bool
    whole: bool
    channel: bool
    bias: torch.dtype | None


def run(
    tiling: Tiling,
    x_TI: Tensor,
    values: Tensor,
    scale: Tensor,
    input_scale: Tensor | None,
    bias: Tensor | None,
    flags: Flags,
) -> Tensor:
    """A linear through the kernels of one tiling, [T, O]."""
    rows, outputs = x_TI.shape[0], values.shape[0]
    out_TO = torch.empty(rows, outputs, dtype=x_TI.dtype, device=x_TI.device)
    if tiling.rows == 1:
        _row_product(tiling, x_TI, values, input_scale, scale, bias, out_TO, flags)
        return out_TO
    if tiling.chunks > 1 and not flags.whole:
        _run_in_chunks_(tiling, x_TI, values, scale, input_scale, bias, out_TO, flags)
        return out_TO
    tiles = _up(rows, tiling.rows) * _up(outputs, tiling.outputs)
    zeros = tiles + rows * outputs if tiling.split > 1 else 0
    q, row_scale, work = _quantized(x_TI, input_scale, flags, zeros, None)
    _product(tiling, q, values, row_scale, scale, bias, out_TO, work, flags, None)
    return out_TO


def _run_in_chunks_(
    tiling: Tiling,
    x_TI: Tensor,
    values: Tensor,
    scale: Tensor,
    input_scale: Tensor | None,
    bias: Tensor | None,
    out_TO: Tensor,
    flags: Flags,
) -> None:
    """Chunks are quantized on the current stream and multiplied on one that goes before it where both have work.

    The current stream waits for the other at the end, so that all that was allocated on it stays until then.
    """
    step = tiling.rows * _up(x_TI.shape[0], tiling.rows * tiling.chunks)
    here, ahead = torch.cuda.current_stream(x_TI.device), _stream(x_TI.device)
    held = []
    for x, out in zip(x_TI.split(step), out_TO.split(step), strict=True):
        q, row_scale, _ = _quantized(x, input_scale, flags, 0, None)
        held.append((q, row_scale))
        ahead.wait_event(here.record_event())
        with torch.cuda.stream(ahead):
            _product(tiling, q, values, row_scale, scale, bias, out, None, flags, None)
    here.wait_stream(ahead)
    del held


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device, priority=-1)


def _quantized(
    x_TI: Tensor, input_scale: Tensor | None, flags: Flags, zeros: int, offs: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Int8 rows, their scales, and ``zeros`` words of zeros to work with."""
    kernels = _kernels()
    (rows, inputs), device = x_TI.shape, x_TI.device
    q = torch.empty(rows, inputs, dtype=torch.int8, device=device)
    row_scale = torch.empty(rows if flags.token else 1, dtype=torch.float32, device=device)
    work = torch.empty(zeros, dtype=torch.int32, device=device) if zeros else None
    given = input_scale
    block = min(2048, power_of_two(inputs))
    if flags.whole:
        given = torch.zeros(1, dtype=torch.int32, device=device)
        _launch(kernels.maximum_of_rows, (rows, 1, 1), (x_TI, given, inputs), (block,), warps=4)
    parts = max(1, min(_up(inputs, block), 4)) if rows <= 64 else 1
    experts = 0 if offs is None else offs.shape[0]
    constants = (block, parts, flags.token, flags.whole, 0 if flags.token else power_of_two(experts), _hopper(device))
    arguments = (x_TI, q, row_scale, given, work, offs, inputs, zeros, experts)
    warps = 16 if rows <= 64 or inputs > 4096 else 4
    _launch(kernels.quantize_rows, (rows, parts, 1), arguments, constants, warps=warps)
    return q, row_scale if given is None or flags.whole else given, work


def _product(
    tiling: Tiling,
    q: Tensor,
    values: Tensor,
    row_scale: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    out_TO: Tensor,
    work: Tensor | None,
    flags: Flags,
    offs: Tensor | None,
) -> None:
    scales = (flags.token, not (flags.token or flags.whole), flags.channel, bias is not None)
    if tiling.specialized:
        gluon = _gluon_kernels()
        programs = tiling.programs or torch.cuda.get_device_properties(q.device).multi_processor_count
        grid, arguments, extents = gluon.launch(tiling, q, values, row_scale, scale, bias, out_TO, programs)
        _launch(gluon.product, grid, arguments, (*extents, *scales), warps=tiling.warps)
        return
    rows, inputs = q.shape
    experts, outputs = 0 if offs is None else offs.shape[0], values.shape[-2]
    tiles = _up(rows, tiling.rows) + experts  # each expert has at most one tile that is not full
    grid = (tiles * _up(outputs, tiling.outputs), tiling.split, 1)
    hopper = _hopper(q.device)
    tma = tiling.tma and hopper and not experts
    a, w = (_tiled(q, tiling.rows, tiling.depth), _tiled(values, tiling.outputs, tiling.depth)) if tma else (q, values)
    arguments = (a, w, row_scale, scale, bias, out_TO, work, offs, rows, outputs, inputs, experts)
    extents = (tiling.rows, tiling.outputs, tiling.depth, tiling.group, tiling.split, tiling.swap)
    early = hopper and tiling.chunks == 1  # starts while the rows are quantized, on the same stream
    kinds = (tma, tma or inputs % tiling.depth == 0, *scales, power_of_two(experts))
    _launch(
        _kernels().product, grid, arguments, (*extents, *kinds, tiling.stages, early), warps=tiling.warps, pdl=early
    )


def _row_product(
    tiling: Tiling,
    x_TI: Tensor,
    values: Tensor,
    input_scale: Tensor | None,
    scale: Tensor,
    bias: Tensor | None,
    out_TO: Tensor,
    flags: Flags,
) -> None:
    outputs, inputs = values.shape
    arguments = (x_TI, values.view(torch.int32), input_scale, scale, bias, out_TO, outputs, inputs)
    kinds = (flags.token, flags.channel, bias is not None, not _interpreted())
    constants = (power_of_two(inputs), tiling.outputs, tiling.depth, *kinds, tiling.stages)
    _launch(_kernels().row_product, (_up(outputs, tiling.outputs), 1, 1), arguments, constants, warps=tiling.warps)


def _launch(
    kernel: Any,
    grid: tuple[int, int, int],
    arguments: tuple[Any, ...],
    constants: tuple[Any, ...],
    *,
    warps: int,
    pdl: bool = False,
) -> None:
    """Start a kernel; from its second time on without the twenty microseconds that Triton takes to look at arguments.

    All that it would look at is in the key or the same in every call: integers that it tells apart are multiples of 16,
    and so are addresses but for those it is told not to look at.
    """
    dtypes = tuple(getattr(getattr(argument, "base", argument), "dtype", None) for argument in arguments)
    key = (kernel, torch.cuda.current_device() if torch.cuda.is_available() else None, dtypes, constants, warps)
    compiled = COMPILED.get(key)
    if compiled is not None:
        compiled[grid](*arguments, *constants)
        return
    options = {"launch_pdl": True} if pdl else {}
    COMPILED[key] = kernel[grid](*arguments, *constants, num_warps=warps, enable_fp_fusion=False, **options)


COMPILED: dict[tuple[Any, ...], Any] = {}
"""Compiled kernels by what they were compiled for; None under Triton's interpreter."""


def _chosen(
    x_TI: Tensor, values: Tensor, scale: Tensor, input_scale: Tensor | None, bias: Tensor | None, flags: Flags
) -> Tiling | None:
    """The fastest exact tiling for these shapes, measured at the first call; None if there is none.

    While a graph is captured nothing can be measured: the first candidate that has proved itself.
    """
    outputs, inputs = values.shape
    key = (power_of_two(x_TI.shape[0]), outputs, inputs, flags, x_TI.device)
    if key in CHOSEN:
        return CHOSEN[key]
    candidates = [
        tiling
        for tiling in tilings(x_TI.shape[0], outputs, _hopper(x_TI.device))
        if not tiling.specialized or (flags.dtype.itemsize == 2 and _capability(x_TI.device) == (9, 0))
    ]
    if x_TI.is_cuda and torch.cuda.is_current_stream_capturing():
        proved = [tiling for tiling in candidates if EXACT.get(_proof(tiling, flags, x_TI.device, inputs, 0))]
        return proved[0] if proved else None
    exact = [tiling for tiling in candidates if is_exact(tiling, flags, x_TI.device, inputs)]

    def timed(tiling: Tiling) -> float:
        return _milliseconds(lambda: run(tiling, x_TI, values, scale, input_scale, bias, flags))

    CHOSEN[key] = _least(exact, timed)
    return CHOSEN[key]


CHOSEN: dict[tuple[Any, ...], Tiling | None] = {}
"""Tilings by power of two of rows, O, I, flags and device."""


ROUNDS = 3
"""In which candidates take turns: a card slows down while it is measured, and the first would seem the fastest."""


def _least(exact: Sequence[Tiling], timed: Callable[[Tiling], float]) -> Tiling | None:
    if len(exact) < 2:
        return exact[0] if exact else None
    try:
        rounds = [[timed(tiling) for tiling in exact] for _ in range(ROUNDS)]
    except torch.OutOfMemoryError:  # measuring takes memory of its own, to empty the cache
        return exact[0]
    medians = [median(times) for times in zip(*rounds, strict=True)]
    return exact[medians.index(min(medians))]


def _milliseconds(call: Callable[[], Tensor]) -> float:
    from triton import testing  # type: ignore[import-not-found]  # where there is a GPU

    return float(testing.do_bench(call, warmup=1, rep=4, return_mode="median"))


def is_exact(tiling: Tiling, flags: Flags, device: torch.device, inputs: int, experts: int = 0) -> bool:
    """True if the kernels of a tiling run on the device and give what the CPU computes, bit for bit; remembered."""
    key = _proof(tiling, flags, device, inputs, experts)
    if key not in EXACT:
        EXACT[key] = _probed(*key)
    return EXACT[key]


Proof = tuple[Tiling, Flags, torch.device, int, int]
EXACT: dict[Proof, bool] = {}


def _proof(tiling: Tiling, flags: Flags, device: torch.device, inputs: int, experts: int) -> Proof:
    """What is proved at once, with experts and I of the probe: kernels differ where a tile's depth divides I."""
    return tiling, flags, device, experts, 2048 if inputs % tiling.depth == 0 else 2048 + ALIGNED


def _probed(tiling: Tiling, flags: Flags, device: torch.device, experts: int, inputs: int) -> bool:
    if tiling.specialized:
        tiling = replace(tiling, programs=1)  # which goes through all tiles, one after the other
    rows = 1 if tiling.rows == 1 else tiling.rows + 3
    x, values, scale, bias = probe(rows, tiling.outputs + ALIGNED, inputs, flags)
    given = None if flags.token or flags.whole else torch.tensor(0.037)
    offs = torch.tensor([3, 3, rows - 2][:experts], dtype=torch.int32)
    if experts:
        values, scale = torch.stack([values, values, values.flip(0)]), torch.stack([scale, scale, scale.flip(0)])
        given = None if given is None else torch.tensor([0.037, 0.01, 0.025])
        wanted = _one_by_one(x, values, scale, given, offs)
    else:
        wanted = int8.linear(x, values, scale, _torch_scale(x, given, flags.token), bias)
    try:
        x, values, scale = x.to(device), values.to(device), scale.to(device)
        given, bias = None if given is None else given.to(device), None if bias is None else bias.to(device)
        if experts:
            got = run_grouped(tiling, x, values, scale, given, offs.to(device), flags)
        else:
            got = run(tiling, x, values, scale, given, bias, flags)
        return torch.allclose(got.cpu(), wanted, rtol=0, atol=0, equal_nan=True)
    except Exception:  # no compiler, too little shared memory, an instruction that the card lacks
        return False


def probe(rows: int, outputs: int, inputs: int, flags: Flags) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Input, int8 weight, its scale and bias on the CPU: halves that round to even, extremes whose sums leave float32's
    integers, and rows with NaN, with infinity, huge, tiny and zero.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, inputs, generator=generator)
    x[::7] = torch.randint(-254, 255, x[::7].shape, generator=generator) * 0.5
    x[1::7] = 1.0
    if not flags.whole:  # all of it would be NaN
        for row, value in ((2, torch.nan), (3, torch.inf)):
            x[row::7, 5] = value
    x[4::7] *= 1e-38 if flags.dtype != torch.float16 else 1e-6
    x[5::7] = 0.0
    values = torch.randint(-128, 128, (outputs, inputs), generator=generator, dtype=torch.int8)
    values[::3], values[1::3] = 127, -128
    scale = torch.rand(outputs if flags.channel else 1, 1, generator=generator) * 1e-2
    bias = None if flags.bias is None else torch.randn(outputs, generator=generator).to(flags.bias)
    return x.to(flags.dtype), values, scale, bias


def _tiled(matrix: Tensor, rows: int, columns: int) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor  # type: ignore[import-not-found]  # where there is a GPU

    return TensorDescriptor.from_tensor(matrix, [rows, columns])


def _kernels() -> Any:
    from autoquant.quantizer import triton_kernels

    return triton_kernels


def _gluon_kernels() -> Any:
    from autoquant.quantizer import gluon_kernels

    return gluon_kernels


@cache
def _hopper(device: torch.device) -> bool:
    return _capability(device) >= (9, 0)


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


@cache
def _interpreted() -> bool:
    return not torch.cuda.is_available()


@contextlib.contextmanager
def _on(device: torch.device) -> Iterator[None]:
    if device.type != "cuda" or device.index in (None, torch.cuda.current_device()):
        yield
        return
    with torch.cuda.device(device):
        yield


def _aligned(tensor: Tensor) -> Tensor:
    """Contiguous, at an address that kernels compiled for multiples of 16 take."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % ALIGNED == 0 else tensor.clone()


def _dtype(tensor: Tensor | None) -> torch.dtype | None:
    return None if tensor is None else tensor.dtype


def _up(n: int, step: int) -> int:
    return -(-n // step)


def _fake_linear(
    x: Tensor, values: Tensor, scale: Tensor, input_scale: Tensor | None, per_token: bool, bias: Tensor | None
) -> Tensor:
    return x.new_empty(x.shape[0], values.shape[0])


def _fake_grouped(x: Tensor, values: Tensor, scale: Tensor, input_scale: Tensor | None, offs: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], values.shape[1])


LIBRARY = Library("autoquant", "FRAGMENT")
LIBRARY.define(
    "int8_linear(Tensor x, Tensor values, Tensor scale, Tensor? input_scale, bool per_token, Tensor? bias) -> Tensor"
)
LIBRARY.define("int8_grouped_linear(Tensor x, Tensor values, Tensor scale, Tensor? input_scale, Tensor offs) -> Tensor")
LIBRARY.impl("int8_linear", linear, "CUDA")
LIBRARY.impl("int8_grouped_linear", grouped_linear, "CUDA")
register_fake("autoquant::int8_linear", _fake_linear, lib=LIBRARY)
register_fake("autoquant::int8_grouped_linear", _fake_grouped, lib=LIBRARY)
