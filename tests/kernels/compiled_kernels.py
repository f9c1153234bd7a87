"""Runs operators' kernels as compiled for GPUs, without one, against float64.

    python compiled_kernels.py ARCH[,ARCH...] [OPERATOR...]

Without an operator: all of them. Says of each GPU at last whether all is right.
"""

import importlib
import multiprocessing
import sys
import time
from collections.abc import Sequence

import attention_definition
import torch
import triton
import window_attention_definition
from definitions import (
    EPS,
    activated,
    assert_as_good_as,
    gradient,
    normalized,
    random,
    relative_error,
    rstd_of,
    slope,
)
from ptx.card import pretend
from vpt_fast.kernels.mlp import gemm
from vpt_fast.kernels.mlp import ops as mlp
from vpt_fast.kernels.normalization import ops as normalization
from vpt_fast.kernels.prompted_attention import window_ops
from vpt_fast.kernels.report import MODULES
from vpt_fast.kernels.rotation import ops as rotation
from vpt_fast.kernels.rotation import reference
from window_attention_definition import Size, make_case

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def prompted_attention() -> None:
    """Whole tiles and tails, rows of one tile and of two, a last block's row, no prompts, all dtypes."""
    for size, dtype, keep_out in (
        ((1, 69, 69, 100, 2, 64), BF16, True),
        ((1, 130, 130, 7, 1, 64), BF16, False),
        ((2, 1, 70, 50, 1, 64), BF16, True),
        ((1, 70, 70, 37, 1, 80), BF16, True),
        ((1, 65, 65, 0, 1, 72), FP16, False),
        ((2, 20, 20, 3, 1, 32), FP32, True),
    ):
        inputs = attention_definition.inputs(size, size[0] == 1, dtype)
        attention_definition.assert_forward_and_backward(inputs, keep_out)


def window_attention() -> None:
    """Windows that are shifted, and that are not; and a single one that holds an image."""
    for size, dtype, keep_out in (
        (Size(1, 2, 49, 20, 0, 1, 32), BF16, True),
        (Size(1, 2, 49, 20, 0, 1, 32, is_shifted=False), BF16, True),
        (Size(1, 1, 70, 20, 0, 1, 64, is_shifted=False), BF16, True),
        (Size(1, 3, 49, 20, 7, 1, 32), BF16, False),
        (Size(1, 1, 35, 0, 0, 1, 64, is_shifted=False), FP16, True),
    ):
        window_attention_definition.assert_forward_and_backward(
            window_ops, make_case(size, True, dtype), keep_out
        )


def assert_products(
    size: tuple[int, int, int], dtype: torch.dtype, kind: str, pack: bool, has_bias: bool = True
) -> None:
    """Of size rows, depth, columns; forward and backward."""
    rows, depth, columns = size
    x = random(rows, depth, seed=0, dtype=dtype)
    bias = random(columns, seed=2, dtype=dtype) if has_bias else None
    weight = (random(columns, depth, seed=1) / (2 * depth**0.5)).to(dtype)
    a, u, codes = gemm.linear_activate(x, weight, bias, kind, pack=pack)
    eager = torch.nn.functional.linear(x, weight, bias)
    exact = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert_as_good_as(a, activated(eager, kind), activated(exact, kind))
    if pack:
        derivative = (codes.double() - 27) / 200
        # u may have been rounded first, as eager rounds it.
        of_rounding = (slope(eager.double(), kind) - slope(exact, kind)).abs().max()
        assert (derivative - slope(exact, kind)).abs().max() <= 0.0025 + 1e-4 + of_rounding
    else:
        assert_as_good_as(u, eager, exact)
        derivative = slope(u.double(), kind)

    grad, weight = random(rows, depth, seed=3, dtype=dtype), weight.T.contiguous()
    grad_u = gemm.linear_activate_backward(grad, weight, codes if pack else u, kind)
    exact = (grad.double() @ weight.double()) * derivative
    assert_as_good_as(grad_u, (grad @ weight) * derivative.to(dtype), exact)


def products() -> None:
    """The first size is moved by TMA where there is one, in several tiles; the second is not aligned."""
    assert_products((150, 80, 208), BF16, "gelu", False)
    assert_products((70, 33, 40), BF16, "quick_gelu", True)
    assert_products((150, 80, 208), FP16, "gelu", True)
    assert_products((20, 16, 24), FP32, "quick_gelu", False)


def products_by_specialized_warpgroups() -> None:
    """On sm_90. Several tiles of one program and of two; fewer steps than stages, and more; no second half of
    rows; no bias; rows that lie apart."""
    gemm._tma_config = lambda: gemm.SPECIALIZED
    for num_sms, size, dtype, kind, pack, has_bias in (
        (2, (300, 208, 336), BF16, "gelu", False, True),
        (1, (150, 80, 208), FP16, "gelu", True, True),
        (1, (40, 400, 512), BF16, "quick_gelu", True, False),
    ):
        gemm.num_sms = lambda device, num_sms=num_sms: num_sms
        assert_products(size, dtype, kind, pack, has_bias)
    grad, weight, kept = (
        random(*s, seed=i, dtype=BF16) for i, s in enumerate([(70, 64), (64, 80), (70, 80)])
    )
    apart = [torch.cat((t, t), 1)[:, : t.shape[1]] for t in (grad, weight, kept)]
    expected = gemm.linear_activate_backward(grad, weight, kept, "gelu")
    assert torch.equal(gemm.linear_activate_backward(*apart, "gelu"), expected)


def activations() -> None:
    for shape, kind, dtype, pack in (
        ((3, 5, 17), "gelu", BF16, True),
        ((7, 136), "silu", FP16, False),
        ((2, 600), "swiglu", BF16, True),
        ((3, 40), "gelu_tanh", FP32, False),
    ):
        wide = (*shape[:-1], shape[-1] * (2 if kind == "swiglu" else 1))
        u, grad = random(*wide, seed=0, dtype=dtype), random(*shape, seed=1, dtype=dtype)
        a, codes, scale = mlp.activate(u, kind, pack=pack)
        assert_as_good_as(a, activated(u, kind), activated(u.double(), kind))
        grad_u = mlp.activate_backward(grad, codes if pack else u, scale, kind)
        eager, exact = (gradient(lambda t, kind=kind: activated(t, kind), x, grad) for x in (u, u.double()))
        if pack:  # in steps of 0.0025, or of a row's largest number over 127 if gated
            assert relative_error(grad_u, exact) <= 2e-2
        else:
            assert_as_good_as(grad_u, eager, exact)


def norms() -> None:
    for shape, kind, dtype in (
        ((5, 768), "layer", BF16),
        ((3, 7, 80), "rms", FP16),
        ((2, 1025), "layer", FP32),
    ):
        residual, update = random(*shape, seed=0), random(*shape, seed=1, dtype=dtype)
        hidden, x_hat, rstd, codes, scale = normalization.add_normalize(
            residual, update, EPS, kind, dtype, pack=True
        )
        assert torch.equal(hidden, residual + update)
        exact = normalized(hidden.double(), kind)
        assert_as_good_as(x_hat, normalized(hidden, kind).to(dtype), exact)
        assert_as_good_as(rstd, rstd_of(hidden, kind), rstd_of(hidden.double(), kind))
        assert ((codes * scale.double() - exact).abs() <= 0.5001 * scale + 1e-5).all()

        grad = random(*shape, seed=2, dtype=dtype)
        exact = gradient(lambda x, kind=kind: normalized(x, kind), hidden.double(), grad)
        for kept, own_scale, tolerance in (
            (x_hat, None, 5e-3 if dtype != FP32 else 1e-5),
            (codes, scale, 2e-2),
        ):
            dx = normalization.normalize_backward(grad, kept, rstd, own_scale, kind)
            assert relative_error(dx, exact) <= tolerance


def rotations() -> None:
    for head_dim, dtype in ((64, BF16), (72, FP16), (32, FP32)):
        qkv = random(2, 21, 3, 2, head_dim, seed=0, dtype=dtype)
        angle = random(16, 2, head_dim // 2, seed=1)
        rows, untouched = qkv[:, 5:, 0], qkv[:, :5].clone()
        exact, eager = rows.double(), rows.clone()
        reference.rotate_(exact, angle.double().sin(), angle.double().cos())
        reference.rotate_(eager, angle.sin(), angle.cos())
        rotation.rotate_(rows, angle.sin(), angle.cos())
        assert_as_good_as(rows, eager, exact)
        assert torch.equal(qkv[:, :5], untouched)


OPERATORS = {
    function.__name__: function
    for function in (
        prompted_attention,
        window_attention,
        products,
        activations,
        norms,
        rotations,
        products_by_specialized_warpgroups,
    )
}


def run(arch: int, operators: Sequence[str]) -> None:
    triton.knobs.runtime.interpret = True  # only now, when the kernels are compiled ones: for CPU tensors
    pretend(arch)
    for name in MODULES:
        module = importlib.import_module(name)
        if hasattr(module, "arch_of"):
            module.arch_of = lambda device: arch
    for operator in operators or OPERATORS:
        if arch != 90 and operator == products_by_specialized_warpgroups.__name__:
            continue
        start = time.process_time()
        OPERATORS[operator]()
        print(f"{operator}: {time.process_time() - start:.1f} s", flush=True)


def main(archs: Sequence[int], operators: Sequence[str]) -> None:
    fork = multiprocessing.get_context("fork")  # which shares what is imported, as that takes seconds
    for arch in archs:
        process = fork.Process(target=run, args=(arch, operators))
        process.start()
        process.join()
        print(f"sm_{arch}: {'wrong' if process.exitcode else 'right'}", flush=True)


if __name__ == "__main__":
    main([int(arch) for arch in sys.argv[1].split(",")], sys.argv[2:])
