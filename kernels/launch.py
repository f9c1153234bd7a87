"""What launchers of GPU kernels share: which dtypes they take, what builds call them, and which GPU it is."""

from __future__ import annotations

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


def arch_of(device: torch.device) -> int:
    """80, 90 or 100: which of the tables of tiles is for this device. Consumer GPUs of any generation have
    neither wgmma nor tensor memory, so that theirs is 80's."""
    if device.type != "cuda":
        return 90
    major = torch.cuda.get_device_capability(device)[0]
    return {9: 90, 10: 100}.get(major, 80)
