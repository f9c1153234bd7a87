"""Weights that timm loads for a name in its registry: no tensor of the model stays as it was initialised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from checkpoint_files import SMALL_CONVNEXT, SMALL_SWIN, SMALL_VIT, save_jax, small, small_vit, swin
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save_file
from timm.models import save_for_hf
from tiny import randomise
from torch import nn

from vpt_fast import PromptedViT
from vpt_fast.backbones.checkpoints import load_checkpoint
from vpt_fast.backbones.creation import names_weights
from vpt_fast.backbones.resolve import CONVNET, SWIN, VIT, Kind, Origin, hub_repository, resolve_backbone

NAME = "vit_base_patch16_224"
WITH_CLASSIFIER, WITHOUT_CLASSIFIER = f"{NAME}.augreg_in21k", f"{NAME}.dino"  # as published
AVERAGED: dict[str, Any] = dict(SMALL_VIT, global_pool="avg")


def written(model: nn.Module, path: Path, **more: torch.Tensor) -> Path:
    save_file({**model.state_dict(), **more}, path)
    return path


def from_timm(
    name: str, file: Path, arguments: dict[str, Any], kind: Kind = VIT, **overlay: Any
) -> nn.Module:
    """What a name stands for whose published weights are this file."""
    settings = {"file": str(file), **overlay}
    return resolve_backbone(name, True, {**arguments, "pretrained_cfg_overlay": settings}, kind=kind)[0]


def unreachable_hub(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that a hub, which cannot be reached and has nothing cached, is asked for."""
    asked: list[str] = []

    def download(repo_id: str, filename: str, **arguments: Any) -> str:
        asked.append(filename)
        raise LocalEntryNotFoundError("no way there")

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *args, **kwargs: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(timm.models._hub, "hf_hub_download", download)
    return asked


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Weights with a final norm, and a classifier of other classes than the published one's."""
    return written(timm.create_model(NAME, num_classes=7, **SMALL_VIT), tmp_path / "own.safetensors")


@pytest.fixture
def headless(tmp_path: Path) -> Path:
    return written(small_vit(1), tmp_path / "model.safetensors")


class TestLacking:
    @pytest.mark.parametrize("name", [WITH_CLASSIFIER, WITHOUT_CLASSIFIER])
    def test_a_norm_after_pooling_that_the_weights_lack_is_named(self, name: str, headless: Path) -> None:
        with pytest.raises(ValueError, match="pretrained: .*fc_norm.weight.*pass fc_norm=False"):
            from_timm(name, headless, AVERAGED)

    @pytest.mark.parametrize("name", [WITH_CLASSIFIER, WITHOUT_CLASSIFIER])
    def test_blocks_that_the_weights_lack_are_named(self, name: str, headless: Path) -> None:
        with pytest.raises(ValueError, match="pretrained: .*with .*depth=3.*blocks.2.norm1.weight"):
            from_timm(name, headless, dict(SMALL_VIT, depth=3))

    def test_long_lists_are_cut(self, headless: Path) -> None:
        with pytest.raises(ValueError, match="blocks.2.attn.qkv.bias and 8 more; want"):
            from_timm(WITH_CLASSIFIER, headless, dict(SMALL_VIT, depth=3))

    def test_weights_in_an_argument_are_not_printed(self) -> None:
        overlay = {"state_dict": small_vit(1).state_dict(), "hf_hub_id": "", "url": ""}
        with pytest.raises(ValueError, match="^(?!.*tensor).*fc_norm.weight"):
            resolve_backbone(WITH_CLASSIFIER, True, {**AVERAGED, "pretrained_cfg_overlay": overlay})

    def test_a_norm_after_pooling_that_a_jax_file_lacks_is_named(self, tmp_path: Path) -> None:
        file = save_jax(small_vit(1), tmp_path / "ViT-B_16.npz")
        with pytest.raises(
            ValueError, match="pretrained: .*lack fc_norm.weight, fc_norm.bias .*fc_norm=False"
        ):
            from_timm(WITH_CLASSIFIER, file, AVERAGED, custom_load=True)

    def test_weights_of_another_width_are_an_error_of_the_argument(self, headless: Path) -> None:
        with pytest.raises(
            ValueError, match="pretrained: .*size mismatch for cls_token.*; want other arguments$"
        ):
            from_timm(WITH_CLASSIFIER, headless, dict(SMALL_VIT, embed_dim=48))

    @staticmethod
    def published_convnext(folder: Path, *left_out: str) -> tuple[nn.Module, Path]:
        source, file = small("convnextv2_atto", 1, **SMALL_CONVNEXT), folder / "model.safetensors"
        save_file({n: t for n, t in source.state_dict().items() if not n.startswith(left_out)}, file)
        return source, file

    def test_masked_convnexts_have_been_published_without_a_final_norm(self, tmp_path: Path) -> None:
        source, file = self.published_convnext(tmp_path, "head.norm.")
        with pytest.warns(UserWarning, match="convnextv2_atto.fcmae .*lack head.norm.weight, head.norm.bias"):
            model = from_timm("convnextv2_atto.fcmae", file, SMALL_CONVNEXT, CONVNET)
        assert torch.equal(model.state_dict()["stem.0.weight"], source.state_dict()["stem.0.weight"])

    @pytest.mark.parametrize(
        ("tag", "left_out"), [("fcmae_ft_in1k", ["head.norm."]), ("fcmae", ["head.norm.", "stem.1."])]
    )
    def test_other_convnexts_and_other_norms_that_are_lacking_are_named(
        self, tag: str, left_out: list[str], tmp_path: Path
    ) -> None:
        _, file = self.published_convnext(tmp_path, *left_out)
        with pytest.raises(
            ValueError, match=f"pretrained: .*convnextv2_atto.{tag} .* lack .*head.norm.weight"
        ):
            from_timm(f"convnextv2_atto.{tag}", file, SMALL_CONVNEXT, CONVNET)


@pytest.mark.parametrize(
    ("origin", "repository"),
    [
        (Origin("sup_vitb16_imagenet21k", True, {}), "timm/vit_base_patch16_224.orig_in21k"),
        (Origin("mocov3_vitb", True, {}), None),
        (Origin("vit_base_patch16_224.mae", True, {}), "timm/vit_base_patch16_224.mae"),
        (Origin("hf-hub:me/vit@v2", True, {}), "me/vit"),
        (Origin("vit_base_patch16_224.mae", False, {}), None),
        (Origin("vit_base_patch16_224.mae", True, {"pretrained_cfg_overlay": {"file": "a.pth"}}), None),
        (Origin(None, True, {}), None),
    ],
)
def test_the_repository_that_weights_came_from(origin: Origin, repository: str | None) -> None:
    assert hub_repository(origin) == repository


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ({"pretrained_cfg": "augreg_in21k"}, True),
        ({"pretrained_cfg_overlay": {"file": "weights.pth"}}, True),
        ({"pretrained_cfg_overlay": {"input_size": (3, 64, 64)}}, False),
        ({"depth": 2}, False),
    ],
)
def test_arguments_that_say_where_weights_are(arguments: dict[str, Any], wanted: bool) -> None:
    assert names_weights(arguments) is wanted


class TestWithoutAPlace:
    """test_vit has six blocks. The hub is not reached: the published weights are known by the name."""

    @pytest.fixture(autouse=True)
    def hub(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        return unreachable_hub(monkeypatch)

    @pytest.mark.parametrize("name", ["test_vit", "test_vit.r160_in1k"])
    def test_blocks_that_arguments_leave_out_are_named(self, name: str, hub: list[str]) -> None:
        with pytest.raises(
            ValueError, match=f"pretrained: {name} with depth=5 .*blocks.5.norm1.*pretrained_strict=False"
        ):
            resolve_backbone(name, True, {"depth": 5})
        assert hub == []

    def test_blocks_of_a_swin_are_named(self) -> None:
        with pytest.raises(ValueError, match="pretrained: .*no place for layers.2.blocks.2.norm1.weight"):
            resolve_backbone("swin_tiny_patch4_window7_224", True, {"depths": (2, 2, 2, 2)}, kind=SWIN)

    def test_final_norm_in_place_of_which_a_mean_has_its_own_is_explained(self) -> None:
        with pytest.raises(ValueError, match="pretrained: .*no place for norm.weight.*pass fc_norm=False"):
            resolve_backbone("test_vit", True, {"global_pool": "avg"})

    @pytest.mark.parametrize("arguments", [{"img_size": 64}, {"depth": 5, "pretrained_strict": False}])
    def test_arguments_with_a_place_for_all_or_leave_to_ignore_some_go_on_to_the_hub(
        self, arguments: dict[str, Any], hub: list[str]
    ) -> None:
        with pytest.raises(ValueError, match="cannot be downloaded"):
            resolve_backbone("test_vit", True, arguments)
        assert hub

    def test_blocks_without_a_place_in_a_file_are_named(self, headless: Path) -> None:
        with pytest.raises(ValueError, match="checkpoint: .*it holds blocks.1..*no place for"):
            resolve_backbone(NAME, False, dict(SMALL_VIT, depth=1), checkpoint=headless)

    def test_blocks_without_a_place_in_a_folder_are_named(self, tmp_path: Path) -> None:
        save_for_hf(small_vit(1), str(tmp_path), safe_serialization=True)
        with pytest.raises(ValueError, match="pretrained: .*it holds blocks.1..*no place for"):
            resolve_backbone(f"local-dir:{tmp_path}", True, {"depth": 1})

    def test_first_blocks_of_a_file_are_loaded_if_strict_is_off(self, headless: Path) -> None:
        arguments = dict(SMALL_VIT, depth=1, pretrained_strict=False)
        vit = resolve_backbone(NAME, False, arguments, checkpoint=headless)[0]
        whole = small_vit(1).state_dict()
        assert all(torch.equal(tensor, whole[name]) for name, tensor in vit.state_dict().items())


def test_settings_that_do_not_say_where_weights_are_publish_none() -> None:
    settings = {"pretrained_cfg_overlay": {"crop_pct": 1.0}, "pretrained_strict": False}
    with pytest.raises(ValueError, match="pretrained: timm has no published weights of test_vit4"):
        resolve_backbone("test_vit4", True, settings)


def test_unreachable_hub_is_asked_for_one_file(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = unreachable_hub(monkeypatch)
    with pytest.raises(ValueError, match="pretrained: the weights of test_vit cannot be downloaded: no way"):
        resolve_backbone("test_vit", True, {})
    assert asked == ["model.safetensors"]


class TestStrictIsOff:
    """pretrained_strict=False, timm's argument, keeps initial values where weights are missing."""

    arguments = dict(AVERAGED, pretrained_strict=False)

    def assert_norm_is_new(self, vit: Any) -> None:
        assert torch.equal(vit.fc_norm.weight, torch.ones(32))
        assert torch.equal(vit.state_dict()["cls_token"], small_vit(1).state_dict()["cls_token"])

    @pytest.mark.parametrize("name", [WITH_CLASSIFIER, WITHOUT_CLASSIFIER])
    def test_with_a_name(self, name: str, headless: Path) -> None:
        self.assert_norm_is_new(from_timm(name, headless, self.arguments))

    def test_with_a_file(self, headless: Path) -> None:
        self.assert_norm_is_new(resolve_backbone(NAME, False, self.arguments, checkpoint=headless)[0])

    def test_with_a_folder(self, tmp_path: Path) -> None:
        save_for_hf(small_vit(1), str(tmp_path), safe_serialization=True)
        arguments = dict(global_pool="avg", pretrained_strict=False)
        self.assert_norm_is_new(resolve_backbone(f"local-dir:{tmp_path}", True, arguments)[0])

    def test_a_saved_model_is_built_so_again(self, headless: Path, tmp_path: Path) -> None:
        model = PromptedViT(NAME, 3, 2, checkpoint=headless, **self.arguments)
        model.save_pretrained(tmp_path / "saved")
        again = PromptedViT.from_pretrained(tmp_path / "saved")
        assert again.backbone.fingerprint == model.backbone.fingerprint


class TestFitting:
    def test_the_final_norm_can_be_kept_before_pooling(self, headless: Path) -> None:
        vit = from_timm(WITH_CLASSIFIER, headless, dict(AVERAGED, fc_norm=False))
        assert torch.equal(vit.state_dict()["norm.weight"], small_vit(1).state_dict()["norm.weight"])

    def test_a_classifier_of_other_classes_is_left_out(self, file: Path) -> None:
        from_timm(WITH_CLASSIFIER, file, SMALL_VIT)

    def test_weights_with_a_norm_after_pooling_fill_it(self, tmp_path: Path) -> None:
        source = small_vit(1, global_pool="avg")
        vit = from_timm(WITH_CLASSIFIER, written(source, tmp_path / "own.safetensors"), AVERAGED)
        assert torch.equal(vit.state_dict()["fc_norm.weight"], source.state_dict()["fc_norm.weight"])

    @pytest.mark.parametrize(
        "arguments", [{"in_chans": 1}, {"img_size": 48}], ids=lambda each: next(iter(each))
    )
    def test_what_timm_converts_counts_as_filled(self, arguments: dict[str, Any], headless: Path) -> None:
        from_timm(WITH_CLASSIFIER, headless, {**SMALL_VIT, **arguments})

    def test_the_authors_swin_with_buffers_and_another_window_fits(self, tmp_path: Path) -> None:
        torch.save(swin(small("swin_base_patch4_window7_224", 1, **SMALL_SWIN)), tmp_path / "swin.pth")
        arguments = dict(SMALL_SWIN, img_size=64, window_size=8)
        from_timm("swin_base_patch4_window7_224", tmp_path / "swin.pth", arguments, SWIN)


@pytest.mark.parametrize(
    "name, arguments",
    [
        (NAME, {}),
        (NAME, dict(reg_tokens=2)),
        (NAME, dict(class_token=False, global_pool="avg")),
        ("flexivit_small", {}),
        ("vit_base_patch16_radio_v3", {}),
        ("vit_large_patch16_radio_v3", {}),
        ("deit3_base_patch16_224", {}),
        ("eva02_tiny_patch14_224", {}),
    ],
)
def test_positions_from_a_file_are_resampled_like_those_of_the_registry(
    name: str, arguments: dict[str, Any], tmp_path: Path
) -> None:
    arguments = dict(embed_dim=32, depth=1, num_heads=2, patch_size=16) | arguments
    described = {"input_size": (3, 96, 96)}
    source = randomise(timm.create_model(name, num_classes=0, img_size=96, **arguments), 1)
    larger: dict[str, Any] = {**arguments, "img_size": (64, 160)}
    file = written(source, tmp_path / "model.safetensors")
    registrys: Any = from_timm(name, file, larger, **described)
    own = randomise(timm.create_model(name, num_classes=0, pretrained_cfg_overlay=described, **larger), 2)
    load_checkpoint(own, file)
    assert torch.equal(own.state_dict()["pos_embed"], registrys.pos_embed)


def test_layer_scales_in_deit3s_own_file_are_found(tmp_path: Path) -> None:
    name, sizes = "deit3_base_patch16_224", dict(embed_dim=32, depth=1, num_heads=2, img_size=32)
    source, model = small(name, 1, **sizes), small(name, 2, **sizes)
    authors = {
        n.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): tensor
        for n, tensor in source.state_dict().items()
    }
    torch.save({"model": authors}, tmp_path / "deit_3_base_224_1k.pth")
    load_checkpoint(model, tmp_path / "deit_3_base_224_1k.pth")
    assert torch.equal(model.state_dict()["blocks.0.ls2.gamma"], source.state_dict()["blocks.0.ls2.gamma"])
