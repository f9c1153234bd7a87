"""What autograd keeps for backward."""

from __future__ import annotations

import torch
from torch.autograd.graph import saved_tensors_hooks


class KeptBytes:
    """Counts what autograd keeps inside the context: each storage once, the model and `known` left out."""

    def __init__(self, model: torch.nn.Module, *known: torch.Tensor) -> None:
        own = (*model.parameters(), *model.buffers(), *known)
        self._known = {t.untyped_storage().data_ptr() for t in own}
        self._storages: dict[int, torch.UntypedStorage] = {}  # held, so that no address is used twice
        self._hooks = saved_tensors_hooks(self._pack, lambda t: t)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._known:
            self._storages[storage.data_ptr()] = storage
        return tensor

    def __enter__(self) -> KeptBytes:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)

    def __contains__(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._storages

    @property
    def total(self) -> int:
        return sum(storage.nbytes() for storage in self._storages.values())
