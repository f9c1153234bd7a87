"""Prompted attention on the GPU. Symbols as in `reference`: S = Q Kᵀ, P = softmax(S), O = P V.

Keys are one sequence of m + N rows with two homes: row j lies in the prompts' tensor while j < m and in the
image's after that. A tile of keys takes each row's pointer from the home that it has, so that nothing is
concatenated, no tile ends at the seam, and one loop goes over all keys. Prompts that are the same for every
image have batch stride 0 and stay in L2.

The index of an image is int64, since its offset may pass 2³¹ elements; offsets within one are int32, which
launchers check.
"""

import triton
import triton.language as tl
from vpt_fast.kernels.tile import accumulate, dot_rows, load_rows, store_rows, sum_rows

# exp(x) = 2^(x · log2 e), and exp2 is the instruction.
LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)

# One build serves all sizes: whether 197 is a multiple of 16 makes no better code.
SIZES = ["num_heads", "num_rows", "num_prompts", "num_keys"]


@triton.jit
def key_rows(
    prompt, image, stride_prompt, stride_image, keys, num_prompts, PROMPTS: tl.constexpr, IMAGE: tl.constexpr
):
    """Pointers to the rows `keys` of the joined sequence. PROMPTS, IMAGE: which homes there are.

    Choosing among pointers hides from the compiler that they are multiples of 16 bytes; unless told, it would
    load element by element, and not through the pipeline.
    """
    if PROMPTS and IMAGE:
        rows = tl.where(
            keys < num_prompts, prompt + keys * stride_prompt, image + (keys - num_prompts) * stride_image
        )
        return tl.multiple_of(rows, 16)
    elif PROMPTS:
        return prompt + keys * stride_prompt
    else:
        return image + keys * stride_image


@triton.jit(do_not_specialize=SIZES)
def attention_forward_kernel(
    q, k, v, prompt_k, prompt_v, out, lse,
    stride_qb, stride_qr, stride_qh,
    stride_kb, stride_kn, stride_kh,
    stride_vb, stride_vn, stride_vh,
    stride_pkb, stride_pkm, stride_pkh,
    stride_pvb, stride_pvm, stride_pvh,
    num_heads, num_rows, num_prompts, num_keys,
    D1: tl.constexpr, D2: tl.constexpr, PROMPTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """O and lse of BLOCK_M query rows of one image and head."""
    tiles = tl.cdiv(num_rows, BLOCK_M)
    tile = tl.program_id(0) % tiles
    head = (tl.program_id(0) // tiles) % num_heads
    image = (tl.program_id(0) // tiles // num_heads).to(tl.int64)
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    rows_exist = rows < num_rows

    q1, q2 = load_rows(q + image * stride_qb + head * stride_qh + rows * stride_qr, rows_exist, D1, D2)
    k += image * stride_kb + head * stride_kh
    v += image * stride_vb + head * stride_vh
    prompt_k += image * stride_pkb + head * stride_pkh
    prompt_v += image * stride_pvb + head * stride_pvh

    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    out1 = tl.zeros((BLOCK_M, D1), tl.float32)
    out2 = tl.zeros((BLOCK_M, D2 if D2 > 0 else D1), tl.float32)
    for start in range(0, num_keys, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        keys_exist = keys < num_keys
        k_rows = key_rows(prompt_k, k, stride_pkm, stride_kn, keys, num_prompts, PROMPTS, True)
        v_rows = key_rows(prompt_v, v, stride_pvm, stride_vn, keys, num_prompts, PROMPTS, True)
        k1, k2 = load_rows(k_rows, keys_exist, D1, D2)
        scores = dot_rows(q1, q2, k1, k2, D2)  # (BLOCK_M, BLOCK_N)
        scores = tl.where(keys_exist[None, :], scores, float("-inf"))

        new_max = tl.maximum(row_max, tl.max(scores, 1))  # finite: the first tile has a key
        weights = tl.exp2(scores * LOG2_E - (new_max * LOG2_E)[:, None])
        correction = tl.exp2((row_max - new_max) * LOG2_E)
        row_max = new_max
        row_sum = row_sum * correction + tl.sum(weights, 1)

        v1, v2 = load_rows(v_rows, keys_exist, D1, D2)
        out1 = out1 * correction[:, None]
        if D2 > 0:
            out2 = out2 * correction[:, None]
        out1, out2 = accumulate(out1, out2, weights, v1, v2, D2)

    D: tl.constexpr = D1 + D2
    out_rows = out + ((image * num_rows + rows) * num_heads + head) * D
    store_rows(out_rows, out1 / row_sum[:, None], out2 / row_sum[:, None], rows_exist, D1, D2)
    lse_rows = lse + (image * num_heads + head) * num_rows + rows
    tl.store(lse_rows, row_max + tl.log(row_sum), mask=rows_exist)


@triton.jit(do_not_specialize=SIZES)
def delta_kernel(
    grad_out, q, k, v, prompt_k, prompt_v, out, lse, delta,
    stride_gb, stride_gr, stride_gh,
    stride_qb, stride_qr, stride_qh,
    stride_kb, stride_kn, stride_kh,
    stride_vb, stride_vn, stride_vh,
    stride_pkb, stride_pkm, stride_pkh,
    stride_pvb, stride_pvm, stride_pvh,
    stride_ob, stride_or, stride_oh,
    stride_lb, stride_lh,
    num_heads, num_rows, num_prompts, num_keys,
    D1: tl.constexpr, D2: tl.constexpr, PROMPTS: tl.constexpr, HAS_OUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """δ of BLOCK_M query rows: rowsum(dO ∘ O), or without O rowsum(P ∘ dO Vᵀ), which is the same."""
    tiles = tl.cdiv(num_rows, BLOCK_M)
    tile = tl.program_id(0) % tiles
    head = (tl.program_id(0) // tiles) % num_heads
    image = (tl.program_id(0) // tiles // num_heads).to(tl.int64)
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    rows_exist = rows < num_rows

    grad_rows = grad_out + image * stride_gb + head * stride_gh + rows * stride_gr
    g1, g2 = load_rows(grad_rows, rows_exist, D1, D2)
    if HAS_OUT:
        o1, o2 = load_rows(out + image * stride_ob + head * stride_oh + rows * stride_or, rows_exist, D1, D2)
        total = sum_rows(g1, g2, o1, o2, D2)
    else:
        q1, q2 = load_rows(q + image * stride_qb + head * stride_qh + rows * stride_qr, rows_exist, D1, D2)
        row_lse = tl.load(lse + image * stride_lb + head * stride_lh + rows, mask=rows_exist, other=0.0)
        k += image * stride_kb + head * stride_kh
        v += image * stride_vb + head * stride_vh
        prompt_k += image * stride_pkb + head * stride_pkh
        prompt_v += image * stride_pvb + head * stride_pvh
        total = tl.zeros((BLOCK_M,), tl.float32)
        for start in range(0, num_keys, BLOCK_N):
            keys = start + tl.arange(0, BLOCK_N)
            keys_exist = keys < num_keys
            k_rows = key_rows(prompt_k, k, stride_pkm, stride_kn, keys, num_prompts, PROMPTS, True)
            v_rows = key_rows(prompt_v, v, stride_pvm, stride_vn, keys, num_prompts, PROMPTS, True)
            k1, k2 = load_rows(k_rows, keys_exist, D1, D2)
            v1, v2 = load_rows(v_rows, keys_exist, D1, D2)
            scores = dot_rows(q1, q2, k1, k2, D2)
            scores = tl.where(keys_exist[None, :], scores, float("-inf"))
            weights = tl.exp2(scores * LOG2_E - (row_lse * LOG2_E)[:, None])
            total += tl.sum(weights * dot_rows(g1, g2, v1, v2, D2), 1)
    tl.store(delta + (image * num_heads + head) * num_rows + rows, total, mask=rows_exist)


@triton.jit(do_not_specialize=SIZES)
def grad_q_kernel(
    grad_out, q, k, v, prompt_k, prompt_v, out, lse, delta, grad_q,
    stride_gb, stride_gr, stride_gh,
    stride_qb, stride_qr, stride_qh,
    stride_kb, stride_kn, stride_kh,
    stride_vb, stride_vn, stride_vh,
    stride_pkb, stride_pkm, stride_pkh,
    stride_pvb, stride_pvm, stride_pvh,
    stride_ob, stride_or, stride_oh,
    stride_lb, stride_lh,
    stride_dqb, stride_dqr, stride_dqh,
    num_heads, num_rows, num_prompts, num_keys,
    D1: tl.constexpr, D2: tl.constexpr, PROMPTS: tl.constexpr, HAS_OUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dQ = dS K of BLOCK_M query rows of one image and head; with O also δ, for the kernel below."""
    tiles = tl.cdiv(num_rows, BLOCK_M)
    tile = tl.program_id(0) % tiles
    head = (tl.program_id(0) // tiles) % num_heads
    image = (tl.program_id(0) // tiles // num_heads).to(tl.int64)
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    rows_exist = rows < num_rows

    q1, q2 = load_rows(q + image * stride_qb + head * stride_qh + rows * stride_qr, rows_exist, D1, D2)
    grad_rows = grad_out + image * stride_gb + head * stride_gh + rows * stride_gr
    g1, g2 = load_rows(grad_rows, rows_exist, D1, D2)
    row_lse = tl.load(lse + image * stride_lb + head * stride_lh + rows, mask=rows_exist, other=0.0)
    delta += (image * num_heads + head) * num_rows
    if HAS_OUT:
        o1, o2 = load_rows(out + image * stride_ob + head * stride_oh + rows * stride_or, rows_exist, D1, D2)
        row_delta = sum_rows(g1, g2, o1, o2, D2)
        tl.store(delta + rows, row_delta, mask=rows_exist)
    else:
        row_delta = tl.load(delta + rows, mask=rows_exist, other=0.0)

    k += image * stride_kb + head * stride_kh
    v += image * stride_vb + head * stride_vh
    prompt_k += image * stride_pkb + head * stride_pkh
    prompt_v += image * stride_pvb + head * stride_pvh
    dq1 = tl.zeros((BLOCK_M, D1), tl.float32)
    dq2 = tl.zeros((BLOCK_M, D2 if D2 > 0 else D1), tl.float32)
    for start in range(0, num_keys, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        keys_exist = keys < num_keys
        k_rows = key_rows(prompt_k, k, stride_pkm, stride_kn, keys, num_prompts, PROMPTS, True)
        v_rows = key_rows(prompt_v, v, stride_pvm, stride_vn, keys, num_prompts, PROMPTS, True)
        k1, k2 = load_rows(k_rows, keys_exist, D1, D2)
        v1, v2 = load_rows(v_rows, keys_exist, D1, D2)
        scores = dot_rows(q1, q2, k1, k2, D2)  # (BLOCK_M, BLOCK_N)
        scores = tl.where(keys_exist[None, :], scores, float("-inf"))
        weights = tl.exp2(scores * LOG2_E - (row_lse * LOG2_E)[:, None])
        grad_scores = weights * (dot_rows(g1, g2, v1, v2, D2) - row_delta[:, None])
        dq1, dq2 = accumulate(dq1, dq2, grad_scores, k1, k2, D2)
    grad_rows = grad_q + image * stride_dqb + head * stride_dqh + rows * stride_dqr
    store_rows(grad_rows, dq1, dq2, rows_exist, D1, D2)


@triton.jit(do_not_specialize=SIZES)
def grad_kv_kernel(
    grad_out, q, k, v, prompt_k, prompt_v, lse, delta, grad_k, grad_v, grad_prompt_kv,
    stride_gb, stride_gr, stride_gh,
    stride_qb, stride_qr, stride_qh,
    stride_kb, stride_kn, stride_kh,
    stride_vb, stride_vn, stride_vh,
    stride_pkb, stride_pkm, stride_pkh,
    stride_pvb, stride_pvm, stride_pvh,
    stride_lb, stride_lh,
    stride_dkb, stride_dkn, stride_dkh,
    num_heads, num_rows, num_prompts, num_keys,
    D1: tl.constexpr, D2: tl.constexpr, PROMPTS: tl.constexpr, IMAGE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dK = dSᵀ Q and dV = Pᵀ dO of BLOCK_N keys of one image and head.

    Everything is transposed, keys by rows, so that Pᵀ and dSᵀ go from registers straight into their products.
    The prompts' gradients are this image's own (B, m, 2, H, D): summing them, where images share the prompts,
    is the launcher's, in a fixed order. Without IMAGE the keys are the prompts alone.
    """
    tiles = tl.cdiv(num_keys, BLOCK_N)
    tile = tl.program_id(0) % tiles
    head = (tl.program_id(0) // tiles) % num_heads
    image = (tl.program_id(0) // tiles // num_heads).to(tl.int64)
    keys = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    keys_exist = keys < num_keys

    k += image * stride_kb + head * stride_kh
    v += image * stride_vb + head * stride_vh
    prompt_k += image * stride_pkb + head * stride_pkh
    prompt_v += image * stride_pvb + head * stride_pvh
    k_rows = key_rows(prompt_k, k, stride_pkm, stride_kn, keys, num_prompts, PROMPTS, IMAGE)
    v_rows = key_rows(prompt_v, v, stride_pvm, stride_vn, keys, num_prompts, PROMPTS, IMAGE)
    k1, k2 = load_rows(k_rows, keys_exist, D1, D2)
    v1, v2 = load_rows(v_rows, keys_exist, D1, D2)

    grad_out += image * stride_gb + head * stride_gh
    q += image * stride_qb + head * stride_qh
    lse += image * stride_lb + head * stride_lh
    delta += (image * num_heads + head) * num_rows
    dk1 = tl.zeros((BLOCK_N, D1), tl.float32)
    dv1 = tl.zeros((BLOCK_N, D1), tl.float32)
    dk2 = tl.zeros((BLOCK_N, D2 if D2 > 0 else D1), tl.float32)
    dv2 = tl.zeros((BLOCK_N, D2 if D2 > 0 else D1), tl.float32)
    for row in range(0, num_rows, BLOCK_M):
        rows = row + tl.arange(0, BLOCK_M)
        rows_exist = rows < num_rows
        q1, q2 = load_rows(q + rows * stride_qr, rows_exist, D1, D2)
        g1, g2 = load_rows(grad_out + rows * stride_gr, rows_exist, D1, D2)
        row_lse = tl.load(lse + rows, mask=rows_exist, other=0.0)
        row_delta = tl.load(delta + rows, mask=rows_exist, other=0.0)

        scores = dot_rows(k1, k2, q1, q2, D2)  # Sᵀ (BLOCK_N, BLOCK_M)
        scores = tl.where(keys_exist[:, None], scores, float("-inf"))
        weights = tl.exp2(scores * LOG2_E - (row_lse * LOG2_E)[None, :])  # Pᵀ
        # Rows that do not exist have dO = 0 and δ = 0, so that they add nothing.
        grad_scores = weights * (dot_rows(v1, v2, g1, g2, D2) - row_delta[None, :])  # dSᵀ
        dv1, dv2 = accumulate(dv1, dv2, weights, g1, g2, D2)
        dk1, dk2 = accumulate(dk1, dk2, grad_scores, q1, q2, D2)

    if PROMPTS:
        D: tl.constexpr = D1 + D2
        from_prompts = keys_exist & (keys < num_prompts)
        rows = grad_prompt_kv + ((image * num_prompts + keys) * 2 * num_heads + head) * D
        store_rows(rows, dk1, dk2, from_prompts, D1, D2)
        store_rows(rows + num_heads * D, dv1, dv2, from_prompts, D1, D2)
    if IMAGE:
        from_image = keys_exist & (keys >= num_prompts)
        offsets = image * stride_dkb + head * stride_dkh + (keys - num_prompts) * stride_dkn
        store_rows(grad_k + offsets, dk1, dk2, from_image, D1, D2)
        store_rows(grad_v + offsets, dv1, dv2, from_image, D1, D2)
