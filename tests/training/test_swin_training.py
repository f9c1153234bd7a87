"""Training with a Swin transformer: which methods it has, and that each is trained, stored and read again."""

from __future__ import annotations

import pytest
import torch

from vpt_fast import load_pretrained
from vpt_fast.training.loop import train
from vpt_fast.training.methods import build_model
from vpt_fast.training.recipe import Recipe
from vpt_fast.training.run import RunFolder

SWIN = "swin_tiny_patch4_window7_224"
SMALL = dict(img_size=16, patch_size=2, embed_dim=16, depths=[2, 1], num_heads=[2, 4], window_size=4)


@pytest.mark.parametrize(
    ("method", "model", "trained"),
    [
        ("vpt-deep", "PromptedSwin", {"prompts.0", "prompts.1", "head.weight", "head.bias"}),
        ("vpt-shallow", "PromptedSwin", {"prompts.0", "head.weight", "head.bias"}),
        ("linear", "LinearProbe", {"head.weight", "head.bias"}),
        ("mlp-2", "MLPProbe", {"hidden.0.weight", "hidden.0.bias", "head.weight", "head.bias"}),
    ],
)
def test_training_lowers_the_loss_and_leaves_a_model(method, model, trained, color_images, tmp_path):
    init = {"prompt_init": "tokens"} if method == "vpt-deep" else {}
    recipe = Recipe(
        data=str(color_images), backbone=SWIN, method=method, pretrained=False, backbone_arg=SMALL,
        epochs=3, warmup_epochs=1, batch_size=8, base_lr=0.5, device="cpu", workers=0, tensorboard=False,
        **init,
    )  # fmt: skip
    result = train(recipe, tmp_path / "run")
    assert result.metrics[-1]["train_loss"] < 0.9 * result.metrics[0]["train_loss"]
    folder = RunFolder(tmp_path / "run")
    assert folder.read().checkpoint.trainable.keys() == trained
    torch.manual_seed(recipe.seed)  # the backbone's weights are random, drawn first
    loaded = load_pretrained(folder.prompts)
    assert (type(loaded).__name__, loaded.trainable_state_dict().keys()) == (model, trained)


@pytest.mark.parametrize(
    ("method", "model"),
    [
        ("partial-2", "PartialNetworkTuning"),
        ("adapter", "AdapterTuning"),
        ("vpt+bias", "PromptAndBiasSwinTuning"),
    ],
)
def test_training_in_timms_own_blocks_lowers_the_loss_and_leaves_a_model(
    method, model, color_images, tmp_path
):
    recipe = Recipe(
        data=str(color_images), backbone=SWIN, method=method, pretrained=False, backbone_arg=SMALL,
        epochs=3, warmup_epochs=1, batch_size=8, base_lr=0.1, device="cpu", workers=0, tensorboard=False,
    )  # fmt: skip
    result = train(recipe, tmp_path / "run")
    assert result.metrics[-1]["train_loss"] < 0.9 * result.metrics[0]["train_loss"]
    folder = RunFolder(tmp_path / "run")
    torch.manual_seed(recipe.seed)  # the backbone's weights are random, drawn first
    loaded, stored = load_pretrained(folder.prompts), folder.read().checkpoint.trainable
    assert type(loaded).__name__ == model and len(stored) > 2
    assert all(torch.equal(tensor, stored[name]) for name, tensor in loaded.trainable_state_dict().items())


def test_method_that_there_is_not_for_a_swin_is_named_with_the_backbone():
    recipe = Recipe(data="", backbone=SWIN, method="cls-token", pretrained=False, backbone_arg=SMALL)
    with pytest.raises(ValueError, match=f"method is 'cls-token'.*for backbone '{SWIN}'"):
        build_model(recipe, 3)


def test_prompt_location_that_there_is_not_for_a_swin_is_named():
    recipe = Recipe(
        data="", backbone=SWIN, method="vpt-shallow", num_prompts=3, prompt_location="pad",
        prompt_dropout=0.0, pretrained=False, backbone_arg=SMALL,
    )  # fmt: skip
    with pytest.raises(ValueError, match="prompt_location='pad': not with a SwinTransformer"):
        build_model(recipe, 3)


def test_a_residual_stream_in_16_bits_is_refused_with_the_backbone():
    recipe = Recipe(
        data="", backbone=SWIN, method="vpt-deep", residual_dtype="bfloat16", pretrained=False,
        backbone_arg=SMALL,
    )  # fmt: skip
    with pytest.raises(ValueError, match=f"residual_dtype is 'bfloat16'.*with backbone '{SWIN}'"):
        build_model(recipe, 3)
