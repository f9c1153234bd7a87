"""On a CUDA device (`make gpu`): the same numbers as in float64, within what plain low precision makes."""

from __future__ import annotations

import pytest
import torch
from concatenation import ConcatenatedViT, relative_error
from tiny import random_batch, tiny_vit

from vpt_fast import PromptedViT

pytestmark = pytest.mark.gpu

CLASSES = 5
SETTINGS = {
    "deep": dict(num_prompts=50),
    "shallow": dict(num_prompts=50, prompt_type="shallow"),
    "image_and_prompt_pool": dict(num_prompts=7, pool="image_and_prompts"),
    "first_drop": dict(num_prompts=7, prompt_layers=1, after_prompts="drop"),
    "add": dict(prompt_location="add"),
}


def gradients(model: torch.nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """By name, of a random weighting of the logits: a saturated softmax would multiply one image's error
    by any factor, of one implementation or the other."""
    model.zero_grad()
    logits = model(images)
    generator = torch.Generator().manual_seed(0)
    logits.backward(torch.randn(logits.shape, generator=generator).to(logits))
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_float64_on_cuda_equals_concatenation(settings: dict) -> None:
    vit = tiny_vit(img_size=40).cuda()
    model = PromptedViT(vit, CLASSES, **settings).double()
    plain = ConcatenatedViT(vit, CLASSES, **settings).double().load_trainables(model.trainable_state_dict())
    images = random_batch(model, 3, CLASSES)[0].cuda()
    actual, expected = gradients(model, images), gradients(plain, images)
    for name, gradient in expected.items():
        assert relative_error(actual[name], gradient) < 1e-9, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_low_precision_error_is_at_most_that_of_concatenation(settings: dict, dtype: torch.dtype) -> None:
    """Root mean square over seeds of each gradient's error from float64, within 1.25 times eager's."""
    squares: dict[str, list[float]] = {}
    for seed in range(8):
        vit = tiny_vit(dtype=torch.float32, seed=seed, embed_dim=128, num_heads=2, img_size=64).cuda()
        exact = PromptedViT(vit, CLASSES, **settings)
        state = {name: t.clone() for name, t in exact.trainable_state_dict().items()}
        images = random_batch(exact, 4, CLASSES, torch.float32, seed=seed)[0].cuda()
        expected = gradients(exact.double(), images.double())
        fast = PromptedViT(vit, CLASSES, dtype=dtype, **settings)
        fast.load_trainable_state_dict(state)
        plain = ConcatenatedViT(vit.to(dtype), CLASSES, **settings).load_trainables(state)
        for which, model in enumerate((fast, plain)):
            actual = gradients(model, images)
            for name, gradient in expected.items():
                squares.setdefault(name, [0.0, 0.0])[which] += relative_error(actual[name], gradient) ** 2
    for name, (ours, theirs) in squares.items():
        # the head's bias is the sum of what the logits are given: exact in both
        assert ours**0.5 <= 1.25 * theirs**0.5, f"{name}: {ours**0.5:.2e}, concatenation {theirs**0.5:.2e}"


def test_training_step_runs_under_autocast_and_grad_scaler() -> None:
    model = PromptedViT(tiny_vit(dtype=torch.float32).cuda(), CLASSES, 7).train()
    images, labels = (t.cuda() for t in random_batch(model, 4, CLASSES, torch.float32))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    scaler = torch.amp.GradScaler("cuda")
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.float16):
            loss = torch.nn.functional.cross_entropy(model(images), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
