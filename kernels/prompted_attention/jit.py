"""Prompted attention on the GPU. Symbols as in `reference`: S = Q Kᵀ, P = softmax(S), O = P V.

Keys are one sequence of m + N rows stored in two tensors: row j is in the prompts' tensor if j < m, else in
the image's. Each row of a tile of keys gets its pointer from the tensor that holds it, so nothing is
concatenated, tiles may span the seam, and one loop covers all keys. Prompts that all images share have batch
stride 0 and stay in L2.

With WINDOWS a sequence is one window of T tokens of an image, see `window_reference`. Its rows are its own
tokens, then the prompts whose output is read, if any. Its keys are its own tokens, then the prompts, so that
tiles of the bias start where its rows do, at multiples of 16 bytes. Without WINDOWS an image is one sequence.

Backward reads two numbers per row, its terms (.., 2, rows) in float32: lse · log2 e, as exp2 needs it, and δ.
They are one tensor because a tile of 64 rows of it has as many elements as four warps have threads: Triton
3.6 does not split the loads of a smaller tile, and each thread loads all that it needs itself.

Loops mask scores in the last tile of keys alone, by a branch that all threads take together: at head dim 64
the mask would be a sixth of a tile's instructions.

CLS beside n x n patches leaves few rows after whole tiles of 64: 5 of 197, and 1 of 257. The kernel for dK
and dV takes those first, in a tile of TAIL rows, so that all tiles of its loop are full and need no mask.
TAIL is 0 if no rows are left, or too many, or if two tiles would need too many registers.

The index of an image is int64, since its offset may exceed 2³¹ elements; offsets within an image are int32,
which launchers check.
"""

import triton
import triton.language as tl
from vpt_fast.kernels.prompted_attention.window_reference import MASKED
from vpt_fast.kernels.tile import (
    accumulate,
    dot_rows,
    load_rows,
    second_width,
    store_rows,
    sum_rows,
    zero_rows,
)

# exp(x) = 2^(x · log2 e); the hardware has an instruction for exp2.
LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)

# One build serves all sizes: specialising on multiples of 16 makes no better code.
SIZES = ["num_heads", "num_rows", "num_prompts", "num_keys", "num_windows", "num_fresh"]

APART: tl.constexpr = tl.constexpr(float(MASKED))


@triton.jit
def row_pointers(first, rows, stride):
    """Pointers to the rows of one head, which start at multiples of 16 bytes: launchers check it.

    The compiler is told only of strides that are multiples of 16 elements, and heads of 72 are 72 elements
    apart. Without the hint it would load element by element, outside the software pipeline.
    """
    return tl.multiple_of(first + rows * stride, 16)


@triton.jit
def load_keys(
    joined, keys, keys_exist, num_prompts, num_keys,
    D: tl.constexpr, PROMPTS: tl.constexpr, IMAGE: tl.constexpr, WINDOWS: tl.constexpr,
):  # fmt: skip
    """Loads the rows `keys` of a joined sequence of keys, or of values: see `enter_sequence`. PROMPTS, IMAGE:
    which of the two tensors exist.

    If both do, a row's tensor, number and stride are selected, and then its address is computed: to compute
    one in each tensor and select the address would take 5 to 14 % more instructions in the loops over keys
    (sm_90). Selecting hides that rows start at multiples of 16 bytes, as in `row_pointers`.
    """
    image, stride_image, prompt, stride_prompt = joined
    if PROMPTS and IMAGE:
        if WINDOWS:
            window_size = num_keys - num_prompts
            in_prompts = keys >= window_size
            rows = tl.where(in_prompts, keys - window_size, keys)
        else:
            in_prompts = keys < num_prompts
            rows = tl.where(in_prompts, keys, keys - num_prompts)
        first = tl.multiple_of(tl.where(in_prompts, prompt, image), 16)
        in_16_bytes: tl.constexpr = 128 // first.dtype.element_ty.primitive_bitwidth
        offsets = tl.multiple_of(rows * tl.where(in_prompts, stride_prompt, stride_image), in_16_bytes)
        return load_rows(first, keys_exist, D, offsets[:, None])
    elif PROMPTS:
        return load_rows(row_pointers(prompt, keys, stride_prompt), keys_exist, D)
    else:
        return load_rows(row_pointers(image, keys, stride_image), keys_exist, D)


@triton.jit
def find_program(num_heads, WINDOWS: tl.constexpr):
    """This program's tile of a sequence and head, the head, and the sequence's image (int64) and window.

    The grid is (tiles, heads or windows times heads, images): with a single axis, all loads waited for the
    divisions that find these.
    """
    tile, image = tl.program_id(0), tl.program_id(2).to(tl.int64)
    if WINDOWS:
        return tile, tl.program_id(1) % num_heads, image, tl.program_id(1) // num_heads
    else:
        return tile, tl.program_id(1), image, 0


@triton.jit
def count_rows(num_rows, num_windows, num_fresh, WINDOWS: tl.constexpr):
    """Rows of an image in Q and O, and in lse and the terms, if a sequence has `num_rows`."""
    if WINDOWS:
        return num_windows * (num_rows - num_fresh) + num_fresh, num_windows * num_rows
    else:
        return num_rows, num_rows


@triton.jit
def find_rows(rows, window, num_rows, num_windows, num_fresh, WINDOWS: tl.constexpr):
    """Positions of a sequence's rows in Q and O, and in lse and the terms.

    All have the tokens first, window by window. Then Q and O have the prompts once, the others per window.
    """
    if WINDOWS:
        num_tokens = num_rows - num_fresh
        first = (num_windows - 1) * num_tokens
        place = rows + tl.where(rows < num_tokens, window * num_tokens, first)
        statistic = rows + tl.where(rows < num_tokens, window * num_tokens, first + window * num_fresh)
        return place, statistic
    else:
        return rows, rows


@triton.jit
def store_terms(
    terms, rows_of_lse, lse, delta, rows, rows_exist, statistics, num_tokens, num_windows,
    WINDOWS: tl.constexpr,
):  # fmt: skip
    """Stores the terms of rows at positions `statistics` in the head's `rows_of_lse`; returns the first
    ones."""
    if WINDOWS:
        # A prompt's output is the mean over the windows, so each window gets 1/W of its gradient:
        # exp(S - lse - log W) is P / W.
        lse += tl.where(rows < num_tokens, 0.0, tl.log(num_windows.to(tl.float32)))
    first = lse * LOG2_E
    tl.store(terms + statistics, first, mask=rows_exist)
    tl.store(terms + rows_of_lse + statistics, delta, mask=rows_exist)
    return first


@triton.jit
def enter_sequence(k, v, prompt_k, prompt_v, bias, image, window, head, window_size, WINDOWS: tl.constexpr):
    """The head's keys and values in a sequence, each joined from two tensors: (first row of the image's, its
    stride, first row of the prompts', its stride). And for a window (bias of the head, stride of its rows,
    regions of the window).

    k, v, prompt_k, prompt_v: (tensor, strides of images, rows and heads). bias: (tensor, stride, regions).
    """
    k, stride_kb, stride_kn, stride_kh = k
    v, stride_vb, stride_vn, stride_vh = v
    prompt_k, stride_pkb, stride_pkm, stride_pkh = prompt_k
    prompt_v, stride_pvb, stride_pvm, stride_pvh = prompt_v
    bias, stride_bias, regions = bias
    k += image * stride_kb + head * stride_kh
    v += image * stride_vb + head * stride_vh
    prompt_k += image * stride_pkb + head * stride_pkh
    prompt_v += image * stride_pvb + head * stride_pvh
    if WINDOWS:
        first = window * window_size
        k += first * stride_kn
        v += first * stride_vn
        bias += head * window_size * stride_bias
        regions += first
    return (
        (k, stride_kn, prompt_k, stride_pkm),
        (v, stride_vn, prompt_v, stride_pvm),
        (bias, stride_bias, regions),
    )


@triton.jit
def add_bias(scores, bias, queries, keys, num_tokens, window_size, SHIFTED: tl.constexpr):
    """S plus what a window adds between its tokens. bias: as `enter_sequence` returns it. queries, keys:
    index tensors that broadcast to S; indices past the last token, of `num_tokens` among the queries, are
    those of prompts, or of nothing. Columns of the bias past the last token are zero, so the mask admits
    whole vectors of them.

    The sum is an fma by 1, which Triton leaves alone. It would turn S + bias into a matmul whose accumulator
    starts from the bias: those registers would be written while the matmul of the tile before is still in
    flight, and ptxas would serialize every wgmma.
    """
    bias, stride_bias, regions = bias
    between = tl.load(
        bias + queries * stride_bias + keys, mask=(queries < num_tokens) & (keys < stride_bias), other=0.0
    )
    are_tokens = (queries < num_tokens) & (keys < window_size)
    if SHIFTED:
        query_regions = tl.load(regions + queries, mask=queries < num_tokens, other=0)
        key_regions = tl.load(regions + keys, mask=keys < window_size, other=0)
        between += tl.where(are_tokens & (query_regions != key_regions), APART, 0.0)
    else:  # of zeros; without this too, ptxas would serialize every wgmma at head dim 32
        between = tl.where(are_tokens, between, 0.0)
    return tl.fma(scores, 1.0, between)


@triton.jit
def score_rows(
    q1, q2, k1, k2, bias, rows, keys, keys_exist, passes_end, num_tokens, window_size,
    D: tl.constexpr, WINDOWS: tl.constexpr, SHIFTED: tl.constexpr,
):  # fmt: skip
    """S of query rows and keys; -inf where there is no key, if the tile `passes_end` of the keys."""
    scores = dot_rows(q1, q2, k1, k2, D)
    if WINDOWS:
        scores = add_bias(scores, bias, rows[:, None], keys[None, :], num_tokens, window_size, SHIFTED)
    if passes_end:
        scores = tl.where(keys_exist[None, :], scores, float("-inf"))
    return scores


@triton.jit
def store_fresh_rows(fresh, first, second, rows, rows_exist, num_tokens, num_heads, head, D: tl.constexpr):
    """Stores the prompts' rows of one window, (f, H, D); the launcher sums or averages over the windows."""
    place = (rows - num_tokens) * num_heads + head
    store_rows(fresh + place * D, first, second, rows_exist & (rows >= num_tokens), D)


@triton.jit(do_not_specialize=SIZES)
def attention_forward_kernel(
    q, k, v, prompt_k, prompt_v, bias, regions, out, lse, fresh_out,
    stride_qb, stride_qr, stride_qh,
    stride_kb, stride_kn, stride_kh,
    stride_vb, stride_vn, stride_vh,
    stride_pkb, stride_pkm, stride_pkh,
    stride_pvb, stride_pvm, stride_pvh, stride_bias,
    num_heads, num_rows, num_prompts, num_keys, num_windows, num_fresh,
    D: tl.constexpr, PROMPTS: tl.constexpr, WINDOWS: tl.constexpr, SHIFTED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """O and lse of BLOCK_M query rows of one sequence and head."""
    tile, head, image, window = find_program(num_heads, WINDOWS)
    num_tokens, window_size = num_rows - num_fresh, num_keys - num_prompts  # of a window
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    rows_exist = rows < num_rows
    places, statistics = find_rows(rows, window, num_rows, num_windows, num_fresh, WINDOWS)

    q_rows = row_pointers(q + image * stride_qb + head * stride_qh, places, stride_qr)
    q1, q2 = load_rows(q_rows, rows_exist, D)
    all_keys, all_values, bias = enter_sequence(
        (k, stride_kb, stride_kn, stride_kh), (v, stride_vb, stride_vn, stride_vh),
        (prompt_k, stride_pkb, stride_pkm, stride_pkh), (prompt_v, stride_pvb, stride_pvm, stride_pvh),
        (bias, stride_bias, regions), image, window, head, window_size, WINDOWS,
    )  # fmt: skip

    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    out1, out2 = zero_rows(BLOCK_M, D)
    for start in range(0, num_keys, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        keys_exist = keys < num_keys
        k1, k2 = load_keys(all_keys, keys, keys_exist, num_prompts, num_keys, D, PROMPTS, True, WINDOWS)
        scores = score_rows(
            q1, q2, k1, k2, bias, rows, keys, keys_exist, start + BLOCK_N > num_keys, num_tokens, window_size,
            D, WINDOWS, SHIFTED,
        )  # fmt: skip

        new_max = tl.maximum(row_max, tl.max(scores, 1) * LOG2_E)  # finite: the first tile has a key
        weights = tl.exp2(scores * LOG2_E - new_max[:, None])
        correction = tl.exp2(row_max - new_max)
        row_max = new_max
        row_sum = row_sum * correction + tl.sum(weights, 1)

        v1, v2 = load_keys(all_values, keys, keys_exist, num_prompts, num_keys, D, PROMPTS, True, WINDOWS)
        out1 = out1 * correction[:, None]
        if second_width(D) > 0:
            out2 = out2 * correction[:, None]
        out1, out2 = accumulate(out1, out2, weights, v1, v2, D)

    rows_of_out, rows_of_lse = count_rows(num_rows, num_windows, num_fresh, WINDOWS)
    out1, out2 = out1 / row_sum[:, None], out2 / row_sum[:, None]
    in_out = rows_exist
    if WINDOWS:
        fresh_out += (image * num_windows + window) * num_fresh * num_heads * D
        store_fresh_rows(fresh_out, out1, out2, rows, rows_exist, num_tokens, num_heads, head, D)
        in_out = rows < num_tokens
    out_rows = out + ((image * rows_of_out + places) * num_heads + head) * D
    store_rows(out_rows, out1, out2, in_out, D)
    lse_rows = lse + (image * num_heads + head) * rows_of_lse + statistics
    tl.store(lse_rows, row_max * LN_2 + tl.log(row_sum), mask=rows_exist)


@triton.jit(do_not_specialize=SIZES)
def terms_kernel(
    grad_out, q, k, v, prompt_k, prompt_v, bias, regions, out, lse, terms,
    stride_gb, stride_gr, stride_gh,
    stride_qb, stride_qr, stride_qh,
    stride_kb, stride_kn, stride_kh,
    stride_vb, stride_vn, stride_vh,
    stride_pkb, stride_pkm, stride_pkh,
    stride_pvb, stride_pvm, stride_pvh, stride_bias,
    stride_ob, stride_or, stride_oh,
    stride_lb, stride_lh,
    num_heads, num_rows, num_prompts, num_keys, num_windows, num_fresh,
    D: tl.constexpr, PROMPTS: tl.constexpr, WINDOWS: tl.constexpr, SHIFTED: tl.constexpr,
    HAS_OUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Terms of BLOCK_M query rows. δ = rowsum(dO ∘ O), or without O rowsum(P ∘ dO Vᵀ) / rowsum(P): see
    `reference.delta_of_scores`."""
    tile, head, image, window = find_program(num_heads, WINDOWS)
    num_tokens, window_size = num_rows - num_fresh, num_keys - num_prompts  # of a window
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    rows_exist = rows < num_rows
    places, statistics = find_rows(rows, window, num_rows, num_windows, num_fresh, WINDOWS)

    grad_rows = row_pointers(grad_out + image * stride_gb + head * stride_gh, places, stride_gr)
    g1, g2 = load_rows(grad_rows, rows_exist, D)
    lse_rows = lse + image * stride_lb + head * stride_lh + statistics
    row_lse = tl.load(lse_rows, mask=rows_exist, other=0.0)
    if HAS_OUT:
        out_rows = row_pointers(out + image * stride_ob + head * stride_oh, places, stride_or)
        o1, o2 = load_rows(out_rows, rows_exist, D)
        delta = sum_rows(g1, g2, o1, o2, D)
    else:
        q_rows = row_pointers(q + image * stride_qb + head * stride_qh, places, stride_qr)
        q1, q2 = load_rows(q_rows, rows_exist, D)
        all_keys, all_values, bias = enter_sequence(
            (k, stride_kb, stride_kn, stride_kh), (v, stride_vb, stride_vn, stride_vh),
            (prompt_k, stride_pkb, stride_pkm, stride_pkh), (prompt_v, stride_pvb, stride_pvm, stride_pvh),
            (bias, stride_bias, regions), image, window, head, window_size, WINDOWS,
        )  # fmt: skip
        delta = tl.zeros((BLOCK_M,), tl.float32)
        row_sum = tl.zeros((BLOCK_M,), tl.float32)
        for start in range(0, num_keys, BLOCK_N):
            keys = start + tl.arange(0, BLOCK_N)
            keys_exist = keys < num_keys
            k1, k2 = load_keys(all_keys, keys, keys_exist, num_prompts, num_keys, D, PROMPTS, True, WINDOWS)
            v1, v2 = load_keys(all_values, keys, keys_exist, num_prompts, num_keys, D, PROMPTS, True, WINDOWS)
            scores = score_rows(
                q1, q2, k1, k2, bias, rows, keys, keys_exist, start + BLOCK_N > num_keys, num_tokens,
                window_size, D, WINDOWS, SHIFTED,
            )  # fmt: skip
            weights = tl.exp2(scores * LOG2_E - (row_lse * LOG2_E)[:, None])
            row_sum += tl.sum(weights, 1)
            delta += tl.sum(weights * dot_rows(g1, g2, v1, v2, D), 1)
        delta /= row_sum
    _, rows_of_lse = count_rows(num_rows, num_windows, num_fresh, WINDOWS)
    terms += (image * num_heads + head) * rows_of_lse * 2
    store_terms(
        terms, rows_of_lse, row_lse, delta, rows, rows_exist, statistics, num_tokens, num_windows, WINDOWS
    )


@triton.jit(do_not_specialize=SIZES)
def grad_q_kernel(
    grad_out, q, k, v, prompt_k, prompt_v, bias, regions, out, lse, terms, grad_q, grad_fresh,
    stride_gb, stride_gr, stride_gh,
    stride_qb, stride_qr, stride_qh,
    stride_kb, stride_kn, stride_kh,
    stride_vb, stride_vn, stride_vh,
    stride_pkb, stride_pkm, stride_pkh,
    stride_pvb, stride_pvm, stride_pvh, stride_bias,
    stride_ob, stride_or, stride_oh,
    stride_lb, stride_lh,
    stride_dqb, stride_dqr, stride_dqh,
    num_heads, num_rows, num_prompts, num_keys, num_windows, num_fresh,
    D: tl.constexpr, PROMPTS: tl.constexpr, WINDOWS: tl.constexpr, SHIFTED: tl.constexpr,
    HAS_OUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dQ = dS K of BLOCK_M query rows of one sequence and head; with O also their terms."""
    tile, head, image, window = find_program(num_heads, WINDOWS)
    num_tokens, window_size = num_rows - num_fresh, num_keys - num_prompts  # of a window
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    rows_exist = rows < num_rows
    places, statistics = find_rows(rows, window, num_rows, num_windows, num_fresh, WINDOWS)

    q_rows = row_pointers(q + image * stride_qb + head * stride_qh, places, stride_qr)
    q1, q2 = load_rows(q_rows, rows_exist, D)
    grad_rows = row_pointers(grad_out + image * stride_gb + head * stride_gh, places, stride_gr)
    g1, g2 = load_rows(grad_rows, rows_exist, D)
    _, rows_of_lse = count_rows(num_rows, num_windows, num_fresh, WINDOWS)
    terms += (image * num_heads + head) * rows_of_lse * 2
    if HAS_OUT:
        lse_rows = lse + image * stride_lb + head * stride_lh + statistics
        row_lse = tl.load(lse_rows, mask=rows_exist, other=0.0)
        out_rows = row_pointers(out + image * stride_ob + head * stride_oh, places, stride_or)
        o1, o2 = load_rows(out_rows, rows_exist, D)
        delta = sum_rows(g1, g2, o1, o2, D)
        lse2 = store_terms(
            terms, rows_of_lse, row_lse, delta, rows, rows_exist, statistics, num_tokens, num_windows, WINDOWS
        )
    else:
        lse2 = tl.load(terms + statistics, mask=rows_exist, other=0.0)
        delta = tl.load(terms + rows_of_lse + statistics, mask=rows_exist, other=0.0)

    all_keys, all_values, bias = enter_sequence(
        (k, stride_kb, stride_kn, stride_kh), (v, stride_vb, stride_vn, stride_vh),
        (prompt_k, stride_pkb, stride_pkm, stride_pkh), (prompt_v, stride_pvb, stride_pvm, stride_pvh),
        (bias, stride_bias, regions), image, window, head, window_size, WINDOWS,
    )  # fmt: skip
    dq1, dq2 = zero_rows(BLOCK_M, D)
    for start in range(0, num_keys, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        keys_exist = keys < num_keys
        k1, k2 = load_keys(all_keys, keys, keys_exist, num_prompts, num_keys, D, PROMPTS, True, WINDOWS)
        v1, v2 = load_keys(all_values, keys, keys_exist, num_prompts, num_keys, D, PROMPTS, True, WINDOWS)
        scores = score_rows(
            q1, q2, k1, k2, bias, rows, keys, keys_exist, start + BLOCK_N > num_keys, num_tokens, window_size,
            D, WINDOWS, SHIFTED,
        )  # fmt: skip
        weights = tl.exp2(scores * LOG2_E - lse2[:, None])
        grad_scores = weights * (dot_rows(g1, g2, v1, v2, D) - delta[:, None])
        dq1, dq2 = accumulate(dq1, dq2, grad_scores, k1, k2, D)
    if WINDOWS:
        grad_fresh += (image * num_windows + window) * num_fresh * num_heads * D
        store_fresh_rows(grad_fresh, dq1, dq2, rows, rows_exist, num_tokens, num_heads, head, D)
        rows_exist = rows < num_tokens
    grad_rows = row_pointers(grad_q + image * stride_dqb + head * stride_dqh, places, stride_dqr)
    store_rows(grad_rows, dq1, dq2, rows_exist, D)


@triton.jit
def add_rows_to_keys(
    dk1, dk2, dv1, dv2, k1, k2, v1, v2, q, grad_out, stride_qr, stride_gr, planes, bias,
    rows, rows_exist, keys, window, num_rows, num_windows, num_fresh, num_tokens, window_size,
    D: tl.constexpr, WINDOWS: tl.constexpr, SHIFTED: tl.constexpr,
):  # fmt: skip
    """Adds a tile of query rows to dK and dV of a tile of keys. planes: pointers (2, 1) to the terms;
    rows_exist: None if all do."""
    places, statistics = find_rows(rows, window, num_rows, num_windows, num_fresh, WINDOWS)
    q1, q2 = load_rows(row_pointers(q, places, stride_qr), rows_exist, D)
    g1, g2 = load_rows(row_pointers(grad_out, places, stride_gr), rows_exist, D)
    if rows_exist is None:
        row_terms = tl.load(planes + statistics[None, :])
    else:
        row_terms = tl.load(planes + statistics[None, :], mask=rows_exist[None, :], other=0.0)
    lse2, delta = tl.split(tl.trans(row_terms))

    scores = dot_rows(k1, k2, q1, q2, D)  # Sᵀ (keys, rows)
    if WINDOWS:
        scores = add_bias(scores, bias, rows[None, :], keys[:, None], num_tokens, window_size, SHIFTED)
    # Rows that do not exist have dO = 0 and δ = 0 and add nothing; keys that do not are not stored.
    weights = tl.exp2(scores * LOG2_E - lse2[None, :])  # Pᵀ
    grad_scores = weights * (dot_rows(v1, v2, g1, g2, D) - delta[None, :])  # dSᵀ
    dk1, dk2 = accumulate(dk1, dk2, grad_scores, q1, q2, D)
    dv1, dv2 = accumulate(dv1, dv2, weights, g1, g2, D)
    return dk1, dk2, dv1, dv2


@triton.jit(do_not_specialize=SIZES)
def grad_kv_kernel(
    grad_out, q, k, v, prompt_k, prompt_v, bias, regions, terms, grad_k, grad_v, grad_prompt_kv,
    stride_gb, stride_gr, stride_gh,
    stride_qb, stride_qr, stride_qh,
    stride_kb, stride_kn, stride_kh,
    stride_vb, stride_vn, stride_vh,
    stride_pkb, stride_pkm, stride_pkh,
    stride_pvb, stride_pvm, stride_pvh, stride_bias,
    stride_dkb, stride_dkn, stride_dkh,
    num_heads, num_rows, num_prompts, num_keys, num_windows, num_fresh,
    D: tl.constexpr, PROMPTS: tl.constexpr, WINDOWS: tl.constexpr, SHIFTED: tl.constexpr,
    IMAGE: tl.constexpr, TAIL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dK = dSᵀ Q and dV = Pᵀ dO of BLOCK_N keys of one sequence and head.

    Everything is transposed, keys by rows, so that Pᵀ and dSᵀ feed their matmuls straight from registers. The
    prompts' gradients are per image, (B, m, 2, H, D); if images share the prompts, the launcher sums them, in
    a fixed order. Without IMAGE the keys are the prompts alone.
    """
    tile, head, image, window = find_program(num_heads, WINDOWS)
    num_tokens, window_size = num_rows - num_fresh, num_keys - num_prompts  # of a window
    keys = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    keys_exist = keys < num_keys

    all_keys, all_values, bias = enter_sequence(
        (k, stride_kb, stride_kn, stride_kh), (v, stride_vb, stride_vn, stride_vh),
        (prompt_k, stride_pkb, stride_pkm, stride_pkh), (prompt_v, stride_pvb, stride_pvm, stride_pvh),
        (bias, stride_bias, regions), image, window, head, window_size, WINDOWS,
    )  # fmt: skip
    k1, k2 = load_keys(all_keys, keys, keys_exist, num_prompts, num_keys, D, PROMPTS, IMAGE, WINDOWS)
    v1, v2 = load_keys(all_values, keys, keys_exist, num_prompts, num_keys, D, PROMPTS, IMAGE, WINDOWS)

    grad_out += image * stride_gb + head * stride_gh
    q += image * stride_qb + head * stride_qh
    _, rows_of_lse = count_rows(num_rows, num_windows, num_fresh, WINDOWS)
    terms += (image * num_heads + head) * rows_of_lse * 2
    planes = terms + tl.arange(0, 2)[:, None] * rows_of_lse
    dk1, dk2 = zero_rows(BLOCK_N, D)
    dv1, dv2 = zero_rows(BLOCK_N, D)
    rows_in_tiles = num_rows
    if TAIL > 0:
        rows_in_tiles -= num_rows % BLOCK_M
        rest = rows_in_tiles + tl.arange(0, TAIL)
        dk1, dk2, dv1, dv2 = add_rows_to_keys(
            dk1, dk2, dv1, dv2, k1, k2, v1, v2, q, grad_out, stride_qr, stride_gr, planes, bias,
            rest, rest < num_rows, keys, window, num_rows, num_windows, num_fresh, num_tokens, window_size,
            D, WINDOWS, SHIFTED,
        )  # fmt: skip
    for row in range(0, rows_in_tiles, BLOCK_M):
        rows = row + tl.arange(0, BLOCK_M)
        rows_exist = None if TAIL > 0 else rows < num_rows
        dk1, dk2, dv1, dv2 = add_rows_to_keys(
            dk1, dk2, dv1, dv2, k1, k2, v1, v2, q, grad_out, stride_qr, stride_gr, planes, bias,
            rows, rows_exist, keys, window, num_rows, num_windows, num_fresh, num_tokens, window_size,
            D, WINDOWS, SHIFTED,
        )  # fmt: skip

    if PROMPTS:
        from_prompts = keys_exist & (keys < num_prompts)
        rows = grad_prompt_kv + ((image * num_prompts + keys) * 2 * num_heads + head) * D
        store_rows(rows, dk1, dk2, from_prompts, D)
        store_rows(rows + num_heads * D, dv1, dv2, from_prompts, D)
    if IMAGE:
        if WINDOWS:
            grad_k += window * window_size * stride_dkn
            grad_v += window * window_size * stride_dkn
        from_image = keys_exist & (keys >= num_prompts)
        first, places = image * stride_dkb + head * stride_dkh, keys - num_prompts
        store_rows(row_pointers(grad_k + first, places, stride_dkn), dk1, dk2, from_image, D)
        store_rows(row_pointers(grad_v + first, places, stride_dkn), dv1, dv2, from_image, D)
