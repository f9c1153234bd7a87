"""Backbones that timm names local-dir:... and hf-hub:...: what is read, and what is refused."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from checkpoint_files import SMALL_CONVNEXT, SMALL_SWIN, SMALL_VIT
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from timm.models import save_for_hf
from tiny import random_batch, randomise
from torch import nn

from vpt_fast import (
    LinearProbe,
    PromptedConvNet,
    PromptedSegmenter,
    PromptedSwin,
    PromptedViT,
    load_pretrained,
)
from vpt_fast.backbones import sources
from vpt_fast.backbones.resolve import CONVNET, SWIN, kind_of, resolve_backbone
from vpt_fast.backbones.sharing import SharedBackbone, sharing_backbones
from vpt_fast.sweeps.parameters import count_parameters
from vpt_fast.training.methods import build_model
from vpt_fast.training.recipe import Recipe
from vpt_fast.tuning.full import FullTuning

VIT = "vit_base_patch16_224"
SWIN_NAME = "swin_base_patch4_window7_224"
CONVNEXT = "convnext_base"
MEAN = (0.1, 0.2, 0.3)


def write(folder: Path, name: str, pickled: bool = False, **arguments: Any) -> nn.Module:
    """Writes a small timm model with random weights and a classifier as timm does."""
    overlay = {"mean": MEAN}
    model = randomise(timm.create_model(name, num_classes=7, pretrained_cfg_overlay=overlay, **arguments))
    save_for_hf(model, str(folder), safe_serialization=not pickled)
    return model.eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "vit", VIT, **SMALL_VIT)
    return tmp_path / "vit"


def change(folder: Path, **values: Any) -> None:
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | values))


@pytest.fixture
def hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, str | None]]:
    """A hub on which every repository has the files in `folder`; returns what is asked of it."""
    asked = []

    def download(repository: str, filename: str, revision: str | None = None, **others: Any) -> str:
        asked.append((repository, filename, revision))
        if not (folder / filename).is_file():
            raise EntryNotFoundError(f"404 {filename}")
        return str(folder / filename)

    monkeypatch.setattr(timm.models._hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return asked


@pytest.mark.parametrize(
    "build, name, arguments",
    [
        (lambda name: PromptedViT(name, 3, 2, pretrained=True), VIT, SMALL_VIT),
        (lambda name: PromptedSegmenter(name, 3, pretrained=True, num_prompts=2), VIT, SMALL_VIT),
        (lambda name: PromptedSwin(name, 3, 2, pretrained=True), SWIN_NAME, SMALL_SWIN),
        (lambda name: PromptedConvNet(name, 3, 2, pretrained=True), CONVNEXT, SMALL_CONVNEXT),
        *(
            (lambda name: LinearProbe(name, 3, pretrained=True), *each)
            for each in ((VIT, SMALL_VIT), (SWIN_NAME, SMALL_SWIN), (CONVNEXT, SMALL_CONVNEXT))
        ),
        (lambda name: FullTuning(name, 3, pretrained=True), SWIN_NAME, SMALL_SWIN),
    ],
    ids=["vit", "segmenter", "swin", "convnet", "probe-vit", "probe-swin", "probe-convnet", "full"],
)
def test_every_model_has_the_folders_weights_and_preprocessing(
    build: Any, name: str, arguments: dict[str, Any], tmp_path: Path
) -> None:
    timms = write(tmp_path / "own", name, **arguments)
    model = build(f"local-dir:{tmp_path / 'own'}").eval()
    assert tuple(model.data_config["mean"]) == MEAN
    timms.reset_classifier(0)
    assert model.config.backbone.fingerprint == LinearProbe(timms, 3).config.backbone.fingerprint
    model.save_pretrained(tmp_path / "saved")
    again = load_pretrained(tmp_path / "saved").eval()
    images, _ = random_batch(model, dtype=torch.float32)
    torch.testing.assert_close(again(images), model(images), rtol=0, atol=0)


def test_features_are_those_of_timms_model(folder: Path) -> None:
    name = f"local-dir:{folder}"
    timms = timm.create_model(name, pretrained=True, num_classes=0).eval()
    model = LinearProbe(name, 3, pretrained=True).eval()
    images, _ = random_batch(model, dtype=torch.float32)
    torch.testing.assert_close(model.image_features(images), timms(images), rtol=1e-4, atol=1e-5)


def test_another_image_size_resamples_positions_as_timm_does(folder: Path) -> None:
    name = f"local-dir:{folder}"
    vit, _ = resolve_backbone(name, True, {"img_size": 64})
    timms = timm.create_model(name, pretrained=True, num_classes=0, img_size=64)
    assert torch.equal(vit.pos_embed, timms.pos_embed)


def test_border_is_added_to_the_folders_own_image_size(folder: Path) -> None:
    settings: dict[str, Any] = dict(prompt_type="shallow", prompt_location="pad", pretrained=True)
    model = PromptedViT(f"local-dir:{folder}", 3, 16, **settings)
    assert (model.image_size, model.backbone.image_size) == ((32, 32), (64, 64))


def test_convnet_of_another_image_size_keeps_the_folders_channels(tmp_path: Path) -> None:
    write(tmp_path, CONVNEXT, in_chans=4, **SMALL_CONVNEXT)
    model, _ = resolve_backbone(f"local-dir:{tmp_path}", True, {"img_size": 96}, kind=CONVNET)
    assert model.pretrained_cfg["input_size"] == (4, 96, 96)


def test_kind_is_that_of_the_architecture(tmp_path: Path) -> None:
    write(tmp_path / "swin", SWIN_NAME, **SMALL_SWIN)
    assert kind_of(f"local-dir:{tmp_path / 'swin'}") is SWIN
    with pytest.raises(ValueError, match="swin' is not a timm VisionTransformer"):
        PromptedViT(f"local-dir:{tmp_path / 'swin'}", 3, 2)


@pytest.mark.parametrize("prefix", ["hf-hub:", "hf_hub:"])
def test_hub_gives_the_revision_and_is_recorded_by_timms_name(hub: Any, prefix: str, tmp_path: Path) -> None:
    model = PromptedViT(f"{prefix}me/vit@v2", 3, 2, pretrained=True)
    assert {*hub} == {("me/vit", "config.json", "v2"), ("me/vit", "model.safetensors", "v2")}
    assert model.config.backbone.name == "hf-hub:me/vit@v2"
    model.save_pretrained(tmp_path / "saved")
    assert load_pretrained(tmp_path / "saved").config == model.config


RECIPE = Recipe(data="", backbone="hf-hub:me/vit", pretrained=False, method="linear", precision="fp32")


@pytest.mark.parametrize(
    "build",
    [
        lambda name: LinearProbe(name, 3),
        lambda name: PromptedSegmenter(name, 3, num_prompts=2),
        lambda name: build_model(RECIPE, 3),
        count_parameters,
    ],
    ids=["probe", "segmenter", "recipe", "methods"],
)
def test_hub_is_asked_once_for_a_model_besides_timms_own_question(hub: Any, build: Any) -> None:
    build("hf-hub:me/vit")
    assert hub == [("me/vit", "config.json", None)] * 2
    build("hf-hub:me/vit")  # the repository may have changed in the meantime
    assert hub == [("me/vit", "config.json", None)] * 4


def test_without_pretrained_only_the_configuration_is_read(hub: Any) -> None:
    model = PromptedViT("hf-hub:me/vit", 3, 2)
    assert {file for _, file, _ in hub} == {"config.json"}
    assert model.config.backbone.fingerprint != PromptedViT("hf-hub:me/vit", 3, 2).config.backbone.fingerprint


def test_checkpoint_replaces_the_folders_weights(folder: Path, tmp_path: Path) -> None:
    write(tmp_path / "other", VIT, **SMALL_VIT)
    path = shutil.move(folder / "model.safetensors", tmp_path / "moved.safetensors")
    assert PromptedViT(f"local-dir:{folder}", 3, 2, checkpoint=path).config.backbone.checkpoint == str(path)


class TestFolderOfASavedModel:
    def test_relative_path_is_found_from_another_working_directory(
        self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(folder.parent)
        model = PromptedViT(f"local-dir:{folder.name}", 3, 2, pretrained=True)
        assert model.config.backbone.name == f"local-dir:{folder}"
        model.save_pretrained(tmp_path / "saved")
        monkeypatch.chdir("/")
        assert load_pretrained(tmp_path / "saved").config == model.config

    def test_moved_folder_is_asked_for_and_may_be_passed(self, folder: Path, tmp_path: Path) -> None:
        PromptedViT(f"local-dir:{folder}", 3, 2, pretrained=True).save_pretrained(tmp_path / "saved")
        moved = folder.rename(tmp_path / "moved")
        with pytest.raises(ValueError, match=f"backbone: {folder}, the folder that .*saved.* is not there"):
            load_pretrained(tmp_path / "saved")
        assert load_pretrained(tmp_path / "saved", f"local-dir:{moved}").config.backbone.pretrained

    def test_other_weights_in_the_folder_are_refused(self, folder: Path, tmp_path: Path) -> None:
        PromptedViT(f"local-dir:{folder}", 3, 2, pretrained=True).save_pretrained(tmp_path / "saved")
        model = timm.create_model(VIT, num_classes=0, **SMALL_VIT)
        save_for_hf(randomise(model, seed=1), str(folder), safe_serialization=True)
        with pytest.raises(ValueError, match="its weights are not those"):
            load_pretrained(tmp_path / "saved")


def test_shared_backbone_is_read_again_after_its_folder_changed(folder: Path) -> None:
    with sharing_backbones(SharedBackbone()):
        first, again = (resolve_backbone(f"local-dir:{folder}", False, {})[0] for _ in range(2))
        change(folder, model_args={**SMALL_VIT, "depth": 1})
        other, _ = resolve_backbone(f"local-dir:{folder}", False, {})
    assert len(first.blocks) == len(again.blocks) == 2 and len(other.blocks) == 1


class Exploit:
    """Unpickled, it would leave a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("where", ["local-dir", "hf-hub"])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pth"])
def test_pickles_are_refused_and_not_read(
    folder: Path, hub: Any, tmp_path: Path, where: str, name: str
) -> None:
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Exploit(tmp_path / "run")))
    backbone = f"local-dir:{folder}" if where == "local-dir" else "hf-hub:me/vit"
    with pytest.raises(
        ValueError, match=r"pretrained: .* has no model.safetensors.*unpickling it can run code"
    ):
        PromptedViT(backbone, 3, 2, pretrained=True)
    assert not (tmp_path / "run").exists()


def test_folder_without_weights_is_named_with_an_older_huggingface_hub_too(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NeedsMessage(EntryNotFoundError):  # as before huggingface_hub 1.0
        def __init__(self, message: str) -> None:
            super().__init__(message)

    monkeypatch.setattr(sources, "EntryNotFoundError", NeedsMessage)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="has no model.safetensors"):
        PromptedViT(f"local-dir:{folder}", 3, 2, pretrained=True)


class TestRefused:
    def refuse(self, message: str, backbone: str, **arguments: Any) -> None:
        with pytest.raises(ValueError, match=message):
            PromptedViT(backbone, 3, 2, **arguments)

    def test_folder_that_is_not_there(self, tmp_path: Path) -> None:
        self.refuse(
            "backbone: got 'local-dir:.*none', and .*none is no folder; want", f"local-dir:{tmp_path}/none"
        )

    def test_folder_without_a_configuration(self, folder: Path) -> None:
        (folder / "config.json").unlink()
        self.refuse("backbone: got .*vit has no config.json; want", f"local-dir:{folder}")

    @pytest.mark.parametrize(
        "text",
        ["", "[]", "{}", "[" * 100_000, '{"architectures": ["ViTModel"]}',
         '{"architecture": 3, "pretrained_cfg": {}}',
         '{"architecture": "vit_base_patch16_224", "pretrained_cfg": {"unknown": 1}}',
         '{"architecture": "vit_base_patch16_224", "pretrained_cfg": {}, "model_args": [32]}'],
    )  # fmt: skip
    def test_configuration_that_timm_does_not_write(self, folder: Path, text: str) -> None:
        (folder / "config.json").write_text(text)
        self.refuse("backbone: got .*whose config.json is not what timm writes", f"local-dir:{folder}")

    def test_unknown_architecture(self, folder: Path) -> None:
        change(folder, architecture="vit_base_patch16_225")
        self.refuse("the architecture 'vit_base_patch16_225'.*close names: vit_base", f"local-dir:{folder}")

    def test_unreachable_hub(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def download(*args: Any, **kwargs: Any) -> str:
            raise LocalEntryNotFoundError("no connection")

        monkeypatch.setattr(timm.models._hub, "hf_hub_download", download)
        self.refuse(
            "backbone: got 'hf-hub:me/vit', whose config.json cannot be read: no conn", "hf-hub:me/vit"
        )

    def test_hub_that_is_gone_before_the_weights_are_there(
        self, folder: Path, hub: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def download(repository: str, filename: str, **others: Any) -> str:
            if filename == "config.json":
                return str(folder / filename)
            raise LocalEntryNotFoundError("no connection")

        monkeypatch.setattr(timm.models._hub, "hf_hub_download", download)
        message = "pretrained: model.safetensors of hf-hub:me/vit cannot be downloaded: no connection"
        self.refuse(message, "hf-hub:me/vit", pretrained=True)

    @pytest.mark.parametrize("name", ["s3:me/vit", "local-dir:", "me/vit"])
    def test_prefix_that_timm_does_not_know(self, name: str) -> None:
        self.refuse(f"backbone: got '{name}': ", name)

    def test_repository_without_an_owners_form(self) -> None:
        self.refuse("backbone: got 'hf-hub:a/b/c', whose config.json cannot be read", "hf-hub:a/b/c")

    def test_weights_of_another_architecture(self, folder: Path) -> None:
        change(folder, model_args={**SMALL_VIT, "depth": 3})
        self.refuse("pretrained: .*does not fit .*it lacks blocks.2", f"local-dir:{folder}", pretrained=True)

    def test_damaged_weights(self, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"x")
        self.refuse("pretrained: .*model.safetensors is damaged", f"local-dir:{folder}", pretrained=True)

    def test_pretrained_beside_a_checkpoint(self, folder: Path) -> None:
        both: dict[str, Any] = dict(pretrained=True, checkpoint=folder / "model.safetensors")
        self.refuse("pretrained: got True beside checkpoint", f"local-dir:{folder}", **both)

    def test_description_of_other_weights(self, folder: Path) -> None:
        self.refuse(
            "pretrained_cfg: got one with backbone", f"local-dir:{folder}", pretrained_cfg={"url": "x"}
        )
