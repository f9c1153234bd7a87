"""The engine's parts: folding, planning, and the operations against autograd."""

from __future__ import annotations

import pytest
import torch
from given_back import GivenBack
from tiny import tiny_vit
from torch.nn import functional as F
from vpt_fast.kernels import Backend, dispatch, get_backend, launch
from vpt_fast.kernels.mlp.reference import ACTIVATIONS, PACKED

from vpt_fast.backbones.timm_vit import FrozenViT
from vpt_fast.engine import passes
from vpt_fast.engine.plan import BlockPlan, Read, plan_blocks, row_range
from vpt_fast.engine.policy import POLICIES
from vpt_fast.engine.stream import Stream
from vpt_fast.engine.weights import BlockParts, LinearParts, NormParts, fold

OPS = get_backend("torch").other
GPU = torch.device("cuda", 0)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


class TestNormalize:
    @pytest.mark.parametrize("kind", ["layer", "rms"])
    @pytest.mark.parametrize("shape", [(1, 1, 3), (2, 5, 7), (3, 197, 64)], ids=str)
    def test_equals_pytorch(self, kind: str, shape: tuple[int, ...]) -> None:
        x = random(*shape).requires_grad_()
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
        x = random(3, 5, 64)
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
        x, update = random(2, 5, 16), random(2, 5, 16, seed=1)
        hidden, *normalized = OPS.add_normalize(x, update, 1e-6, "layer", torch.float64)
        torch.testing.assert_close(hidden, x + update)
        torch.testing.assert_close(normalized[0], OPS.normalize(x + update, 1e-6, "layer", torch.float64)[0])

    def test_computes_in_float32_whatever_it_is_given_and_gives(self) -> None:
        x = random(4, 64).to(torch.bfloat16) + 100  # a mean that bfloat16's squares would drown in
        x_hat, rstd, _, _ = OPS.normalize(x, 1e-6, "layer", torch.bfloat16)
        assert (x_hat.dtype, rstd.dtype) == (torch.bfloat16, torch.float32)
        torch.testing.assert_close(x_hat, F.layer_norm(x.double(), (64,)).to(torch.bfloat16))


class TestActivation:
    @pytest.mark.parametrize("kind", ACTIVATIONS)
    def test_backward_equals_autograd(self, kind: str) -> None:
        u = random(3, 5, 8).requires_grad_()
        output, _, _ = OPS.activate(u, kind)
        assert output.shape == (3, 5, 4 if kind in PACKED else 8)
        grad = random(*output.shape, seed=1)
        (expected,) = torch.autograd.grad(output, u, grad)
        torch.testing.assert_close(OPS.activate_backward(grad, u.detach(), None, kind), expected)

    @pytest.mark.parametrize("kind", ACTIVATIONS)
    def test_derivative_in_8_bits_is_within_half_a_step(self, kind: str) -> None:
        u = random(40, 64) * 4  # far into both tails
        grad = torch.ones_like(OPS.activate(u, kind)[0])
        output, codes, scale = OPS.activate(u, kind, pack=True)
        torch.testing.assert_close(output, OPS.activate(u, kind)[0])
        error = OPS.activate_backward(grad, codes, scale, kind) - OPS.activate_backward(grad, u, None, kind)
        if kind in PACKED:
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
            function(random(2, 2), "mish")


def plain_attention(q, k, v, prompt_k, prompt_v):
    """softmax(Q [K_P; K]ᵀ) [V_P; V], by concatenation."""
    if prompt_k is not None:
        batch = q.shape[0]
        k = torch.cat((prompt_k.expand(batch, -1, -1, -1), k), dim=1)
        v = torch.cat((prompt_v.expand(batch, -1, -1, -1), v), dim=1)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=1.0).transpose(1, 2)


class TestPromptedAttention:
    SIZES = [(1, 1, 1, 1, 1, 16), (2, 17, 17, 5, 2, 16), (3, 1, 197, 50, 1, 32), (2, 7, 13, 0, 3, 80)]
    IDS = [f"B{b}_R{r}_N{n}_m{m}_H{h}_D{d}" for b, r, n, m, h, d in SIZES]

    def inputs(self, size: tuple[int, ...], shared: bool) -> list[torch.Tensor | None]:
        b, r, n, m, h, d = size
        copies = 1 if shared else b
        shapes = [(b, r, h, d), (b, n, h, d), (b, n, h, d), (copies, m, h, d), (copies, m, h, d)]
        tensors = [random(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes)]
        return tensors if m else [*tensors[:3], None, None]

    @pytest.mark.parametrize("shared", [True, False], ids=["shared", "per_image"])
    @pytest.mark.parametrize("size", SIZES, ids=IDS)
    def test_output_and_gradients_equal_concatenation(self, size: tuple[int, ...], shared: bool) -> None:
        inputs = self.inputs(size, shared)
        expected = plain_attention(*inputs)
        grad = random(*expected.shape, seed=9)
        given = [t for t in inputs if t is not None]
        expected_grads = torch.autograd.grad(expected, given, grad)
        detached = [None if t is None else t.detach() for t in inputs]
        out, lse = OPS.attention(*detached)
        torch.testing.assert_close(out, expected.detach())
        for kept in (out, None):
            grads = OPS.attention_backward(grad, *detached, kept, lse, need_q=True, need_kv=True)
            actual = [grads.q, *grads.kv.unbind(2), *(() if size[3] == 0 else grads.prompt_kv.unbind(2))]
            torch.testing.assert_close(actual, list(expected_grads))

    def test_packed_gradients_are_the_others_in_one_tensor(self) -> None:
        inputs = [t.detach() for t in self.inputs(self.SIZES[1], True)]
        out, lse = OPS.attention(*inputs)
        given = (random(*out.shape, seed=9), *inputs, out, lse)
        apart = OPS.attention_backward(*given, need_q=True, need_kv=True)
        packed = OPS.attention_backward(*given, need_q=True, need_kv=True, packed=True)
        assert packed.q is None and packed.kv is None
        torch.testing.assert_close(packed.qkv, torch.cat((apart.q.unsqueeze(2), apart.kv), dim=2))
        torch.testing.assert_close(packed.prompt_kv, apart.prompt_kv)

    @pytest.mark.parametrize("need_q", [False, True], ids=["prompts_alone", "prompts_and_queries"])
    @pytest.mark.parametrize("shared", [True, False], ids=["shared", "per_image"])
    def test_gradients_that_are_not_wanted_are_not_formed(self, shared: bool, need_q: bool) -> None:
        inputs = [t.detach() for t in self.inputs(self.SIZES[1], shared)]
        out, lse = OPS.attention(*inputs)
        grad = random(*out.shape, seed=9)
        every = OPS.attention_backward(grad, *inputs, out, lse, need_q=True, need_kv=True)
        q, k, v, prompt_k, prompt_v = inputs
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
        q, k, v, prompt_k, prompt_v = (t.detach() for t in self.inputs(self.SIZES[1], True))
        out, lse = OPS.attention(q * 1e4, k, v, prompt_k * 1e4, prompt_v)
        assert out.isfinite().all() and lse.isfinite().all()


def parts(dtype: torch.dtype = torch.float32, **changes) -> BlockParts:
    d, h = 8, 12
    values = dict(
        num_heads=2,
        norm1=NormParts("layer", 1e-6, random(d, seed=1, dtype=dtype), random(d, seed=2, dtype=dtype)),
        qkv=LinearParts(random(3 * d, d, seed=3, dtype=dtype), random(3 * d, seed=4, dtype=dtype)),
        q_norm=None,
        k_norm=None,
        attn_norm=None,
        proj=LinearParts(random(d, d, seed=5, dtype=dtype), random(d, seed=6, dtype=dtype)),
        scale1=random(d, seed=7, dtype=dtype),
        norm2=NormParts("rms", 1e-5, random(d, seed=8, dtype=dtype), None),
        fc1=LinearParts(random(h, d, seed=9, dtype=dtype), None),
        activation="gelu",
        mlp_norm=None,
        fc2=LinearParts(random(d, h, seed=10, dtype=dtype), random(d, seed=11, dtype=dtype)),
        scale2=None,
    )
    return BlockParts(**(values | changes))


class TestFolding:
    def test_projections_of_x_hat_equal_those_of_the_affine_norm(self) -> None:
        block = parts(torch.float64)
        _, w = fold(block)
        x_hat, y = random(5, 8, seed=20), random(5, 8, seed=21)
        qkv = F.linear(x_hat * block.norm1.weight + block.norm1.bias, block.qkv.weight, block.qkv.bias)
        qkv[:, :8] *= 4**-0.5  # the softmax scale, for heads of 4
        torch.testing.assert_close(F.linear(x_hat, w.qkv_weight, w.qkv_bias), qkv)
        torch.testing.assert_close(
            F.linear(y, w.proj_weight, w.proj_bias),
            F.linear(y, block.proj.weight, block.proj.bias) * block.scale1,
        )
        fc1 = F.linear(x_hat * block.norm2.weight, block.fc1.weight)
        torch.testing.assert_close(F.linear(x_hat, w.fc1_weight), fc1)

    def test_terms_that_a_block_lacks_stay_absent(self) -> None:
        _, w = fold(parts(norm1=NormParts("rms", 1e-6, None, None), qkv=LinearParts(random(24, 8), None)))
        assert w.qkv_bias is None and w.fc1_bias is None and w.q_norm_weight is None

    def test_block_that_is_read_is_not_changed(self) -> None:
        block = parts(norm1=NormParts("layer", 1e-6, None, None), scale1=None)
        before = block.qkv.weight.clone()
        _, w = fold(block)
        torch.testing.assert_close(block.qkv.weight, before, rtol=0, atol=0)
        for folded, given in ((w.qkv_weight, block.qkv.weight), (w.proj_weight, block.proj.weight)):
            assert folded.data_ptr() != given.data_ptr()

    def test_products_are_formed_in_float32_and_rounded_once(self) -> None:
        block = parts(torch.bfloat16)
        _, w = fold(block)
        wide = block.qkv.weight.float() * block.norm1.weight.float()
        wide[:8] *= 4**-0.5
        assert torch.equal(w.qkv_weight, wide.to(torch.bfloat16))

    def test_query_norm_carries_the_softmax_scale(self) -> None:
        norms = [NormParts("layer", 1e-6, random(4, seed=s), random(4, seed=s + 1)) for s in (30, 40)]
        spec, w = fold(parts(torch.float64, q_norm=norms[0], k_norm=norms[1]))
        assert spec.qk_norm == ("layer", 1e-6, 1e-6)
        torch.testing.assert_close(w.q_norm_weight, norms[0].weight / 2)
        torch.testing.assert_close(w.q_norm_bias, norms[0].bias / 2)
        torch.testing.assert_close(w.k_norm_weight, norms[1].weight)

    def test_one_query_key_norm_alone_is_refused(self) -> None:
        with pytest.raises(ValueError, match="q_norm and k_norm: got one without the other"):
            fold(parts(q_norm=NormParts("rms", 1e-6, None, None)))

    def test_norms_of_two_kinds_on_queries_and_keys_are_refused(self) -> None:
        norms = dict(q_norm=NormParts("rms", 1e-6, None, None), k_norm=NormParts("layer", 1e-6, None, None))
        with pytest.raises(ValueError, match="q_norm and k_norm: got two kinds of norm, want one"):
            fold(parts(**norms))

    def test_weights_without_values_are_folded(self) -> None:
        block = FrozenViT(tiny_vit(init_values=0.1).to("meta")).blocks[0]
        assert block.spec.float16_error == 0.0 and block.proj_weight.is_meta


class TestPlan:
    def test_deep_prompts_are_keys_and_values_only(self) -> None:
        assert plan_blocks(3, (0, 1, 2), "flow", Read.CLS) == (
            BlockPlan(0, False, Read.TOKENS),
            BlockPlan(1, False, Read.TOKENS),
            BlockPlan(2, False, Read.CLS),
        )

    def test_shallow_prompts_flow_on_as_tokens(self) -> None:
        assert plan_blocks(3, (0,), "flow", Read.PATCHES) == (
            BlockPlan(0, False, Read.TOKENS_AND_PROMPTS),
            BlockPlan(None, True, Read.TOKENS_AND_PROMPTS),
            BlockPlan(None, True, Read.PATCHES),
        )

    def test_prompts_that_are_replaced_next_are_not_read(self) -> None:
        plans = plan_blocks(4, (0, 2), "flow", Read.PROMPTS)
        assert [p.read for p in plans] == [
            Read.TOKENS_AND_PROMPTS,
            Read.TOKENS,
            Read.TOKENS_AND_PROMPTS,
            Read.PROMPTS,
        ]

    def test_dropped_prompts_are_in_no_later_block(self) -> None:
        assert [p.prompts_in for p in plan_blocks(3, (0,), "drop", Read.CLS)] == [False] * 3

    def test_head_that_reads_dropped_prompts_is_refused(self) -> None:
        with pytest.raises(ValueError, match="no prompts reach the end"):
            plan_blocks(3, (0,), "drop", Read.PROMPTS)

    @pytest.mark.parametrize(
        ("read", "rows"),
        [
            (Read.CLS, (0, 1)),
            (Read.PREFIX, (0, 2)),
            (Read.PATCHES, (2, 10)),
            (Read.TOKENS, (0, 10)),
            (Read.PROMPTS, (10, 13)),
            (Read.PATCHES_AND_PROMPTS, (2, 13)),
            (Read.TOKENS_AND_PROMPTS, (0, 13)),
        ],
        ids=lambda value: value.name if isinstance(value, Read) else "",
    )
    def test_row_ranges(self, read: Read, rows: tuple[int, int]) -> None:
        assert row_range(read, num_tokens=10, num_prefix=2, num_prompts=3) == rows


class TestBackends:
    @pytest.fixture(autouse=True)
    def a_driver(self, monkeypatch) -> None:
        """Of a GPU, which Triton finds."""
        monkeypatch.setattr(dispatch, "require_driver", lambda: None)

    def test_unknown_backend_names_the_choices(self) -> None:
        with pytest.raises(ValueError, match="'cuda'.*'torch'"):
            get_backend("cuda")

    def test_unknown_attention_names_the_choices(self) -> None:
        with pytest.raises(ValueError, match="attention: got 'flash'.*'flash_attn'.*'sdpa_cudnn'"):
            get_backend("auto", "flash")

    def test_triton_without_a_cuda_device_is_refused_and_not_replaced(self, monkeypatch) -> None:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(ValueError, match="backend='triton': there is no CUDA device here"):
            get_backend("triton")

    def test_triton_stands_for_its_kernels_on_every_device(self, monkeypatch) -> None:
        monkeypatch.setattr(launch, "_capability", lambda device: (8, 0))
        backend = get_backend("triton")
        assert backend.ops(GPU, torch.bfloat16, 64).name == "triton"
        assert backend.ops(torch.device("cpu"), torch.float32, 64).name == "triton"

    def test_torch_stands_for_pytorch_on_every_device(self, monkeypatch) -> None:
        monkeypatch.setattr(launch, "_capability", lambda device: (9, 0))
        assert get_backend("torch").ops(GPU, torch.bfloat16, 64).name == "torch"

    @pytest.fixture
    def auto(self, monkeypatch) -> Backend:
        """Where there is a GPU."""
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        return get_backend("auto")

    @pytest.mark.parametrize("backend", ["auto", "triton"])
    def test_products_hold_the_activation_where_that_is_faster(self, auto, monkeypatch, backend) -> None:
        monkeypatch.setattr(launch, "_capability", lambda device: (9, 0))
        ops = get_backend(backend).ops
        found = [ops(GPU, dtype, 64).name for dtype in (torch.bfloat16, torch.float16, torch.float32)]
        assert found == ["triton_fused_mlp", "triton_fused_mlp", "triton"]
        assert ops(GPU, torch.bfloat16, 64, in_windows=True).name == "triton"
        assert ops(GPU, torch.bfloat16, 64, is_gated=True).name == "triton"

    @pytest.mark.parametrize("capability", [(8, 0), (8, 9), (10, 0), (12, 0)])
    def test_auto_on_a_gpu_is_triton_but_for_what_it_does_not_support(
        self, auto, monkeypatch, capability
    ) -> None:
        monkeypatch.setattr(launch, "_capability", lambda device: capability)
        assert auto.ops(GPU, torch.bfloat16, 64).name == "triton"
        assert auto.ops(GPU, torch.bfloat16, 32, in_windows=True).name == "triton"
        others = (
            (torch.device("cpu"), torch.bfloat16, 64),
            (GPU, torch.float64, 64),
            (GPU, torch.float32, 76),
            (GPU, torch.float32, 16, True),
        )
        for request in others:
            assert auto.ops(*request).name == "torch"

    def test_auto_on_a_gpu_older_than_triton_takes_is_pytorch(self, auto, monkeypatch) -> None:
        monkeypatch.setattr(launch, "_capability", lambda device: (7, 5))
        assert auto.ops(GPU, torch.float16, 64).name == "torch"

    def test_auto_on_a_gpu_of_amd_is_pytorch(self, auto, monkeypatch) -> None:
        monkeypatch.setattr(launch, "_capability", lambda device: (9, 4))
        monkeypatch.setattr(torch.version, "hip", "7.0")
        assert auto.ops(GPU, torch.float16, 64).name == "torch"

    @pytest.mark.parametrize("recording", [(torch.compiler, "is_exporting"), (torch.jit, "is_tracing")])
    def test_auto_on_a_gpu_is_pytorch_while_a_model_is_exported(self, auto, monkeypatch, recording) -> None:
        monkeypatch.setattr(launch, "_capability", lambda device: (9, 0))
        monkeypatch.setattr(*recording, lambda: True)
        assert auto.ops(GPU, torch.bfloat16, 64).name == "torch"
        assert auto.ops(GPU, torch.bfloat16, 32, in_windows=True).name == "torch"

    def test_named_attention_takes_the_place_of_the_backend_s_own(self) -> None:
        ops = get_backend("torch", "sdpa_cpu").other
        assert ops.needs_out and ops.normalize is OPS.normalize and ops.attention is not OPS.attention


class TestFrozenBlock:
    @pytest.mark.parametrize("rows", [(0, 17), (0, 20), (0, 1)], ids=["all", "with_prompts", "cls"])
    def test_output_was_not_written_into(self, rows: tuple[int, int], monkeypatch) -> None:
        """Compiled by torch 2.11, a Function that returns what it changed in place has gradients of zero."""
        versions = []
        forward = passes.forward

        def spy(*arguments, **options):
            output, kept = forward(*arguments, **options)
            versions.append(output.update._version)
            return output, kept

        monkeypatch.setattr(passes, "forward", spy)
        tokens, update = random(2, 17, 32), random(2, 17, 32, seed=2).requires_grad_()
        prompts = random(1, 3, 32, seed=1).requires_grad_()
        FrozenViT(tiny_vit()).blocks[0](Stream(tokens, update), prompts, rows, POLICIES["exact"])
        assert versions == [0]

    @pytest.mark.parametrize("rows", [(0, 17), (0, 20), (0, 1)], ids=["all", "with_prompts", "cls"])
    def test_output_is_not_what_the_last_operation_was_given(
        self, rows: tuple[int, int], monkeypatch
    ) -> None:
        forward, outputs = passes.forward, []

        def spy(*arguments, **options):
            with GivenBack() as given_back:
                output, kept = forward(*arguments, **options)
            outputs.append(output.update in given_back)
            return output, kept

        monkeypatch.setattr(passes, "forward", spy)
        tokens, update = random(2, 17, 32), random(2, 17, 32, seed=2).requires_grad_()
        prompts = random(1, 3, 32, seed=1).requires_grad_()
        FrozenViT(tiny_vit()).blocks[0](Stream(tokens, update), prompts, rows, POLICIES["exact"])
        assert outputs == [False]


class TestFrozenViT:
    def test_the_model_that_is_read_is_left_alone_and_shares_nothing(self) -> None:
        vit = tiny_vit()
        before = {name: t.clone() for name, t in vit.state_dict().items()}
        requires_grad = {name: p.requires_grad for name, p in vit.named_parameters()}
        frozen = FrozenViT(vit)
        for parameter in frozen.parameters():
            parameter.zero_()
        assert all(torch.equal(t, before[name]) for name, t in vit.state_dict().items())
        assert {name: p.requires_grad for name, p in vit.named_parameters()} == requires_grad

    def test_blocks_are_held_once(self) -> None:
        vit = tiny_vit()
        own = sum(p.numel() for p in FrozenViT(vit).parameters())
        folded_away = sum(p.numel() for b in vit.blocks for n in (b.norm1, b.norm2) for p in n.parameters())
        assert own == sum(p.numel() for p in vit.parameters()) - folded_away

    def test_dtype_is_that_of_every_frozen_weight(self) -> None:
        frozen = FrozenViT(tiny_vit(dtype=torch.float32), torch.bfloat16)
        assert {p.dtype for p in frozen.parameters()} == {torch.bfloat16}
