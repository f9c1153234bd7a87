"""Which implementation of the operations a block uses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from vpt_fast.kernels.launch import arch_of, require_driver, takes_kernels
from vpt_fast.kernels.mlp import reference as mlp
from vpt_fast.kernels.normalization import reference as normalization
from vpt_fast.kernels.prompted_attention import HEAD_DIMS, WINDOW_HEAD_DIMS, by_images
from vpt_fast.kernels.prompted_attention.flash import FLASH_BACKENDS, get_flash
from vpt_fast.kernels.rotation import reference as rotation
from vpt_fast.kernels.torch_op import is_for_other_programs

BACKENDS = ("auto", "torch", "triton", "triton_fused_mlp")
ATTENTION = ("auto", *FLASH_BACKENDS)


class Ops(NamedTuple):
    """One complete implementation of the block's operations.

    Signatures and semantics are those of the functions in the `reference` modules.

    linear_activate, linear_activate_backward: from `mlp.gemm`, the MLP's GEMMs with the activation or its
        derivative in the epilogue; None: a GEMM of PyTorch's, then `activate` or `activate_backward`.
    needs_out: attention's backward needs attention's output.
    forms_window_scores: attention in windows materialises the scores of a few images at a time.
    """

    name: str
    normalize: Callable[..., tuple[torch.Tensor, ...]]
    add_normalize: Callable[..., tuple[torch.Tensor, ...]]
    normalize_backward: Callable[..., torch.Tensor]
    attention: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    attention_backward: Callable[..., Any]
    window_attention: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    window_attention_backward: Callable[..., Any]
    activate: Callable[..., tuple[torch.Tensor, ...]]
    activate_: Callable[..., torch.Tensor | None]
    activate_backward: Callable[..., torch.Tensor]
    activate_backward_: Callable[..., None]
    rotate_: Callable[..., None]
    needs_out: bool
    forms_window_scores: bool
    linear_activate: Callable[..., tuple[torch.Tensor, ...]] | None = None
    linear_activate_backward: Callable[..., torch.Tensor] | None = None


TORCH_OPS = Ops(
    name="torch",
    normalize=normalization.normalize,
    add_normalize=normalization.add_normalize,
    normalize_backward=normalization.normalize_backward,
    attention=by_images.attention,
    attention_backward=by_images.attention_backward,
    window_attention=by_images.window_attention,
    window_attention_backward=by_images.window_attention_backward,
    activate=mlp.activate,
    activate_=mlp.activate_,
    activate_backward=mlp.activate_backward,
    activate_backward_=mlp.activate_backward_,
    rotate_=rotation.rotate_,
    needs_out=False,
    forms_window_scores=True,
)


@torch.compiler.assume_constant_result
def fused_mlp_pays(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `Ops.linear_activate` is faster than a cuBLAS GEMM followed by our elementwise kernel. On an
    H200 it was, forward and backward together, with 64 images at the widths of ViT-B, L and H in bfloat16
    (benchmarks/kernels.py times both), before the last change to its kernels (docs/kernels.md). On other
    devices it has not been measured; in float32 it is not faster."""
    return device.type == "cuda" and dtype.itemsize == 2 and arch_of(device) == 90


def _head_dims(in_windows: bool) -> tuple[int, ...]:
    """The head dims that Triton's kernels take."""
    return WINDOW_HEAD_DIMS if in_windows else HEAD_DIMS


class Backend(NamedTuple):
    """The operations that a backend's name stands for, by kind of device.

    cuda: for float32, bfloat16 and float16 on a CUDA device that runs the kernels. other: for everything
    else. fused: instead of `cuda` where fusing the activation into the MLP's GEMMs is faster; None: never.
    """

    cuda: Ops
    other: Ops
    fused: Ops | None = None

    def ops(
        self,
        device: torch.device,
        dtype: torch.dtype,
        head_dim: int,
        in_windows: bool = False,
        is_gated: bool = False,
    ) -> Ops:
        """The operations for tensors on this device.

        Args:
            device: of the tensors.
            dtype: of the matmuls.
            head_dim: D.
            in_windows: whether tokens attend in windows.
            is_gated: whether the MLP's activation is gated.

        Raises:
            ValueError: the model is being exported, and the backend has no plain PyTorch; or kernels cannot
                be launched, for want of a C compiler.
        """
        if is_for_other_programs():
            if self.other.name != "torch":
                raise ValueError(
                    f"backend={self.other.name!r}: got a model to export, whose file would need this "
                    "package's operators; want one built or loaded with 'auto' or 'torch'"
                )
            return self.other
        if device.type != "cuda" or dtype == torch.float64 or head_dim not in _head_dims(in_windows):
            return self.other
        if self.cuda is not self.other and not takes_kernels(device):
            return self.other
        if self.cuda.name != "torch":
            require_driver()
        can_fuse = self.fused is not None and not in_windows and not is_gated
        if can_fuse and fused_mlp_pays(device, dtype):
            return self.fused
        return self.cuda

    def require_head_dim(self, head_dim: int, in_windows: bool = False, is_rotary: bool = False) -> None:
        """Raises ValueError for a head dim that the backend's own operations take on no device and in no
        dtype, so that a model need not be moved and called to find out.

        Args:
            head_dim, in_windows: see `ops`.
            is_rotary: whether queries and keys are rotated, which the backend does whatever attention is.
        """
        if self.other.name == "torch" or (self.needs_out and not is_rotary):
            return
        head_dims = _head_dims(in_windows)
        if head_dim not in head_dims:
            kind = " in windows" if in_windows else " and rotary positions" if is_rotary else ""
            raise ValueError(
                f"backend={self.other.name!r}: got a backbone with head dim {head_dim}{kind}, want one of "
                f"{', '.join(map(str, head_dims))}; 'auto' and 'torch' take any"
            )

    def require_operations(
        self, device: torch.device, dtype: torch.dtype, head_dim: int, in_windows: bool = False
    ) -> None:
        """Raises ValueError if `ops` does, or if a FlashAttention implementation does not support such
        tensors, found by calling it on a few rows. A backend's own attention is not tried: it supports
        whatever the backend does."""
        ops = self.ops(device, dtype, head_dim, in_windows)
        if self.needs_out:
            rows = torch.zeros(1, 8, 1, head_dim, dtype=dtype, device=device)  # (B, N, H, D)
            ops.attention(rows, rows, rows, None, None)

    @property
    def needs_out(self) -> bool:
        """Whether attention's output is kept under every memory policy."""
        return self.other.needs_out

    @property
    def always_fuses_mlp(self) -> bool:
        """Whether the MLP's GEMMs include the activation and its derivative on every device."""
        return self.other.linear_activate is not None


def get_backend(backend: str, attention: str = "auto") -> Backend:
    """The operations that `backend` stands for.

    Args:
        backend: ``"torch"``: plain PyTorch, any device. ``"triton"``: Triton's kernels, always; what they do
            not support raises. In 16 bits on GPUs of compute capability 9.0, where that is known to be
            faster, these include the GEMMs on both sides of the MLP's activation, with it or its derivative
            in the epilogue, so that the pre-activation's gradient is the only tensor of the hidden width that
            backward writes. ``"triton_fused_mlp"``: includes those GEMMs everywhere; not for gated
            activations. ``"auto"``: ``"triton"`` on an NVIDIA GPU of compute capability 8.0 or more, for the
            dtypes and head dims that it supports (not float64; those in `prompted_attention.HEAD_DIMS`; in
            windows 32 and 64), and PyTorch for everything else, and wherever a model is exported.
        attention: ``"auto"``: the backend's own prompted attention; or the name of a FlashAttention
            implementation in `FLASH_BACKENDS`, which runs on prompts and image concatenated, and not in
            windows.

    Raises:
        ValueError: an unknown name; Triton's kernels where Triton or a CUDA device is missing; a
            FlashAttention package that is not installed.
    """
    for name, value, choices in (("backend", backend, BACKENDS), ("attention", attention, ATTENTION)):
        if value not in choices:
            raise ValueError(f"{name}: got {value!r}, want one of {', '.join(map(repr, choices))}")
    if backend == "torch" or (backend == "auto" and not _has_triton_and_cuda()):
        chosen = Backend(TORCH_OPS, TORCH_OPS)
    else:
        triton_ops, fused = _triton_ops(backend)
        if backend == "triton_fused_mlp":
            chosen = Backend(fused, fused)
        else:
            chosen = Backend(triton_ops, TORCH_OPS if backend == "auto" else triton_ops, fused)
    if attention == "auto":
        return chosen
    forward, backward = get_flash(attention)
    flash = dict(attention=forward, attention_backward=backward, needs_out=True)
    return Backend(*(None if ops is None else ops._replace(**flash) for ops in chosen))  # type: ignore


def _has_triton_and_cuda() -> bool:
    if not torch.cuda.is_available():
        return False
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


def _triton_ops(backend: str) -> tuple[Ops, Ops]:
    """Triton's operations, with PyTorch's GEMMs around the MLP's activation and with our GEMMs that include
    it. Imported on demand: not every platform has Triton, and importing it takes a second."""
    try:
        import triton
    except ImportError:
        raise ValueError(f"backend={backend!r}: Triton is not installed, want `pip install triton`") from None
    if not torch.cuda.is_available() and not triton.knobs.runtime.interpret:
        raise ValueError(f"backend={backend!r}: there is no CUDA device here, want 'auto' or 'torch'")
    from vpt_fast.kernels.mlp import gemm
    from vpt_fast.kernels.mlp import ops as mlp_ops
    from vpt_fast.kernels.normalization import ops as normalization_ops
    from vpt_fast.kernels.prompted_attention import ops as attention_ops
    from vpt_fast.kernels.prompted_attention import window_ops
    from vpt_fast.kernels.rotation import ops as rotation_ops

    triton_ops = Ops(
        name="triton",
        normalize=normalization_ops.normalize,
        add_normalize=normalization_ops.add_normalize,
        normalize_backward=normalization_ops.normalize_backward,
        attention=attention_ops.attention,
        attention_backward=attention_ops.attention_backward,
        window_attention=window_ops.window_attention,
        window_attention_backward=window_ops.window_attention_backward,
        activate=mlp_ops.activate,
        activate_=mlp_ops.activate_,
        activate_backward=mlp_ops.activate_backward,
        activate_backward_=mlp_ops.activate_backward_,
        rotate_=rotation_ops.rotate_,
        needs_out=False,
        forms_window_scores=False,
    )
    return triton_ops, triton_ops._replace(
        name="triton_fused_mlp",
        linear_activate=gemm.linear_activate,
        linear_activate_backward=gemm.linear_activate_backward,
    )
