"""Autocast for the precisions that a recipe may name."""

from __future__ import annotations

import torch

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def default_precision(device_type: str) -> str:
    """The precision of a recipe that names none: bf16 on a CUDA device with native support, fp16 on an older
    one, fp32 elsewhere."""
    if device_type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def autocast(precision: str | None, device: torch.device) -> torch.autocast:
    dtype = AUTOCAST[precision or "fp32"]
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
