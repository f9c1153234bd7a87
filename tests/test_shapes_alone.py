"""Models on tensors without values: the shapes of outputs and gradients, on meta and of fake tensors."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import random_batch, tiny_beit, tiny_convnet, tiny_eva, tiny_swin, tiny_vit
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vpt_fast import LinearProbe, PromptedConvNet, PromptedSegmenter, PromptedSwin, PromptedViT
from vpt_fast.engine.policy import MEMORY
from vpt_fast.tuning.partial import PartialTuning

CLASSES = 5
FLOAT = torch.float32
MODELS = {
    **{
        memory: lambda memory=memory: PromptedViT(tiny_vit(FLOAT, qk_norm=True), CLASSES, 4, memory=memory)
        for memory in MEMORY
    },
    "eva": lambda: PromptedViT(tiny_eva(FLOAT, scale_mlp=True, swiglu_mlp=True), CLASSES, 4, "shallow"),
    "beit": lambda: PromptedViT(tiny_beit(FLOAT), CLASSES, 4, "shallow"),
    "padded Swin": lambda: PromptedSwin(tiny_swin(FLOAT, img_size=40), CLASSES, 4, memory="compact"),
    "ConvNet": lambda: PromptedConvNet(tiny_convnet("resnet10t").float(), CLASSES, 2),
    "segmenter": lambda: PromptedSegmenter(tiny_vit(FLOAT), CLASSES, num_prompts=4, head_channels=8),
    "linear": lambda: LinearProbe(tiny_vit(FLOAT), CLASSES),
    "partial": lambda: PartialTuning(tiny_vit(FLOAT), CLASSES),
}


def shapes(model: nn.Module, images: torch.Tensor) -> list[torch.Size]:
    """Of the outputs, and of the gradients of what is trained."""
    outputs = model(images)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    sum(output.sum() for output in outputs).backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    return [tensor.shape for tensor in (*outputs, *gradients)]


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_shapes_on_the_meta_device_are_those_on_the_cpu(build) -> None:
    model = build()
    images, _ = random_batch(model, dtype=FLOAT)
    meta = copy.deepcopy(model).to("meta")
    assert shapes(meta, images.to("meta")) == shapes(model, images)


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_shapes_of_fake_tensors_are_those_of_real_ones(build) -> None:
    model = build()
    images, _ = random_batch(model, dtype=FLOAT)
    expected = shapes(copy.deepcopy(model), images)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        assert shapes(model, fake.from_tensor(images)) == expected


def test_model_built_on_the_meta_device_runs_there_under_autocast() -> None:
    with torch.device("meta"), torch.autocast("cpu", dtype=torch.bfloat16):
        model = PromptedViT("vit_tiny_patch16_224", CLASSES, 4)
        assert model(torch.empty(2, 3, 224, 224)).shape == (2, CLASSES)
