"""PromptedViT against recorded outputs of the official implementation (KMnP/vpt): one test per golden file.

Each file in $VPT_GOLDEN_DIR (default: tests/golden) holds the settings, weights, inputs and results of one
run of the official code on a small random model. A file that cannot be mapped fails, with the reason.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from concatenation import PATCH_EMBEDDING, ConcatenatedViT, step, trainables
from safetensors import safe_open
from safetensors.torch import save_file
from timm.layers import LayerNorm
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vpt_fast import PromptedViT

GOLDEN_DIR = Path(os.environ.get("VPT_GOLDEN_DIR", Path(__file__).parent / "golden"))
# Those of a Swin are test_swin.py's.
# With no file in the folder one test remains, and it fails on the missing file instead of being skipped.
GOLDEN_FILES = [p for p in sorted(GOLDEN_DIR.glob("*.safetensors")) if not p.name.startswith("swin")]
GOLDEN_FILES = GOLDEN_FILES or [GOLDEN_DIR / "no_golden_file.safetensors"]

# Largest error over the tensor's largest entry. The files were computed in float32: the plain definition is
# off by up to 5e-6 in a step and 1.1e-5 after SGD steps, which carry rounding on; a wrong formula by 1e-3.
STEP_TOLERANCE = 2e-5
SGD_TOLERANCE = 1e-4

OFFICIAL_DEFAULTS: dict[str, Any] = {
    "NUM_TOKENS": None,  # given by the file's metadata
    "LOCATION": "prepend",
    "INITIATION": "random",
    "CLSEMB_FOLDER": "",
    "CLSEMB_PATH": "",
    "PROJECT": -1,
    "DEEP": False,
    "NUM_DEEP_LAYERS": None,
    "REVERSE_DEEP": False,
    "DEEP_SHARED": False,
    "FORWARD_DEEP_NOEXPAND": False,
    "VIT_POOL_TYPE": "original",
    "DROPOUT": 0.0,
    "SAVE_FOR_EACH_EPOCH": False,
}
TOKEN_LOCATIONS = ("prepend", "add", "add-1")  # the ones that may be deep and may be projected
LOCATIONS = {
    "prepend": "prepend",
    "add": "add",
    "add-1": "add-1",
    "prepend-pixel": "prepend-pixel",
    "prepend-pixel-gaussian": "prepend-pixel",  # differs in how it starts, which the file holds
    "pad": "pad",
    "below": "concat-channel",
}
POOLS = {"img_pool": "image", "prompt_pool": "prompts", "imgprompt_pool": "image_and_prompts"}


class Unmapped(ValueError):
    """A golden file asks for what PromptedViT has no counterpart of, or what the official code gets wrong."""


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
        unknown = sorted(given.keys() - OFFICIAL_DEFAULTS.keys())
        if unknown:
            raise Unmapped(f"unknown prompt settings {unknown}; known: {sorted(OFFICIAL_DEFAULTS)}")
        return cls(metadata, tensors, OFFICIAL_DEFAULTS | given)

    def __getitem__(self, size: str) -> int:
        return int(self.metadata[size])

    def under(self, prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): t for key, t in self.tensors.items() if key.startswith(prefix)}

    @property
    def is_mae(self) -> bool:
        return self.metadata.get("arch") == "mae"


def mapped_settings(golden: Golden) -> dict[str, Any]:
    """The keyword arguments of PromptedViT that mean what the official settings mean."""
    prompt, depth, num_prompts = golden.prompt, golden["num_layers"], golden["num_prompts"]
    location, deep, pool = prompt["LOCATION"], prompt["DEEP"], prompt["VIT_POOL_TYPE"]
    if location == "prepend-pixel-imgnettransform":
        raise Unmapped(f"LOCATION {location}: PromptedViT takes the strip's pixels as they are")
    if location not in LOCATIONS:
        raise Unmapped(f"LOCATION {location!r}; known: {sorted(LOCATIONS)}")
    if pool != "original" and pool not in POOLS:
        raise Unmapped(f"VIT_POOL_TYPE {pool!r}; known: original, {', '.join(POOLS)}")
    if prompt["INITIATION"] not in ("random", "final-cls", "cls-nolastl", "cls-nofirstl"):
        raise Unmapped(f"INITIATION {prompt['INITIATION']!r} is none of the official ones")
    if prompt["DROPOUT"] != 0:
        raise Unmapped(f"DROPOUT {prompt['DROPOUT']}: results under random masks cannot be compared")
    if prompt["NUM_TOKENS"] not in (None, num_prompts):
        raise Unmapped(f"NUM_TOKENS {prompt['NUM_TOKENS']} but the file's num_prompts is {num_prompts}")
    if pool != "original" and location != "prepend":
        raise Unmapped(f"VIT_POOL_TYPE {pool} with LOCATION {location}: the official code refuses it")
    if golden.is_mae:
        return mapped_mae_settings(golden)

    if deep and location not in TOKEN_LOCATIONS:
        raise Unmapped(f"DEEP with LOCATION {location}: the official code has no deep prompts there")
    if not deep and (prompt["REVERSE_DEEP"] or prompt["FORWARD_DEEP_NOEXPAND"]):
        raise Unmapped("REVERSE_DEEP and FORWARD_DEEP_NOEXPAND need DEEP")

    settings: dict[str, Any] = {
        "num_prompts": None if location in ("add", "add-1") else num_prompts,
        "prompt_type": "deep" if deep else "shallow",
        "prompt_location": LOCATIONS[location],
        "pool": POOLS.get(pool),
    }
    if location in TOKEN_LOCATIONS and prompt["PROJECT"] > -1:
        settings["prompt_project"] = prompt["PROJECT"]
    if not deep:
        return settings

    first = prompt["NUM_DEEP_LAYERS"]
    if first is not None and not 1 <= first <= depth:
        raise Unmapped(f"NUM_DEEP_LAYERS {first} of {depth} blocks")
    if prompt["REVERSE_DEEP"]:
        if first is None:
            raise Unmapped("REVERSE_DEEP needs NUM_DEEP_LAYERS")
        if location == "prepend":
            raise Unmapped(
                "REVERSE_DEEP with LOCATION prepend: the official code slices off prompts that were never "
                "inserted, so it loses the first num_prompts patches"
            )
        return settings | {"prompt_layers": -first}

    drop = prompt["FORWARD_DEEP_NOEXPAND"]
    if drop and location != "prepend":
        raise Unmapped(f"FORWARD_DEEP_NOEXPAND with LOCATION {location}: the official code refuses it")
    if first is not None:
        settings["prompt_layers"] = first
    settings["prompt_shared"] = prompt["DEEP_SHARED"] and not drop  # the NOEXPAND path never looks at it
    settings["after_prompts"] = "drop" if drop else "flow"
    if drop and first is not None and first < depth:
        if pool in ("img_pool", "prompt_pool"):
            raise Unmapped(
                f"FORWARD_DEEP_NOEXPAND with {pool}: the official code counts num_prompts rows that are "
                "gone, so it pools the wrong patches"
            )
        if pool == "imgprompt_pool":  # no prompt is left: all but CLS are the patches
            settings["pool"] = "image"
    return settings


def mapped_mae_settings(golden: Golden) -> dict[str, Any]:
    """The official MAE reads DEEP, VIT_POOL_TYPE and LOCATION alone, and by default pools prompts too."""
    prompt = golden.prompt
    if prompt["LOCATION"] != "prepend":
        raise Unmapped(f"LOCATION {prompt['LOCATION']} with MAE: the official code refuses it")
    return {
        "num_prompts": golden["num_prompts"],
        "prompt_type": "deep" if prompt["DEEP"] else "shallow",
        "pool": POOLS.get(prompt["VIT_POOL_TYPE"], "image_and_prompts"),
    }


def build_backbone(golden: Golden, folder: Path) -> VisionTransformer:
    """The file's frozen weights, by timm's loader of the public JAX checkpoints or as an MAE state dict."""
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
    vit.load_pretrained(str(folder / "backbone.npz"))
    return vit


def to_our_names(golden: Golden, official: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Official tensors of the trained parameters (values, gradients) under PromptedViT's names for them."""
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in official.items()}
    ours = {
        "head.weight": tensors.pop("head.last_layer.weight"),
        "head.bias": tensors.pop("head.last_layer.bias"),
    }
    location, settings = golden.prompt["LOCATION"], mapped_settings(golden)
    shallow = tensors.pop("prompt_embeddings", None)
    deep = tensors.pop("deep_prompt_embeddings", None)
    if settings.get("prompt_shared") or settings["prompt_type"] == "shallow":
        deep = None  # there, but never used
    sets = [tensor for tensor in (shallow, deep) if tensor is not None]  # REVERSE_DEEP has no shallow ones
    if sets:
        ours["prompts"] = torch.cat(sets)
    if location == "pad":
        ours["prompts"] = tensors.pop("prompt_embeddings_tb")
        ours["prompts_sides"] = tensors.pop("prompt_embeddings_lr")
    if location == "below":
        ours[f"{PATCH_EMBEDDING}.weight"] = tensors.pop("embeddings.patch_embeddings.weight")
        ours[f"{PATCH_EMBEDDING}.bias"] = tensors.pop("embeddings.patch_embeddings.bias")
    projection = {part: tensors.pop(f"prompt_proj.{part}", None) for part in ("weight", "bias")}
    if "prompt_project" in settings:  # with a location in pixel space the official projection is never used
        ours |= {f"prompt_projection.{part}": t for part, t in projection.items() if t is not None}
    if tensors:
        raise Unmapped(f"tensors without a counterpart: {sorted(tensors)}")
    return ours


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
