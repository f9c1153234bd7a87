"""What a Function must not return, or torch 2.11 compiles it to gradients of zero, in silence."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class GivenBack(TorchFunctionMode):
    """While entered, notes the tensors that an operation was given and gave back: changed in place, or cast
    to the dtype that they had."""

    def __init__(self) -> None:
        super().__init__()
        self._tensors: list[torch.Tensor] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self._tensors.extend(t for t in args if t is result and isinstance(t, torch.Tensor))
        return result

    def __contains__(self, tensor: torch.Tensor) -> bool:
        return any(t is tensor for t in self._tensors)
