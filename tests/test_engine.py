"""The engine's parts: folding, planning, a block's output, and the backbone of blocks."""

from __future__ import annotations

import pytest
import torch
from given_back import GivenBack
from tiny import tiny_vit
from torch.nn import functional as F

from vpt_fast.backbones.timm_vit import FrozenViT
from vpt_fast.engine import passes
from vpt_fast.engine.plan import BlockPlan, Read, plan_blocks, row_range
from vpt_fast.engine.policy import POLICIES
from vpt_fast.engine.stream import Stream
from vpt_fast.engine.weights import BlockParts, LinearParts, NormParts, fold


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


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
