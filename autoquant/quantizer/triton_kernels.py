# mypy: ignore-errors
# The bodies are Triton's language, not Python: there is no type for a tile.
"""Kernels of int8 linears: rows of an input to int8, and their product with an int8 weight, finished there.

The arithmetic is that of :mod:`autoquant.quantizer.int8`, operation by operation, each rounded to float32 once: true
division (``div_rn``), rounding half to even, sums in int32, ``(float(sum) * weight scale) * scale + bias``, or
``float(sum) * (scale * weight scale) + bias`` where the scale is STATIC. The kernels
must be launched with ``enable_fp_fusion=False``: a fused multiply-add would round the last two steps together.

Triton is imported here alone, and this module by :mod:`autoquant.quantizer.cuda_linear` alone, where there is a GPU.
Names: a is [M, K] (int8 rows of the input), w is [N, K]; BM, BN, BK are the extents of a tile.
"""

# fmt: off  # arguments in rows, as they belong together
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

TINY = tl.constexpr(1.1754943508222875e-38)
"""The smallest normal float32."""
HALF_EVEN = tl.constexpr(12582912.0)
"""1.5 * 2**23: a float32 below 2**22 in magnitude, added to it, is rounded half to even to an integer."""


@triton.jit
def rounded(y):
    """``clamp(round(y), -128, 127)`` with NaN as 0, float32: the bounds are integers, so clamping may come first."""
    y = tl.where(y == y, tl.minimum(tl.maximum(y, -128.0), 127.0), 0.0)
    return (y + HALF_EVEN) - HALF_EVEN


@triton.jit
def magnitude_bits(x):
    """Bits of ``|x|`` as int32: ordered as the magnitudes are, with NaN above infinity."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def scale_of(bits):
    """``int8.scale_of`` of a magnitude given by its bits."""
    s = tl.div_rn(bits.to(tl.float32, bitcast=True), 127.0)
    s = tl.where(s == s, tl.maximum(s, TINY), s)
    return tl.where(s == float("inf"), float("nan"), s)


@triton.jit
def expert_of(row, offs, experts, EXPERTS: tl.constexpr):
    """Number of the expert that a row belongs to; ``experts`` for a row behind the last."""
    e = tl.arange(0, EXPERTS)
    ends = tl.load(offs + e, mask=e < experts, other=0x7FFFFFFF)
    return tl.sum((ends <= row).to(tl.int32), 0)


@triton.jit
def maximum_of_rows(x, bits, K, BLOCK: tl.constexpr):
    """Bits of the largest magnitude of all rows, into one int32 that was zero."""
    row = tl.program_id(0).to(tl.int64)
    largest = tl.zeros([BLOCK], tl.int32)
    for start in tl.range(0, K, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        v = tl.load(x + row * K + cols, mask=cols < K, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, magnitude_bits(v))
    tl.atomic_max(bits, tl.max(largest, 0), sem="relaxed")


@triton.jit(do_not_specialize=["zeros"], do_not_specialize_on_alignment=["scale", "given", "offs"])
def quantize_rows(
    x,
    q,
    scale,
    given,
    work,
    offs,
    K,
    zeros,
    experts,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    TOKEN: tl.constexpr,
    BITS: tl.constexpr,
    EXPERTS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Rows of x to int8, ``PARTS`` programs for each.

    TOKEN: each row by its own scale, which is written to ``scale``. Else by the scale in ``given``: one number, one for
    each expert, or (BITS) a magnitude that it is made of, which is written to ``scale`` too. The first ``zeros`` words
    of ``work`` become zero.
    """
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    if PDL:
        gdc_launch_dependents()
    cols = tl.arange(0, BLOCK)
    if TOKEN:
        largest = tl.zeros([BLOCK], tl.int32)
        for start in tl.range(0, K, BLOCK):
            v = tl.load(x + row * K + start + cols, mask=start + cols < K, other=0.0).to(tl.float32)
            largest = tl.maximum(largest, magnitude_bits(v))
        s = scale_of(tl.max(largest, 0))
        if part == 0:
            tl.store(scale + row, s)
    elif BITS:
        s = scale_of(tl.load(given))
        if row + part == 0:
            tl.store(scale, s)
    elif EXPERTS > 0:
        expert = expert_of(row, offs, experts, EXPERTS)
        s = tl.load(given + tl.minimum(expert, experts - 1))
    else:
        s = tl.load(given)
    for start in tl.range(part * BLOCK, K, PARTS * BLOCK):
        inside = start + cols < K
        v = tl.load(x + row * K + start + cols, mask=inside, other=0.0).to(tl.float32)
        tl.store(q + row * K + start + cols, rounded(tl.div_rn(v, s)).to(tl.int8), mask=inside)
    if work is not None:
        first = (tl.program_id(0) * PARTS + part) * BLOCK
        for start in tl.range(first, zeros, tl.num_programs(0) * PARTS * BLOCK):
            tl.store(work + start + cols, tl.zeros([BLOCK], tl.int32), mask=start + cols < zeros)


@triton.jit
def finish(
    acc,
    scale,
    weight_scale,
    bias,
    out,
    rm,
    rn,
    end,
    N,
    expert,
    TOKEN: tl.constexpr,
    STATIC: tl.constexpr,
    CHANNEL: tl.constexpr,
    BIAS: tl.constexpr,
):
    """Scale int32 sums, add the bias, store in out's dtype the rows before ``end``.

    All is loaded here, not before the sums: held through them it costs registers that the sums need.
    """
    s = tl.load(scale + rm, mask=rm < end, other=0.0)[:, None] if TOKEN else tl.load(scale + expert)
    if CHANNEL:
        t = tl.load(weight_scale + expert * N + rn, mask=rn < N, other=0.0)[None, :]
    else:
        t = tl.load(weight_scale + expert)
    y = acc.to(tl.float32) * (s * t) if STATIC else acc.to(tl.float32) * t * s
    if BIAS:
        y += tl.load(bias + rn, mask=rn < N, other=0.0).to(tl.float32)[None, :]
    at = rm.to(tl.int64)[:, None] * N + rn[None, :]
    tl.store(out + at, y.to(out.dtype.element_ty), mask=(rm < end)[:, None] & (rn < N)[None, :])


@triton.jit
def tile_of(pid, M, N, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """Row and column of a tile: ``GROUP`` rows of tiles are gone through together, so that their inputs stay in L2."""
    tiles_m = tl.cdiv(M, BM)
    per_group = GROUP * tl.cdiv(N, BN)
    first = (pid // per_group) * GROUP
    size = min(tiles_m - first, GROUP)
    return first + (pid % per_group) % size, (pid % per_group) // size


@triton.jit
def experts_tile(offs, experts, pid_m, BM: tl.constexpr, EXPERTS: tl.constexpr):
    """Expert, first row and end of the ``pid_m``-th tile of BM rows of one expert; ``experts`` behind the last."""
    e = tl.arange(0, EXPERTS)
    ends = tl.load(offs + e, mask=e < experts, other=0)
    starts = tl.load(offs + e - 1, mask=(e > 0) & (e < experts), other=0)
    tiles = tl.where(e < experts, (ends - starts + BM - 1) // BM, 0)
    behind = tl.cumsum(tiles, 0)
    expert = tl.sum((behind <= pid_m).to(tl.int32), 0)
    mine = e == expert
    first = tl.sum(tl.where(mine, starts + (pid_m - behind + tiles) * BM, 0), 0)
    return expert, first, tl.sum(tl.where(mine, ends, 0), 0)


@triton.jit
def sums_over(
    a,
    w,
    first,
    pid_n,
    end,
    N,
    K,
    low,
    high,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SWAP: tl.constexpr,
    TMA: tl.constexpr,
    EVEN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """``a @ w.T`` of a tile over the steps ``low`` to ``high`` of K, int32 [BM, BN]."""
    rk = tl.arange(0, BK)
    if not TMA:
        rm = first + tl.arange(0, BM)
        rn = pid_n * BN + tl.arange(0, BN)
        a_at = a + tl.where(rm < end, rm, 0).to(tl.int64)[:, None] * K + rk[None, :] + low * BK
        w_at = w + tl.where(rn < N, rn, 0).to(tl.int64)[:, None] * K + rk[None, :] + low * BK
    acc = tl.zeros([BN, BM], tl.int32) if SWAP else tl.zeros([BM, BN], tl.int32)
    for k in tl.range(low, high, num_stages=STAGES):
        if TMA:
            at = a.load([first, k * BK])
            wt = w.load([pid_n * BN, k * BK])
        else:
            if EVEN:
                at = tl.load(a_at)
                wt = tl.load(w_at)
            else:
                at = tl.load(a_at, mask=(rk < K - k * BK)[None, :], other=0)
                wt = tl.load(w_at, mask=(rk < K - k * BK)[None, :], other=0)
            a_at += BK
            w_at += BK
        acc = tl.dot(wt, at.T, acc, out_dtype=tl.int32) if SWAP else tl.dot(at, wt.T, acc, out_dtype=tl.int32)
    return acc.T if SWAP else acc


@triton.jit(
    do_not_specialize=["M", "experts"],
    do_not_specialize_on_alignment=["scale", "weight_scale", "bias", "offs"],
)
def product(
    a,
    w,
    scale,
    weight_scale,
    bias,
    out,
    work,
    offs,
    M,
    N,
    K,
    experts,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    SPLIT: tl.constexpr,
    SWAP: tl.constexpr,
    TMA: tl.constexpr,
    EVEN: tl.constexpr,
    TOKEN: tl.constexpr,
    STATIC: tl.constexpr,
    CHANNEL: tl.constexpr,
    BIAS: tl.constexpr,
    EXPERTS: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """One tile of ``out``, or one of SPLIT parts of its sum over K, for each program.

    SWAP: w is the left factor, so that few rows of a waste no matrix units. TMA: a and w are tensor descriptors.
    SPLIT: ``work``, zero at the start, holds a counter for each tile and the sums [M, N]; the last program of a tile
    to add its part finishes it. Integer sums are exact in any order. EXPERTS: rows are sorted by expert, expert e has
    those from ``offs[e - 1]`` to ``offs[e]`` and its own weight w[e]; there are programs for more tiles than there are.
    """
    pid = tl.program_id(0)
    if EXPERTS > 0:
        tiles_m = tl.num_programs(0) // tl.cdiv(N, BN)
        pid_n = pid // tiles_m
        expert, first, end = experts_tile(offs, experts, pid % tiles_m, BM, EXPERTS)
        if expert >= experts:
            return
        w += expert.to(tl.int64) * N * K
    else:
        expert = 0
        end = M
        pid_m, pid_n = tile_of(pid, M, N, BM, BN, GROUP)
        first = pid_m * BM
    rm = first + tl.arange(0, BM)
    rn = pid_n * BN + tl.arange(0, BN)
    if PDL:
        gdc_wait()  # for the rows that the kernel before writes
    per = tl.cdiv(tl.cdiv(K, BK), SPLIT)
    low = tl.program_id(1) * per
    high = min(low + per, tl.cdiv(K, BK))
    acc = sums_over(a, w, first, pid_n, end, N, K, low, high, BM, BN, BK, SWAP, TMA, EVEN, STAGES)
    if SPLIT == 1:
        finish(acc, scale, weight_scale, bias, out, rm, rn, end, N, expert, TOKEN, STATIC, CHANNEL, BIAS)
    else:
        sums = work + tl.num_programs(0) + rm[:, None] * N + rn[None, :]
        inside = (rm < end)[:, None] & (rn < N)[None, :]
        tl.atomic_add(sums, acc, mask=inside, sem="relaxed")
        tl.debug_barrier()  # all of this program's parts are in before it counts
        if tl.atomic_add(work + pid, 1, sem="acq_rel") == SPLIT - 1:
            whole = tl.load(sums, mask=inside, other=0, cache_modifier=".cg")
            finish(whole, scale, weight_scale, bias, out, rm, rn, end, N, expert, TOKEN, STATIC, CHANNEL, BIAS)


@triton.jit
def dot4(w, q, acc, ASM: tl.constexpr):
    """``acc`` plus the products of four int8 values each, in words of int32."""
    if ASM:
        return tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [w, q, acc], dtype=tl.int32, is_pure=True, pack=1
        )
    for i in tl.static_range(4):
        acc += ((w << (24 - 8 * i)) >> 24) * ((q << (24 - 8 * i)) >> 24)
    return acc


@triton.jit(do_not_specialize_on_alignment=["given", "weight_scale", "bias"])
def row_product(
    x,
    w,
    given,
    weight_scale,
    bias,
    out,
    N,
    K,
    BLOCK: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    TOKEN: tl.constexpr,
    CHANNEL: tl.constexpr,
    BIAS: tl.constexpr,
    ASM: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A linear of one row, in one kernel: every program quantizes the row for itself.

    x is the row itself, w [N, K // 4] words of four int8 values; BK counts words, BLOCK is K or more.
    """
    rn = tl.program_id(0) * BN + tl.arange(0, BN)
    if TOKEN:
        cols = tl.arange(0, BLOCK)
        row = tl.load(x + cols, mask=cols < K, other=0.0).to(tl.float32)
        s = scale_of(tl.max(magnitude_bits(row), 0))
    else:
        s = tl.load(given)
    rk = tl.arange(0, BK)
    byte = tl.arange(0, 4)
    words = K // 4
    w_at = w + tl.where(rn < N, rn, 0).to(tl.int64)[:, None] * words
    acc = tl.zeros([BN, BK], tl.int32)
    for k in tl.range(0, words, BK, num_stages=STAGES):
        inside = k + rk < words
        v = tl.load(x + (k + rk)[:, None] * 4 + byte[None, :], mask=inside[:, None], other=0.0).to(tl.float32)
        q = rounded(tl.div_rn(v, s)).to(tl.int32) & 255
        word = tl.sum(q << (8 * byte)[None, :], 1)
        wt = tl.load(w_at + (k + rk)[None, :], mask=inside[None, :], other=0)
        acc = dot4(wt, tl.broadcast_to(word[None, :], [BN, BK]), acc, ASM)
    t = tl.load(weight_scale + rn, mask=rn < N, other=0.0) if CHANNEL else tl.load(weight_scale)
    sums = tl.sum(acc, 1).to(tl.float32)
    y = sums * t * s if TOKEN else sums * (s * t)
    if BIAS:
        y += tl.load(bias + rn, mask=rn < N, other=0.0).to(tl.float32)
    tl.store(out + rn, y.to(out.dtype.element_ty), mask=rn < N)
