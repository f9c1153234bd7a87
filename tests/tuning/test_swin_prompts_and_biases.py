"""Deep prompts and biases of a Swin: against concatenation in every window, what is kept, and storing."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from concatenated_swin import ConcatenatedSwin
from concatenation import assert_same_step, relative_error, step
from kept_bytes import KeptBytes
from test_swin import SIZES, TOLERANCE
from timm.models.swin_transformer import SwinTransformer
from tiny import random_batch, tiny_swin

from vpt_fast import load_pretrained
from vpt_fast.tuning.bias import PromptAndBiasSwinTuning

CLASSES, M = 5, 3
POOLS = (None, "image", "prompts", "image_and_prompts")


def make(
    swin: SwinTransformer, num_prompts: int = M, dtype: torch.dtype = torch.float64, **settings: Any
) -> PromptAndBiasSwinTuning:
    """With every trained tensor moved from its start."""
    model = PromptAndBiasSwinTuning(swin, CLASSES, num_prompts, **settings).to(dtype)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in model.trainable_state_dict().values():
            tensor += 0.1 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(dtype)
    return model.eval()


def in_definition(name: str) -> str:
    return name.replace("backbone.stem.", "swin.")


def define(model: PromptAndBiasSwinTuning, swin: SwinTransformer) -> ConcatenatedSwin:
    """Concatenation in every window with the model's trained tensors, and as many of them trained."""
    settings = {k: v for k, v in model.config.options.items() if k.startswith("prompt_")}
    defined = ConcatenatedSwin(swin, CLASSES, model.prompts[0].shape[1], pool=model.pool, **settings).double()
    for name, parameter in defined.swin.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
    return defined.load_trainables({in_definition(k): v for k, v in model.trainable_state_dict().items()})


def assert_as_defined(model: PromptAndBiasSwinTuning, swin: SwinTransformer, batch_size: int = 2) -> None:
    images, labels = random_batch(model, batch_size, CLASSES)
    defined, results = define(model, swin).train(model.training), []
    for either in (model, defined):
        torch.manual_seed(0)  # both draw a mask for each set of prompts, in order
        results.append(step(either, images, labels))
    found, wanted = results
    gradients = {in_definition(name): gradient for name, gradient in found.gradients.items()}
    assert_same_step(dataclasses.replace(found, gradients=gradients), wanted, TOLERANCE)


@pytest.mark.parametrize("size", SIZES)
def test_logits_and_gradients_are_those_of_concatenation(size: str) -> None:
    swin = tiny_swin(**SIZES[size])
    assert_as_defined(make(swin), swin)


@pytest.mark.parametrize("pool", POOLS[1:])
def test_logits_and_gradients_are_those_of_concatenation_with_pool(pool: str) -> None:
    swin = tiny_swin(window_size=3)
    assert_as_defined(make(swin, pool=pool), swin)


@pytest.mark.parametrize("num_prompts", [1, 16])  # as many as a window and the last stage have tokens
@pytest.mark.parametrize("batch_size", [1, 3])
def test_any_number_of_prompts_and_images_is_as_concatenation(batch_size: int, num_prompts: int) -> None:
    swin = tiny_swin()
    assert_as_defined(make(swin, num_prompts), swin, batch_size)


@pytest.mark.parametrize("pool", POOLS[1:3])
def test_no_images_give_no_logits_and_gradients_of_zero(pool: str) -> None:
    model = make(tiny_swin(), pool=pool).train()
    images, _ = random_batch(model)
    logits = model(images[:0])
    assert logits.shape == (0, CLASSES)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert not any(gradient.any() for gradient in torch.autograd.grad(logits.sum(), trained))


@pytest.mark.parametrize("per", ["image", "batch"])
def test_prompt_dropout_is_that_of_concatenation(per: str) -> None:
    swin = tiny_swin(drop_path_rate=0.0)
    assert_as_defined(make(swin, prompt_dropout=0.4, prompt_dropout_per=per).train(), swin, 3)


def test_what_is_trained_is_prompts_biases_and_head() -> None:
    swin = tiny_swin()
    biases = {f"backbone.stem.{name}" for name, _ in swin.named_parameters() if name.endswith(".bias")}
    head = {"head.weight", "head.bias"}
    assert make(swin).trainable_state_dict().keys() == biases | head | {"prompts.0", "prompts.1"}


@pytest.mark.parametrize("pool", POOLS)
def test_prompts_are_keys_and_values_alone_where_their_outputs_are_not_read(pool: str | None) -> None:
    model = make(tiny_swin(), pool=pool)
    rows: dict[str, list[int]] = {"norm1": [], "proj": [], "fc1": []}
    for name, module in model.backbone.stem.layers.named_modules():
        seen = rows.get(name.rpartition(".")[2])
        if seen is not None:
            module.register_forward_pre_hook(
                lambda module, args, seen=seen: seen.append(args[0][..., 0].numel())
            )
    model(random_batch(model, 2)[0])
    blocks = [64, 64, 16, 16]  # tokens of an image
    # Of two images, and of prompts once.
    assert rows["norm1"] == [count for tokens in blocks for count in (2 * tokens, M)]
    attended = 16 + (0 if pool == "image" else M)
    assert rows["proj"] == [2 * tokens for tokens in (*blocks[:-1], attended)]
    read = M if pool == "prompts" else attended
    assert rows["fc1"] == [2 * tokens for tokens in (*blocks[:-1], read)]


def test_inputs_of_frozen_linear_layers_are_not_kept() -> None:
    model = make(tiny_swin())
    inputs = []  # the tensors too: memory that was given back could be handed out again
    for name, module in model.backbone.stem.layers.named_modules():
        if name.endswith("norm1"):  # attention's projection takes what it gives
            module.register_forward_hook(lambda module, args, output: inputs.append(output))
        if name.endswith(("proj", "fc1", "fc2", "reduction")):
            module.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    images, _ = random_batch(model)
    with KeptBytes(model, images) as kept:
        model(images)
    assert len(inputs) == 4 * 5 + 1
    assert not any(tensor in kept for tensor in inputs)


@pytest.mark.parametrize("pool", POOLS)
def test_estimate_covers_what_is_kept(pool: str | None) -> None:
    model = make(tiny_swin(torch.float32), dtype=torch.float32, pool=pool)
    images, _ = random_batch(model, dtype=torch.float32)
    with KeptBytes(model, images) as kept:
        model(images)
    assert 0.95 * kept.total <= model.estimate_training_bytes(2)["kept"] <= 1.5 * kept.total


def test_saved_model_gives_the_same_logits_and_settings(tmp_path) -> None:
    swin = tiny_swin(torch.float32)
    model = make(swin, dtype=torch.float32, pool="image", prompt_dropout=0.2, prompt_dropout_per="batch")
    model.save_pretrained(tmp_path)
    again = load_pretrained(tmp_path, swin).eval()
    images, _ = random_batch(model, dtype=torch.float32)
    assert (type(again), again.config) == (type(model), model.config)
    assert torch.equal(again(images), model(images))


def test_image_features_are_what_the_head_is_given() -> None:
    model = make(tiny_swin())
    given: list[torch.Tensor] = []
    model.head.register_forward_pre_hook(lambda module, inputs: given.append(inputs[0]))
    images, _ = random_batch(model)
    model(images)
    assert torch.equal(model.image_features(images), given[0])


@pytest.mark.parametrize("rate", ["drop_path_rate", "proj_drop_rate", "attn_drop_rate", "drop_rate"])
def test_dropout_of_timms_acts_in_training_alone(rate: str) -> None:
    model = make(tiny_swin(**{"drop_path_rate": 0.0, rate: 0.5}))
    images, _ = random_batch(model, 8)
    assert torch.equal(model(images), model(images))
    model.train()
    assert relative_error(model(images), model(images)) > 0.01


def test_prompts_start_within_the_bound_of_the_first_stages_width() -> None:
    model = PromptAndBiasSwinTuning(tiny_swin(), CLASSES, 50)
    bound = (6 / (3 * 4 * 4 + 16)) ** 0.5
    assert [0.9 * bound < stage.abs().max() <= bound for stage in model.prompts] == [True, True]


class OwnFeatures(SwinTransformer):
    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward_features(x)


BAD = {
    "num_prompts": (lambda: make(tiny_swin(), 0), "num_prompts: got 0"),
    "pool": (
        lambda: make(tiny_swin(), pool="cls"),
        "pool: got 'cls' with a SwinTransformer that is trained; want None or 'image' or 'prompts' or",
    ),
    "kind": (lambda: make("vit_tiny_patch16_224"), "'vit_tiny_patch16_224' is not a timm SwinTransformer"),
    "part": (
        lambda: make(OwnFeatures(img_size=32, embed_dim=16, depths=(1,), num_heads=(2,), window_size=4)),
        "backbone: OwnFeatures has its own forward_features",
    ),
}


@pytest.mark.parametrize(("build", "message"), BAD.values(), ids=BAD)
def test_what_there_is_not_is_refused_by_name(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
