"""Int8 linears on a CPU: oneDNN's int8 product with a packed weight, and rows in blocks that stay in the cache.

The numbers are those of :func:`autoquant.quantizer.int8.linear` bit for bit: the kernel gives the float32 of each int32
sum times the weight's scale, or under a static scale the result itself, and proves it on every machine before it is
used. Without VNNI it adds pairs of products in int16 and saturates: rows go as two halves of few bits there, whose sums
stay small and are joined. Where that is not exact either, there is :func:`autoquant.quantizer.int8.matmul`.

Packing copies a weight into the order that the kernel reads, once; the copy lives as long as the weight does. Values
that were changed are packed again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from autoquant.library_patches import constant_in_traces
from autoquant.quantizer import int8

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST_ROWS = 1024
"""Rows of one product. Many: each product reads the whole weight."""
CACHED = 1 << 17
"""Elements of one elementwise step: half a MiB in float32, which stays in the cache, and is memory used before."""
HALF_EVEN = 12582912.0
"""1.5 * 2**23. Added to a float32 below 2**22 in magnitude it rounds half to even; the low byte is the integer's."""
SHIFT, LARGEST = torch.tensor(HALF_EVEN, device="cpu"), torch.tensor(float(int8.QMAX), device="cpu")
SIGN = torch.tensor(-128, dtype=torch.int8, device="cpu")
"""Tensors: a number that an operation has to make a tensor of costs as much as the operation on one row."""
SIGNED, UNSIGNED, HALVES = 0, 128, 8
"""Zero points of the forms in which the kernel is given int8 rows: as they are; 128 higher as uint8; or each as two, a
sixteenth of its values and the rest of -8 to 7, both 8 higher as uint8 of 0 to 16.
"""
DEEPEST = {
    SIGNED: int8.EXACT_INT32_DEPTH // 2,  # the kernel may make them unsigned
    UNSIGNED: int8.EXACT_INT32_DEPTH // 2,  # inputs reach 255, so that sums are twice as large
    HALVES: 2**24 // (8 * 128),  # each half's sum is exact in float32, so that their sum is rounded once
}
"""Channels of one product, by the form of its rows."""


@dataclass(eq=False, slots=True)
class Packed:
    """Packed forms of ``source``, int8 [(E,) O, I], or of its experts, by address and version; a copy begins empty.

    Holding on to the source keeps its memory, so that an address is never another tensor's.
    """

    source: Tensor | None = None
    held: dict[tuple[int, int], Any] = field(default_factory=dict)
    scales: dict[tuple[int, int], Scales] = field(default_factory=dict)

    def __deepcopy__(self, memo: Any) -> Packed:
        return Packed()

    def __reduce__(self) -> tuple[type[Packed], tuple[()]]:
        return Packed, ()

    def shares(self, values: Tensor) -> bool:
        """True if ``values`` lie in the memory of the source."""
        return self.source is not None and _memory(values) == _memory(self.source)

    def holds(self, values: Tensor) -> bool:
        """True if :meth:`of` has packed these values before, as they are."""
        return (values.data_ptr(), values._version) in self.held

    def of(self, values: Tensor) -> Any:
        """The packed form of int8 values [O, I] in the memory of the source."""
        key = (values.data_ptr(), values._version)
        if key not in self.held:
            for old in [other for other in self.held if other[0] == key[0]]:
                del self.held[old]
            self.held[key] = torch.ops.onednn.qlinear_prepack(values.contiguous(), None)
        return self.held[key]

    def both(self, scale: Tensor, given: Tensor) -> Scales:
        """A weight's scale [O or 1, 1] and a static one [], multiplied once for all calls while neither changes."""
        if scale.is_inference() or given.is_inference():  # these have no version
            return Scales.of(scale, given)
        key, versions = (scale.data_ptr(), given.data_ptr()), (scale._version, given._version)
        made = self.scales.get(key)
        if made is None or made.versions != versions:
            made = self.scales[key] = Scales.of(scale, given, versions)
        return made


@dataclass(eq=False, frozen=True, slots=True)
class Scales:
    """``product`` [O or 1] of two scales, which it holds on to: an address is never another tensor's."""

    made_of: tuple[Tensor, Tensor]
    versions: tuple[int, int] | None
    product: Tensor
    is_tiny: bool
    """True if one is below the normal numbers."""

    @staticmethod
    def of(scale: Tensor, given: Tensor, versions: tuple[int, int] | None = None) -> Scales:
        both = scale.reshape(-1) * given
        return Scales((scale, given), versions, both, bool(both.amin() < int8.TINY))


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def takes(x: Tensor, values: Tensor, packed: Packed | None) -> bool:
    """True if :func:`linear` can compute with an input of x's dtype and device and int8 values [O, I].

    False while a graph is traced or compiled, for fakes, for values that ``packed`` is not of, and where gradients are
    wanted.
    """
    return (
        packed is not None
        and not torch.compiler.is_compiling()
        and type(x) is Tensor
        and type(values) is Tensor
        and x.is_cpu
        and x.dtype in DTYPES
        and x.numel() > 0
        and not values.is_inference()  # these have no version
        and (packed.holds(values) or _packs(values, packed))
        and not (x.requires_grad and torch.is_grad_enabled())
    )


def _packs(values: Tensor, packed: Packed) -> bool:
    """What :func:`takes` asks of a weight, once: each question costs as much as an operation on one row."""
    return (
        values.is_cpu
        and values.numel() > 0
        and packed.shares(values)
        and is_exact()
        and values.shape[-1] <= DEEPEST[zero_point()]
    )


def linear(
    x_TI: Tensor,
    values: Tensor,
    packed: Packed,
    scale: Tensor,
    input_scale: Tensor | None,
    per_token: bool,
    bias: Tensor | None,
) -> Tensor:
    """``x @ W.T + b`` in x's dtype, [T, O].

    ``scale`` is float32 [O or 1, 1]. ``input_scale`` is float32 and broadcasts against [T, 1]; None: one scale for each
    token, or one for all of x.
    """
    weight, bias_O = packed.of(values), None if bias is None else bias.float()
    if input_scale is not None and input_scale.dim() == 0:
        whole = partial(_static, weight=weight, both=packed.both(scale, input_scale), given=input_scale, bias_O=bias_O)
        return whole(x_TI) if x_TI.shape[0] <= MOST_ROWS else torch.cat([whole(x) for x in x_TI.split(MOST_ROWS)])
    if input_scale is None and not per_token:
        input_scale = _scales(x_TI).amax()
    if x_TI.shape[0] <= MOST_ROWS:
        return _linear(x_TI, weight, scale, input_scale, bias_O)
    out_TO = torch.empty(x_TI.shape[0], values.shape[0], dtype=x_TI.dtype)
    for start in range(0, x_TI.shape[0], MOST_ROWS):
        block = slice(start, start + MOST_ROWS)
        given = input_scale if input_scale is None or input_scale.numel() == 1 else input_scale[block]
        out_TO[block] = _linear(x_TI[block], weight, scale, given, bias_O)
    return out_TO


def _static(x_TI: Tensor, weight: Any, both: Scales, given: Tensor, bias_O: Tensor | None) -> Tensor:
    """One kernel after the rounding. It has both scales as one: given two it multiplies in an order of its choice."""
    q, _ = quantized(x_TI, given)
    if x_TI.dtype == torch.bfloat16 and (bias_O is not None or both.is_tiny):
        return product(q, weight, both.product, bias_O, spent=True).to(x_TI.dtype)  # it makes zeros of tiny bfloat16
    return product(q, weight, both.product, bias_O, x_TI.dtype, spent=True)


def _linear(x_TI: Tensor, weight: Any, scale: Tensor, given: Tensor | None, bias_O: Tensor | None) -> Tensor:
    q, row_scale = quantized(x_TI, given)
    sums = product(q, weight, scale, spent=True)
    if sums.numel() <= CACHED:
        return _finished(sums, row_scale, bias_O).to(x_TI.dtype)
    out_TO, step = torch.empty(sums.shape, dtype=x_TI.dtype), max(1, CACHED // sums.shape[1])
    for start in range(0, sums.shape[0], step):
        part = slice(start, start + step)
        out_TO[part] = _finished(sums[part], row_scale if row_scale.numel() == 1 else row_scale[part], bias_O)
    return out_TO


def _finished(sums: Tensor, row_scale: Tensor, bias_O: Tensor | None) -> Tensor:
    """Float32 sums under the weight's scale, scaled in place."""
    sums.mul_(row_scale)
    return sums if bias_O is None else sums.add_(bias_O)


def quantized(x_TI: Tensor, given: Tensor | None) -> tuple[Tensor, Tensor]:
    """Int8 rows by the ``given`` scale [] or [T, 1], or each by its own, and the scales: ``int8.quantize_activations``
    in fewer steps.

    The scale of a row with infinity is infinity, not NaN: its int8 values are 0, and NaN comes of the product.
    """
    if x_TI.numel() <= CACHED:
        y = x_TI.float()
        scales = y.abs().amax(1, True).div_(LARGEST).clamp_min_(int8.TINY) if given is None else given
        return _rounded(y, scales, x_TI.dtype, given is not None).to(torch.int8), scales
    scales = _scales(x_TI) if given is None else given
    q, step = torch.empty(x_TI.shape, dtype=torch.int8), max(1, CACHED // x_TI.shape[1])
    for start in range(0, x_TI.shape[0], step):
        part = slice(start, start + step)
        scale = scales if scales.numel() == 1 else scales[part]
        q[part] = _rounded(x_TI[part].float(), scale, x_TI.dtype, given is not None)
    return q, scales


def _rounded(y: Tensor, scales: Tensor, dtype: torch.dtype, clamped: bool) -> Tensor:
    """int32 whose low byte is the int8 value, of float32 rows; conversion to int8 keeps that byte alone. ``y`` is
    overwritten unless it is the input itself, whose ``dtype`` is float32 then.

    A row under its own scale needs no clamp. NaN becomes a NaN whose low byte is zero, but for one that a float32 input
    brings along with bits of its own.
    """
    out = None if dtype == torch.float32 else y
    # A division, then a sum: in one step for one row, which is element by element where the scales are broadcast.
    one_row = len(y) == 1
    shifted = torch.addcdiv(SHIFT, y, scales, out=out) if one_row else torch.div(y, scales, out=out).add_(SHIFT)
    if clamped:  # to bounds that are shifted too
        shifted.clamp_(HALF_EVEN + int8.QMIN, HALF_EVEN + int8.QMAX)
        if dtype == torch.float32:
            shifted.nan_to_num_(HALF_EVEN)
    return shifted.view(torch.int32)


def _scales(x_TI: Tensor) -> Tensor:
    """Largest magnitude of each row by 127, [T, 1]; of half-sized floats by their bits, ordered as magnitudes are."""
    if x_TI.dtype == torch.float32:
        maximum = torch.maximum(x_TI.amax(1, keepdim=True), x_TI.amin(1, keepdim=True).neg_())
    else:
        bits = x_TI.contiguous().view(torch.int16).bitwise_and(0x7FFF)
        maximum = bits.amax(1, keepdim=True).view(x_TI.dtype).float()
    return maximum.div_(LARGEST).clamp_min_(int8.TINY)


def product(
    q: Tensor,
    weight: Any,
    scale_O: Tensor | None = None,
    bias_O: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    zero: int | None = None,
    *,
    spent: bool = False,
) -> Tensor:
    """The int32 sums of int8 rows [M, K] with a packed weight as float32, times a scale, plus a bias, [M, N].

    ``scale_O`` is float32, of N elements or one, [N, 1] as well as [N]: a view costs 5 µs. ``zero``: the form in which
    the rows go; None: that of :func:`zero_point`. ``spent``: the rows may be overwritten. Raises RuntimeError or
    AttributeError where the kernel is missing.
    """
    zero = zero_point() if zero is None else zero
    if zero == HALVES:
        sums = _of_halves(q, weight)
        if scale_O is not None:
            sums.mul_(scale_O.reshape(-1))
        return (sums if bias_O is None else sums.add_(bias_O)).to(dtype)
    rows = q
    if zero != SIGNED:  # the highest bit: 128 more, as uint8
        rows = (q.bitwise_xor_(SIGN) if spent else q.bitwise_xor(SIGN)).view(torch.uint8)
    return _product(rows, weight, ONE if scale_O is None else scale_O, bias_O, dtype, zero)


def _of_halves(q: Tensor, weight: Any) -> Tensor:
    """The float32 of each int32 sum. Sixteen times a float32 is exact, so that joining rounds once."""
    count = len(q)
    rows = torch.empty(2 * count, q.shape[1], dtype=torch.int8)
    high, low = rows[:count], rows[count:]
    torch.bitwise_right_shift(q, 3, out=high)
    high.add_(1).bitwise_right_shift_(1)  # (q + 8) // 16, which would overflow
    torch.sub(q, high, alpha=16, out=low)
    sums = _product(rows.add_(HALVES).view(torch.uint8), weight, ONE, None, torch.float32, HALVES)
    return sums[count:].add_(sums[:count], alpha=16)


def _product(
    rows: Tensor, weight: Any, scale_O: Tensor, bias_O: Tensor | None, dtype: torch.dtype, zero: int
) -> Tensor:
    """Of rows int8 or uint8 [M, K] that stand for ``zero`` less. Few are filled up to eight where N is small: oneDNN
    3.12 takes up to 18 ms for them, and 0.04 ms for eight.
    """
    count = rows.shape[0]
    few = count < LEAST_ROWS and weight.shape[-1] < WIDE
    filled = functional.pad(rows, (0, 0, 0, LEAST_ROWS - count)) if few else rows
    sums: Tensor = torch.ops.onednn.qlinear_pointwise(
        filled, 1.0, zero, weight, scale_O, ZERO, bias_O, 1.0, 0, dtype, "none", [], ""
    )
    return sums[:count] if few else sums


def zero_point() -> int:
    """Of the form in which rows go to the kernel: that with which it is exact, where there is one."""
    exact = _exact_form()
    return quick() if exact is None else exact


def quick() -> int:
    """The form that is quick here. Weights are packed for unsigned rows; signed ones have a kernel of their own where
    the CPU has AMX, and elsewhere oneDNN's reference, a thousand times as slow. Timed once.
    """
    if not QUICK:
        took = {zero: _seconds(zero) for zero in (SIGNED, UNSIGNED)}
        QUICK.append(UNSIGNED if int8.FAR * took[UNSIGNED] < took[SIGNED] else SIGNED)
    return QUICK[0]


def _seconds(zero: int) -> float:
    """What a small product takes."""
    q = torch.ones(64, 256, dtype=torch.int8)
    packed = torch.ops.onednn.qlinear_prepack(q, None)
    return int8.least_seconds(lambda: product(q, packed, zero=zero))


LEAST_ROWS, WIDE = 8, 1024
ONE, ZERO = torch.ones(1, device="cpu"), torch.zeros(1, dtype=torch.int32, device="cpu")


def probe_product(zero: int) -> bool:
    """True if :func:`product` gets every probe of :func:`autoquant.quantizer.int8.probes` right, whose rows go in the
    form of this zero point. Raises RuntimeError or AttributeError where the kernel is missing.
    """
    for a, b in int8.probes():
        exact, outputs = (a.double() @ b.double()).float(), b.shape[1]
        scales, bias = torch.linspace(1e-3, 2e-2, outputs), torch.linspace(-1.0, 1.0, outputs)
        packed = torch.ops.onednn.qlinear_prepack(b.t().contiguous(), None)
        if not torch.equal(product(a, packed, zero=zero), exact):
            return False
        for each in (scales, scales[:1], scales * int8.TINY):
            for added in (None, bias):
                wanted = exact * each if added is None else exact * each + added
                for shown in (each, each[:, None]):
                    if not torch.equal(product(a, packed, shown, added, zero=zero), wanted):
                        return False
        for dtype in DTYPES:
            if not torch.equal(product(a, packed, scales, None, dtype, zero), (exact * scales).to(dtype)):
                return False
    return True


def _exact_form() -> int | None:
    """The zero point of a form of rows with which the kernel is exact, the quick one first; None: of no form."""
    if not PROBED:
        try:
            PROBED.append(next((zero for zero in (quick(), HALVES) if probe_product(zero)), None))
        except (RuntimeError, AttributeError):  # the kernel is missing
            PROBED.append(None)
    return PROBED[0]


PROBED: list[int | None] = []
QUICK: list[int] = []
is_exact: Callable[[], bool] = constant_in_traces(lambda: _exact_form() is not None)
