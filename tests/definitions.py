"""What normalisation and activations are, in plain PyTorch of any precision, and how far off a result is."""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

EPS = 1e-6


def normalized(x: torch.Tensor, kind: str) -> torch.Tensor:
    if kind == "layer":
        return F.layer_norm(x, x.shape[-1:], eps=EPS)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)


def rstd_of(x: torch.Tensor, kind: str) -> torch.Tensor:
    if kind == "layer":
        x = x - x.mean(-1, keepdim=True)
    return torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)


def activated(u: torch.Tensor, kind: str) -> torch.Tensor:
    if kind == "swiglu":
        gate, value = u.chunk(2, dim=-1)
        return F.silu(gate) * value
    return {
        "gelu": F.gelu,
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
        "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
        "silu": F.silu,
        "relu": F.relu,
    }[kind](u)


def gradient(function, x: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """Of x, in its precision, by autograd."""
    x = x.detach().clone().requires_grad_()
    (dx,) = torch.autograd.grad(function(x), x, grad.to(x.dtype))
    return dx


def slope(u: torch.Tensor, kind: str) -> torch.Tensor:
    """The derivative of an activation that is not gated."""
    return gradient(lambda x: activated(x, kind), u, torch.ones_like(u))


def relative_error(got: torch.Tensor, exact: torch.Tensor) -> float:
    """Norm of the difference over the norm of the exact float64 result; NaN where `got` has one."""
    return ((got.double() - exact).norm() / exact.norm()).item()


def assert_as_good_as(got: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor) -> None:
    """`got` is at most 1.25 times as wrong as `eager`, which is the same in the same low precision."""
    assert got.shape == exact.shape
    wrong, allowed = relative_error(got, exact), 1.25 * relative_error(eager, exact) + 1e-7
    assert wrong <= allowed, f"error {wrong:.2e}, want at most {allowed:.2e}"


def assert_equal_twice(op, *args, **kwargs):
    """The op's results, the same to the bit when it runs again."""
    first, second = op(*args, **kwargs), op(*args, **kwargs)
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
        return first
    for a, b in zip(first, second, strict=True):
        assert a is b is None or torch.equal(a, b)
    return first


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    """Normal numbers, the same on every device, with a mean for LayerNorm to take away."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(math.prod(shape), generator=generator) * 2 + 0.3).view(shape).to(device, dtype)
