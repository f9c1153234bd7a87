"""Whole models on a CUDA device: float64's numbers, within what plain low precision makes, and memory."""

from __future__ import annotations

import gc

import pytest
import timm
import torch
from concatenation import ConcatenatedViT, image_by_image, relative_error
from low_precision import CLASSES, assert_no_worse_than_concatenation, gradients, vits
from tiny import random_batch, tiny_vit
from torch import nn

from vpt_fast import PromptedViT
from vpt_fast.engine.policy import POLICIES

pytestmark = pytest.mark.gpu

SETTINGS = {
    "deep": dict(num_prompts=50),
    "shallow": dict(num_prompts=50, prompt_type="shallow"),
    "image_and_prompt_pool": dict(num_prompts=7, pool="image_and_prompts"),
    "first_drop": dict(num_prompts=7, prompt_layers=1, after_prompts="drop"),
    "key_value": dict(num_prompts=50, prompt_location="key-value"),
    "add": dict(prompt_location="add"),
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_float64_on_cuda_equals_concatenation(settings: dict) -> None:
    vit = tiny_vit(img_size=40).cuda()
    model = PromptedViT(vit, CLASSES, **settings).double()
    plain = ConcatenatedViT(vit, CLASSES, **settings).double().load_trainables(model.trainable_state_dict())
    images = random_batch(model, 3, CLASSES)[0].cuda()
    actual, expected = gradients(model, images), gradients(plain, images)
    for name, gradient in expected.items():
        assert relative_error(actual[name], gradient) < 1e-9, name


@pytest.mark.parametrize("backend", ["triton", "triton_fused_mlp", "torch"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_low_precision_error_is_at_most_that_of_concatenation(
    settings: dict, dtype: torch.dtype, backend: str
) -> None:
    assert_no_worse_than_concatenation(vits, 8, device="cuda", dtype=dtype, backend=backend, **settings)


LARGE = {
    "vit_base_patch16_224": dict(depth=4),
    # Narrow, their head dims still 80 and 72.
    "vit_huge_patch14_224": dict(depth=3, embed_dim=320, num_heads=4),
    "vit_so400m_patch14_siglip_gap_224": dict(depth=3, embed_dim=288, num_heads=4),
}
BEIT = "beitv2_base_patch16_224"


def large(name: str) -> nn.Module:
    torch.manual_seed(0)
    vit = timm.create_model(name, num_classes=0, **LARGE.get(name, dict(depth=3)))
    for key, parameter in vit.named_parameters():
        if "relative_position" in key:  # zero in timm's initialisation
            nn.init.normal_(parameter)
    return vit.cuda()


VARIANTS = {
    "triton": dict(backend="triton"),
    "bfloat16_residual": dict(backend="triton", residual_dtype=torch.bfloat16),
    "fused_mlp": dict(backend="triton_fused_mlp"),
}


@pytest.mark.parametrize(
    ("name", "variant"), [*((name, variant) for name in LARGE for variant in VARIANTS), (BEIT, "triton")]
)
@pytest.mark.parametrize("memory", POLICIES)
def test_gradients_of_large_models_in_bfloat16(name: str, memory: str, variant: str) -> None:
    """Error from float64 at most 1.25 times that of concatenation in bfloat16."""
    vit = large(name)
    exact = PromptedViT(vit, CLASSES, 100, backend="torch").double()
    state = {key: t.clone() for key, t in exact.trainable_state_dict().items()}
    images = random_batch(exact, 4, CLASSES, torch.float32)[0].cuda()
    expected = gradients(exact, images.double())
    fast = PromptedViT(vit, CLASSES, 100, dtype=torch.bfloat16, memory=memory, **VARIANTS[variant])
    fast.load_trainable_state_dict(state)
    plain = ConcatenatedViT(vit.to(torch.bfloat16), CLASSES, num_prompts=100).load_trainables(state)
    actual, eager = gradients(fast, images), gradients(plain, images)
    for key, gradient in expected.items():
        ours, theirs = relative_error(actual[key], gradient), relative_error(eager[key], gradient)
        assert ours <= 1.25 * theirs, f"{key}: {ours:.2e}, concatenation {theirs:.2e}"


@pytest.mark.parametrize("memory", POLICIES)
def test_prompts_that_are_each_image_s_own_in_bfloat16(memory: str) -> None:
    """Error of their gradient from float64 at most 1.25 times that of concatenation in bfloat16."""
    vit, settings = large("vit_base_patch16_224"), dict(num_prompts=20)
    plain = ConcatenatedViT(vit, CLASSES, **settings).cuda().double()
    fast = PromptedViT(vit, CLASSES, dtype=torch.bfloat16, memory=memory, **settings)
    plain.load_trainables(fast.trainable_state_dict())
    eager = ConcatenatedViT(vit.to(torch.bfloat16), CLASSES, **settings)
    eager.load_trainables(fast.trainable_state_dict())
    images = random_batch(fast, 4, CLASSES, torch.float32)[0].cuda()
    prompts = torch.randn(4, *fast.prompts.shape, device="cuda")
    weights = torch.randn(4, CLASSES, device="cuda", dtype=torch.float64)
    found = []
    for dtype, run in (
        (torch.float64, lambda given: image_by_image(plain, images.double(), [given])),
        (torch.float32, lambda given: fast(images, given)),
        (torch.float32, lambda given: image_by_image(eager, images, [given])),
    ):
        given = prompts.to(dtype).requires_grad_()
        logits = run(given)
        found.append(torch.autograd.grad((logits * weights.to(logits.dtype)).sum(), given)[0])
    exact, ours, theirs = found
    assert relative_error(ours, exact) <= 1.25 * relative_error(theirs, exact)


@pytest.mark.parametrize("memory", POLICIES)
def test_same_bits_when_run_again(memory: str) -> None:
    model = PromptedViT(large("vit_base_patch16_224"), CLASSES, 50, dtype=torch.bfloat16, memory=memory)
    images = random_batch(model, 8, CLASSES, torch.float32)[0].cuda()
    first, second = gradients(model, images), gradients(model, images)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("memory", POLICIES)
def test_estimate_is_within_a_tenth_of_the_peak(memory: str, variant: dict) -> None:
    vit = large("vit_base_patch16_224")
    model = PromptedViT(vit, CLASSES, 100, dtype=torch.bfloat16, memory=memory, **variant)
    images = random_batch(model, 64, CLASSES, torch.float32)[0].cuda()
    gradients(model, images)  # kernels compiled, cuBLAS's workspace there
    model.zero_grad()
    gc.collect()  # what tests before this one left, which would be let go in between
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    gradients(model, images)
    peak = torch.cuda.max_memory_allocated() - before
    step = model.estimate_training_bytes(64)
    assert step["kept"] + step["workspace"] == pytest.approx(peak, rel=0.1)
