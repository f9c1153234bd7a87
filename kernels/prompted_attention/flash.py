"""Prompted attention by other libraries' FlashAttention kernels, each selectable by its name.

They take one sequence of keys and values, so prompts are concatenated to the image's: in forward, and again
in backward, so that no second copy is kept. In backward they need attention's output. If only the prompts'
gradients are wanted, backward gets the prompts alone: they compute P = exp(S - lse) and rowsum(dO ∘ O) from
the kept lse and output, which already cover all keys, so each key's gradient is independent of the others.

| name         | what it runs                                              | head dims      |
| ------------ | --------------------------------------------------------- | -------------- |
| flash_attn   | FlashAttention 2, package flash-attn                      | 8, 16, ... 256 |
| flash_attn_3 | FlashAttention 3, module flash_attn_interface (Hopper)    | 8, 16, ... 256 |
| flash_attn_4 | FlashAttention 4, package flash-attn-4 (Hopper and later) | 8, 16, ... 128 |
| sdpa_flash   | PyTorch's own FlashAttention 2                            | 8, 16, ... 256 |
| sdpa_cudnn   | cuDNN, through PyTorch                                    | 8, 16, ... 128 |
| sdpa_cpu     | PyTorch's kernel for CPUs                                 | any            |

All but the last take float16 and bfloat16 on a CUDA device. All but ``sdpa_cudnn`` are bitwise reproducible:
PyTorch has no deterministic cuDNN backward.
"""

from __future__ import annotations

import contextlib
import importlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from vpt_fast.kernels.prompted_attention.reference import AttentionGrads, empty_grads, name_grads, num_rows_of
from vpt_fast.kernels.torch_op import is_for_other_programs, torch_op

aten = torch.ops.aten


@dataclass(frozen=True)
class _Library:
    """Attention with a softmax scale of 1 and no mask, on tensors (B, rows, H, D).

    forward(q, k, v) returns out (B, R, H, D) and lse (B, H, R), in natural logarithms;
    backward(grad_out, q, k, v, out, lse) returns dQ, dK and dV.
    """

    forward: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    backward: Callable[..., tuple[torch.Tensor, ...]]
    head_dims: range
    dtypes: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16)
    device: str = "cuda"


def get_flash(name: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """`attention` and `attention_backward` of the backend `name`, with the signatures of their reference.

    Raises:
        ValueError: an unknown name, or a package that is not installed. When they are called: a dtype,
            device or head dim that the library does not take; an `out` that was not kept; a model that is
            being exported.
    """
    if name not in _LIBRARIES:
        raise ValueError(f"attention: got {name!r}, want one of {', '.join(map(repr, _LIBRARIES))}")
    _library(name)  # raises before any work if the package is missing
    return partial(_attention, name), partial(_attention_backward, name)


def _attention(
    name: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    prompt_k: torch.Tensor | None,
    prompt_v: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    _require_supported(name, q)
    return _flash_attention(name, q, k, v, prompt_k, prompt_v)


def _attention_backward(
    name: str,
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    prompt_k: torch.Tensor | None,
    prompt_v: torch.Tensor | None,
    out: torch.Tensor | None,
    lse: torch.Tensor,
    *,
    need_q: bool,
    need_kv: bool,
    packed: bool = False,
) -> AttentionGrads:
    _require_supported(name, q)
    if out is None:
        raise ValueError(
            f"out: got None, want the output of attention: memory='compact' drops it, and attention={name!r} "
            "needs it in backward"
        )
    grads = _flash_attention_backward(
        name, grad_out, q, k, v, prompt_k, prompt_v, out, lse, need_q, need_kv, packed
    )
    return name_grads(grads, need_q=need_q, need_kv=need_kv, packed=packed)


def _require_supported(name: str, q: torch.Tensor) -> None:
    if is_for_other_programs():
        raise ValueError(
            f"attention={name!r}: got a model to export, whose file would need this package's operators; "
            "want one built or loaded with 'auto'"
        )
    library = _library(name)
    if q.dtype not in library.dtypes:
        wanted = " or ".join(_dtype_name(dtype) for dtype in library.dtypes)
        raise ValueError(f"attention={name!r}: got dtype {_dtype_name(q.dtype)}, want {wanted}")
    if q.device.type != library.device:
        raise ValueError(f"attention={name!r}: got a tensor on {q.device}, want one on {library.device}")
    dims = library.head_dims
    if q.shape[-1] not in dims:
        raise ValueError(
            f"attention={name!r}: got head dim {q.shape[-1]}, want a multiple of {dims.step} up to {dims[-1]}"
        )


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# One operator for all libraries, so that torch.compile need not trace into their Python.


@torch_op("flash_attention")
def _flash_attention(
    name: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    prompt_k: torch.Tensor | None,
    prompt_v: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = _library(name).forward(q, _extend(prompt_k, k), _extend(prompt_v, v))
    return out.contiguous(), lse.contiguous()


@torch.library.register_fake("vpt_fast::flash_attention")
def _(name, q, k, v, prompt_k, prompt_v):
    batch, rows, heads, _ = q.shape
    stat = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty((batch, heads, rows), dtype=stat)


@torch_op("flash_attention_backward")
def _flash_attention_backward(
    name: str,
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    prompt_k: torch.Tensor | None,
    prompt_v: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    need_q: bool,
    need_kv: bool,
    packed: bool,
) -> list[torch.Tensor]:
    """Returns the gradients that are wanted, in the order of `empty_grads`."""
    m = num_rows_of(prompt_k)
    if not (need_q or need_kv):
        k = v = q[:, :0]  # no image keys: the prompts' columns are enough
    keys, values = _extend(prompt_k, k), _extend(prompt_v, v)  # (B, m + N, H, D)
    grad_q, grad_k, grad_v = _library(name).backward(
        grad_out.contiguous(), q, keys, values, out.contiguous(), lse.contiguous()
    )  # (B, R, H, D) and twice (B, m + N, H, D)
    grads = []
    if packed:
        grads.append(_join(torch.stack, (grad_q, grad_k[:, m:], grad_v[:, m:]), 2))
    elif need_q:
        grads.append(grad_q.contiguous())
    if need_kv and not packed:
        grads.append(_join(torch.stack, (grad_k[:, m:], grad_v[:, m:]), 2))
    if prompt_k is not None:
        parts = [grad_k[:, :m], grad_v[:, :m]]
        if prompt_k.shape[0] == 1:
            stat = torch.promote_types(q.dtype, torch.float32)
            parts = [part.sum(0, keepdim=True, dtype=stat).to(q.dtype) for part in parts]
        grads.append(_join(torch.stack, parts, 2))
    return grads


@torch.library.register_fake("vpt_fast::flash_attention_backward")
def _(name, grad_out, q, k, v, prompt_k, prompt_v, out, lse, need_q, need_kv, packed):
    return empty_grads(q, k, prompt_k, need_q=need_q, need_kv=need_kv, packed=packed)


def _extend(prompts: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    """Prompt rows before image rows: (1 or B, m, H, D) and (B, N, H, D) -> (B, m + N, H, D)."""
    if prompts is None:
        return x
    return _join(torch.cat, (prompts.expand(x.shape[0], -1, -1, -1), x), 1)


_WIDE = torch.complex128  # for its 16 bytes: nothing computes with it


def _join(how: Callable[..., torch.Tensor], parts: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
    """torch.cat or torch.stack of tensors (B, rows, H, D) along an axis before the heads.

    On a GPU PyTorch copies parts that are not contiguous, as these are, element by element, and computes an
    index for each: on an H200 that took longer than the attention. So elements are 16 bytes where possible.
    """
    if not all(map(_has_wide_rows, parts)):
        return how(parts, dim)
    joined = how([x.flatten(2).view(_WIDE) for x in parts], dim)
    return joined.view(parts[0].dtype).unflatten(-1, parts[0].shape[2:])


def _has_wide_rows(x: torch.Tensor) -> bool:
    """Whether each row of (B, rows, H, D) is one piece of memory from a multiple of 16 bytes to another."""
    heads, head_dim = x.shape[2:]
    is_one_piece = x.stride(3) == 1 and (heads == 1 or x.stride(2) == head_dim)
    in_bytes = [n * x.element_size() for n in (x.storage_offset(), *x.stride()[:2], heads * head_dim)]
    return is_one_piece and not any(n % _WIDE.itemsize for n in (x.data_ptr(), *in_bytes))


# The libraries. What their functions take and return is said in `_Library`.


def _import(name: str, module: str, source: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"attention={name!r}: {error}; want {source}") from error


def _flash_attn_2() -> _Library:
    module = _import("flash_attn", "flash_attn.flash_attn_interface", "pip install flash-attn, 2.7 or later")
    no_window = dict(window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None)

    def forward(q, k, v):
        return module._flash_attn_forward(
            q, k, v, dropout_p=0.0, softmax_scale=1.0, causal=False, return_softmax=False, **no_window
        )[:2]

    def backward(grad_out, q, k, v, out, lse):
        grads = (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v))
        module._flash_attn_backward(
            grad_out, q, k, v, out, lse, *grads, dropout_p=0.0, softmax_scale=1.0, causal=False,
            deterministic=True, rng_state=None, **no_window,
        )  # fmt: skip
        return grads

    return _Library(forward, backward, range(8, 257, 8))


def _flash_attn_3() -> _Library:
    module = _import(
        "flash_attn_3",
        "flash_attn_interface",
        "FlashAttention 3, built from the folder hopper of github.com/Dao-AILab/flash-attention",
    )

    def forward(q, k, v):
        return module._flash_attn_forward(q, k, v, softmax_scale=1.0)[:2]

    def backward(grad_out, q, k, v, out, lse):
        grads = (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v))
        dq, dk, dv = grads
        module._flash_attn_backward(
            grad_out, q, k, v, out, lse, dq=dq, dk=dk, dv=dv, softmax_scale=1.0, deterministic=True
        )
        return grads

    return _Library(forward, backward, range(8, 257, 8))


def _flash_attn_4() -> _Library:
    module = _import("flash_attn_4", "flash_attn.cute.interface", "pip install flash-attn-4")

    def forward(q, k, v):
        return module._flash_attn_fwd(q, k, v, softmax_scale=1.0, return_lse=True)[:2]

    def backward(grad_out, q, k, v, out, lse):
        return module._flash_attn_bwd(q, k, v, out, grad_out, lse, softmax_scale=1.0, deterministic=True)[:3]

    return _Library(forward, backward, range(8, 129, 8))


def _sdpa_flash() -> _Library:
    def forward(q, k, v):
        out, lse, *_ = aten._scaled_dot_product_flash_attention.default(
            *_swap_heads(q, k, v), 0.0, False, scale=1.0
        )
        return out.transpose(1, 2), lse

    def backward(grad_out, q, k, v, out, lse):
        # The state of dropout's generator, which is not read without dropout.
        seed = torch.empty(2, dtype=torch.uint64, device=q.device)
        offset = torch.empty((), dtype=torch.uint64, device=q.device)
        grad_out, q, k, v, out = _swap_heads(grad_out, q, k, v, out)
        with _deterministic():
            grads = aten._scaled_dot_product_flash_attention_backward.default(
                grad_out, q, k, v, out, lse, None, None, q.shape[2], k.shape[2], 0.0, False, seed, offset,
                scale=1.0,
            )  # fmt: skip
        return _swap_heads(*grads)

    return _Library(forward, backward, range(8, 257, 8))


def _sdpa_cudnn() -> _Library:
    def forward(q, k, v):
        rows = q.shape[1]
        out, lse, *_ = aten._scaled_dot_product_cudnn_attention.default(
            *_swap_heads(_two_rows(q), k, v), None, True, 0.0, False, scale=1.0
        )
        return out.transpose(1, 2)[:, :rows], lse.squeeze(-1)[:, :, :rows]

    def backward(grad_out, q, k, v, out, lse):
        if torch.get_deterministic_debug_mode() == 2:
            raise ValueError(
                "attention='sdpa_cudnn': its backward pass does not repeat bit for bit, which "
                "torch.use_deterministic_algorithms(True) asks for; want another of "
                f"{', '.join(map(repr, FLASH_BACKENDS))}"
            )
        rows, num_keys = q.shape[1], k.shape[1]
        if rows == 1:
            grad_out = torch.cat((grad_out, torch.zeros_like(grad_out)), dim=1)
            lse = lse.expand(-1, -1, 2).contiguous()
        grad_out, q, k, v, out = _swap_heads(grad_out, *map(_two_rows, (q, k, v, out)))
        seed = torch.empty((), dtype=torch.int64, device=q.device)
        grad_q, grad_k, grad_v = _swap_heads(
            *aten._scaled_dot_product_cudnn_attention_backward.default(
                grad_out, q, k, v, out, lse.unsqueeze(-1), seed, seed, None, None, None, q.shape[2],
                k.shape[2], 0.0, False, scale=1.0,
            )
        )  # fmt: skip
        return grad_q[:, :rows], grad_k[:, :num_keys], grad_v[:, :num_keys]

    return _Library(forward, backward, range(8, 129, 8))


def _two_rows(x: torch.Tensor) -> torch.Tensor:
    """A single row twice: cuDNN's backward does not take one (github.com/pytorch/pytorch/issues/138529).

    This is harmless in backward: the second query has dO = 0, and the second key's gradient is dropped.
    """
    return torch.cat((x, x), dim=1) if x.shape[1] == 1 else x


def _sdpa_cpu() -> _Library:
    def forward(q, k, v):
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu.default(
            *_swap_heads(q, k, v), 0.0, False, scale=1.0
        )
        return out.transpose(1, 2), lse

    def backward(grad_out, q, k, v, out, lse):
        return _swap_heads(
            *aten._scaled_dot_product_flash_attention_for_cpu_backward.default(
                *_swap_heads(grad_out, q, k, v, out), lse, 0.0, False, scale=1.0
            )
        )

    dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    return _Library(forward, backward, range(1, 2**31), dtypes, device="cpu")


def _swap_heads(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(B, rows, H, D) <-> (B, H, rows, D)."""
    return tuple(x.transpose(1, 2) for x in tensors)


_mode_lock = threading.Lock()
_mode_users: list[tuple[int, bool]] = []  # a thread inside each: the settings before the first entered


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    """Turns on PyTorch's deterministic mode, since its kernels have no argument for it. The mode is global,
    and autograd has a thread for each GPU, so it stays on until the last thread inside has left."""
    settings: Any = torch.utils.deterministic
    with _mode_lock:
        now = torch.get_deterministic_debug_mode(), settings.fill_uninitialized_memory
        _mode_users.append(_mode_users[0] if _mode_users else now)
        torch.set_deterministic_debug_mode("error")
        settings.fill_uninitialized_memory = False  # would launch a kernel for each tensor
    try:
        yield
    finally:
        with _mode_lock:
            mode, fill = _mode_users.pop()
            if not _mode_users:
                torch.set_deterministic_debug_mode(mode)
                settings.fill_uninitialized_memory = fill


_LIBRARIES: dict[str, Callable[[], _Library]] = {
    "flash_attn": _flash_attn_2,
    "flash_attn_3": _flash_attn_3,
    "flash_attn_4": _flash_attn_4,
    "sdpa_flash": _sdpa_flash,
    "sdpa_cudnn": _sdpa_cudnn,
    "sdpa_cpu": _sdpa_cpu,
}
FLASH_BACKENDS = tuple(_LIBRARIES)

_made: dict[str, _Library] = {}


def _library(name: str) -> _Library:
    """Made once, since every call of attention asks. Not by functools.cache, which Dynamo warns that it
    ignores."""
    if name not in _made:
        _made[name] = _LIBRARIES[name]()
    return _made[name]
