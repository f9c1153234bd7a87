"""The operations in plain PyTorch, against PyTorch's own and autograd in float64."""

from __future__ import annotations

import pytest
import torch
from attention_definition import definition, inputs, leaves, random
from torch.nn import functional as F
from vpt_fast.kernels.dispatch import TORCH_OPS as OPS
from vpt_fast.kernels.mlp.reference import ACTIVATIONS, GATED


class TestNormalize:
    @pytest.mark.parametrize("kind", ["layer", "rms"])
    @pytest.mark.parametrize("shape", [(1, 1, 3), (2, 5, 7), (3, 197, 64)], ids=str)
    def test_equals_pytorch(self, kind: str, shape: tuple[int, ...]) -> None:
        x = random(*shape, seed=0).requires_grad_()
        norm = F.layer_norm if kind == "layer" else F.rms_norm
        expected = norm(x, shape[-1:], eps=1e-6)
        grad = random(*shape, seed=1)
        (expected_grad,) = torch.autograd.grad(expected, x, grad)
        x_hat, rstd, _, _ = OPS.normalize(x.detach(), 1e-6, kind, torch.float64)
        torch.testing.assert_close(x_hat, expected.detach())
        torch.testing.assert_close(OPS.normalize_backward(grad, x_hat, rstd, None, kind), expected_grad)
        with_residual = OPS.normalize_backward(grad, x_hat, rstd, None, kind, grad)
        torch.testing.assert_close(with_residual, expected_grad + grad)

    @pytest.mark.parametrize("kind", ["layer", "rms"])
    def test_codes_are_within_half_a_step_and_reach_127_in_every_row(self, kind: str) -> None:
        x = random(3, 5, 64, seed=0)
        x[0, 0] = 0
        x_hat, rstd, codes, scale = OPS.normalize(x, 1e-6, kind, torch.float64, pack=True)
        assert codes.dtype == torch.int8
        assert ((codes * scale - x_hat).abs() <= scale * 0.5000001).all()
        assert codes.abs().amax(-1).flatten().tolist() == [0] + [127] * 14
        grad = random(3, 5, 64, seed=1)
        torch.testing.assert_close(
            OPS.normalize_backward(grad, codes, rstd, scale, kind),
            OPS.normalize_backward(grad, codes * scale, rstd, None, kind),
        )

    def test_sum_and_its_normalisation(self) -> None:
        x, update = random(2, 5, 16, seed=0), random(2, 5, 16, seed=1)
        hidden, *normalized = OPS.add_normalize(x, update, 1e-6, "layer", torch.float64)
        torch.testing.assert_close(hidden, x + update)
        torch.testing.assert_close(normalized[0], OPS.normalize(x + update, 1e-6, "layer", torch.float64)[0])

    def test_computes_in_float32_whatever_it_is_given_and_gives(self) -> None:
        x = random(4, 64, seed=0).to(torch.bfloat16) + 100  # a mean that bfloat16's squares would drown in
        x_hat, rstd, _, _ = OPS.normalize(x, 1e-6, "layer", torch.bfloat16)
        assert (x_hat.dtype, rstd.dtype) == (torch.bfloat16, torch.float32)
        torch.testing.assert_close(x_hat, F.layer_norm(x.double(), (64,)).to(torch.bfloat16))


class TestActivation:
    @pytest.mark.parametrize("kind", ACTIVATIONS)
    def test_backward_equals_autograd(self, kind: str) -> None:
        u = random(3, 5, 8, seed=0).requires_grad_()
        output, _, _ = OPS.activate(u, kind)
        assert output.shape == (3, 5, 4 if kind in GATED else 8)
        grad = random(*output.shape, seed=1)
        (expected,) = torch.autograd.grad(output, u, grad)
        torch.testing.assert_close(OPS.activate_backward(grad, u.detach(), None, kind), expected)

    @pytest.mark.parametrize("kind", ACTIVATIONS)
    def test_derivative_in_8_bits_is_within_half_a_step(self, kind: str) -> None:
        u = random(40, 64, seed=0) * 4  # far into both tails
        grad = torch.ones_like(OPS.activate(u, kind)[0])
        output, codes, scale = OPS.activate(u, kind, pack=True)
        torch.testing.assert_close(output, OPS.activate(u, kind)[0])
        error = OPS.activate_backward(grad, codes, scale, kind) - OPS.activate_backward(grad, u, None, kind)
        if kind in GATED:
            assert (error.unflatten(-1, (2, -1)).abs() <= scale.unsqueeze(-1) * 0.5000001).all()
        else:
            assert error.abs().max() <= 0.5000001 / 200

    @pytest.mark.parametrize("kind", ["gelu", "quick_gelu", "silu", "relu"])
    def test_derivatives_of_0_and_1_are_exact_in_8_bits(self, kind: str) -> None:
        u = torch.tensor([-100.0, 100.0])
        _, codes, scale = OPS.activate(u, kind, pack=True)
        assert OPS.activate_backward(torch.ones(2), codes, scale, kind).tolist() == [0.0, 1.0]

    @pytest.mark.parametrize(
        "function", [OPS.activate, lambda u, kind: OPS.activate_backward(u, u, None, kind)]
    )
    def test_unknown_kind_is_named(self, function) -> None:
        with pytest.raises(ValueError, match="'mish'"):
            function(random(2, 2, seed=0), "mish")


class TestPromptedAttention:
    SIZES = [(1, 1, 1, 1, 1, 16), (2, 17, 17, 5, 2, 16), (3, 1, 197, 50, 1, 32), (2, 7, 13, 0, 3, 80)]
    IDS = [f"B{b}_R{r}_N{n}_m{m}_H{h}_D{d}" for b, r, n, m, h, d in SIZES]

    @pytest.mark.parametrize("shared", [True, False], ids=["shared", "per_image"])
    @pytest.mark.parametrize("size", SIZES, ids=IDS)
    def test_output_and_gradients_equal_concatenation(self, size: tuple[int, ...], shared: bool) -> None:
        given = inputs(size, shared, torch.float64)
        own = leaves(given, torch.float64)
        exact = definition(*own)
        grad = random(*given[0].shape, seed=9)
        exact_grads = torch.autograd.grad(exact[0], [t for t in own if t is not None], grad)
        out, lse = OPS.attention(*given)
        torch.testing.assert_close([out, lse], [t.detach() for t in exact])
        for kept in (out, None):
            grads = OPS.attention_backward(grad, *given, kept, lse, need_q=True, need_kv=True)
            of_prompts = () if grads.prompt_kv is None else grads.prompt_kv.unbind(2)
            torch.testing.assert_close([grads.q, *grads.kv.unbind(2), *of_prompts], list(exact_grads))

    def test_packed_gradients_are_the_others_in_one_tensor(self) -> None:
        given = inputs(self.SIZES[1], True, torch.float64)
        out, lse = OPS.attention(*given)
        given = (random(*out.shape, seed=9), *given, out, lse)
        apart = OPS.attention_backward(*given, need_q=True, need_kv=True)
        packed = OPS.attention_backward(*given, need_q=True, need_kv=True, packed=True)
        assert packed.q is None and packed.kv is None
        torch.testing.assert_close(packed.qkv, torch.cat((apart.q.unsqueeze(2), apart.kv), dim=2))
        torch.testing.assert_close(packed.prompt_kv, apart.prompt_kv)

    @pytest.mark.parametrize("need_q", [False, True], ids=["prompts_alone", "prompts_and_queries"])
    @pytest.mark.parametrize("shared", [True, False], ids=["shared", "per_image"])
    def test_gradients_that_are_not_wanted_are_not_formed(self, shared: bool, need_q: bool) -> None:
        given = inputs(self.SIZES[1], shared, torch.float64)
        out, lse = OPS.attention(*given)
        grad = random(*out.shape, seed=9)
        every = OPS.attention_backward(grad, *given, out, lse, need_q=True, need_kv=True)
        q, k, v, prompt_k, prompt_v = given
        if not need_q:
            k = v = None
        some = OPS.attention_backward(
            grad, q, k, v, prompt_k, prompt_v, out, lse, need_q=need_q, need_kv=False
        )
        assert tuple(g is not None for g in some) == (False, need_q, False, True)
        for actual, expected in zip(some, every, strict=True):
            if actual is not None:
                torch.testing.assert_close(actual, expected)

    def test_scores_of_any_size_give_finite_results(self) -> None:
        q, k, v, prompt_k, prompt_v = inputs(self.SIZES[1], True, torch.float64)
        out, lse = OPS.attention(q * 1e4, k, v, prompt_k * 1e4, prompt_v)
        assert out.isfinite().all() and lse.isfinite().all()
