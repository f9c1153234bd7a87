"""The tensor operations a frozen transformer block is made of.

Every operation has one plain-PyTorch definition (`reference.py` in its folder), which runs on any device and
which faster implementations are tested against. `dispatch.get_backend` gives the engine a complete set of
implementations; the engine reaches operations in no other way, but for
`prompted_attention.reference.probabilities`, which has no faster implementation.

Installed as ``vpt_fast.kernels``; imports torch (and, for GPU kernels, triton) only.
"""

from vpt_fast.kernels.dispatch import ATTENTION, BACKENDS, Backend, Ops, get_backend

__all__ = ["ATTENTION", "BACKENDS", "Backend", "Ops", "get_backend"]
