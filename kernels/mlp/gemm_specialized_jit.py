"""The MLP's GEMMs with the activation, or its derivative, in the epilogue, for sm_90, by warpgroups that each
do one kind of work. In Gluon, Triton's language of the level below.

A program has three warpgroups. Two multiply: each sums 64 of a tile's 128 rows in its registers, and hands
the sums over in shared memory, rounded to 16 bits. The third finishes what it is handed: it applies the
activation, or multiplies with its derivative, and stores the result. So epilogues take no time from the
tensor cores, and a tile can have 256 columns, whose sums would leave an epilogue of the same warps no
registers. Larger tiles read less: one step of 128 x 256 takes 48 KiB, two of 128 x 128 take 64.

The tensor cores read operands at most of shared memory's bandwidth, and TMA writes them at much of the rest.
So all else goes past it: results are stored, and what backward needs is loaded, from registers, in rows of
128 bytes.

Programs are persistent. Operands are loaded STAGES - 1 steps ahead, also across tiles. The warpgroups wait
for each other at mbarriers:

- `loaded`, one for each stage of the operands: TMA has written it;
- `released`, one for each stage: the second warpgroup has read it. The first, which has read it too, loads;
- `filled`, `emptied`, one for each half of a tile's rows: its sums are handed over, or have been read.

A phase of an mbarrier ends when all have arrived; who waits names the parity of the phase. Before the first
phase ends, a wait for the phase before it, of parity 1, returns at once.
"""

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from vpt_fast.kernels.mlp.gemm_jit import grouped_tile, rounded, times_slope
from vpt_fast.kernels.mlp.jit import activation, encode_derivative

# Gluon's name since Triton 3.8, and in 3.6.
_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared

_WARPS = gl.constexpr(4)  # in a warpgroup
_HALF = gl.constexpr(64)  # rows of a wgmma


@gluon.jit
def first_row_and_column(tile, M, N, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, GROUP: gl.constexpr):
    tile_m, tile_n = grouped_tile(tile, gl.cdiv(M, BLOCK_M), gl.cdiv(N, BLOCK_N), GROUP)
    return tile_m * BLOCK_M, tile_n * BLOCK_N


@gluon.jit
def next_step(
    tile, k, m, n, M, N, K,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """The next BLOCK_K columns of the tile from row m and column n on, or the first of this program's next
    tile."""
    k += BLOCK_K
    if k >= K:
        k = 0
        tile += gl.num_programs(0)
        m, n = first_row_and_column(tile, M, N, BLOCK_M, BLOCK_N, GROUP)
    return tile, k, m, n


@gluon.jit
def load_operands(
    left, right, left_tiles, right_tiles, loaded, stage, k, m, n, exists, TRANSPOSED: gl.constexpr
):
    """Begins a step's loads, if the step exists."""
    mbarrier.expect(loaded.index(stage), left.block_type.nbytes + right.block_type.nbytes, pred=exists)
    _load(left, [m, k], loaded.index(stage), left_tiles.index(stage), pred=exists)
    at = [n, k] if TRANSPOSED else [k, n]
    _load(right, at, loaded.index(stage), right_tiles.index(stage), pred=exists)


@gluon.jit
def multiply(
    work,
    HALF: gl.constexpr,  # 0 or 1: which of a tile's rows; the first loads for both
    TRANSPOSED: gl.constexpr,
    GROUP: gl.constexpr,
):
    """left · right + bias of half the rows of each tile, handed over in `results`.

    work: left (M, K); right (K, N), or (N, K) if TRANSPOSED; bias (N,), a pointer, or None; sizes; tiles of
    shared memory, and barriers.
    """
    (
        left, right, bias, M, N, K, left_tiles, right_tiles, loaded, released, results, filled, emptied
    ) = work  # fmt: skip
    STAGES: gl.constexpr = left_tiles.shape[0]
    BLOCK_M: gl.constexpr = left_tiles.shape[1]
    BLOCK_K: gl.constexpr = left_tiles.shape[2]
    BLOCK_N: gl.constexpr = results.shape[2]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [_WARPS, 1], [16, BLOCK_N, 16])
    num_tiles = gl.cdiv(M, BLOCK_M) * gl.cdiv(N, BLOCK_N)
    gl.assume(K > 0)

    # The step whose operands are loaded next.
    ahead, ahead_k = gl.program_id(0), 0
    ahead_m, ahead_n = first_row_and_column(ahead, M, N, BLOCK_M, BLOCK_N, GROUP)
    if HALF == 0:
        for stage in gl.static_range(STAGES - 1):
            load_operands(
                left, right, left_tiles, right_tiles, loaded, stage, ahead_k, ahead_m, ahead_n,
                ahead < num_tiles, TRANSPOSED,
            )  # fmt: skip
            ahead, ahead_k, ahead_m, ahead_n = next_step(
                ahead, ahead_k, ahead_m, ahead_n, M, N, K, BLOCK_M, BLOCK_N, BLOCK_K, GROUP
            )

    stage, before, parity = 0, STAGES - 1, 0
    is_first_step = True
    tile_parity = 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        product = gl.zeros((_HALF, BLOCK_N), gl.float32, layout)
        if bias is not None:
            _, n = first_row_and_column(tile, M, N, BLOCK_M, BLOCK_N, GROUP)
            columns = n + gl.arange(0, BLOCK_N, gl.SliceLayout(0, layout))
            start = gl.load(bias + columns, columns < N, other=0.0).to(gl.float32)
            product, _ = gl.broadcast(start[None, :], product)
        product = warpgroup_mma_init(product)
        for k in range(0, K, BLOCK_K):
            mbarrier.wait(loaded.index(stage), parity)
            left_tile = left_tiles.index(stage).slice(HALF * _HALF, _HALF, 0)
            right_tile = right_tiles.index(stage)
            if TRANSPOSED:
                right_tile = right_tile.permute((1, 0))
            # Without a bias, the first step does not add to the zeros but replaces them.
            is_added = True if bias is not None else k > 0
            product = warpgroup_mma(left_tile, right_tile, product, use_acc=is_added, is_async=True)
            # While this step multiplies, the stage of the one before is free.
            product = warpgroup_mma_init(warpgroup_mma_wait(1, deps=(product,)))
            if HALF == 0:
                mbarrier.wait(released.index(before), gl.where(stage > 0, parity, parity ^ 1))
                load_operands(
                    left, right, left_tiles, right_tiles, loaded, before, ahead_k, ahead_m, ahead_n,
                    ahead < num_tiles, TRANSPOSED,
                )  # fmt: skip
                ahead, ahead_k, ahead_m, ahead_n = next_step(
                    ahead, ahead_k, ahead_m, ahead_n, M, N, K, BLOCK_M, BLOCK_N, BLOCK_K, GROUP
                )
            else:
                mbarrier.arrive(released.index(before), count=1, pred=not is_first_step)
                is_first_step = False
            before = stage
            stage += 1
            if stage == STAGES:
                stage = 0
                parity ^= 1
        product = warpgroup_mma_wait(0, deps=(product,))
        mbarrier.wait(emptied.index(HALF), tile_parity ^ 1)
        results.index(HALF).store(rounded(product, results.dtype))
        mbarrier.arrive(filled.index(HALF), count=1)
        tile_parity ^= 1


@triton.constexpr_function
def layout_of(columns):
    """How a warpgroup holds (rows, columns): 8 adjacent elements in a thread, whole rows in a warp."""
    return gl.BlockedLayout([1, 8], [256 // columns, columns // 8], [_WARPS, 1], [1, 0])


@gluon.jit
def rows_and_columns(m, n, COLUMNS: gl.constexpr):
    """Of a part from row m and column n on."""
    layout: gl.constexpr = layout_of(COLUMNS)
    rows = m + gl.arange(0, _HALF, gl.SliceLayout(1, layout))
    return rows, n + gl.arange(0, COLUMNS, gl.SliceLayout(0, layout))


@gluon.jit
def offsets(rows, columns, stride):
    return rows.to(gl.int64)[:, None] * stride + columns[None, :]


@gluon.jit
def take_part(results, emptied, HALF: gl.constexpr, PART: gl.constexpr, COLUMNS: gl.constexpr):
    """COLUMNS of the sums of a half; after the last of them, the half is emptied."""
    found = results.index(HALF).slice(PART * COLUMNS, COLUMNS, 1).load(layout_of(COLUMNS))
    if PART == results.shape[2] // COLUMNS - 1:
        mbarrier.arrive(emptied.index(HALF), count=1)
    return found


@gluon.jit
def finish_activation(
    a,  # (M, N)
    u,  # (M, N), or None: the pre-activation is not kept
    codes,  # (M, N), or None: the derivative is not kept
    M, N, results, filled, emptied,
    KIND: gl.constexpr,
    COLUMNS: gl.constexpr,
    GROUP: gl.constexpr,
):  # fmt: skip
    """Stores the activation of what `multiply` hands over, COLUMNS of it at a time, and u or codes."""
    BLOCK_N: gl.constexpr = results.shape[2]
    PARTS: gl.constexpr = BLOCK_N // COLUMNS
    num_tiles = gl.cdiv(M, 2 * _HALF) * gl.cdiv(N, BLOCK_N)
    parity = 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        m, n = first_row_and_column(tile, M, N, 2 * _HALF, BLOCK_N, GROUP)
        for i in gl.static_range(2 * PARTS):
            if i % PARTS == 0:
                mbarrier.wait(filled.index(i // PARTS), parity)
            product = take_part(results, emptied, i // PARTS, i % PARTS, COLUMNS)
            rows, columns = rows_and_columns(m + i // PARTS * _HALF, n + i % PARTS * COLUMNS, COLUMNS)
            mask = (rows < M)[:, None] & (columns < N)[None, :]
            at = offsets(rows, columns, N)
            if u is not None:
                gl.store(u + at, product, mask)
            value, slope = activation(product.to(gl.float32), KIND, False)
            gl.store(a + at, value.to(a.dtype.element_ty), mask)
            if codes is not None:
                gl.store(codes + at, encode_derivative(slope), mask)
        parity ^= 1


@gluon.jit
def load_kept(kept, kept_stride, m, n, M, N, exists, COLUMNS: gl.constexpr):
    """The part of `kept` from row m and column n on, if it exists."""
    rows, columns = rows_and_columns(m, n, COLUMNS)
    mask = (rows < M)[:, None] & (columns < N)[None, :] & exists
    return gl.load(kept + offsets(rows, columns, kept_stride), mask, other=0)


@gluon.jit
def finish_gradient(
    kept,  # (M, N): the pre-activation, or uint8 codes of the derivative
    grad_u,  # (M, N)
    M, N, kept_stride, results, filled, emptied,
    KIND: gl.constexpr,
    COLUMNS: gl.constexpr,
    GROUP: gl.constexpr,
):  # fmt: skip
    """Stores what `multiply` hands over times the derivative, COLUMNS of it at a time."""
    BLOCK_N: gl.constexpr = results.shape[2]
    PARTS: gl.constexpr = BLOCK_N // COLUMNS
    num_tiles = gl.cdiv(M, 2 * _HALF) * gl.cdiv(N, BLOCK_N)
    tile = gl.program_id(0)
    m, n = first_row_and_column(tile, M, N, 2 * _HALF, BLOCK_N, GROUP)
    saved = load_kept(kept, kept_stride, m, n, M, N, tile < num_tiles, COLUMNS)
    parity = 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        after = tile + gl.num_programs(0)
        m_after, n_after = first_row_and_column(after, M, N, 2 * _HALF, BLOCK_N, GROUP)
        for i in gl.static_range(2 * PARTS):
            # Meanwhile, the next part is on its way.
            if i + 1 < 2 * PARTS:
                next_m, next_n = m + (i + 1) // PARTS * _HALF, n + (i + 1) % PARTS * COLUMNS
                next_saved = load_kept(kept, kept_stride, next_m, next_n, M, N, True, COLUMNS)
            else:
                exists = after < num_tiles
                next_saved = load_kept(kept, kept_stride, m_after, n_after, M, N, exists, COLUMNS)
            if i % PARTS == 0:
                mbarrier.wait(filled.index(i // PARTS), parity)
            product = take_part(results, emptied, i // PARTS, i % PARTS, COLUMNS).to(gl.float32)
            rows, columns = rows_and_columns(m + i // PARTS * _HALF, n + i % PARTS * COLUMNS, COLUMNS)
            mask = (rows < M)[:, None] & (columns < N)[None, :]
            value = times_slope(product, saved, KIND).to(grad_u.dtype.element_ty)
            gl.store(grad_u + offsets(rows, columns, N), value, mask)
            saved = next_saved
        m, n = m_after, n_after
        parity ^= 1


@gluon.jit
def make_barriers(NUM: gl.constexpr):
    """mbarriers at which one thread arrives in each phase."""
    found = gl.allocate_shared_memory(gl.int64, [NUM, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NUM):
        mbarrier.init(found.index(i), count=1)
    return found


@gluon.jit
def tiles_of(descriptor, NUM: gl.constexpr):
    """Shared memory for so many of a descriptor's blocks."""
    return gl.allocate_shared_memory(descriptor.dtype, [NUM] + descriptor.block_type.shape, descriptor.layout)


@gluon.jit
def results_of(operand, BLOCK_N: gl.constexpr):
    """Shared memory for a tile of the sums, in two halves of its rows."""
    layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    return gl.allocate_shared_memory(operand.dtype, [2, _HALF, BLOCK_N], layout)


# One build serves every M and K: with descriptors, alignment does not depend on them.
@gluon.jit(do_not_specialize=["M", "K"])
def linear_activate_specialized_kernel(
    x,  # (M, K)
    weight,  # (N, K)
    bias,  # (N,), a pointer, or None
    a,  # (M, N), a pointer
    u,  # (M, N), a pointer, or None: the pre-activation is not kept
    codes,  # (M, N), a pointer, or None: the derivative is not kept
    M,
    N,
    K,
    KIND: gl.constexpr,
    COLUMNS: gl.constexpr,
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
    MULTIPLY_REGISTERS: gl.constexpr,
    FINISH_REGISTERS: gl.constexpr,
):
    x_tiles, weight_tiles = tiles_of(x, STAGES), tiles_of(weight, STAGES)
    results = results_of(x, weight.block_type.shape[0])
    loaded, released = make_barriers(STAGES), make_barriers(STAGES)
    filled, emptied = make_barriers(2), make_barriers(2)
    work = (
        x, weight, bias, M, N, K, x_tiles, weight_tiles, loaded, released, results, filled, emptied
    )  # fmt: skip
    gl.warp_specialize(
        [
            (multiply, (work, 0, True, GROUP)),
            (multiply, (work, 1, True, GROUP)),
            (finish_activation, (a, u, codes, M, N, results, filled, emptied, KIND, COLUMNS, GROUP)),
        ],
        [_WARPS, _WARPS],
        [MULTIPLY_REGISTERS, FINISH_REGISTERS],
    )


@gluon.jit(do_not_specialize=["M", "K"])
def linear_activate_backward_specialized_kernel(
    grad,  # (M, K)
    weight,  # (K, N)
    kept,  # (M, N), a pointer: the pre-activation, or uint8 codes of the derivative
    grad_u,  # (M, N), a pointer
    M,
    N,
    K,
    kept_stride,
    KIND: gl.constexpr,
    COLUMNS: gl.constexpr,
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
    MULTIPLY_REGISTERS: gl.constexpr,
    FINISH_REGISTERS: gl.constexpr,
):
    grad_tiles, weight_tiles = tiles_of(grad, STAGES), tiles_of(weight, STAGES)
    results = results_of(grad, weight.block_type.shape[1])
    loaded, released = make_barriers(STAGES), make_barriers(STAGES)
    filled, emptied = make_barriers(2), make_barriers(2)
    work = (
        grad, weight, None, M, N, K, grad_tiles, weight_tiles, loaded, released, results, filled, emptied
    )  # fmt: skip
    gl.warp_specialize(
        [
            (multiply, (work, 0, False, GROUP)),
            (multiply, (work, 1, False, GROUP)),
            (
                finish_gradient,
                (kept, grad_u, M, N, kept_stride, results, filled, emptied, KIND, COLUMNS, GROUP),
            ),
        ],
        [_WARPS, _WARPS],
        [MULTIPLY_REGISTERS, FINISH_REGISTERS],
    )
