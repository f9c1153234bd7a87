"""Backbones under the names of the VPT paper's official code (KMnP/vpt).

Each is a timm architecture with weights that their authors publish as a file; timm's hub has most of them
too. Sources of names and addresses: the official code's README, and timm's configuration of its weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class KnownBackbone:
    """A backbone of the paper.

    Attributes:
        name: the official code's (DATA.FEATURE).
        objective: how it was pre-trained.
        timm_name: the architecture; with a tag if timm's hub holds the same weights as the file.
        address: URL of the authors' file.
        normalization: mean and standard deviation of its input images.
        arguments: of timm's model, besides the architecture's own.
        pool: what the head reads if there are prompts; None for the backbone's own pooling.
        may_lack: prefixes of the model's tensors that may be missing in the file; they keep timm's initial
            values.
        leaves_out: prefixes of the file's tensors to ignore.
    """

    name: str
    objective: str
    timm_name: str
    address: str
    normalization: Literal["imagenet", "inception"] = "imagenet"
    arguments: Mapping[str, Any] = field(default_factory=dict)
    pool: str | None = None
    may_lack: tuple[str, ...] = ()
    leaves_out: tuple[str, ...] = ()

    @property
    def file(self) -> str:
        """The published file's name."""
        return self.address.rpartition("/")[2]

    @property
    def hub(self) -> str | None:
        """The repository on the Hugging Face hub that holds the same weights, or None."""
        return f"timm/{self.timm_name}" if "." in self.timm_name else None


def _supervised(name: str, timm_name: str, file: str) -> KnownBackbone:
    # The first ImageNet-21k weights of Google's JAX code. timm's default for these architectures, augreg, was
    # trained later with another recipe.
    return KnownBackbone(
        name=name,
        objective="supervised, ImageNet-21k",
        timm_name=f"{timm_name}.orig_in21k",
        address=f"https://storage.googleapis.com/vit_models/imagenet21k/{file}",
        normalization="inception",
    )


def _mae(name: str, timm_name: str, size: str) -> KnownBackbone:
    # The official code pools the prompts too, and normalises after pooling, with a norm that is not in the
    # file and keeps its initial weight 1 and bias 0.
    return KnownBackbone(
        name=name,
        objective="MAE, ImageNet-1k",
        timm_name=f"{timm_name}.mae",
        address=f"https://dl.fbaipublicfiles.com/mae/pretrain/mae_pretrain_vit_{size}.pth",
        arguments={"global_pool": "avg"},
        pool="image_and_prompts",
        may_lack=("fc_norm.",),
        leaves_out=("norm.",),
    )


def _swin(name: str, objective: str, timm_name: str, file: str) -> KnownBackbone:
    release = "https://github.com/SwinTransformer/storage/releases/download/v1.0.0"
    return KnownBackbone(name, objective, timm_name, f"{release}/{file}")


KNOWN: dict[str, KnownBackbone] = {
    known.name: known
    for known in (
        _supervised("sup_vitb16_imagenet21k", "vit_base_patch16_224", "ViT-B_16.npz"),
        _supervised("sup_vitb32_imagenet21k", "vit_base_patch32_224", "ViT-B_32.npz"),
        _supervised("sup_vitl16_imagenet21k", "vit_large_patch16_224", "ViT-L_16.npz"),
        _supervised("sup_vitl32_imagenet21k", "vit_large_patch32_224", "ViT-L_32.npz"),
        _supervised("sup_vith14_imagenet21k", "vit_huge_patch14_224", "ViT-H_14.npz"),
        _mae("mae_vitb16", "vit_base_patch16_224", "base"),
        _mae("mae_vitl16", "vit_large_patch16_224", "large"),
        _mae("mae_vith14", "vit_huge_patch14_224", "huge"),
        KnownBackbone(
            name="mocov3_vitb",
            objective="MoCo v3, ImageNet-1k",
            timm_name="vit_base_patch16_224",
            address="https://dl.fbaipublicfiles.com/moco-v3/vit-b-300ep/linear-vit-b-300ep.pth.tar",
        ),
        _swin(
            "swint_imagenet",
            "supervised, ImageNet-1k",
            "swin_tiny_patch4_window7_224.ms_in1k",
            "swin_tiny_patch4_window7_224.pth",
        ),
        _swin(
            "swins_imagenet",
            "supervised, ImageNet-1k",
            "swin_small_patch4_window7_224.ms_in1k",
            "swin_small_patch4_window7_224.pth",
        ),
        _swin(
            "swinb_imagenet_224",
            "supervised, ImageNet-1k",
            "swin_base_patch4_window7_224.ms_in1k",
            "swin_base_patch4_window7_224.pth",
        ),
        _swin(
            "swinb_imagenet_384",
            "supervised, ImageNet-1k",
            "swin_base_patch4_window12_384.ms_in1k",
            "swin_base_patch4_window12_384.pth",
        ),
        _swin(
            "swinb_imagenet22k_224",
            "supervised, ImageNet-22k",
            "swin_base_patch4_window7_224.ms_in22k",
            "swin_base_patch4_window7_224_22k.pth",
        ),
        _swin(
            "swinb_imagenet22k_384",
            "supervised, ImageNet-22k",
            "swin_base_patch4_window12_384.ms_in22k",
            "swin_base_patch4_window12_384_22k.pth",
        ),
        _swin(
            "swinl_imagenet22k_224",
            "supervised, ImageNet-22k",
            "swin_large_patch4_window7_224.ms_in22k",
            "swin_large_patch4_window7_224_22k.pth",
        ),
        KnownBackbone(
            name="imagenet22k_sup_rnx_base",
            objective="supervised, ImageNet-22k",
            timm_name="convnext_base.fb_in22k",
            address="https://dl.fbaipublicfiles.com/convnext/convnext_base_22k_224.pth",
        ),
        KnownBackbone(
            name="imagenet_sup_rn50",
            objective="supervised, ImageNet-1k",
            timm_name="resnet50.tv_in1k",
            address="https://download.pytorch.org/models/resnet50-0676ba61.pth",
        ),
    )
}


def find_known(backbone: str) -> KnownBackbone | None:
    """The backbone with this name, or with the weights of this timm name; None if there is none. A timm name
    without a tag does not identify weights."""
    by_timm = {known.timm_name: known for known in KNOWN.values() if known.hub is not None}
    return KNOWN.get(backbone) or by_timm.get(backbone)


def table() -> list[tuple[str, ...]]:
    """`KNOWN` as rows of text; the first is the header."""
    header = ("name", "trained", "timm name", "normalisation", "file", "timm has it")
    return [
        header,
        *(
            (
                known.name,
                known.objective,
                known.timm_name,
                known.normalization,
                known.file,
                "yes" if known.hub else "no",
            )
            for known in KNOWN.values()
        ),
    ]
