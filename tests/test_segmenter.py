"""Patch tokens and the segmenter on them: against concatenation and the plain SETR-PUP head in float64."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
from concatenation import ConcatenatedViT, relative_error
from definitions import gradient
from kept_bytes import KeptBytes
from tiny import random_batch, tiny_beit, tiny_eva, tiny_vit
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from vpt_fast import LinearProbe, PromptedConvNet, PromptedSegmenter, PromptedViT, load_pretrained
from vpt_fast.engine.policy import POLICIES
from vpt_fast.segmenter import ENCODERS, UpsamplingHead
from vpt_fast.tuning.adapter import AdapterTuning
from vpt_fast.tuning.bias import PromptAndBiasTuning
from vpt_fast.tuning.full import FullTuning

CLASSES = 5
SETTINGS = {
    "deep": dict(num_prompts=7),
    "shallow": dict(num_prompts=7, prompt_type="shallow"),
    "gap_flow": dict(num_prompts=3, prompt_layers=[0, 2]),
    "first_drop": dict(num_prompts=1, prompt_layers=1, after_prompts="drop"),
    "add": dict(prompt_location="add"),
    "pixels": dict(num_prompts=2, prompt_location="prepend-pixel", prompt_type="shallow"),
}
BACKBONES = {
    "plain": lambda: tiny_vit(),
    "ragged": lambda: tiny_vit(img_size=(24, 40), reg_tokens=2, init_values=0.1, qk_norm=True),
    "no_prefix": lambda: tiny_vit(class_token=False, global_pool="avg"),
    "rotary": lambda: tiny_eva(),
    "biased": lambda: tiny_beit(),
}


def tokens_of_concatenation(model: ConcatenatedViT, images: Tensor, blocks: list[int]) -> list[Tensor]:
    """Patches after `blocks`, then the image's own tokens after the final norm."""
    found: list[Tensor] = []
    prefix, num_patches = model.vit.num_prefix_tokens, model.vit.patch_embed.num_patches
    modules = [*(model.vit.blocks[i] for i in blocks), model.vit.norm]
    hooks = [m.register_forward_hook(lambda _, __, out: found.append(out)) for m in modules]
    model(images)
    for hook in hooks:
        hook.remove()
    *tokens, last = found  # (B, prefix tokens, prompts where there are some, patches; d)
    return [
        *(x[:, -num_patches:] for x in tokens),
        torch.cat((last[:, :prefix], last[:, -num_patches:]), dim=1),
    ]


@pytest.mark.parametrize("backbone", BACKBONES.values(), ids=BACKBONES)
@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_tokens_and_their_gradients_are_those_of_concatenation(setting: dict, backbone) -> None:
    vit = backbone()
    model = PromptedViT(vit, CLASSES, **setting).double()
    wanted = ConcatenatedViT(vit, CLASSES, **setting).double()
    wanted.load_trainables(model.trainable_state_dict())
    images, _ = random_batch(model)
    blocks = [0, 2]
    got = [*model.patch_tokens(images, blocks), model.forward_features(images)]
    exact = tokens_of_concatenation(wanted, images, blocks)
    weights = [torch.randn(x.shape, dtype=x.dtype) for x in exact]
    for tokens in (got, exact):
        sum((x * w).sum() for x, w in zip(tokens, weights, strict=True)).backward()
    for x, y in zip(got, exact, strict=True):
        assert x.shape == y.shape and relative_error(x, y) < 1e-12
    assert relative_error(model.prompts.grad, wanted.prompts.grad) < 1e-11


@pytest.mark.parametrize("backbone", BACKBONES.values(), ids=BACKBONES)
def test_patches_of_other_ways_to_tune_are_timms_own(backbone) -> None:
    vit = backbone()
    images, _ = random_batch(LinearProbe(vit, CLASSES))
    exact = vit.forward_intermediates(images, indices=[1, 2], output_fmt="NLC", intermediates_only=True)
    for kind, settings in ((LinearProbe, {}), (FullTuning, {}), (AdapterTuning, {"reduction": 8})):
        got = kind(vit, CLASSES, **settings).double().patch_tokens(images, [1, 2])
        assert all(relative_error(x, y) < 1e-12 for x, y in zip(got, exact, strict=True)), kind


def test_prompts_reach_the_patches_of_vpt_and_bias() -> None:
    vit = tiny_vit()
    model = PromptAndBiasTuning(vit, CLASSES, 3).double()
    wanted = ConcatenatedViT(vit, CLASSES, 3).double()
    with torch.no_grad():
        wanted.prompts.copy_(model.prompts)
    images, _ = random_batch(model)
    (got,), (exact, _) = model.patch_tokens(images, [1]), tokens_of_concatenation(wanted, images, [1])
    assert relative_error(got, exact) < 1e-12


def test_blocks_after_the_last_one_that_is_read_do_not_run() -> None:
    model = PromptedViT(tiny_vit(), CLASSES, 3).double()
    calls = []
    for index, block in enumerate(model.backbone.blocks):
        block.register_forward_hook(lambda _, __, out, i=index: calls.append((i, out.num_tokens)))
    model.patch_tokens(random_batch(model)[0], [0, 1])
    assert calls == [(0, 17), (1, 16)]  # the last one computes no row of the CLS token


@pytest.mark.parametrize("blocks", [[], [1, 0], [0, 0], [0, 3], [-1]])
def test_blocks_that_are_not_there_are_refused(blocks: list[int]) -> None:
    model = PromptedViT(tiny_vit(), CLASSES, 3).double()
    with pytest.raises(ValueError, match=re.escape(f"blocks: got {blocks}, want rising")):
        model.patch_tokens(random_batch(model)[0], blocks)


def test_convnet_gives_no_patch_tokens() -> None:
    model = PromptedConvNet("resnet10t", CLASSES, 1, img_size=32)
    with pytest.raises(NotImplementedError, match="PromptedConvNet gives no patch tokens"):
        model.patch_tokens(torch.zeros(1, 3, 32, 32), [0])


def plain_head(head: UpsamplingHead, tokens: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """SETR-PUP as it is drawn: each stage upsamples, and the classifier comes last."""
    x = head.norm(tokens).transpose(1, 2).reshape(len(tokens), -1, *grid)
    count = len(head.stages)
    for index, (conv, norm, _) in enumerate(head.stages):
        x = F.conv2d(x, conv.weight, padding=1)
        x = F.relu(F.group_norm(x, norm.num_groups, norm.weight, norm.bias))
        shape = [round(p * (n / p) ** ((index + 1) / count)) for p, n in zip(grid, size, strict=True)]
        x = F.interpolate(x, shape, mode="bilinear", align_corners=False)
    return F.conv2d(x, head.classifier.weight, head.classifier.bias)


@pytest.mark.parametrize(
    ("grid", "patch", "stages"), [((3, 5), 16, 4), ((2, 3), 14, 4), ((4, 4), 4, 1)], ids=str
)
def test_head_equals_the_plain_one_with_its_classifier_last(grid, patch, stages) -> None:
    torch.manual_seed(0)
    head = UpsamplingHead(12, CLASSES, 8, stages, torch.device("cpu")).double()
    nn.init.normal_(head.classifier.bias)
    size = grid[0] * patch, grid[1] * patch
    tokens = torch.randn(2, math.prod(grid), 12, dtype=torch.float64)
    got, exact = head(tokens, grid, size), plain_head(head, tokens, grid, size)
    assert got.shape == (2, CLASSES, *size) and relative_error(got, exact) < 1e-12
    grad = torch.randn_like(exact)
    of_tokens = (gradient(f, tokens, grad) for f in (
        lambda x: head(x, grid, size), lambda x: plain_head(head, x, grid, size)
    ))  # fmt: skip
    assert relative_error(*of_tokens) < 1e-11


def test_stages_of_16_pixel_patches_double() -> None:
    head = UpsamplingHead(8, CLASSES, 4, 4, torch.device("cpu"))
    sides = []
    for stage in head.stages:
        stage.register_forward_hook(lambda _, __, out: sides.append(out.shape[-1]))
    head(torch.zeros(1, 9, 8), (3, 3), (48, 48))
    assert sides == [3, 6, 12, 24]


def make(method: str, dtype: torch.dtype = torch.float32, **settings) -> PromptedSegmenter:
    if method.startswith("vpt"):
        settings = {"num_prompts": 3} | settings
    model = PromptedSegmenter(tiny_vit(dtype), CLASSES, method, head_channels=8, **settings)
    return model.to(dtype)


@pytest.mark.parametrize("method", ENCODERS)
def test_images_that_are_no_tensor_are_refused(method: str) -> None:
    with pytest.raises(ValueError, match="images: got a list, want a torch.Tensor"):
        make(method)([[0.0]])


@pytest.mark.parametrize("method", ENCODERS)
def test_everything_that_is_trained_and_nothing_else_has_a_gradient(method: str) -> None:
    model = make(method).train()
    images, _ = random_batch(model, dtype=torch.float32)
    sum(logits.square().mean() for logits in model(images)).backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    trained = {name.split(".")[0] for name in model.trainable_state_dict()}
    own = {"head", "aux_heads"} if method == "linear" else {"head", "aux_heads", "encoder"}
    assert trained == own


@pytest.mark.parametrize("method", ENCODERS)
def test_saved_segmenter_gives_the_same_logits_and_settings(method: str, tmp_path) -> None:
    model = make(method, aux_blocks=[1]).eval()
    with torch.no_grad():
        for tensor in model.trainable_state_dict().values():
            tensor += 0.1
    model.save_pretrained(tmp_path)
    vit = tiny_vit(torch.float32, seed=0 if method != "full" else 9)  # full stores all that is read
    again = load_pretrained(tmp_path, vit).eval()
    images, _ = random_batch(model, dtype=torch.float32)
    assert type(again) is PromptedSegmenter and again.config == model.config
    assert torch.equal(again(images), model(images))


def test_auxiliary_heads_run_in_training_alone() -> None:
    model = make("vpt-deep")
    images, _ = random_batch(model, dtype=torch.float32)
    assert model.aux_blocks == (0, 1)  # of 3 blocks, whose shares of the depth are SETR's
    logits, *aux = model.train()(images)
    assert len(aux) == 2 and {x.shape for x in aux} == {(2, CLASSES, 32, 32)}
    assert torch.equal(model.eval()(images), logits)
    assert len(make("linear", aux_blocks=()).train()(images)) == 1


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")  # that tracing is deprecated, and that shapes are taken for constants
def test_jit_trace_gives_the_logits() -> None:
    model = make("linear").eval()
    images, _ = random_batch(model, dtype=torch.float32)
    traced = torch.jit.trace(model, images, check_trace=False)
    assert torch.equal(traced(images + 1), model(images + 1))


def test_last_block_computes_patch_rows_alone() -> None:
    """The operations of the blocks are those of PromptedViT with pool="image", whose closed form is known."""
    model = make("vpt-deep", aux_blocks=()).eval()
    pooled = PromptedViT(tiny_vit(torch.float32), CLASSES, 3, pool="image").eval()
    images, _ = random_batch(model, dtype=torch.float32)
    with FlopCounterMode(display=False) as counter:
        model.encoder.patch_tokens(images, [2])
    with FlopCounterMode(display=False) as other:
        pooled(images)
    assert counter.get_total_flops() == other.get_total_flops() - 2 * 2 * 32 * CLASSES


def test_estimate_is_the_same_in_inference_mode() -> None:
    model = make("vpt-deep")
    expected = model.estimate_training_bytes(2)
    with torch.inference_mode():
        assert model.estimate_training_bytes(2) == expected


@pytest.mark.parametrize("memory", ["exact", "recompute"])
def test_estimate_counts_what_blocks_heads_and_loss_keep(memory: str) -> None:
    model = make("vpt-deep", memory=memory).train()
    images, _ = random_batch(model, dtype=torch.float32)
    labels = torch.zeros(2, 32, 32, dtype=torch.int64)
    with KeptBytes(model, images, labels) as kept:
        losses = [F.cross_entropy(logits, labels) for logits in model(images)]
    assert len(losses) == 3
    # The labels, which the estimate counts, are the batch's own.
    estimate = model.estimate_training_bytes(2)["kept"] - labels.nbytes
    assert estimate == pytest.approx(kept.total, rel=1e-3)


def test_memory_that_is_changed_is_the_encoders() -> None:
    model = make("vpt-deep").train()
    kept = {}
    for memory in ("exact", "recompute"):
        model.memory = memory
        assert (model.memory, model.encoder.memory) == (memory, memory)
        kept[memory] = model.estimate_training_bytes(2)["kept"]
    assert kept["recompute"] < kept["exact"]
    with pytest.raises(ValueError, match="memory: got 'recompute' with LinearProbe"):
        make("linear").memory = "recompute"


def test_auto_policy_leaves_room_for_the_heads(monkeypatch) -> None:
    model = make("vpt-deep", memory="auto").train()
    blocks = sum(model.encoder._step_bytes(2, 17, torch.float32, POLICIES["exact"]))
    monkeypatch.setattr("vpt_fast.classifier.free_bytes", lambda device: int(1.2 * blocks))
    assert model.encoder.memory_policy(2) != "exact"
    model.encoder.bytes_beside = 0
    model.encoder._chosen.clear()
    assert model.encoder.memory_policy(2) == "exact"


def test_auto_policy_leaves_room_for_the_heads_of_larger_images(monkeypatch) -> None:
    vit = tiny_vit(torch.float32, dynamic_img_size=True)
    encoder = PromptedSegmenter(vit, CLASSES, num_prompts=3, head_channels=8, memory="auto").encoder
    larger = 1 + 4 * 16
    blocks = sum(encoder._step_bytes(2, larger, torch.float32, POLICIES["exact"]))
    enough = blocks + 2 * 4 * encoder.bytes_beside
    for share, is_exact in ((0.99, False), (1.01, True)):
        encoder._chosen.clear()
        free = int(share * enough / 0.9)
        monkeypatch.setattr("vpt_fast.classifier.free_bytes", lambda device, free=free: free)
        assert (encoder.memory_policy(2, larger) == "exact") == is_exact


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(method="lora"), "method: got 'lora', want one of 'vpt-deep', 'vpt.bias', 'linear', 'bias'"),
        (dict(method=["full"]), r"method: got \['full'\], want one of"),
        (dict(num_classes=0), "num_classes: got 0"),
        (dict(head_channels=0), "head_channels: got 0"),
        (dict(pool="cls"), "pool: got 'cls' with a segmenter, want None"),
        (dict(prompt_type="shallow"), "prompt_type: got 'shallow' with a segmenter, want 'deep'"),
        (dict(prompt_location="pad"), "prompt_location: got 'pad' with a segmenter"),
        (dict(aux_blocks=[2]), r"aux_blocks: got \[2\], want rising block indices below 2"),
        (dict(aux_blocks=[1.0]), r"aux_blocks: got \[1.0\], want rising block indices below 2"),
        (dict(aux_blocks=[1, 0]), r"aux_blocks: got \[1, 0\], want rising block indices below 2"),
        (dict(aux_blocks=1), "aux_blocks: got 1, want rising block indices below 2"),
        (dict(backbone=tiny_vit(patch_drop_rate=0.5)), "patch_drop_rate leaves patches out"),
        (dict(backbone=tiny_vit(dynamic_img_pad=True, dynamic_img_size=True)), "dynamic_img_pad pads images"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_bad_arguments_are_named(settings: dict, message: str) -> None:
    wanted = {"backbone": tiny_vit(), "num_classes": CLASSES, "num_prompts": 3} | settings
    with pytest.raises(ValueError, match=message):
        PromptedSegmenter(**wanted)


def test_pool_that_is_given_as_it_must_be_is_taken() -> None:
    assert PromptedSegmenter(tiny_vit(), CLASSES, "linear", pool=None).pool is None


@pytest.mark.parametrize(
    "change", [{}, {"method": "lora"}, {"method": ["full"]}], ids=["none", "lora", "list"]
)
def test_file_without_a_method_that_there_is_is_named(change: dict, tmp_path) -> None:
    PromptedSegmenter(tiny_vit(), CLASSES, "full", head_channels=8).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    settings = json.loads(path.read_text())
    del settings["options"]["method"]
    settings["options"] |= change
    path.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=f"{tmp_path}.*config.json describes a model that cannot be built"):
        load_pretrained(tmp_path, tiny_vit())


def test_heads_of_vit_l_have_as_many_parameters_as_the_docs_say() -> None:
    with torch.device("meta"):
        model = PromptedSegmenter("vit_large_patch16_384", 150, "linear", img_size=512)
    assert model.aux_blocks == (9, 14, 19)
    docs = Path(__file__).parents[1] / "docs" / "segmentation.md"
    assert f"heads have {model.num_trainable_parameters:,} parameters" in docs.read_text()


def test_position_embedding_is_resampled_for_a_larger_image() -> None:
    model = PromptedSegmenter("vpt_fast_demo", CLASSES, "linear", head_channels=8, img_size=48).eval()
    assert model.image_size == (48, 48)
    assert model(torch.zeros(1, 3, 48, 48)).shape == (1, CLASSES, 48, 48)
