"""What the launchers of GPU kernels share: supported dtypes and Triton's names of them, properties of the
GPU, and how to launch a kernel repeatedly."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

TYPE_NAMES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
}
"""Triton's names of these."""


# Triton's own versions also work inside kernels, and take microseconds to find out that they are not in one.


def cdiv(n: int, size: int) -> int:
    """How many blocks of this size n elements take."""
    return -(-n // size)


def next_power_of_2(n: int) -> int:
    """The smallest power of 2 that is at least n, for n >= 1."""
    return 1 << (n - 1).bit_length()


LEAST_CAPABILITY = (8, 0)
"""Compute capability of the oldest NVIDIA GPUs that Triton supports: Ampere."""


@torch.compiler.assume_constant_result
def takes_kernels(device: torch.device) -> bool:
    """Whether the kernels run on this CUDA device. AMD GPUs, which PyTorch also calls CUDA devices, have less
    shared memory, and no kernel here has been built for them."""
    return torch.version.hip is None and _capability(device) >= LEAST_CAPABILITY


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@torch.compiler.assume_constant_result
def require_driver() -> None:
    """Raises ValueError if Triton cannot launch kernels. It compiles a C file for that, once, and containers
    often have no compiler, lack Python's headers, or run as a user without a home."""
    try:
        _make_driver()
    except Exception as error:  # of Triton, of the compiler's process, or of loading what was compiled
        raise ValueError(
            f"backend='triton': Triton cannot launch kernels here ({error}); it needs a C compiler, such as "
            "gcc, Python's headers, in a package such as python3-dev, and a folder that it may write to "
            "(~/.triton, or what the environment variable TRITON_CACHE_DIR names); 'torch' needs none of them"
        ) from error


@cache
def _make_driver() -> None:
    import triton

    _ = triton.runtime.driver.active  # made when it is first read


def arch_of(device: torch.device) -> int:
    """80, 90 or 100: the architecture whose tables of tiles apply to this device."""
    return tables_of(_capability(device)[0]) if device.type == "cuda" else 90


def tables_of(generation: int) -> int:
    """The same for a GPU of this major compute capability. Consumer GPUs of any generation have neither wgmma
    nor tensor memory, so they use the tables of 80."""
    return {9: 90, 10: 100}.get(generation, 80)


@cache
def num_sms(device: torch.device) -> int:
    """Number of SMs; 1 on the CPU, in the interpreter."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


MAX_PROGRAMS = 2**31 - 1
"""Programs along a grid's first axis: a limit of CUDA's."""

MAX_ALONG_AXIS = 65535
"""The same along the second or third axis."""


ROUNDING = {"enable_fp_fusion": True}
"""The launch option that lets a product and a sum round once: Triton's default until 3.9, which warns of
another from 3.10 on."""


class Launch:
    """A kernel bound to everything but its tensors: device, grid and all other arguments.

    On every call, Triton inspects each argument to find the matching build, which takes longer than the
    launch. A caller that holds one of these has already found the tensors' layouts to be equal
    (`checks.once_per_layout`), so the build found by the first call serves all.

    Args:
        kernel: a `triton.jit` function whose pointers come first and constexprs last.
        device: of the tensors.
        grid: the number of programs, or their numbers along three axes, the last two at most
            `MAX_ALONG_AXIS`; with 0 nothing is launched.
        *scalars: the arguments between pointers and constexprs, in the kernel's order.
        **options: constexprs, num_warps, num_stages, maxnreg.
    """

    __slots__ = (
        "_constexprs",
        "_device",
        "_grid",
        "_kernel",
        "_kinds",
        "_options",
        "_run",
        "_scalars",
    )

    def __init__(
        self,
        kernel: Any,
        device: torch.device,
        grid: int | tuple[int, int, int],
        *scalars: float,
        **options: Any,
    ) -> None:
        self._kernel, self._device = kernel, device
        self._grid = (grid, 1, 1) if isinstance(grid, int) else grid
        self._scalars, self._options = scalars, {**options, **ROUNDING}
        self._constexprs = tuple(options[name] for name in kernel.arg_names if name in options)
        self._kinds: tuple[object, ...] | None = None
        self._run: Any = None  # the build's launcher; stays None in Triton's interpreter, which has no builds

    def __call__(self, *pointers: Any) -> None:
        """Launches on tensors, or on Triton's descriptors of them, with the dtypes, strides and alignment of
        the first call; None for one that is absent."""
        if 0 in self._grid:
            return
        if self._device.type == "cuda" and torch.cuda.current_device() != self._device.index:
            with torch.cuda.device(self._device):
                self._launch(pointers)
        else:
            self._launch(pointers)

    def _launch(self, pointers: tuple[Any, ...]) -> None:
        if self._run is not None:
            self._run(*pointers, *self._scalars, *self._constexprs)
            return
        # The interpreter takes this path on every call, so there every call is checked.
        tensors = [getattr(p, "base", p) for p in pointers]  # of a descriptor: its tensor
        kinds = tuple(None if t is None else (t.dtype, t.data_ptr() % 16 == 0) for t in tensors)
        self._kinds = self._kinds or kinds
        assert kinds == self._kinds, f"{self._kernel.__name__}: got {kinds}, want {self._kinds} as at first"
        build = self._kernel[self._grid](*pointers, *self._scalars, **self._options)
        if build is not None:
            self._run = build[self._grid]
