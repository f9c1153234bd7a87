"""Weights from files: every published format, and every file that does not fit."""

from __future__ import annotations

import argparse
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from checkpoint_files import (
    SMALL_CONVNEXT,
    SMALL_RESNET,
    SMALL_SWIN,
    SMALL_VIT,
    convnext,
    jax_arrays,
    mae,
    mae_with_decoder,
    moco_linear,
    moco_pretrained,
    save_jax,
    small,
    small_vit,
    swin,
    torchvision_resnet,
)
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from torch import nn

from vpt_fast import LinearProbe, PromptedSwin, PromptedViT, load_pretrained
from vpt_fast.backbones import creation, resolve
from vpt_fast.backbones.checkpoints import check_jax_shapes, load_checkpoint
from vpt_fast.backbones.creation import overlay_of
from vpt_fast.backbones.known import KNOWN
from vpt_fast.backbones.resolve import is_supported, resolve_backbone
from vpt_fast.tuning.full import FullTuning

VIT = "vit_base_patch16_224"
SWIN = "swin_base_patch4_window7_224"


def assert_same_weights(model: nn.Module, other: nn.Module, but: tuple[str, ...] = ()) -> None:
    expected = other.state_dict()
    for name, tensor in model.state_dict().items():
        if not name.startswith(but) and not name.endswith("num_batches_tracked"):
            assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize(
    "name, sizes, content",
    [
        (VIT, SMALL_VIT, mae),
        (VIT, SMALL_VIT, mae_with_decoder),
        (VIT, SMALL_VIT, moco_pretrained),
        (VIT, SMALL_VIT, moco_linear),
        (SWIN, SMALL_SWIN, swin),
        ("convnext_base", SMALL_CONVNEXT, convnext),
        ("resnet50", SMALL_RESNET, torchvision_resnet),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_published_format_fills_the_whole_model(
    name: str, sizes: dict[str, Any], content: Callable, tmp_path: Path
) -> None:
    source, model = small(name, 1, **sizes), small(name, 2, **sizes)
    torch.save(content(source), tmp_path / "file.pth.tar")
    load_checkpoint(model, tmp_path / "file.pth.tar")
    assert_same_weights(model, source)


@pytest.mark.parametrize("name", [SWIN, "swinb_imagenet22k_224"])
def test_a_prompted_swin_stands_on_the_authors_file(name: str, tmp_path: Path) -> None:
    source = small(SWIN, 1, **SMALL_SWIN)
    torch.save(swin(source), tmp_path / "swin.pth")
    model = PromptedSwin(name, 3, 2, checkpoint=tmp_path / "swin.pth", **SMALL_SWIN)
    assert model.backbone.fingerprint == PromptedSwin(source, 3, 2).backbone.fingerprint
    model.save_pretrained(tmp_path)
    loaded = PromptedSwin.from_pretrained(tmp_path)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(images), model(images))


@pytest.mark.parametrize("prefix", ["", "opt/target/"])
def test_a_jax_file_fills_the_whole_model(prefix: str, tmp_path: Path) -> None:
    source, model = small_vit(1), small_vit(2)
    load_checkpoint(model, save_jax(source, tmp_path / "ViT-B_16.npz", prefix))
    assert_same_weights(model, source)


def test_a_safetensors_file_fills_the_whole_model(tmp_path: Path) -> None:
    source, model = small_vit(1), small_vit(2)
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    load_checkpoint(model, tmp_path / "model.safetensors")
    assert_same_weights(model, source)


def test_a_command_line_beside_the_weights_is_no_obstacle(tmp_path: Path) -> None:
    source, model = small_vit(1), small_vit(2)
    torch.save({"args": argparse.Namespace(lr=1e-3), **mae(source)}, tmp_path / "mae_finetuned.pth")
    load_checkpoint(model, tmp_path / "mae_finetuned.pth")
    assert_same_weights(model, source)


@pytest.mark.parametrize(
    "suffix, interpolation", [("npz", dict(interpolation="bilinear", antialias=False)), ("pth", {})]
)
def test_positions_are_interpolated_as_timm_does_it(
    suffix: str, interpolation: dict[str, Any], tmp_path: Path
) -> None:
    source, model, path = small_vit(1), small_vit(2, img_size=80), tmp_path / f"file.{suffix}"
    if suffix == "npz":
        save_jax(source, path)
    else:
        torch.save(mae(source), path)
    load_checkpoint(model, path)
    positions: Any = source.pos_embed
    expected = resample_abs_pos_embed(positions, new_size=[5, 5], num_prefix_tokens=1, **interpolation)
    assert torch.equal(model.state_dict()["pos_embed"], expected)
    assert_same_weights(model, source, but=("pos_embed",))


BIG_VIT = dict(SMALL_VIT, embed_dim=48)
DEEP_VIT = dict(SMALL_VIT, depth=3)


@pytest.mark.parametrize(
    "sizes, reason",
    [
        (BIG_VIT, r"cls has shape (1, 1, 48), want (1, 1, 32)"),
        (DEEP_VIT, "it holds Transformer/encoderblock_2/"),
        (dict(SMALL_VIT, depth=1), "it lacks Transformer/encoderblock_1/LayerNorm_0/scale"),
        (dict(SMALL_VIT, num_heads=4), "query/kernel has shape (32, 4, 8), want (32, 2, 16)"),
        (dict(SMALL_VIT, patch_size=8), "embedding/kernel has shape (8, 8, 3, 32), want (16, 16, 3, 32)"),
    ],
    ids=["wide", "deep", "flat", "heads", "patch"],
)
def test_a_jax_file_of_another_architecture_is_refused(
    sizes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    path = save_jax(small_vit(**sizes), tmp_path / "ViT.npz")
    with pytest.raises(
        ValueError, match=re.escape(f"{path} does not fit {VIT}: ") + ".*" + re.escape(reason)
    ):
        load_checkpoint(small_vit(), path)


@pytest.mark.parametrize(
    "source, reason",
    [
        (lambda: mae(small_vit(**BIG_VIT)), "cls_token has shape (1, 1, 48), want (1, 1, 32)"),
        (lambda: mae(small_vit(**DEEP_VIT)), "it holds blocks.2.norm1.weight, which the model has no place"),
        (lambda: mae(small_vit(depth=1)), "it lacks blocks.1.norm1.weight"),
        (lambda: mae(small_vit(patch_size=8)), "patch_embed.proj.weight has shape (32, 3, 8, 8)"),
        (lambda: swin(small(SWIN, **SMALL_SWIN)), "patch_embed.proj.weight has shape (16, 3, 4, 4)"),
        (lambda: torchvision_resnet(small("resnet50", **SMALL_RESNET)), "it lacks cls_token"),
    ],
    ids=["wide", "deep", "flat", "patch", "swin", "resnet"],
)
def test_a_file_of_another_architecture_is_refused(source: Callable, reason: str, tmp_path: Path) -> None:
    torch.save(source(), tmp_path / "file.pth")
    with pytest.raises(ValueError, match=re.escape(reason)):
        load_checkpoint(small_vit(), tmp_path / "file.pth")


@pytest.mark.parametrize(
    "name, sizes, content, reason",
    [
        (
            SWIN,
            SMALL_SWIN,
            lambda: swin(small(SWIN, **dict(SMALL_SWIN, depths=(2, 4)))),
            "layers.1.blocks.2.",
        ),
        ("convnext_base", SMALL_CONVNEXT, lambda: mae(small_vit()), "blocks.0.attn.qkv.weight does not fit"),
    ],
    ids=["swin", "convnext"],
)
def test_what_timms_converter_fails_on_is_named(
    name: str, sizes: dict[str, Any], content: Callable, reason: str, tmp_path: Path
) -> None:
    torch.save(content(), tmp_path / "file.pth")
    with pytest.raises(ValueError, match=re.escape(reason)):
        load_checkpoint(small(name, **sizes), tmp_path / "file.pth")


def test_an_unknown_array_in_a_jax_file_is_refused(tmp_path: Path) -> None:
    arrays: dict[str, Any] = {**jax_arrays(small_vit()), "Transformer/gate": np.zeros(3)}
    np.savez(tmp_path / "ViT.npz", **arrays)
    with pytest.raises(ValueError, match="it holds Transformer/gate, which the model has no place for"):
        load_checkpoint(small_vit(), tmp_path / "ViT.npz")


def test_a_jax_file_for_a_swin_is_refused(tmp_path: Path) -> None:
    path = save_jax(small_vit(), tmp_path / "ViT.npz")
    with pytest.raises(ValueError, match="holds a Vision Transformer"):
        load_checkpoint(small(SWIN, **SMALL_SWIN), path)


class _Attack:
    """Unpickled, it makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.mkdir, (self.marker,)


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
def test_a_pickled_object_is_refused_and_not_executed(is_zip: bool, tmp_path: Path) -> None:
    content = {**mae(small_vit()), "extra": _Attack(tmp_path / "executed")}
    torch.save(content, tmp_path / "file.pth", _use_new_zipfile_serialization=is_zip)
    with pytest.raises(ValueError, match="unpickling anything else can run code"):
        load_checkpoint(small_vit(), tmp_path / "file.pth")
    assert not (tmp_path / "executed").exists()


def test_a_pickled_object_in_a_jax_file_is_refused_and_not_executed(tmp_path: Path) -> None:
    attack = np.array([_Attack(tmp_path / "executed")], dtype=object)
    arrays: dict[str, Any] = {**jax_arrays(small_vit()), "head/bias": attack}
    np.savez(tmp_path / "ViT.npz", **arrays)
    with pytest.raises(ValueError, match="head/bias.npy holds Python objects"):
        load_checkpoint(small_vit(), tmp_path / "ViT.npz")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("suffix", ["npz", "pth", "legacy.pth", "safetensors"])
def test_a_truncated_file_is_refused(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"file.{suffix}"
    if suffix == "npz":
        save_jax(small_vit(), path)
    elif suffix == "safetensors":
        save_file(small_vit().state_dict(), path)
    else:
        torch.save(mae(small_vit()), path, _use_new_zipfile_serialization=suffix == "pth")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=f"{re.escape(str(path))} is damaged"):
        load_checkpoint(small_vit(), path)


def test_file_that_does_not_fit_into_memory_is_not_called_damaged(tmp_path, monkeypatch) -> None:
    path = tmp_path / "file.pth"
    torch.save(small_vit().state_dict(), path)

    def load(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(MemoryError):
        load_checkpoint(small_vit(), path)


@pytest.mark.parametrize("content", [b"abc", b"Entry not found", b"\x80\x02.", b"GM_\xd0\xc7\t"])
def test_a_file_of_something_else_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "file.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))} is damaged, or none"):
        load_checkpoint(small_vit(), path)


def test_a_jax_file_with_damaged_values_is_refused(tmp_path: Path) -> None:
    path = save_jax(small_vit(), tmp_path / "ViT.npz")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is damaged"):
        load_checkpoint(small_vit(), path)


def test_a_tensor_without_values_is_refused(tmp_path: Path) -> None:
    state = small_vit().state_dict()
    torch.save({**state, "cls_token": state["cls_token"].to("meta")}, tmp_path / "file.pth")
    with pytest.raises(ValueError, match=r"file\.pth does not fit .*cls_token"):
        load_checkpoint(small_vit(), tmp_path / "file.pth")


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64], ids=str)
def test_a_tensor_that_holds_no_real_weights_is_refused_by_its_name(dtype, tmp_path: Path) -> None:
    state = small_vit().state_dict()
    torch.save({**state, "norm.bias": state["norm.bias"].to(dtype)}, tmp_path / "file.pth")
    with pytest.raises(ValueError, match=f"norm.bias is of {dtype}, want floating-point numbers"):
        load_checkpoint(small_vit(), tmp_path / "file.pth")


def test_a_locked_jax_file_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "ViT.npz", "w") as archive:
        archive.writestr("cls.npy", b"x")
    content = bytearray((tmp_path / "ViT.npz").read_bytes())
    content[6] |= 1  # in both of the member's headers: it is encrypted
    content[content.find(b"PK\1\2") + 8] |= 1
    (tmp_path / "ViT.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"ViT\.npz is damaged, or no \.npz file: .*encrypted"):
        load_checkpoint(small_vit(), tmp_path / "ViT.npz")


@pytest.mark.parametrize(
    "content",
    [[1, 2], {"model": {"cls_token": "text"}}, {7: 1}, {"model": {7: torch.zeros(1)}}],
    ids=["list", "text", "numbers", "numbers of tensors"],
)
def test_a_file_without_a_state_dict_is_refused(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "file.pth")
    with pytest.raises(
        ValueError,
        match="want a mapping of names|no state dict: cls_token is a str|something under 7, want names",
    ):
        load_checkpoint(small_vit(), tmp_path / "file.pth")


# Sizes of the published files: patch, width, blocks, heads.
JAX_SIZES = {
    "sup_vitb16_imagenet21k": (16, 768, 12, 12),
    "sup_vitb32_imagenet21k": (32, 768, 12, 12),
    "sup_vitl16_imagenet21k": (16, 1024, 24, 16),
    "sup_vitl32_imagenet21k": (32, 1024, 24, 16),
    "sup_vith14_imagenet21k": (14, 1280, 32, 16),
}


@pytest.mark.parametrize("name", JAX_SIZES)
def test_the_papers_supervised_vits_have_the_shapes_of_their_files(name: str) -> None:
    patch, dim, depth, heads = JAX_SIZES[name]
    shapes: dict[str, tuple[int, ...]] = {
        "cls": (1, 1, dim),
        "embedding/kernel": (patch, patch, 3, dim),
        "embedding/bias": (dim,),
        "Transformer/posembed_input/pos_embedding": (1, (224 // patch) ** 2 + 1, dim),
        "pre_logits/kernel": (dim, dim),
        "head/kernel": (dim, 21843),
        "Transformer/encoder_norm/scale": (dim,),
        "Transformer/encoder_norm/bias": (dim,),
    }
    for i in range(depth):
        block = f"Transformer/encoderblock_{i}"
        for part in ("query", "key", "value"):
            shapes[f"{block}/MultiHeadDotProductAttention_1/{part}/kernel"] = (dim, heads, dim // heads)
            shapes[f"{block}/MultiHeadDotProductAttention_1/{part}/bias"] = (heads, dim // heads)
        shapes[f"{block}/MultiHeadDotProductAttention_1/out/kernel"] = (heads, dim // heads, dim)
        shapes[f"{block}/MultiHeadDotProductAttention_1/out/bias"] = (dim,)
        for norm in (0, 2):
            shapes[f"{block}/LayerNorm_{norm}/scale"] = shapes[f"{block}/LayerNorm_{norm}/bias"] = (dim,)
        shapes[f"{block}/MlpBlock_3/Dense_0/kernel"] = (dim, 4 * dim)
        shapes[f"{block}/MlpBlock_3/Dense_0/bias"] = (4 * dim,)
        shapes[f"{block}/MlpBlock_3/Dense_1/kernel"] = (4 * dim, dim)
        shapes[f"{block}/MlpBlock_3/Dense_1/bias"] = (dim,)
    with torch.device("meta"):
        vit, _ = resolve_backbone(name, False, {})
    check_jax_shapes(vit, shapes, Path(KNOWN[name].file))


class TestKnown:
    @pytest.mark.parametrize("known", KNOWN.values(), ids=KNOWN)
    def test_a_tag_has_the_address_and_the_normalisation_that_timm_says(self, known) -> None:
        settings = timm.get_pretrained_cfg(known.timm_name, allow_unregistered=False)
        assert settings is not None
        overlay = overlay_of(known)
        if known.hub:
            assert (settings.mean, settings.std) == (overlay["mean"], overlay["std"])
            assert settings.hf_hub_id == known.hub
            assert settings.url in (None, "", known.address)  # timm says none for what it converted itself

    def test_moco_is_normalised_with_imagenets_mean(self) -> None:
        with torch.device("meta"):
            vit, _ = resolve_backbone("mocov3_vitb", False, {})
        assert timm.data.resolve_model_data_config(vit)["mean"] == timm.data.IMAGENET_DEFAULT_MEAN

    def test_a_name_that_is_nearly_known_gets_a_hint(self) -> None:
        with pytest.raises(ValueError, match="close names: .*mocov3_vitb"):
            resolve_backbone("mocov3_vitb16", False, {})

    def test_every_name_is_of_a_kind_that_is_tuned(self) -> None:
        kinds = (resolve.VIT, resolve.SWIN, resolve.CONVNET)
        assert all(is_supported(known.timm_name, *kinds) for known in KNOWN.values())

    def test_a_convnets_name_is_refused_where_a_vit_is_wanted(self) -> None:
        with pytest.raises(ValueError, match="'imagenet_sup_rn50' is not a timm VisionTransformer"):
            resolve_backbone("imagenet_sup_rn50", False, {})

    def test_published_weights_come_from_timms_hub(self, tmp_path: Path, monkeypatch) -> None:
        source = small_vit(1)
        save_file(source.state_dict(), tmp_path / "model.safetensors")
        asked = []

        def download(repository: str, file: str) -> str:
            asked.append((repository, file))
            return str(tmp_path / file)

        monkeypatch.setattr(creation.huggingface_hub, "hf_hub_download", download)
        vit, origin = resolve_backbone("sup_vitb16_imagenet21k", True, SMALL_VIT)
        assert asked == [("timm/vit_base_patch16_224.orig_in21k", "model.safetensors")]
        assert_same_weights(vit, source)
        assert (origin.pretrained, origin.checkpoint) == (True, None)

    def test_weights_that_the_hub_lacks_are_asked_for_as_a_file(self) -> None:
        with pytest.raises(ValueError, match="get https://dl.fbaipublicfiles.com/moco-v3/.* as checkpoint"):
            resolve_backbone("mocov3_vitb", True, SMALL_VIT)


class TestMAE:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        torch.save(mae(small_vit(1)), tmp_path / "mae_pretrain_vit_base.pth")
        return tmp_path / "mae_pretrain_vit_base.pth"

    def test_by_its_name_the_norm_after_pooling_starts_as_identity(self, path: Path) -> None:
        vit, _ = resolve_backbone("mae_vitb16", False, SMALL_VIT, checkpoint=path)
        assert torch.equal(vit.fc_norm.weight, torch.ones(32))
        assert torch.equal(vit.fc_norm.bias, torch.zeros(32))
        assert_same_weights(vit, small_vit(1), but=("fc_norm.",))

    def test_by_its_name_prompts_are_pooled_too(self, path: Path) -> None:
        sizes: dict[str, Any] = SMALL_VIT
        assert PromptedViT("mae_vitb16", 3, 2, checkpoint=path, **sizes).pool == "image_and_prompts"
        assert LinearProbe("mae_vitb16", 3, checkpoint=path, **sizes).pool is None

    def test_by_its_name_prompts_without_outputs_are_not_pooled(self, path: Path) -> None:
        sizes: dict[str, Any] = dict(SMALL_VIT, prompt_location="key-value")
        assert PromptedViT("mae_vitb16", 3, 2, checkpoint=path, **sizes).pool is None

    def test_with_a_pooling_of_the_users_the_files_norm_is_used(self, path: Path) -> None:
        sizes: dict[str, Any] = dict(SMALL_VIT, global_pool="token")
        model = PromptedViT("mae_vitb16", 3, 2, checkpoint=path, **sizes)
        assert model.pool is None
        assert torch.equal(model.backbone.stem.norm.weight, small_vit(1).state_dict()["norm.weight"])

    def test_by_timms_name_the_missing_norm_is_an_error(self, path: Path) -> None:
        with pytest.raises(ValueError, match="it lacks fc_norm.weight"):
            resolve_backbone(VIT, False, dict(SMALL_VIT, global_pool="avg"), checkpoint=path)


class TestInAModel:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        return save_jax(small_vit(1), tmp_path / "ViT-B_16.npz")

    def build(self, kind: type, path: Path, **settings: Any) -> Any:
        return kind(VIT, 3, checkpoint=path, **settings, **SMALL_VIT)

    def test_the_model_is_that_of_the_loaded_backbone(self, path: Path) -> None:
        model = self.build(PromptedViT, path, num_prompts=2)
        assert model.backbone.fingerprint == PromptedViT(small_vit(1), 3, 2).backbone.fingerprint

    def test_a_saved_model_finds_its_file_from_another_folder(
        self, path: Path, tmp_path: Path, monkeypatch
    ) -> None:
        monkeypatch.chdir(path.parent)
        model = self.build(PromptedViT, Path(path.name), num_prompts=2).eval()
        model.save_pretrained(tmp_path / "saved")
        monkeypatch.chdir("/")
        images = torch.randn(1, 3, 32, 32)
        assert torch.equal(load_pretrained(tmp_path / "saved").eval()(images), model(images))

    def test_a_saved_model_names_the_file_that_has_moved(self, path: Path, tmp_path: Path) -> None:
        self.build(LinearProbe, path).save_pretrained(tmp_path / "saved")
        moved = path.rename(tmp_path / "elsewhere.npz")
        with pytest.raises(ValueError, match=r"ViT-B_16.npz, which the backbone of .* pass the file"):
            load_pretrained(tmp_path / "saved")
        assert load_pretrained(tmp_path / "saved", checkpoint=moved).num_classes == 3

    def test_a_model_that_stores_its_backbone_needs_no_file_again(self, path: Path, tmp_path: Path) -> None:
        model = self.build(FullTuning, path).eval()
        model.save_pretrained(tmp_path / "saved")
        path.unlink()
        images = torch.randn(1, 3, 32, 32)
        assert torch.equal(load_pretrained(tmp_path / "saved").eval()(images), model(images))

    def test_another_file_in_its_place_is_refused(self, path: Path, tmp_path: Path) -> None:
        self.build(LinearProbe, path).save_pretrained(tmp_path / "saved")
        save_jax(small_vit(5), path)
        with pytest.raises(ValueError, match="its weights are not those"):
            load_pretrained(tmp_path / "saved")

    @pytest.mark.parametrize(
        "backbone, arguments, reason",
        [
            (VIT, dict(pretrained=True), "pretrained: got True beside checkpoint"),
            (None, {}, "checkpoint: only with a backbone's name"),
            (VIT, dict(checkpoint="nowhere.npz"), "checkpoint: nowhere.npz is no file"),
        ],
        ids=["pretrained", "instance", "missing"],
    )
    def test_what_excludes_a_checkpoint_is_refused(
        self, backbone: str | None, arguments: dict[str, Any], reason: str, path: Path
    ) -> None:
        with pytest.raises(ValueError, match=reason):
            LinearProbe(backbone or small_vit(), 3, **{"checkpoint": path, **arguments})
