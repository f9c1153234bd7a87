"""PromptedViT against recorded outputs of the official implementation (KMnP/vpt): one test per golden file.

Each file in $VPT_GOLDEN_DIR (default: tests/golden) holds the settings, weights, inputs and results of one
run of the official code on a small random model. A file that cannot be mapped fails, with the reason.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from concatenation import ConcatenatedViT, step, trainables
from safetensors import safe_open
from safetensors.torch import save_file
from timm.layers import LayerNorm
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vpt_fast import PromptedViT, official
from vpt_fast.backbones.checkpoints import load_checkpoint
from vpt_fast.official import Unmapped

GOLDEN_DIR = Path(os.environ.get("VPT_GOLDEN_DIR", Path(__file__).parent / "golden"))
# Those of a Swin are test_swin.py's.
# With no file in the folder one test remains, and it fails on the missing file instead of being skipped.
GOLDEN_FILES = [p for p in sorted(GOLDEN_DIR.glob("*.safetensors")) if not p.name.startswith("swin")]
GOLDEN_FILES = GOLDEN_FILES or [GOLDEN_DIR / "no_golden_file.safetensors"]

# Largest error over the tensor's largest entry. The files were computed in float32: the plain definition is
# off by up to 5e-6 in a step and 1.1e-5 after SGD steps, which carry rounding on; a wrong formula by 1e-3.
STEP_TOLERANCE = 2e-5
SGD_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Golden:
    """One golden file: its metadata and tensors, and the official prompt settings with defaults filled in."""

    metadata: dict[str, str]
    tensors: dict[str, Tensor]
    prompt: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> Golden:
        with safe_open(path, "pt") as file:
            metadata, tensors = dict(file.metadata()), {key: file.get_tensor(key) for key in file.keys()}
        if metadata.get("arch", "vit") not in ("vit", "mae"):
            raise Unmapped(f"arch {metadata['arch']!r}: PromptedViT takes a ViT or an MAE")
        given = json.loads(metadata["prompt"]) if "prompt" in metadata else {}
        if "deep" in metadata:  # the MAE files say these two beside the settings
            given.setdefault("DEEP", metadata["deep"] == "True")
        if "pool" in metadata:
            given.setdefault("VIT_POOL_TYPE", metadata["pool"])
        return cls(metadata, tensors, official.DEFAULTS | given)

    def __getitem__(self, size: str) -> int:
        return int(self.metadata[size])

    def under(self, prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): t for key, t in self.tensors.items() if key.startswith(prefix)}

    @property
    def is_mae(self) -> bool:
        return self.metadata.get("arch") == "mae"


def mapped_settings(golden: Golden) -> dict[str, Any]:
    """The keyword arguments of PromptedViT that mean what the file's settings mean."""
    if golden.prompt["DROPOUT"] != 0:
        raise Unmapped(f"DROPOUT {golden.prompt['DROPOUT']}: results under random masks cannot be compared")
    return official.mapped_settings(
        golden.prompt,
        encoder="mae" if golden.is_mae else "sup",
        depth=golden["num_layers"],
        num_prompts=golden["num_prompts"],
    )


def build_backbone(golden: Golden, folder: Path) -> VisionTransformer:
    """The file's frozen weights, as a public JAX checkpoint or as an MAE state dict."""
    border = golden["num_prompts"] if golden.prompt["LOCATION"] == "pad" else 0
    sizes: dict[str, Any] = {
        "img_size": golden["img_size"] + 2 * border,
        "patch_size": golden["patch_size"],
        "embed_dim": golden["hidden_size"],
        "depth": golden["num_layers"],
        "num_heads": golden["num_heads"],
        "norm_layer": partial(LayerNorm, eps=1e-6),
        "num_classes": 0,
    }
    state, npz = golden.under("state:"), golden.under("npz:")
    if golden.is_mae and state:
        mlp_dim = state["blocks.0.mlp.fc1.weight"].shape[0]
        vit = VisionTransformer(**sizes, mlp_ratio=mlp_dim / sizes["embed_dim"], global_pool="avg")
        vit.load_state_dict(state)
        return vit
    if not npz:
        raise Unmapped("no backbone: want npz: tensors of a ViT or state: tensors of an MAE")
    vit = VisionTransformer(**sizes, mlp_ratio=golden["mlp_dim"] / sizes["embed_dim"])
    position = tuple(npz["Transformer/posembed_input/pos_embedding"].shape)
    if vit.pos_embed is None or position != tuple(vit.pos_embed.shape):
        raise Unmapped(f"position embedding {position}, want one for an image of {sizes['img_size']} pixels")
    arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in npz.items()}
    np.savez(folder / "backbone.npz", **arrays)
    load_checkpoint(vit, folder / "backbone.npz")
    return vit


def to_our_names(golden: Golden, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return official.to_our_names(tensors, mapped_settings(golden))


def assert_close(actual: Tensor, expected: Tensor, what: str, tolerance: float = STEP_TOLERANCE) -> None:
    assert actual.shape == expected.shape, f"{what}: {tuple(actual.shape)}, official {tuple(expected.shape)}"
    error = float((actual.double() - expected.double()).abs().max() / expected.double().abs().max())
    assert error <= tolerance, f"{what}: off by {error:.1e} of the official tensor's largest entry"


def check_against(golden: Golden, model: nn.Module, dtype: torch.dtype) -> None:
    """Holds logits, loss, every gradient and, where the file has them, SGD steps to the official ones."""
    images, labels = golden.tensors["images"].to(dtype), golden.tensors["labels"]
    first = step(model, images, labels)
    assert_close(first.logits, golden.tensors["logits"], "logits")
    assert_close(first.loss, golden.tensors["loss"], "loss")
    expected = to_our_names(golden, golden.under("grad:"))
    assert first.gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_close(first.gradients[name], gradient, f"gradient of {name}")

    if "sgd" not in golden.metadata:
        if golden.under("after3:") or not golden.is_mae:
            raise Unmapped("the file has no settings for its SGD steps")
        return
    sgd = json.loads(golden.metadata["sgd"])
    trainable = trainables(model)
    optimizer = torch.optim.SGD(
        trainable.values(), lr=sgd["lr"], momentum=sgd["momentum"], weight_decay=sgd["weight_decay"]
    )
    losses = []
    for _ in range(sgd["steps"]):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach().double())
    assert_close(torch.stack(losses), golden.tensors["losses_sgd"], "losses of the SGD steps", SGD_TOLERANCE)
    for name, value in to_our_names(golden, golden.under(f"after{sgd['steps']}:")).items():
        assert_close(trainable[name].detach(), value, f"{name} after {sgd['steps']} SGD steps", SGD_TOLERANCE)


@pytest.mark.parametrize("path", GOLDEN_FILES, ids=lambda path: path.stem)
def test_prompted_vit_matches_the_official_implementation(path: Path, tmp_path: Path) -> None:
    golden = Golden.read(path)
    settings, backbone = mapped_settings(golden), build_backbone(golden, tmp_path)
    for dtype in (torch.float64, torch.float32):
        model = PromptedViT(backbone, golden["num_classes"], dtype=dtype, **settings).to(dtype).train()
        start = to_our_names(golden, golden.under("init:"))
        model.load_trainable_state_dict({name: tensor.to(dtype) for name, tensor in start.items()})
        check_against(golden, model, dtype)


@pytest.mark.parametrize("path", GOLDEN_FILES, ids=lambda path: path.stem)
def test_the_plain_definition_matches_the_official_implementation(path: Path, tmp_path: Path) -> None:
    golden = Golden.read(path)
    backbone = build_backbone(golden, tmp_path)
    model = ConcatenatedViT(backbone, golden["num_classes"], **mapped_settings(golden))
    model.load_trainables(to_our_names(golden, golden.under("init:")))
    check_against(golden, model.double(), torch.float64)


@pytest.mark.parametrize(
    "prompt, reason",
    [
        ({"NUM_LAYERS": 2}, "unknown prompt settings"),
        ({"LOCATION": "append"}, "LOCATION 'append'"),
        ({"VIT_POOL_TYPE": "max"}, "VIT_POOL_TYPE 'max'"),
        ({"DROPOUT": 0.1}, "DROPOUT 0.1"),
        ({"DEEP": True, "NUM_DEEP_LAYERS": 4}, "NUM_DEEP_LAYERS 4 of 3 blocks"),
        ({"DEEP": True, "NUM_DEEP_LAYERS": 2, "REVERSE_DEEP": True}, "slices off prompts that were never"),
        (
            {"DEEP": True, "NUM_DEEP_LAYERS": 2, "FORWARD_DEEP_NOEXPAND": True, "VIT_POOL_TYPE": "img_pool"},
            "pools the wrong patches",
        ),
        ({"DEEP": True, "LOCATION": "pad"}, "no deep prompts there"),
    ],
    ids=["key", "location", "pool", "dropout", "layers", "reverse_prepend", "noexpand_pool", "deep_pad"],
)
def test_settings_without_a_counterpart_are_refused(
    prompt: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    metadata = {"prompt": json.dumps(prompt), "num_layers": "3", "num_prompts": "5"}
    path = tmp_path / "golden.safetensors"
    save_file({"loss": torch.zeros(())}, path, metadata)
    with pytest.raises(Unmapped, match=reason):
        mapped_settings(Golden.read(path))


@pytest.mark.parametrize("path", GOLDEN_FILES, ids=lambda path: path.stem)
def test_official_prompts_give_the_official_logits_and_go_back_bit_by_bit(path: Path, tmp_path: Path) -> None:
    golden = Golden.read(path)
    tensors = {
        name if name.startswith("head.") else f"enc.{name}": tensor
        for name, tensor in golden.under("init:").items()
    }
    torch.save({"model": tensors}, tmp_path / "last_model.pth")
    backbone = build_backbone(golden, tmp_path)
    model = official.import_prompts(tmp_path / "last_model.pth", backbone, prompt=golden.prompt)
    assert_close(model.eval()(golden.tensors["images"]).detach(), golden.tensors["logits"], "logits")
    official.export_prompts(model, tmp_path / "again.pth")
    again = torch.load(tmp_path / "again.pth", weights_only=True)["model"]
    unused = () if again.keys() == tensors.keys() else ("enc.transformer.deep_prompt_embeddings",)
    assert set(tensors) - set(again) == set(unused) and not set(again) - set(tensors)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in again.items())
    other = official.import_prompts(tmp_path / "again.pth", backbone)  # the settings are in the file
    assert torch.equal(other.eval()(golden.tensors["images"]), model(golden.tensors["images"]))
