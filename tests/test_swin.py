"""PromptedSwin: against the official implementation and the plain definition, and what it does not do."""

from __future__ import annotations

import ast
import os
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from concatenated_swin import ConcatenatedSwin
from concatenation import Step, assert_same_step, relative_error, step, training_steps
from given_back import GivenBack
from kept_bytes import KeptBytes
from safetensors import safe_open
from test_dead_work import linear
from timm.layers import RmsNorm
from timm.models.swin_transformer import SwinTransformer, checkpoint_filter_fn
from tiny import random_batch, randomise, tiny_swin
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from vpt_fast.kernels import get_backend

from vpt_fast import LinearProbe, PromptedSwin, load_pretrained, official
from vpt_fast.engine import passes
from vpt_fast.engine import windows as engine_windows
from vpt_fast.engine.policy import POLICIES

GOLDEN_DIR = Path(os.environ.get("VPT_GOLDEN_DIR", Path(__file__).parent / "golden"))
NUM_CLASSES = 5
TOLERANCE = 1e-9  # relative, in float64
# With no file in the folder one test remains, and it fails on the missing file instead of being skipped.
GOLDEN_FILES = sorted(GOLDEN_DIR.glob("swin*.safetensors")) or [GOLDEN_DIR / "no_swin_file.safetensors"]
TYPES = ("deep", "shallow")


def prompted_and_defined(swin: SwinTransformer, **settings: Any) -> tuple[PromptedSwin, ConcatenatedSwin]:
    """Both models in float64 with the same random trainable tensors."""
    prompted = PromptedSwin(swin, NUM_CLASSES, dtype=torch.float64, **settings).double()
    with torch.no_grad():
        randomise(nn.ModuleList([prompted.prompts, prompted.head]), seed=3)
    settings = {name: value for name, value in settings.items() if name != "memory"}
    defined = ConcatenatedSwin(swin, NUM_CLASSES, **settings).double()
    return prompted, defined.load_trainables(prompted.trainable_state_dict())


def assert_as_defined(swin: SwinTransformer, batch_size: int = 2, **settings: Any) -> None:
    prompted, defined = prompted_and_defined(swin, **settings)
    images, labels = random_batch(prompted, batch_size, NUM_CLASSES)
    assert_same_step(step(prompted, images, labels), step(defined, images, labels), TOLERANCE)


class Golden:
    """One file of the official code's results: a SwinTransformer, and its tensors under our names."""

    def __init__(self, path: Path) -> None:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            self.tensors = {name: file.get_tensor(name) for name in file.keys()}
        names = ("img_size", "window_size", "embed_dim", "depths", "num_heads")
        sizes = {name: ast.literal_eval(metadata[name]) for name in names}
        self.swin = SwinTransformer(**sizes, num_classes=0)
        self.swin.load_state_dict(checkpoint_filter_fn(self._under("state:"), self.swin))
        self.prompt_type = "deep" if metadata["deep"] == "True" else "shallow"
        self.num_classes, self.num_prompts = int(metadata["num_classes"]), int(metadata["num_prompts"])

    def _under(self, prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): t for key, t in self.tensors.items() if key.startswith(prefix)}

    def trained(self, prefix: str) -> dict[str, Tensor]:
        official = self._under(prefix)
        stages = [official.pop("prompt_embeddings")]  # of the first block; the others' are stage by stage
        deep = [official.pop(name) for name in sorted(official) if name.startswith("deep_")]
        if deep:
            stages = [torch.cat((stages[0], deep[0])), *deep[1:]]
        ours = {f"prompts.{i}": stage for i, stage in enumerate(stages)}
        ours |= {f"head.{part}": official.pop(f"head.last_layer.{part}") for part in ("weight", "bias")}
        assert not official
        return ours


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("path", GOLDEN_FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize("kind", [PromptedSwin, ConcatenatedSwin])
def test_matches_the_official_implementation(kind: Any, path: Path, dtype: torch.dtype) -> None:
    golden = Golden(path)
    model = kind(golden.swin.to(dtype), golden.num_classes, golden.num_prompts, golden.prompt_type).to(dtype)
    start = {name: t.to(dtype) for name, t in golden.trained("init:").items()}
    (model.load_trainables if kind is ConcatenatedSwin else model.load_trainable_state_dict)(start)
    actual = step(model, golden.tensors["images"].to(dtype), golden.tensors["labels"])
    expected = Step(golden.tensors["logits"], golden.tensors["loss"], golden.trained("grad:"))
    assert_same_step(actual, expected, 2e-5)  # the files were computed in float32


@pytest.mark.parametrize("path", GOLDEN_FILES, ids=lambda path: path.stem)
def test_official_prompts_give_the_official_logits_and_go_back_bit_by_bit(path: Path, tmp_path: Path) -> None:
    golden = Golden(path)
    tensors = {
        name if name.startswith("head.") else f"enc.{name}": tensor
        for name, tensor in golden._under("init:").items()
    }
    torch.save({"model": tensors}, tmp_path / "last_model.pth")
    model = official.import_prompts(tmp_path / "last_model.pth", golden.swin).eval()
    assert relative_error(model(golden.tensors["images"]), golden.tensors["logits"]) < 2e-5
    official.export_prompts(model, tmp_path / "again.pth")
    again = torch.load(tmp_path / "again.pth", weights_only=True)["model"]
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())


SIZES: dict[str, dict[str, Any]] = {
    "whole_windows": {},
    "padded_windows": {"window_size": 3},
    "odd_image": {"img_size": (28, 20), "window_size": 3},
    "oblong_windows": {"window_size": (2, 3)},
    "shift_along_one_side": {"img_size": (32, 16)},
    "one_window": {"window_size": 16},
    "windows_past_the_image": {"window_size": 6, "always_partition": True},
    "one_block_a_stage": {"depths": (1, 1)},
    "three_stages": {"img_size": 36, "depths": (1, 2, 1), "num_heads": (1, 2, 4), "window_size": 2},
    "no_qkv_bias": {"window_size": 3, "qkv_bias": False},
    "rms_norm": {"window_size": 3, "norm_layer": RmsNorm},
    "rates_of_training": {"drop_rate": 0.5, "proj_drop_rate": 0.5, "attn_drop_rate": 0.5},
}


@pytest.mark.parametrize("prompt_type", TYPES)
@pytest.mark.parametrize("size", SIZES)
def test_equals_the_definition(size: str, prompt_type: str) -> None:
    assert_as_defined(tiny_swin(**SIZES[size]), num_prompts=3, prompt_type=prompt_type)


@pytest.mark.parametrize("pool", ["image", "prompts", "image_and_prompts"])
@pytest.mark.parametrize("prompt_type", TYPES)
def test_equals_the_definition_with_pool(prompt_type: str, pool: str) -> None:
    assert_as_defined(tiny_swin(window_size=3), num_prompts=3, prompt_type=prompt_type, pool=pool)


def assert_tokens_as_defined(swin: SwinTransformer, **settings: Any) -> None:
    prompted, defined = prompted_and_defined(swin, num_prompts=3, **settings)
    images, _ = random_batch(prompted, 2, NUM_CLASSES)
    got, (exact, _) = prompted.forward_features(images), defined.outputs(images)
    weights = torch.randn(exact.shape, dtype=exact.dtype)
    for tokens in (got, exact):
        (tokens * weights).sum().backward()
    assert got.shape == exact.shape and relative_error(got, exact) < TOLERANCE
    for prompts, wanted in zip(prompted.prompts, defined.prompts, strict=True):
        assert relative_error(prompts.grad, wanted.grad) < TOLERANCE


@pytest.mark.parametrize("prompt_type", TYPES)
@pytest.mark.parametrize("size", SIZES)
def test_tokens_and_their_gradients_are_those_of_the_definition(size: str, prompt_type: str) -> None:
    assert_tokens_as_defined(tiny_swin(**SIZES[size]), prompt_type=prompt_type)


@pytest.mark.parametrize("pool", ["image", "prompts"])
@pytest.mark.parametrize("prompt_type", TYPES)
def test_pool_changes_no_token(prompt_type: str, pool: str) -> None:
    assert_tokens_as_defined(tiny_swin(window_size=3), prompt_type=prompt_type, pool=pool)


def test_tokens_have_the_shape_and_dtype_of_timms() -> None:
    swin = tiny_swin(img_size=(32, 16)).float().eval()
    images = torch.randn(2, 3, 32, 16)
    wanted = swin.forward_features(images)
    got = PromptedSwin(swin, NUM_CLASSES, 3).forward_features(images)
    assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype)
    got = PromptedSwin(swin, NUM_CLASSES, 3, dtype=torch.bfloat16).forward_features(images)
    assert (got.shape, got.dtype) == (wanted.shape, torch.float32)  # the residual stream's
    with pytest.raises(ValueError, match="images: got 16x32, want 32x16"):
        PromptedSwin(swin, NUM_CLASSES, 3).forward_features(images.mT)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.torch.jit.script")  # PyTorch's own use of it
@pytest.mark.parametrize("prompt_type", TYPES)  # shallow ones are merged, too
def test_forward_mode_derivative_of_the_prompts_is_that_of_the_definition(prompt_type: str) -> None:
    swin = tiny_swin()
    model = PromptedSwin(swin, NUM_CLASSES, 3, prompt_type).double()
    defined = ConcatenatedSwin(swin, NUM_CLASSES, 3, prompt_type).double()
    defined.load_trainables(model.trainable_state_dict())
    images, _ = random_batch(model)
    tangents = []
    for each in (model, defined):
        with fwAD.dual_level():
            given = {"prompts.0": fwAD.make_dual(each.prompts[0], torch.ones_like(each.prompts[0]))}
            logits = torch.func.functional_call(each, given, (images,))
            tangents.append(fwAD.unpack_dual(logits).tangent)
    assert relative_error(*tangents) < 1e-11


@pytest.mark.parametrize("num_prompts", [1, 16])  # as many as a window and the last stage have tokens
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("prompt_type", TYPES)
def test_equals_the_definition_with_any_number_of_prompts(
    prompt_type: str, batch_size: int, num_prompts: int
) -> None:
    assert_as_defined(tiny_swin(), batch_size, num_prompts=num_prompts, prompt_type=prompt_type)


@pytest.mark.parametrize("grid", [(3, 3), (1, 3), (3, 1)], ids=str)
@pytest.mark.parametrize("prompt_type", TYPES)
def test_gradient_ends_at_places_without_a_token_where_a_shift_moves_none(
    prompt_type: str, grid: tuple[int, int]
) -> None:
    # Shifted by three, as many tokens as there are or a multiple: both blocks have one order, with holes.
    swin = tiny_swin(
        img_size=(4 * grid[0], 4 * grid[1]), depths=(3,), num_heads=(2,), window_size=7, always_partition=True
    )
    assert_as_defined(swin, num_prompts=3, prompt_type=prompt_type)


@pytest.mark.parametrize("per", ["image", "batch"])
@pytest.mark.parametrize("prompt_type", TYPES)
def test_prompt_dropout(prompt_type: str, per: str) -> None:
    prompted, defined = prompted_and_defined(
        tiny_swin(), num_prompts=3, prompt_type=prompt_type, prompt_dropout=0.4, prompt_dropout_per=per
    )
    images, labels = random_batch(prompted, 3, NUM_CLASSES)
    assert_same_step(*training_steps((prompted, defined), images, labels), TOLERANCE)


@pytest.mark.parametrize("prompt_type", TYPES)
def test_an_image_does_not_depend_on_the_others_of_its_batch(prompt_type: str) -> None:
    model, _ = prompted_and_defined(tiny_swin(), num_prompts=3, prompt_type=prompt_type)
    images, _ = random_batch(model, 3)
    alone = torch.cat([model(image.unsqueeze(0)) for image in images])
    assert relative_error(model(images), alone) < TOLERANCE


@pytest.mark.parametrize("prompt_type", TYPES)
@pytest.mark.parametrize(
    ("memory", "tolerance"), [("recompute_mlp", TOLERANCE), ("recompute", TOLERANCE), ("compact", 0.05)]
)
def test_gradients_under_a_memory_policy(memory: str, tolerance: float, prompt_type: str) -> None:
    settings = dict(num_prompts=3, prompt_type=prompt_type)
    prompted, defined = prompted_and_defined(tiny_swin(window_size=3), memory=memory, **settings)
    images, labels = random_batch(prompted, 2, NUM_CLASSES)
    assert_same_step(step(prompted, images, labels), step(defined, images, labels), tolerance)


@pytest.mark.parametrize("prompt_type", TYPES)
def test_blocks_that_run_again_a_few_images_at_a_time(
    prompt_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passes, "ROWS_AT_ONCE", 1)
    settings = dict(num_prompts=3, prompt_type=prompt_type)
    prompted, defined = prompted_and_defined(tiny_swin(window_size=3), memory="recompute", **settings)
    images, labels = random_batch(prompted, 3, NUM_CLASSES)
    assert_same_step(step(prompted, images, labels), step(defined, images, labels), TOLERANCE)


def test_half_precision_is_near() -> None:
    prompted, _ = prompted_and_defined(tiny_swin(), num_prompts=3)
    images, labels = random_batch(prompted, 4, NUM_CLASSES)
    half = PromptedSwin(tiny_swin(torch.float32), NUM_CLASSES, 3, dtype=torch.bfloat16)
    half.load_trainable_state_dict(prompted.trainable_state_dict())
    assert_same_step(step(half, images.float(), labels), step(prompted, images, labels), 0.05)


@pytest.mark.parametrize("size", ["whole_windows", "odd_image"])
def test_linear_probe_equals_the_backbones_own_features(size: str) -> None:
    swin = tiny_swin(**SIZES[size])
    probe = LinearProbe(swin, NUM_CLASSES, dtype=torch.float64).double()
    images, labels = random_batch(probe, 2, NUM_CLASSES)
    actual = step(probe, images, labels)
    features = swin(images)
    assert relative_error(probe.frozen_features(images), features) < TOLERANCE
    assert relative_error(actual.logits, probe.head(features)) < TOLERANCE
    assert actual.gradients.keys() == {"head.weight", "head.bias"}
    assert probe.estimate_training_bytes(2)["workspace"] > 0


# The closed forms below are of tiny_swin's four blocks, with M prompts: B images, W windows of T tokens.
BATCH, M, T, RATIO = 3, 5, 16, 2
BLOCKS = [(16, 2, 4), (16, 2, 4), (32, 4, 1), (32, 4, 1)]  # width, heads, windows


def rows_of(index: int, prompt_type: str) -> tuple[int, int, int]:
    """Sets of prompts that a block projects, prompts whose output is read, tokens."""
    sets = BATCH if prompt_type == "shallow" and index > 0 else 1
    fresh = M if prompt_type == "shallow" or index == 3 else 0
    return sets, fresh, BLOCKS[index][2] * T


def forward_flops(index: int, prompt_type: str) -> int:
    width, _, windows = BLOCKS[index]
    sets, fresh, tokens = rows_of(index, prompt_type)
    rows = tokens + fresh
    total = linear(BATCH * tokens, width, 3 * width) + linear(sets * M, width, 2 * width)
    total += linear(sets * fresh, width, width)
    total += 2 * linear(BATCH * windows * (T + fresh), width, M + T)  # Q Kᵀ and P V, over all heads
    total += linear(BATCH * rows, width, width) + 2 * linear(BATCH * rows, width, RATIO * width)
    return total


def backward_flops(index: int, prompt_type: str) -> int:
    width, _, windows = BLOCKS[index]
    sets, fresh, tokens = rows_of(index, prompt_type)
    rows = tokens + fresh
    total = linear(BATCH * rows, width, width) + 2 * linear(BATCH * rows, width, RATIO * width)
    if index > 0:
        total += 5 * linear(BATCH * windows * (T + fresh), width, M + T)  # S, dP, dQ, dK, dV
        total += linear(BATCH * tokens, 3 * width, width)
    else:
        total += 4 * linear(BATCH * tokens, width, M)  # S, dP, dK, dV over the prompts' columns alone
        total += 3 * linear(BATCH * windows * fresh, width, M + T)  # S, dP, dQ of prompts that go on
        total += 2 * linear(BATCH * windows * fresh, width, M)  # and their share of the prompts' dK, dV
    return total + linear(sets * M, 2 * width, width) + linear(sets * fresh, width, width)


def merge_flops(prompt_type: str) -> int:
    flows = prompt_type == "shallow"  # a prompt's four copies are one
    return linear(BATCH * T, 4 * 16, 32) + flows * linear(BATCH * M, 16, 32)


@pytest.mark.parametrize("prompt_type", TYPES)
def test_operations_equal_the_closed_form(prompt_type: str) -> None:
    model, _ = prompted_and_defined(tiny_swin(), num_prompts=M, prompt_type=prompt_type)
    images, labels = random_batch(model, BATCH)
    head = linear(BATCH, 32, NUM_CLASSES)
    with FlopCounterMode(display=False) as counter:
        loss = F.cross_entropy(model(images), labels)
    embedding = linear(BATCH * 64, 3 * 4 * 4, 16)
    blocks = sum(forward_flops(index, prompt_type) for index in range(4))
    assert counter.get_total_flops() == embedding + blocks + merge_flops(prompt_type) + head
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    blocks = sum(backward_flops(index, prompt_type) for index in range(4))
    assert counter.get_total_flops() == blocks + merge_flops(prompt_type) + 2 * head


def kept_numbers(prompt_type: str) -> int:
    """Numbers that blocks and merging keep for backward."""
    total = BATCH * T * (4 * 16 + 1)  # merging: x̂ of four tokens side by side, and rstd
    if prompt_type == "shallow":
        total += BATCH * M * (16 + 1)
    for index, (width, heads, windows) in enumerate(BLOCKS):
        sets, fresh, tokens = rows_of(index, prompt_type)
        if index > 0:
            total += BATCH * tokens * (width + 1)  # x̂1, rstd
        if index > 0 or fresh:
            total += BATCH * tokens * 2 * width  # K, V
        total += (
            BATCH * (tokens + fresh) * 2 * width + BATCH * (tokens + windows * fresh) * heads
        )  # Q, O, lse
        total += BATCH * (tokens + fresh) * (width + 1 + RATIO * width)  # x̂2, rstd, the MLP's pre-activation
        total += sets * M * (width + 1 + 2 * width)  # x̂, rstd, K, V of the prompts
    return total


@pytest.mark.parametrize("prompt_type", TYPES)
def test_bytes_kept_equal_the_closed_form_and_the_estimate(prompt_type: str) -> None:
    model, _ = prompted_and_defined(tiny_swin(), num_prompts=M, prompt_type=prompt_type)
    images, _ = random_batch(model, BATCH)
    with KeptBytes(model, images) as kept:
        model(images)
    after = (T + M) * (32 + 2) + 32  # the rows that the final norm is given, mean and rstd; the head's input
    assert kept.total == (kept_numbers(prompt_type) + BATCH * after) * 8
    assert model.estimate_training_bytes(BATCH)["kept"] == kept.total


@pytest.mark.parametrize("memory", ["compact", "recompute_mlp", "recompute"])
@pytest.mark.parametrize(
    "settings",
    [{"pool": "image"}, {"pool": "prompts"}, {"prompt_type": "shallow"}],
    ids=["image_pool", "prompt_pool", "shallow"],
)
def test_estimate_of_kept_bytes(settings: dict[str, Any], memory: str) -> None:
    model, _ = prompted_and_defined(tiny_swin(window_size=3), num_prompts=M, memory=memory, **settings)
    images, _ = random_batch(model, BATCH)
    with KeptBytes(model, images) as kept:
        model(images)
    assert kept.total == model.estimate_training_bytes(BATCH)["kept"]


def test_prompts_that_flow_are_in_the_estimate_of_recompute_for_a_single_image() -> None:
    model, _ = prompted_and_defined(tiny_swin(), num_prompts=M, prompt_type="shallow", memory="recompute")
    images, _ = random_batch(model, 1)
    with KeptBytes(model, images) as kept:
        model(images)
    assert kept.total == model.estimate_training_bytes(1)["kept"]


def test_auto_memory_takes_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = PromptedSwin(tiny_swin(torch.float32), NUM_CLASSES, 3, memory="auto")
    for free, expected in ((10**12, "exact"), (0, "recompute")):
        monkeypatch.setattr("vpt_fast.classifier.free_bytes", lambda device, free=free: free)
        assert model.memory_policy(1 + (free == 0)) == expected


NAME = "swin_tiny_patch4_window7_224"
SMALL = dict(img_size=32, embed_dim=16, depths=[1, 1], num_heads=[2, 4], window_size=4)


@pytest.mark.parametrize("model", ["deep", "shallow", "probe"])
def test_saved_model_is_the_same_when_loaded(model: str, tmp_path: Path) -> None:
    swin = tiny_swin(torch.float32)
    if model == "probe":
        saved: Any = LinearProbe(swin, NUM_CLASSES)
    else:
        saved = PromptedSwin(swin, NUM_CLASSES, 3, model, prompt_dropout=0.2, pool="prompts")
    saved.save_pretrained(tmp_path)
    loaded = load_pretrained(tmp_path, swin)
    assert (type(loaded), loaded.config) == (type(saved), saved.config)
    images, _ = random_batch(saved, dtype=torch.float32)
    assert torch.equal(loaded.eval()(images), saved.eval()(images))
    with pytest.raises(ValueError, match="backbone: its weights are not those"):
        load_pretrained(tmp_path, tiny_swin(torch.float32, seed=1))


def test_backbone_by_name_is_the_same_as_built() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        named = PromptedSwin(NAME, NUM_CLASSES, 3, **SMALL)
        torch.manual_seed(0)
        built = timm.create_model(NAME, num_classes=0, **SMALL)
    assert named.backbone.fingerprint == PromptedSwin(built, NUM_CLASSES, 3).backbone.fingerprint
    assert named.config.backbone.kwargs == SMALL


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "add": (dict(prompt_location="add", num_prompts=None), "prompt_location='add': not with a Swin"),
    "pad": (dict(prompt_location="pad"), "prompt_location='pad': not with a SwinTransformer"),
    "layers": (dict(prompt_layers=2), "prompt_layers=2: not with a SwinTransformer"),
    "shared": (dict(prompt_shared=True), "prompt_shared=True: not with a SwinTransformer"),
    "cls_pool": (dict(pool="cls"), "pool: got 'cls' with a SwinTransformer"),
    "flash": (dict(attention="sdpa_cpu"), "attention: got 'sdpa_cpu' with a SwinTransformer"),
    "flash_anywhere": (dict(attention="flash_attn"), "attention: got 'flash_attn' with a SwinTransformer"),
    "no_prompts": (dict(num_prompts=0), "num_prompts: got 0"),
    "memory": (dict(memory="none"), "memory: got 'none'"),
}


@pytest.mark.parametrize("setting", REFUSED)
def test_setting_that_a_swin_does_not_have_is_refused(setting: str) -> None:
    arguments, message = REFUSED[setting]
    with pytest.raises(ValueError, match=message):
        PromptedSwin(tiny_swin(), NUM_CLASSES, **({"num_prompts": 3} | arguments))


def swin_with(part: str, module: nn.Module) -> SwinTransformer:
    swin = tiny_swin()
    owner, _, name = f"layers.1.{part}".rpartition(".")
    setattr(swin.get_submodule(owner), name, module)
    return swin


BACKBONES: dict[str, tuple[Any, str]] = {
    "downsample": (lambda: swin_with("downsample", nn.Identity()), r"layers\.1\.downsample is a .*Identity"),
    "block": (lambda: swin_with("blocks.0", nn.Identity()), r"layers\.1\.blocks\.0 has a .*Identity"),
    "attention": (lambda: swin_with("blocks.0.attn", nn.Identity()), r"blocks\.0 has a .*WindowAttention"),
    "vit": (lambda: "vit_tiny_patch16_224", "'vit_tiny_patch16_224' is not a timm SwinTransformer"),
    "v2": (lambda: "swinv2_tiny_window8_256", "'swinv2_tiny_window8_256' is not a timm SwinTransformer"),
    "any_size": (lambda: tiny_swin(dynamic_img_size=True), "dynamic_img_size"),
    "max_pool": (lambda: tiny_swin(global_pool="max"), "global_pool='max'"),
    "no_pool": (lambda: tiny_swin(global_pool=""), "global_pool=''"),
}


@pytest.mark.parametrize("backbone", BACKBONES)
def test_backbone_that_is_not_supported_is_named(backbone: str) -> None:
    build, message = BACKBONES[backbone]
    with pytest.raises(ValueError, match=message):
        PromptedSwin(build(), NUM_CLASSES, 3)


@pytest.mark.parametrize("window_size", [3, 4])  # padded and whole windows
def test_all_tensors_are_on_the_backbone_s_device(window_size: int) -> None:
    model = PromptedSwin(tiny_swin(window_size=window_size).to("meta"), NUM_CLASSES, 3)
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"meta"}


class Context:
    """Of a Function, where it is only called."""

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        pass


def test_moved_tokens_are_not_what_the_last_operation_was_given() -> None:
    order = torch.arange(6)
    wanted = torch.cat((order.flip(0), torch.tensor([-1, -1])))  # two places hold no token
    move = engine_windows.Move(order, wanted)
    arguments = move.index, move.index_holes, move.back, move.back_holes
    with GivenBack() as given_back:
        moved = engine_windows._MoveFunction.forward(Context(), torch.randn(2, 6, 4), *arguments)
    assert move.index_holes is not None and moved not in given_back


def test_merged_tokens_are_not_what_the_last_operation_was_given() -> None:
    x, weight, ops = torch.randn(2, 3, 16), torch.randn(8, 16), get_backend("torch").other
    arguments = None, ("layer", 1e-5), ops, torch.float32, POLICIES["exact"]
    with GivenBack() as given_back:
        merged = engine_windows._ReduceFunction.forward(Context(), x, weight, *arguments)
    assert merged.shape == (2, 3, 8) and merged not in given_back


def test_dynamo_traces_shifted_windows_for_any_batch_size() -> None:
    """Two blocks with shifted windows: each has tokens that must not see each other."""
    torch._dynamo.reset()
    model = PromptedSwin(tiny_swin(depths=(4,), num_heads=(2,)), NUM_CLASSES, 3, dtype=torch.float64)
    compiled = torch.compile(model, backend="eager", dynamic=True, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch_size in (6, 7):  # unlike all of the model's sizes, which torch.compile takes for the same
            images, _ = random_batch(model, batch_size, NUM_CLASSES)
            assert relative_error(compiled(images).detach(), model(images).detach()) < TOLERANCE
