"""What a training step on the Triton kernels takes of the allocator at its peak, against the estimate.

The kernels themselves, which allocate nothing, are left out, and so is the arithmetic of matmuls, which takes
a CPU very long in 16 bits: nobody looks at numbers here.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny import random_batch, tiny_beit, tiny_eva, tiny_swin, tiny_vit
from torch.profiler import ProfilerActivity, profile

from vpt_fast import PromptedSwin, PromptedViT
from vpt_fast.engine import passes
from vpt_fast.engine.policy import POLICIES

CLASSES, BATCH = 5, 4
VIT = dict(embed_dim=256, num_heads=4, depth=4, img_size=112, patch_size=8)
EVA = dict(**VIT, rope_type="dinov3", rope_rotate_half=True, dynamic_img_size=True)
VARIANTS = {
    "deep": {},
    "residual_in_16_bits": dict(residual_dtype=torch.bfloat16),
    "fused_mlp": dict(backend="triton_fused_mlp"),
}


@pytest.fixture(autouse=True)
def launch_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.interpreter import InterpretedFunction

    monkeypatch.setattr(InterpretedFunction, "run", lambda *args, **kwargs: None)


@pytest.fixture(autouse=True)
def multiply_nothing() -> Iterator[None]:
    def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a.new_empty((*a.shape[:-1], b.shape[-1]))

    def given(*args: Any, out: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return out

    library = torch.library.Library("aten", "IMPL")
    for name in ("mm", "bmm"):
        library.impl(name, product, "CPU")
        library.impl(f"{name}.out", given, "CPU")
    for name in ("addmm", "baddbmm"):
        library.impl(name, lambda added, a, b, **kwargs: product(a, b), "CPU")
        library.impl(f"{name}.out", given, "CPU")
    yield
    library._destroy()


def peak_bytes(model: PromptedViT | PromptedSwin) -> int:
    """The most bytes that PyTorch's allocator has given out at once in forward and backward."""
    images = random_batch(model, BATCH, CLASSES, torch.float32)[0]

    def step() -> None:
        logits = model(images)
        logits.backward(torch.ones_like(logits))

    step()  # whatever is made once
    model.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    records = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = (record.nbytes() for record in sorted(records, key=lambda record: record.start_ns()))
    return max(itertools.accumulate(changes))


def assert_estimated(model: PromptedViT | PromptedSwin) -> None:
    estimate = model.train().estimate_training_bytes(BATCH)
    assert estimate["kept"] + estimate["workspace"] == pytest.approx(peak_bytes(model), rel=0.1)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("memory", POLICIES)
def test_estimate_is_within_a_tenth_of_the_peak(memory: str, variant: dict) -> None:
    options = {"backend": "triton", "dtype": torch.bfloat16, **variant}
    vit = tiny_vit(dtype=torch.float32, **VIT)
    assert_estimated(PromptedViT(vit, CLASSES, 20, memory=memory, **options))


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_estimate_of_a_few_images_at_a_time(variant: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"backend": "triton", "dtype": torch.bfloat16, "memory": "recompute", **variant}
    model = PromptedViT(tiny_vit(dtype=torch.float32, **VIT), CLASSES, 20, **options)
    at_once = model.train().estimate_training_bytes(BATCH)["workspace"]
    monkeypatch.setattr(passes, "ROWS_AT_ONCE", 197)
    assert model.estimate_training_bytes(BATCH)["workspace"] < 0.8 * at_once
    assert_estimated(model)


@pytest.mark.parametrize("memory", POLICIES)
def test_estimate_with_prompts_of_each_image(memory: str) -> None:
    vit = tiny_vit(dtype=torch.float32, **VIT)
    options = dict(backend="triton", dtype=torch.bfloat16, prompt_dropout=0.1)
    assert_estimated(PromptedViT(vit, CLASSES, 20, memory=memory, **options))


@pytest.mark.parametrize("memory", POLICIES)
@pytest.mark.parametrize("eva", [{}, dict(swiglu_mlp=True, scale_mlp=True)], ids=["gelu", "swiglu_and_norm"])
def test_estimate_of_a_rotary_backbone(eva: dict, memory: str) -> None:
    vit = tiny_eva(**EVA, **eva).float()
    assert_estimated(PromptedViT(vit, CLASSES, 20, backend="triton", dtype=torch.bfloat16, memory=memory))


@pytest.mark.parametrize("prompt_type", ["deep", "shallow"])
@pytest.mark.parametrize("memory", POLICIES)
def test_estimate_with_relative_position_bias(memory: str, prompt_type: str) -> None:
    beit = tiny_beit(torch.float32, **VIT, global_pool="token")
    options = dict(backend="triton", dtype=torch.bfloat16, prompt_type=prompt_type)
    assert_estimated(PromptedViT(beit, CLASSES, 20, memory=memory, **options))


@pytest.mark.parametrize("prompt_type", ["deep", "shallow"])
@pytest.mark.parametrize("memory", POLICIES)
def test_estimate_of_a_swin(memory: str, prompt_type: str) -> None:
    swin = tiny_swin(torch.float32, img_size=112, patch_size=2, embed_dim=64, window_size=7)
    options = dict(backend="triton", dtype=torch.bfloat16, prompt_type=prompt_type)
    assert_estimated(PromptedSwin(swin, CLASSES, 20, memory=memory, **options))
