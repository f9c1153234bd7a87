"""What launchers of GPU kernels share: which dtypes they take, what builds call them, which GPU it is, and
how a kernel is launched over and over."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

TYPE_NAMES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int8: "i8",
    torch.uint8: "u8",
}
"""Triton's names of dtypes."""


# Triton's own two are for kernels as well, and take microseconds to find out that they are not in one.


def cdiv(n: int, size: int) -> int:
    """How many blocks of this size n elements take."""
    return -(-n // size)


def next_power_of_2(n: int) -> int:
    """The smallest power of 2 that is not below n, from 1."""
    return 1 << (n - 1).bit_length()


LEAST_CAPABILITY = (8, 0)
"""Compute capability of the oldest NVIDIA GPUs that Triton takes: Ampere's."""


@torch.compiler.assume_constant_result
def takes_kernels(device: torch.device) -> bool:
    """Whether the kernels run on this CUDA device. AMD's GPUs, which PyTorch calls CUDA devices too, have
    less shared memory, and nothing here has been built for them."""
    return torch.version.hip is None and _capability(device) >= LEAST_CAPABILITY


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def arch_of(device: torch.device) -> int:
    """80, 90 or 100: which of the tables of tiles is for this device. Consumer GPUs of any generation have
    neither wgmma nor tensor memory, so that theirs is 80's."""
    if device.type != "cuda":
        return 90
    return {9: 90, 10: 100}.get(_capability(device)[0], 80)


@cache
def num_processors(device: torch.device) -> int:
    """Multiprocessors of the device; in the interpreter, on the CPU, one."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


MAX_ALONG_AXIS = 65535
"""Programs along a grid's second or third axis: a limit of CUDA's."""


class Launch:
    """A kernel with everything but its tensors: where it runs, its grid and all other arguments.

    Triton looks at each argument of each call anew to find the build that is for them, which takes longer
    than the launch. Whoever holds one of these has found the tensors to be alike already
    (`checks.once_per_layout`), so that the build which the first call was given is the one for all.

    Args:
        kernel: a `triton.jit` function whose pointers come first and constexprs last.
        device: of the tensors.
        grid: how many programs there are, or how many along each of three axes, of which the last two take no
            more than `MAX_ALONG_AXIS`; with 0 nothing is launched.
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
        self._scalars, self._options = scalars, options
        self._constexprs = tuple(options[name] for name in kernel.arg_names if name in options)
        self._kinds: tuple[object, ...] | None = None
        self._run: Any = None  # of the build; never in Triton's interpreter, which has none

    def __call__(self, *pointers: Any) -> None:
        """Launches on tensors, or Triton's descriptors of them, whose dtypes, strides and alignment are those
        of the first call; None for one that is absent."""
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
        # The interpreter comes here every time, so that with it this is checked of every call.
        tensors = [getattr(p, "base", p) for p in pointers]  # a descriptor's
        kinds = tuple(None if t is None else (t.dtype, t.data_ptr() % 16 == 0) for t in tensors)
        self._kinds = self._kinds or kinds
        assert kinds == self._kinds, f"{self._kernel.__name__}: got {kinds}, want {self._kinds} as at first"
        build = self._kernel[self._grid](*pointers, *self._scalars, **self._options)
        if build is not None:
            self._run = build[self._grid]
