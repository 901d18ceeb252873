# mypy: ignore-errors
# The bodies are Gluon's language, not Python: there is no type for a tile.
"""The int8 product of many rows on Hopper, in Gluon: one warp fetches tiles, two groups of four multiply and finish.

The arithmetic is that of :mod:`autoquant.quantizer.triton_kernels`, which has the names too; what differs is who waits
for whom. Each program goes through tiles of the result one after the other. Its fetching warp runs ahead by STAGES
steps of K, whatever the others do, so that the matrix units need not wait for memory when a tile begins. Triton's own
pipeline has all warps do the same, and drains where a tile ends.

The language is experimental: Triton 3.6 to 3.9 compile this. Where it is missing, or compiles to something else, the
proof of :mod:`autoquant.quantizer.cuda_linear` fails and the other kernels are used.
"""

# fmt: off
# Arguments in rows, as they belong together.
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

# Triton 3.8 calls them otherwise; 3.9 has the old names no more.
async_load = getattr(tma, "async_load", tma.async_copy_global_to_shared)
async_store = getattr(tma, "async_store", tma.async_copy_shared_to_global)
GROUPS = gl.constexpr(2)
"""Of four warps, each with half the rows of a tile."""
WIDEST = gl.constexpr(128)
"""Outputs of one int8 instruction, as far as Triton has them."""


@gluon.jit
def tile_of(pid, M, N, BM: gl.constexpr, BN: gl.constexpr, GROUP: gl.constexpr):
    """Row and column of a tile: ``GROUP`` rows of tiles are gone through together, so that their inputs stay in L2."""
    tiles_m = gl.cdiv(M, BM)
    per_group = GROUP * gl.cdiv(N, BN)
    first = (pid // per_group) * GROUP
    size = min(tiles_m - first, GROUP)
    return first + (pid % per_group) % size, (pid % per_group) // size


@gluon.jit
def fetch(a, w, a_tiles, w_tiles, full, empty, M, N, K, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr,
          GROUP: gl.constexpr, STAGES: gl.constexpr):
    """Tiles of both inputs into shared memory, as they become free."""
    step = 0
    for tile in range(gl.program_id(0), gl.cdiv(M, BM) * gl.cdiv(N, BN), gl.num_programs(0)):
        pid_m, pid_n = tile_of(tile, M, N, BM, BN, GROUP)
        for k in range(gl.cdiv(K, BK)):
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            mbarrier.expect(full.index(stage), (BM + BN) * BK)
            for part in gl.static_range(GROUPS):
                async_load(
                    a,
                    [pid_m * BM + part * (BM // GROUPS), k * BK],
                    full.index(stage),
                    a_tiles.index(stage * GROUPS + part),
                )
            async_load(w, [pid_n * BN, k * BK], full.index(stage), w_tiles.index(stage))
            step += 1


@gluon.jit
def stored(y, out, buffer, row, column, PARTS: gl.constexpr):
    """A group's half of a tile to ``out`` in so many parts, through one buffer in shared memory."""
    ROWS: gl.constexpr = y.shape[0]
    COLUMNS: gl.constexpr = y.shape[1] // PARTS
    if PARTS == 1:
        tma.store_wait(0)  # the buffer is read
        buffer.store(y)
        fence_async_shared()
        async_store(out, [row, column], buffer)
    else:
        halves = y.reshape([ROWS, PARTS, COLUMNS]).permute([0, 2, 1]).split()
        for part in gl.static_range(PARTS):
            tma.store_wait(0)
            buffer.store(halves[part])
            fence_async_shared()
            async_store(out, [row, column + part * COLUMNS], buffer)


@gluon.jit
def multiply(a_tiles, w_tiles, full, empty, scale, weight_scale, bias, out, buffers, M, N, K, PART: gl.constexpr,
             BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr,
             TOKEN: gl.constexpr, STATIC: gl.constexpr, CHANNEL: gl.constexpr, BIAS: gl.constexpr):
    """The rows of one group: their sums over K, scaled, with the bias, in out's dtype."""
    ROWS: gl.constexpr = BM // GROUPS
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, min(BN, WIDEST), 32])
    PARTS: gl.constexpr = BN // out.block_shape[1]
    step = 0
    for tile in range(gl.program_id(0), gl.cdiv(M, BM) * gl.cdiv(N, BN), gl.num_programs(0)):
        pid_m, pid_n = tile_of(tile, M, N, BM, BN, GROUP)
        acc = gl.zeros([ROWS, BN], gl.int32, SUMS)
        for k in range(gl.cdiv(K, BK)):
            stage = step % STAGES
            mbarrier.wait(full.index(stage), (step // STAGES) & 1)
            wt = w_tiles.index(stage).permute([1, 0])
            acc = warpgroup_mma(a_tiles.index(stage * GROUPS + PART), wt, acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=[acc])  # all but this step: the stage before it is free
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), pred=k > 0)
            step += 1
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES))
        row = pid_m * BM + PART * ROWS
        rm = row + gl.arange(0, ROWS, gl.SliceLayout(1, SUMS))
        rn = pid_n * BN + gl.arange(0, BN, gl.SliceLayout(0, SUMS))
        s = gl.expand_dims(gl.load(scale + rm, mask=rm < M, other=0.0), 1) if TOKEN else gl.load(scale)
        t = gl.expand_dims(gl.load(weight_scale + rn, mask=rn < N, other=0.0), 0) if CHANNEL else gl.load(weight_scale)
        y = acc.to(gl.float32) * (s * t) if STATIC else acc.to(gl.float32) * t * s
        if BIAS:
            y = y + gl.expand_dims(gl.load(bias + rn, mask=rn < N, other=0.0).to(gl.float32), 0)
        stored(y.to(out.dtype), out, buffers.index(PART), row, pid_n * BN, PARTS)
    tma.store_wait(0)


@gluon.jit(
    do_not_specialize=["M"],
    do_not_specialize_on_alignment=["scale", "weight_scale", "bias"],
)
def product(a, w, out, scale, weight_scale, bias, M, N, K, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr,
            GROUP: gl.constexpr, STAGES: gl.constexpr, TOKEN: gl.constexpr, STATIC: gl.constexpr,
            CHANNEL: gl.constexpr, BIAS: gl.constexpr):
    """All tiles of ``out``. ``a`` is described in halves of a tile, ``out`` in what is stored at once."""
    a_tiles = gl.allocate_shared_memory(gl.int8, [STAGES * GROUPS, BM // GROUPS, BK], a.layout)
    w_tiles = gl.allocate_shared_memory(gl.int8, [STAGES, BN, BK], w.layout)
    buffers = gl.allocate_shared_memory(out.dtype, [GROUPS, out.block_shape[0], out.block_shape[1]], out.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=GROUPS)
    fence_async_shared()
    gl.warp_specialize(
        [
            (multiply, (a_tiles, w_tiles, full, empty, scale, weight_scale, bias, out, buffers, M, N, K, 0, BM, BN,
                        BK, GROUP, STAGES, TOKEN, STATIC, CHANNEL, BIAS)),
            (multiply, (a_tiles, w_tiles, full, empty, scale, weight_scale, bias, out, buffers, M, N, K, 1, BM, BN,
                        BK, GROUP, STAGES, TOKEN, STATIC, CHANNEL, BIAS)),
            (fetch, (a, w, a_tiles, w_tiles, full, empty, M, N, K, BM, BN, BK, GROUP, STAGES)),
        ],
        [4, 1],  # warps beside the four of the first
        [232, 24],  # registers of a thread: sums take 128 of them, fetching next to none
    )


def launch(tiling, q, values, row_scale, scale, bias, out, programs):
    """Grid, arguments and constants of :func:`product` for int8 rows ``q`` and a weight; kinds of scales are left."""
    half, parts = tiling.rows // 2, tiling.rows * tiling.outputs // AT_ONCE
    tiled = (
        _described(q, half, tiling.depth),
        _described(values, tiling.outputs, tiling.depth),
        _described(out, half, tiling.outputs // parts),
    )
    tiles = -(-out.shape[0] // tiling.rows) * -(-out.shape[1] // tiling.outputs)
    arguments = (*tiled, row_scale, scale, bias, *out.shape, q.shape[1])
    extents = (tiling.rows, tiling.outputs, tiling.depth, tiling.group, tiling.stages)
    return (min(programs, tiles), 1, 1), arguments, extents


AT_ONCE = 128 * 128
"""Elements of a tile that both groups store at once: as many as shared memory has room for beside the inputs."""


def _described(matrix, rows, columns):
    """A matrix by tiles of so many rows and columns."""
    dtypes = {"torch.int8": gl.int8, "torch.bfloat16": gl.bfloat16, "torch.float16": gl.float16}
    layout = gl.NVMMASharedLayout.get_default_for([rows, columns], dtypes[str(matrix.dtype)])
    return TensorDescriptor.from_tensor(matrix, [rows, columns], layout)
