"""The precision that a recipe names, as autocast."""

from __future__ import annotations

import torch

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(precision: str | None, device: torch.device) -> torch.autocast:
    dtype = AUTOCAST[precision or "fp32"]
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
