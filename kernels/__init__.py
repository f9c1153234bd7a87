"""The tensor operations a frozen transformer block is made of.

Every operation has one plain-PyTorch definition (`reference.py` in its folder), which runs on any device
and is what faster implementations are held against. `dispatch.get_backend` hands the engine one complete
list of them; the engine knows no other way to reach an operation.

Installed as ``vpt_fast.kernels``; imports torch (and, for GPU kernels, triton) only.
"""

from vpt_fast.kernels.dispatch import ATTENTION, BACKENDS, Backend, Ops, get_backend

__all__ = ["ATTENTION", "BACKENDS", "Backend", "Ops", "get_backend"]
