"""A block's forward and backward pass, written out, so that what is computed and what is kept for backward
are decided in one place. They do none of the dead work that an ordinary block does on the concatenated
sequence:

- prompts enter as keys and values; they have queries, attention rows and an MLP only where their outputs are
  read (`Call.fresh`);
- prompts that are the same for every image are normalised and projected once for the batch;
- only the rows that are read get a query, an attention row, a projection and an MLP;
- gradients of frozen weights are not computed; where nothing below is trained, neither is the gradient of the
  image-side tokens, and nothing is kept for it.

The memory policy (`engine.policy`) decides what is kept for the rest. Shapes are those of `engine.call`.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

import torch
from torch.nn import functional as F

from vpt_fast.engine.call import Call, Kept, Rotation, Windows
from vpt_fast.engine.stream import Stream
from vpt_fast.engine.weights import BlockWeights
from vpt_fast.kernels.mlp.reference import GATED
from vpt_fast.kernels.prompted_attention.reference import AttentionGrads, probabilities
from vpt_fast.kernels.prompted_attention.window_reference import WindowBias, pad_bias


class _Keep(Enum):
    """How much of a forward pass goes into `Kept`."""

    NOTHING = "nobody asks for a gradient"
    INPUT = "tokens and prompts: the block will run again in backward"
    ALL = "all that backward needs, as the policy says"


def forward(
    stream: Stream,
    prompts: torch.Tensor | None,
    rotation: Rotation | None,
    w: BlockWeights,
    call: Call,
    *,
    keep: bool,
) -> tuple[Stream, Kept]:
    """The block's output, and what backward needs, which is incomplete without `keep`."""
    what = (_Keep.INPUT if call.policy.recompute_block else _Keep.ALL) if keep else _Keep.NOTHING
    hidden, activated, kept = _up_to_fc2(stream, prompts, rotation, w, call, what, activate=True)
    return Stream(hidden, F.linear(activated, w.fc2_weight, w.fc2_bias)), kept


def _up_to_fc2(
    stream: Stream,
    prompts: torch.Tensor | None,
    rotation: Rotation | None,
    w: BlockWeights,
    call: Call,
    keep: _Keep,
    *,
    activate: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, Kept]:
    """The forward pass without fc2: the residual stream after attention (B, R, d); fc2's input (B, R, h),
    which may be None if `activate` is False; and what is to be kept."""
    spec, ops, dtype, policy = call.spec, call.ops, call.dtype, call.policy
    norm2, eps2 = spec.norm2
    kept = Kept()

    def hold(**tensors: torch.Tensor | None) -> None:
        if keep is _Keep.ALL:
            for name, tensor in tensors.items():
                setattr(kept, name, tensor)

    # What the policy says of each part.
    keeps_qkv = not policy.recomputes_qkv(call.grad_tokens)
    keeps_prompt_kv = prompts is not None and not policy.recomputes_prompt_kv(
        prompts.shape[0], call.key_value
    )
    keeps_out = policy.keeps_out(call.grad_tokens, ops.needs_out or spec.attn_norm is not None)
    keeps_mlp = keep is _Keep.ALL and not policy.recompute_mlp
    pack = policy.compact

    # Attention
    x, x_hat, rstd = _normalize_stream(stream, call)  # (B, N, d) twice, (B, N, 1)
    if keep is _Keep.INPUT:
        kept.tokens, kept.prompts = x, prompts
    if call.grad_tokens:
        hold(x_hat1=x_hat, rstd1=rstd)
    residual = x[:, call.image]  # (B, R, d), once prompts that are read are in it
    del x

    prompt_x_hat, rstd, prompt_keys = _enter_prompts(prompts, w, call)
    hold(prompt_x_hat=prompt_x_hat, prompt_rstd=rstd)
    if keeps_prompt_kv:
        hold(prompt_kv=prompt_keys.kv, prompt_k_rstd=prompt_keys.k_rstd)
    if call.num_fresh_rows:
        fresh = prompts[:, call.fresh].to(residual.dtype)
        residual = torch.cat((residual, fresh.expand(residual.shape[0], -1, -1)), dim=1)
    tokens = _project_tokens(x_hat, prompt_x_hat, rotation, w, call)
    del x_hat, prompt_x_hat
    if keeps_qkv:
        hold(qkv=tokens.qkv, q=None if call.packed else tokens.q)
        if call.keeps_image_keys:
            hold(kv=tokens.kv, q_rstd=tokens.q_rstd)
        if call.grad_tokens:
            hold(k_rstd=tokens.k_rstd)

    q, k, prompt_k = _attention_operands(tokens, prompt_keys, rotation, w, call)
    out, lse = _attend(call, q, k, tokens.v, prompt_k, prompt_keys.v)  # (B, R, H, D), (B, H, R)
    hold(out=out if keeps_out else None, lse=lse)
    del tokens, prompt_keys, q, k, prompt_k
    out = out.flatten(2)  # (B, R, H·D)
    if spec.attn_norm is not None:
        out = _normalize_out(out, call)[0]
    update = F.linear(out, w.proj_weight, w.proj_bias)  # (B, R, d)
    del out
    # (B, R, d) twice, (B, R, 1); as codes too: (B, R, d) and (B, R, 1)
    hidden, x_hat, rstd, codes, scale = ops.add_normalize(residual, update, eps2, norm2, dtype, pack=pack)
    del update, residual
    hold(x_hat2=x_hat if codes is None else codes, scale2=scale, rstd2=rstd)

    # MLP. With a norm in it, or to pack the derivative, the activation is needed anyway.
    activate = activate or pack or spec.mlp_norm is not None
    activated = codes = scale = None  # (B, R, h), half of fc1's if gated
    if ops.linear_activate is not None and activate:
        activated, u, codes = ops.linear_activate(
            x_hat, w.fc1_weight, w.fc1_bias, spec.activation, pack=pack, keep=keeps_mlp
        )
        del x_hat
    else:
        u = F.linear(x_hat, w.fc1_weight, w.fc1_bias)  # (B, R, h)
        del x_hat
        if activate and (spec.activation in GATED or (keeps_mlp and not pack)):
            activated, codes, scale = ops.activate(u, spec.activation, pack=pack)
        elif activate:  # u is not needed again
            activated, codes = u, ops.activate_(u, spec.activation, pack=pack)
    if keeps_mlp:
        hold(mlp=u if codes is None else codes, mlp_scale=scale)
    del u, codes
    if spec.mlp_norm is not None:
        norm3, eps3 = spec.mlp_norm
        activated, rstd, codes, scale = ops.normalize(activated, eps3, norm3, dtype, pack=pack)
        if keeps_mlp:
            hold(x_hat3=activated if codes is None else codes, scale3=scale, rstd3=rstd)
    return hidden, activated, kept


def backward(
    grad: torch.Tensor,
    kept: Kept,
    rotation: Rotation | None,
    w: BlockWeights,
    call: Call,
    grad_prompts_wanted: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Gradients of the block's tokens and prompts. Large tensors are freed as soon as they are no longer
    needed: the peak of temporaries, beside what was kept, limits the batch (`engine.cost`)."""
    spec, ops = call.spec, call.ops
    attn_dim = spec.num_heads * spec.head_dim
    num_image = call.num_image_rows

    grad_hidden = _through_mlp(grad, kept, w, call)  # (B, R, d), of the residual stream after attention
    kept.release_mlp()
    grads = _through_attention(grad_hidden, kept, rotation, w, call)

    grad_tokens = None
    if call.grad_tokens:
        # (B, N, 3·H·D) or (B, N, 2·H·D) -> (B, N, d)
        if call.packed:
            grad_x_hat = grads.qkv.flatten(2) @ w.qkv_weight
            grads = grads._replace(qkv=None)
        else:
            grad_x_hat = grads.kv.flatten(2) @ w.qkv_weight[attn_dim:]
            grad_x_hat[:, call.image] += grads.q[:, :num_image].flatten(2) @ w.qkv_weight[:attn_dim]
        grad_tokens = ops.normalize_backward(
            grad_x_hat, kept.x_hat1, kept.rstd1, None, spec.norm1[0],
            grad_hidden if call.packed else None, call.grad_dtype,
        )  # fmt: skip
        if not call.packed:
            grad_tokens[:, call.image] += grad_hidden[:, :num_image]

    grad_prompts = None
    if grad_prompts_wanted and call.key_value:
        grad_prompts = grads.prompt_kv.flatten(2).to(torch.promote_types(call.dtype, torch.float32))
    elif grad_prompts_wanted:
        shared = kept.prompt_x_hat.shape[0] == 1

        def per_prompt(x: torch.Tensor) -> torch.Tensor:
            return x.sum(0, keepdim=True) if shared else x

        # (1 or B, m, 2·H·D) -> (1 or B, m, d)
        grad_p_hat = grads.prompt_kv.flatten(2) @ w.qkv_weight[attn_dim:]
        if call.num_fresh_rows:
            grad_fresh_q = grads.q[:, -call.num_fresh_rows :].flatten(2)
            grad_p_hat[:, call.fresh] += per_prompt(grad_fresh_q) @ w.qkv_weight[:attn_dim]
        grad_prompts = ops.normalize_backward(
            grad_p_hat, kept.prompt_x_hat, kept.prompt_rstd, None, spec.norm1[0]
        )
        if call.num_fresh_rows:
            grad_prompts[:, call.fresh] += per_prompt(grad_hidden[:, num_image:].to(grad_prompts.dtype))
    return grad_tokens, grad_prompts


ROWS_AT_ONCE = 4096
"""Tokens that a recomputed block processes at a time, at least. Fewer would leave SMs of a large GPU idle in
the narrowest GEMM: 4096 x 768 are 192 tiles of 128 x 128, for an H100's 132."""


def images_at_once(batch_size: int, num_tokens: int) -> int:
    """How many images, of `num_tokens` tokens each, a recomputed block processes at a time."""
    parts = max(1, batch_size * num_tokens // ROWS_AT_ONCE)
    return max(1, -(-batch_size // parts))


def recompute_backward(
    grad: torch.Tensor,
    kept: Kept,
    rotation: Rotation | None,
    w: BlockWeights,
    call: Call,
    grad_prompts_wanted: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """`backward` where only the block's input was kept. All else is recomputed for a few images at a time:
    for a large batch at once it would be more than what all blocks keep."""
    tokens, prompts = kept.tokens, kept.prompts
    batch_size = tokens.shape[0]
    at_once = images_at_once(batch_size, tokens.shape[1])

    def run(images: slice) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        own = prompts if prompts is None or prompts.shape[0] == 1 else prompts[images]
        formed = _up_to_fc2(Stream(tokens[images]), own, rotation, w, call, _Keep.ALL, activate=False)[-1]
        return backward(grad[images], formed, rotation, w, call, grad_prompts_wanted)

    if at_once >= batch_size:
        return run(slice(None))
    grad_tokens = tokens.new_empty(tokens.shape, dtype=call.grad_dtype) if call.grad_tokens else None
    grad_prompts = torch.zeros_like(prompts) if grad_prompts_wanted else None
    for start in range(0, batch_size, at_once):
        images = slice(start, start + at_once)
        of_tokens, of_prompts = run(images)
        if grad_tokens is not None:
            grad_tokens[images] = of_tokens
        del of_tokens
        if grad_prompts is not None:
            grad_prompts[images if prompts.shape[0] > 1 else slice(None)] += of_prompts
    return grad_tokens, grad_prompts


def attention_probabilities(
    stream: Stream, prompts: torch.Tensor | None, rotation: Rotation | None, w: BlockWeights, call: Call
) -> torch.Tensor:
    """P of the rows that are read, all among the tokens: (B, H, R, m + N), over prompts, then tokens."""
    _, x_hat, _ = _normalize_stream(stream, call)
    _, _, prompt_keys = _enter_prompts(prompts, w, call)
    tokens = _project_tokens(x_hat, None, rotation, w, call)
    q, k, prompt_k = _attention_operands(tokens, prompt_keys, rotation, w, call)
    return probabilities(q, k, prompt_k, None if call.windows is None else _bias(call.windows).bias)


def _through_mlp(grad: torch.Tensor, kept: Kept, w: BlockWeights, call: Call) -> torch.Tensor:
    """From the gradient of the block's output to that of the residual stream before the MLP, (B, R, d)."""
    grad_x_hat = _grad_of_hidden(grad, kept, w, call) @ w.fc1_weight  # (B, R, h) -> (B, R, d)
    return call.ops.normalize_backward(
        grad_x_hat, kept.x_hat2, kept.rstd2, kept.scale2, call.spec.norm2[0], grad, grad.dtype
    )


def _grad_of_hidden(grad: torch.Tensor, kept: Kept, w: BlockWeights, call: Call) -> torch.Tensor:
    """From the gradient of the block's output to that of the MLP's pre-activation, (B, R, h)."""
    spec, ops, dtype = call.spec, call.ops, call.dtype
    mlp = F.linear(kept.x_hat2, w.fc1_weight, w.fc1_bias) if kept.mlp is None else kept.mlp
    if ops.linear_activate_backward is not None and spec.mlp_norm is None:
        return ops.linear_activate_backward(grad, w.fc2_weight, mlp, spec.activation)
    grad_activated = grad @ w.fc2_weight  # (B, R, d) -> (B, R, h), half of fc1's if gated
    if spec.mlp_norm is not None:
        norm3, eps3 = spec.mlp_norm
        x_hat3, rstd3 = kept.x_hat3, kept.rstd3
        if x_hat3 is None:
            x_hat3, rstd3, _, _ = ops.normalize(ops.activate(mlp, spec.activation)[0], eps3, norm3, dtype)
        grad_activated = ops.normalize_backward(
            grad_activated, x_hat3, rstd3, kept.scale3, norm3, None, dtype
        )
    if spec.activation in GATED:
        return ops.activate_backward(grad_activated, mlp, kept.mlp_scale, spec.activation)
    ops.activate_backward_(grad_activated, mlp, spec.activation)
    return grad_activated


def _through_attention(
    grad_hidden: torch.Tensor, kept: Kept, rotation: Rotation | None, w: BlockWeights, call: Call
) -> AttentionGrads:
    """From the gradient of the residual stream after attention to those of the projections' outputs: packed,
    or of the queries and of the image's keys and values; and of the prompts' keys and values. If nothing
    below is trained, the only queries with a gradient are those of prompts whose outputs are read."""
    spec, ops = call.spec, call.ops
    num_image = call.num_image_rows
    grad_out = grad_hidden @ w.proj_weight  # (B, R, d) -> (B, R, H·D)
    if spec.attn_norm is not None:
        x_hat, rstd = _normalize_out(kept.out.flatten(2), call)
        grad_out = ops.normalize_backward(grad_out, x_hat, rstd, None, spec.attn_norm[0], None, call.dtype)
        del x_hat
    grad_out = grad_out.unflatten(-1, (spec.num_heads, spec.head_dim))  # of attention's output

    tokens, prompts = _projections(kept, rotation, w, call)
    q, k, prompt_k = _attention_operands(tokens, prompts, rotation, w, call)
    v, prompt_v = tokens.v, prompts.v

    grad_q, grad_k, grad_prompt_kv = None, None, None
    if call.grad_tokens:
        grads = _attend_backward(
            call, grad_out, q, k, v, prompt_k, prompt_v, kept.out, kept.lse, num_fresh=call.num_fresh_rows,
            need_q=True, need_kv=True, packed=call.packed,
        )  # fmt: skip
        grad_prompt_kv = grads.prompt_kv
        grad_q, grad_k = grads.qkv.unbind(2)[:2] if call.packed else (grads.q, grads.kv[:, :, 0])
    else:
        # From the image's rows, gradients flow into the prompts' keys and values alone; from prompts whose
        # outputs are read, into their own queries too, through all keys.
        for part, need_q in ((slice(0, num_image), False), (slice(num_image, None), True)):
            if grad_out[:, part].shape[1] == 0:
                continue
            part_grads = _attend_backward(
                call, grad_out[:, part], q[:, part], k, v, prompt_k, prompt_v, kept.out[:, part],
                kept.lse[:, :, part], num_fresh=call.num_fresh_rows if need_q else 0, need_q=need_q,
                need_kv=False,
            )  # fmt: skip
            grad_q, more = part_grads.q, part_grads.prompt_kv
            grad_prompt_kv = more if grad_prompt_kv is None else grad_prompt_kv + more
        grads = AttentionGrads(qkv=None, q=grad_q, kv=None, prompt_kv=grad_prompt_kv)

    if rotation is not None and call.grad_tokens:
        _rotate(call, rotation, grad_q, grad_k, inverse=True)
    if spec.qk_norm is not None:
        # Through the norms, in place: the gradients of q and k become those of the projection's outputs.
        kind = spec.qk_norm[0]

        def through_norm(
            grad: torch.Tensor, weight: torch.Tensor, x_hat: torch.Tensor, rstd: torch.Tensor
        ) -> None:
            grad.copy_(ops.normalize_backward(grad * weight, x_hat, rstd, None, kind))

        if grad_q is not None:
            first = 0 if call.grad_tokens else num_image
            through_norm(grad_q, w.q_norm_weight, tokens.q[:, first:], tokens.q_rstd[:, first:])
        if call.grad_tokens:
            through_norm(grad_k, w.k_norm_weight, tokens.k, tokens.k_rstd)
        if grad_prompt_kv is not None and not call.key_value:
            through_norm(grad_prompt_kv[:, :, 0], w.k_norm_weight, prompts.k, prompts.k_rstd)
    return grads


class _Tokens(NamedTuple):
    """Queries of the rows that are read, keys and values of the image-side tokens: views of one packed
    projection (B, N, 3, H, D) of a call that is `packed`, else separate tensors, so that what backward needs
    does not keep alive what it does not.

    q_rstd, k_rstd: with query-key normalisation, and q, k are then q̂, k̂.
    """

    qkv: torch.Tensor | None
    q: torch.Tensor  # (B, R, H, D)
    kv: torch.Tensor | None  # (B, N, 2, H, D)
    k: torch.Tensor | None  # (B, N, H, D); k, v None where no gradient flows through them
    v: torch.Tensor | None
    q_rstd: torch.Tensor | None
    k_rstd: torch.Tensor | None


class _Prompts(NamedTuple):
    """Keys and values of the prompts. k_rstd: with query-key normalisation, and k is then k̂, if prompts are
    tokens."""

    kv: torch.Tensor | None = None  # (1 or B, m, 2, H, D)
    k: torch.Tensor | None = None  # (1 or B, m, H, D)
    v: torch.Tensor | None = None
    k_rstd: torch.Tensor | None = None


def _projections(
    kept: Kept, rotation: Rotation | None, w: BlockWeights, call: Call
) -> tuple[_Tokens, _Prompts]:
    """The projections' outputs in forward, kept or recomputed: by the same matmuls, so that they are bit for
    bit what the log-sum-exp was computed from."""
    if call.policy.recomputes_qkv(call.grad_tokens):
        tokens = _project_tokens(kept.x_hat1, kept.prompt_x_hat, rotation, w, call)
    else:
        if kept.qkv is not None:
            q, k, v = kept.qkv.unbind(2)
        else:
            q, (k, v) = kept.q, (None, None) if kept.kv is None else kept.kv.unbind(2)
        tokens = _Tokens(kept.qkv, q, kept.kv, k, v, kept.q_rstd, kept.k_rstd)
    if kept.prompt_kv is not None:
        k, v = kept.prompt_kv.unbind(2)
        return tokens, _Prompts(kept.prompt_kv, k, v, kept.prompt_k_rstd)
    if kept.prompt_x_hat is not None:
        return tokens, _project_prompts(kept.prompt_x_hat, w, call)
    return tokens, _Prompts()


def _project_tokens(
    x_hat: torch.Tensor,
    prompt_x_hat: torch.Tensor | None,
    rotation: Rotation | None,
    w: BlockWeights,
    call: Call,
) -> _Tokens:
    """Projects x̂ of the tokens (B, N, d) and, for queries of prompts whose outputs are read, x̂ of the
    prompts (1 or B, m, d)."""
    spec = call.spec
    heads, attn_dim = (spec.num_heads, spec.head_dim), spec.num_heads * spec.head_dim
    qkv = kv = q_rstd = k_rstd = None
    if call.packed:
        qkv = F.linear(x_hat, w.qkv_weight, w.qkv_bias).unflatten(-1, (3, *heads))
        q, k, v = _parts(qkv)
    else:
        q = _project(x_hat[:, call.image], w, 0, attn_dim).unflatten(-1, heads)
        kv = _project(x_hat, w, attn_dim, 3 * attn_dim).unflatten(-1, (2, *heads))
        k, v = _parts(kv)
    if call.windows is not None and call.windows.pads is not None:
        k[:, call.windows.pads], v[:, call.windows.pads] = call.windows.pad_kv.to(call.dtype)
    if call.num_fresh_rows:
        fresh_q = _project(prompt_x_hat[:, call.fresh], w, 0, attn_dim).unflatten(-1, heads)
        q = torch.cat((q, fresh_q.expand(x_hat.shape[0], -1, -1, -1)), dim=1)
    if spec.qk_norm is not None:
        kind, q_eps, k_eps = spec.qk_norm
        q_rstd, k_rstd = _normalize_(q, q_eps, kind, call), _normalize_(k, k_eps, kind, call)
    elif rotation is not None:
        _rotate(call, rotation, q, k)
    return _Tokens(qkv, q, kv, k, v, q_rstd, k_rstd)


def _enter_prompts(
    prompts: torch.Tensor | None, w: BlockWeights, call: Call
) -> tuple[torch.Tensor | None, torch.Tensor | None, _Prompts]:
    """x̂ (1 or B, m, d) and rstd (1 or B, m, 1) of the prompts, both None if there are none or they are keys
    and values; and their keys and values."""
    spec = call.spec
    if prompts is None:
        return None, None, _Prompts()
    if call.key_value:
        # A copy in any case: it is kept, and its rows are aligned as kernels want them.
        kv = prompts.to(call.dtype, copy=True, memory_format=torch.contiguous_format)
        kv = kv.unflatten(-1, (2, spec.num_heads, spec.head_dim))
        return None, None, _Prompts(kv, *kv.unbind(2))
    kind, eps = spec.norm1
    x_hat, rstd, _, _ = call.ops.normalize(prompts, eps, kind, call.dtype)
    return x_hat, rstd, _project_prompts(x_hat, w, call)


def _project_prompts(x_hat: torch.Tensor, w: BlockWeights, call: Call) -> _Prompts:
    """Projects x̂ (1 or B, m, d) of the prompts."""
    spec = call.spec
    attn_dim = spec.num_heads * spec.head_dim
    kv = _project(x_hat, w, attn_dim, 3 * attn_dim).unflatten(-1, (2, spec.num_heads, spec.head_dim))
    k, v = _parts(kv)
    k_rstd = None
    if spec.qk_norm is not None:
        kind, _, k_eps = spec.qk_norm
        k_rstd = _normalize_(k, k_eps, kind, call)
    return _Prompts(kv, k, v, k_rstd)


def _project(x_hat: torch.Tensor, w: BlockWeights, start: int, stop: int) -> torch.Tensor:
    """The output features [start, stop) of the packed projection."""
    bias = None if w.qkv_bias is None else w.qkv_bias[start:stop]
    return F.linear(x_hat, w.qkv_weight[start:stop], bias)


def _parts(packed: torch.Tensor) -> list[torch.Tensor]:
    """(B, N, n, H, D) -> n views (B, N, H, D) that may be written to."""
    if torch.compiler.is_compiling():
        # In grad mode, as while torch.export traces, unbind's views must not be written to.
        return [packed.select(2, i) for i in range(packed.shape[2])]
    return list(packed.unbind(2))


def _attention_operands(
    tokens: _Tokens, prompts: _Prompts, rotation: Rotation | None, w: BlockWeights, call: Call
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Queries, keys and prompts' keys as attention takes them: q̂ and k̂ get affine parts, then rotation;
    prompts that are keys are so already."""
    if call.spec.qk_norm is None:
        return tokens.q, tokens.k, prompts.k
    q = _affine(tokens.q, w.q_norm_weight, w.q_norm_bias)
    k = _affine(tokens.k, w.k_norm_weight, w.k_norm_bias)
    if rotation is not None:
        _rotate(call, rotation, q, k)
    prompt_k = prompts.k if call.key_value else _affine(prompts.k, w.k_norm_weight, w.k_norm_bias)
    return q, k, prompt_k


def _affine(
    x_hat: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor | None:
    if x_hat is None:
        return None
    return x_hat * weight if bias is None else torch.addcmul(bias, x_hat, weight)


def _rotate(
    call: Call,
    rotation: Rotation,
    q: torch.Tensor,
    k: torch.Tensor | None,
    *,
    inverse: bool = False,
) -> None:
    """Rotates the patches' rows of q (B, R, H, D) and k (B, N, H, D), or of their gradients, in place."""
    sin, cos, start = rotation
    stop = start + sin.shape[0]
    if k is not None:
        call.ops.rotate_(k[:, start:stop], sin, cos, inverse=inverse)
    # Of the image-side tokens, only those in `call.image` have queries.
    first, last = max(start, call.image.start), min(stop, call.image.stop)
    if first < last:
        rows = slice(first - call.image.start, last - call.image.start)
        table = slice(first - start, last - start)
        call.ops.rotate_(q[:, rows], sin[table], cos[table], inverse=inverse)


def _normalize_stream(stream: Stream, call: Call) -> tuple[torch.Tensor, ...]:
    """The stream's sum, and x̂ and rstd of the first norm."""
    kind, eps = call.spec.norm1
    if stream.update is None:
        x_hat, rstd, _, _ = call.ops.normalize(stream.base, eps, kind, call.dtype)
        return stream.base, x_hat, rstd
    x, x_hat, rstd, _, _ = call.ops.add_normalize(stream.base, stream.update, eps, kind, call.dtype)
    return x, x_hat, rstd


def _normalize_(x: torch.Tensor, eps: float, kind: str, call: Call) -> torch.Tensor:
    """Query-key normalisation in place: backward needs only x̂ and the rstd that is returned, not x."""
    x_hat, rstd, _, _ = call.ops.normalize(x, eps, kind, call.dtype)
    x.copy_(x_hat)
    return rstd


def _normalize_out(out: torch.Tensor, call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """x̂ and rstd of attention's output (B, R, H·D). Backward recomputes them from the output, which attention
    itself needs there."""
    kind, eps = call.spec.attn_norm
    x_hat, rstd, _, _ = call.ops.normalize(out, eps, kind, call.dtype)
    return x_hat, rstd


def _attend(call: Call, *qkv: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    if call.windows is None:
        return call.ops.attention(*qkv)
    return call.ops.window_attention(*qkv, _bias(call.windows), num_fresh=call.num_fresh_rows)


def _attend_backward(
    call: Call, *tensors: torch.Tensor | None, num_fresh: int, **wanted: bool
) -> AttentionGrads:
    if call.windows is None:
        return call.ops.attention_backward(*tensors, **wanted)
    return call.ops.window_attention_backward(*tensors, _bias(call.windows), num_fresh=num_fresh, **wanted)


def _bias(windows: Windows) -> WindowBias:
    """The bias of all of a window's tokens: zero for those behind the ones that it is stored for."""
    if windows.num_behind == 0:
        return windows.bias
    return WindowBias(pad_bias(windows.bias.bias, windows.num_behind), None)
