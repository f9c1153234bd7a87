"""The MLP's GEMMs with the activation, or its derivative, in the epilogue.

Tiles are processed in groups of GROUP rows of tiles, column by column, so that concurrent tiles share their
operands through the L2 cache.

Each GEMM has two kernels. Those that end in `_tma_kernel` are for sm_90 and newer: TMA moves whole tiles by
tensor descriptors and checks bounds; elements past the end read as 0 and are not stored. They are persistent:
as many programs as the device holds at once process one tile after the other, so that the epilogue of one
overlaps with the main loop of another. The other kernels compute every address; rows past the end read the
last row and are not stored.

Two programs on an SM that start together, with equal work, would stay in step: both in their main loops, at
half the speed each, and then both in their epilogues, while the tensor cores idle. So half of the programs
start DELAY nanoseconds later.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer
from vpt_fast.kernels.mlp.jit import activation, decode_derivative, encode_derivative
from vpt_fast.kernels.rows import row_offset


@triton.jit
def grouped_tile(tile, num_m, num_n, GROUP: tl.constexpr):
    """Row and column of tile number `tile` in the grid of tiles."""
    group = tile // (GROUP * num_n)
    first = group * GROUP
    rows = tl.minimum(num_m - first, GROUP)
    within = tile - group * (GROUP * num_n)
    return first + within % rows, within // rows


@triton.jit
def add_product(product, left, right):
    """product + left · right.

    In float32, without tensor cores, an accumulator would be one chain of K additions, whose error grows with
    √K; so each tile is summed on its own first. max_num_imprecise_acc keeps Triton from merging the two sums.
    """
    if left.dtype == tl.float32:
        return product + tl.dot(left, right, input_precision="ieee", max_num_imprecise_acc=left.shape[1])
    return tl.dot(left, right, product)


@triton.jit
def split_columns(product, BLOCK_M: tl.constexpr, half: tl.constexpr):
    """Left and right half of a tile."""
    return tl.split(tl.permute(tl.reshape(product, (BLOCK_M, 2, half)), (0, 2, 1)))


@triton.jit
def rounded(u, DTYPE: tl.constexpr):
    """A pre-activation as it is kept. Out of float16's range it becomes the largest finite number: no
    activation has a derivative at infinity, although its value, computed from float32, may well be finite."""
    if DTYPE == tl.float16:
        u = tl.where(u > 65504.0, 65504.0, tl.where(u < -65504.0, -65504.0, u))
    return u.to(DTYPE)


@triton.jit
def store_activation(product, bias, a, u, codes, m, n, M, N, KIND: tl.constexpr, EXACT: tl.constexpr):
    """Stores rows m and columns n of the activation, and of u or codes."""
    if bias is not None:
        product += tl.load(bias + n, n < N, other=0.0).to(tl.float32)[None, :]
    value, slope = activation(product, KIND, EXACT)
    mask = (m < M)[:, None] & (n < N)[None, :]
    at = m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(a + at, value.to(a.dtype.element_ty), mask)
    if u is not None:
        tl.store(u + at, rounded(product, u.dtype.element_ty), mask)
    if codes is not None:
        tl.store(codes + at, encode_derivative(slope), mask)


@triton.jit
def store_gradient(product, kept_rows, grad_u, m, n, M, N, KIND: tl.constexpr):
    """Stores rows m and columns n of product times derivative. kept_rows: pointers to the kept rows."""
    mask = (m < M)[:, None] & (n < N)[None, :]
    saved = tl.load(kept_rows[:, None] + n[None, :], mask, other=0)
    if kept_rows.dtype.element_ty == tl.uint8:
        slope = decode_derivative(saved)
    else:
        EXACT: tl.constexpr = grad_u.dtype.element_ty == tl.float32
        _, slope = activation(saved.to(tl.float32), KIND, EXACT)
    at = m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(grad_u + at, (product * slope).to(grad_u.dtype.element_ty), mask)


@triton.jit
def linear_activate_kernel(
    x,  # (M, K)
    weight,  # (N, K)
    bias,  # (N,) or None
    a,  # (M, N)
    u,  # (M, N) or None: the pre-activation is not kept
    codes,  # (M, N) or None: the derivative is not kept
    M,
    N,
    K,
    size1,
    size2,
    x_stride0,
    x_stride1,
    x_stride2,
    weight_stride,
    KIND: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    tile_m, tile_n = grouped_tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    x_rows = row_offset(tl.minimum(m, M - 1), size1, size2, x_stride0, x_stride1, x_stride2)
    x_at = x + x_rows[:, None] + k[None, :]
    weight_at = weight + tl.minimum(n, N - 1).to(tl.int64)[:, None] * weight_stride + k[None, :]

    product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            x_tile = tl.load(x_at)
            weight_tile = tl.load(weight_at)
        else:
            x_tile = tl.load(x_at, k[None, :] < K - start, other=0.0)
            weight_tile = tl.load(weight_at, k[None, :] < K - start, other=0.0)
        # (BLOCK_M, BLOCK_K) (BLOCK_N, BLOCK_K)ᵀ
        product = add_product(product, x_tile, tl.trans(weight_tile))
        x_at += BLOCK_K
        weight_at += BLOCK_K

    # In halves, so that the epilogue's registers leave room for a second program on the SM.
    half: tl.constexpr = BLOCK_N // 2
    left, right = split_columns(product, BLOCK_M, half)
    n = tile_n * BLOCK_N + tl.arange(0, half)
    store_activation(left, bias, a, u, codes, m, n, M, N, KIND, x.dtype.element_ty == tl.float32)
    store_activation(right, bias, a, u, codes, m, n + half, M, N, KIND, x.dtype.element_ty == tl.float32)


@triton.jit
def linear_activate_backward_kernel(
    grad,  # (M, K)
    weight,  # (K, N)
    kept,  # (M, N): the pre-activation, or uint8 codes of the derivative
    grad_u,  # (M, N)
    M,
    N,
    K,
    size1,
    size2,
    grad_stride0,
    grad_stride1,
    grad_stride2,
    kept_stride0,
    kept_stride1,
    kept_stride2,
    weight_stride,
    KIND: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    tile_m, tile_n = grouped_tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    row = tl.minimum(m, M - 1)
    grad_at = (
        grad + row_offset(row, size1, size2, grad_stride0, grad_stride1, grad_stride2)[:, None] + k[None, :]
    )
    weight_at = weight + k.to(tl.int64)[:, None] * weight_stride + n[None, :]
    n_mask = (n < N)[None, :]

    step = tl.full((), BLOCK_K, tl.int64) * weight_stride
    product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            grad_tile = tl.load(grad_at)
            weight_tile = tl.load(weight_at, n_mask, other=0.0)
        else:
            grad_tile = tl.load(grad_at, k[None, :] < K - start, other=0.0)
            weight_tile = tl.load(weight_at, (k[:, None] < K - start) & n_mask, other=0.0)
        # (BLOCK_M, BLOCK_K) (BLOCK_K, BLOCK_N)
        product = add_product(product, grad_tile, weight_tile)
        grad_at += BLOCK_K
        weight_at += step

    half: tl.constexpr = BLOCK_N // 2
    left, right = split_columns(product, BLOCK_M, half)
    n = tile_n * BLOCK_N + tl.arange(0, half)
    kept_rows = kept + row_offset(row, size1, size2, kept_stride0, kept_stride1, kept_stride2)
    store_gradient(left, kept_rows, grad_u, m, n, M, N, KIND)
    store_gradient(right, kept_rows, grad_u, m, n + half, M, N, KIND)


@triton.jit
def begin_apart(DELAY: tl.constexpr):
    """Delays the second half of the programs: the GPU places one on every SM before it places a second."""
    if DELAY > 0:
        if 2 * tl.program_id(0) >= tl.num_programs(0):
            start = globaltimer()
            while globaltimer() < start + DELAY:
                pass


@triton.jit
def store_activation_tile(product, a, u, codes, m, n, N, KIND: tl.constexpr, FIRST: tl.constexpr):
    """`store_activation` by descriptors, of a part of a tile, bias included, from row m and column n on.

    Stores pass through one buffer in shared memory, which must have been read before the next store may fill
    it. So the activation is computed between two stores: in the tile's FIRST part after the store of u, in
    the others before it.
    """
    if FIRST and u is not None:
        u.store([m, n], rounded(product, u.dtype))
    value, slope = product, product
    # True except past the last column. Without the branch, ptxas computes all parts before it stores the
    # first, and holds them in registers.
    if n < N:
        value, slope = activation(product, KIND, EXACT=False)
    if not FIRST and u is not None:
        u.store([m, n], rounded(product, u.dtype))
    if codes is not None:
        codes.store([m, n], encode_derivative(slope))
    a.store([m, n], value.to(a.dtype))


@triton.jit
def store_activation_half(
    product, a, u, codes, m, n, N,
    KIND: tl.constexpr, BLOCK_M: tl.constexpr, HALF: tl.constexpr, COLUMNS: tl.constexpr,
    FIRST: tl.constexpr,
):  # fmt: skip
    """`store_activation_tile` of HALF columns, COLUMNS at a time: all of them, or half."""
    if COLUMNS == HALF:
        store_activation_tile(product, a, u, codes, m, n, N, KIND, FIRST)
    else:
        left, right = split_columns(product, BLOCK_M, COLUMNS)
        store_activation_tile(left, a, u, codes, m, n, N, KIND, FIRST)
        store_activation_tile(right, a, u, codes, m, n + COLUMNS, N, KIND, FIRST=False)


@triton.jit
def times_slope(product, saved, KIND: tl.constexpr):
    """The product times the derivative. saved: uint8 codes of the derivative, or the pre-activation."""
    if saved.dtype == tl.uint8:
        slope = decode_derivative(saved)
    else:
        _, slope = activation(saved.to(tl.float32), KIND, EXACT=False)
    return product * slope


# One build serves every M and K: with descriptors, alignment does not depend on them.
@triton.jit(do_not_specialize=["M", "K"])
def linear_activate_tma_kernel(
    x,  # (M, K)
    weight,  # (N, K)
    bias,  # (N,), a pointer, or None
    a,  # (M, N)
    u,  # (M, N) or None: the pre-activation is not kept
    codes,  # (M, N) or None: the derivative is not kept
    M,
    N,
    K,
    KIND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    DELAY: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    begin_apart(DELAY)
    num_m, num_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    half: tl.constexpr = BLOCK_N // 2
    for tile in range(tl.program_id(0), num_m * num_n, tl.num_programs(0)):
        tile_m, tile_n = grouped_tile(tile, num_m, num_n, GROUP)
        m, n = tile_m * BLOCK_M, tile_n * BLOCK_N
        product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if bias is not None:
            # Sums start from the bias: it loads with the first operands, and no epilogue waits for it.
            columns = n + tl.arange(0, BLOCK_N)
            product += tl.load(bias + columns, columns < N, other=0.0).to(tl.float32)[None, :]
        for k in range(0, K, BLOCK_K):
            product = tl.dot(x.load([m, k]), weight.load([n, k]).T, product)
        left, right = split_columns(product, BLOCK_M, half)
        store_activation_half(left, a, u, codes, m, n, N, KIND, BLOCK_M, half, COLUMNS, FIRST=True)
        store_activation_half(right, a, u, codes, m, n + half, N, KIND, BLOCK_M, half, COLUMNS, FIRST=False)


@triton.jit(do_not_specialize=["M", "N", "K"])
def linear_activate_backward_tma_kernel(
    grad,  # (M, K)
    weight,  # (K, N)
    kept,  # (M, N): the pre-activation, or uint8 codes of the derivative
    grad_u,  # (M, N)
    M,
    N,
    K,
    KIND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    DELAY: tl.constexpr,
):
    begin_apart(DELAY)
    # Launchers use no descriptors with K = 0. Checks of it take registers, of which float16 has none left.
    if grad_u.dtype == tl.float16:
        tl.assume(K > 0)
    num_m, num_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    half: tl.constexpr = BLOCK_N // 2
    for tile in range(tl.program_id(0), num_m * num_n, tl.num_programs(0)):
        tile_m, tile_n = grouped_tile(tile, num_m, num_n, GROUP)
        m, n = tile_m * BLOCK_M, tile_n * BLOCK_N
        product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, K, BLOCK_K):
            product = tl.dot(grad.load([m, k]), weight.load([k, n]), product)
        left, right = split_columns(product, BLOCK_M, half)
        saved_left, saved_right = split_columns(kept.load([m, n]), BLOCK_M, half)
        grad_u.store([m, n], times_slope(left, saved_left, KIND).to(grad_u.dtype))
        if n + half < N:
            right = times_slope(right, saved_right, KIND)
        grad_u.store([m, n + half], right.to(grad_u.dtype))
