"""Saved models and backbones on the hub, with huggingface_hub's own requests to a hub on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import yaml
from hub_server import Hub

from vpt_fast.backbones.resolve import Origin
from vpt_fast.hub import model_card

HERE = Path(__file__).parent
# In a process of its own, because huggingface_hub reads the hub's address when it is imported.
SESSION = """
import json, sys, warnings
import torch
import vpt_fast

found = {}

def attempt(name, function):
    try:
        found[name] = function()
    except Exception as error:
        found[name] = f"{type(error).__name__}: {error}"

model = vpt_fast.PromptedViT("hf-hub:me/vit@v1", 3, 4, pretrained=True).eval()
found["backbone"] = model.config.backbone.name
found["commit"] = model.push_to_hub("prompts", token="hf_token")
images = torch.randn(2, 3, 32, 32)

def difference(name):
    loaded = vpt_fast.PromptedViT.from_pretrained(name).eval()
    return float((loaded(images) - model(images)).abs().max())

attempt("loaded", lambda: difference("me/prompts"))
attempt("loaded at a revision", lambda: difference("me/prompts@v1"))
attempt("no revision", lambda: difference("me/prompts@v2"))
attempt("no repository", lambda: difference("me/none"))
attempt("no folder", lambda: difference("prompts"))
attempt("no backbone", lambda: vpt_fast.PromptedViT("hf-hub:me/none", 3, 4))
for name in ("vit_tiny_patch16_224", "sup_vitb16_imagenet21k"):
    attempt(name, lambda: vpt_fast.PromptedViT(name, 3, 4, pretrained=True))
attempt("no safetensors", lambda: vpt_fast.PromptedViT("hf-hub:me/pickled", 3, 4, pretrained=True))
found["second commit"] = model.push_to_hub("me/described", token="hf_token")
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A hub after the session above, of which it has `found` what there was, and the files of
    me/prompts that were `downloaded`."""
    folder = tmp_path_factory.mktemp("vit")
    size = dict(depth=1, embed_dim=16, num_heads=1, img_size=32)
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, **size)
    timm.models.save_for_hf(vit, folder, model_args=size, safe_serialization=True)
    with Hub() as hub:
        hub.revisions.add("v1")
        files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        hub.repositories = {
            "me/vit": files,
            "me/pickled": {"config.json": files["config.json"], "pytorch_model.bin": b"pickle"},
            "me/described": {"README.md": b"mine"},
        }
        cache = str(tmp_path_factory.mktemp("cache"))
        environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": cache, "HF_HUB_OFFLINE": "0"}
        result = subprocess.run(
            [sys.executable, "-c", SESSION], env=environment, cwd=cache, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
        hub.found = json.loads(result.stdout.splitlines()[-1])
        hub.downloaded = {path.name for path in Path(cache).glob("hub/models--me--prompts/snapshots/*/*")}
        yield hub
        hub.shutdown()


def test_a_backbone_is_read_from_a_repository_at_a_revision(hub: Any) -> None:
    assert hub.found["backbone"] == "hf-hub:me/vit@v1"


def test_an_upload_is_what_save_pretrained_writes_and_a_card(hub: Any) -> None:
    assert sorted(hub.repositories["me/prompts"]) == ["README.md", "config.json", "model.safetensors"]
    assert hub.found["commit"] == f"{hub.url}/me/prompts/commit/{'a' * 40}"


def test_a_card_that_is_there_is_left(hub: Any) -> None:
    assert sorted(hub.repositories["me/described"]) == ["README.md", "config.json", "model.safetensors"]
    assert hub.repositories["me/described"]["README.md"] == b"mine"


def test_the_card_says_what_the_model_was_trained_on_and_how_to_load_it(hub: Any) -> None:
    _, metadata, text = hub.repositories["me/prompts"]["README.md"].decode().split("---\n")
    assert yaml.safe_load(metadata) == {
        "base_model": "me/vit",
        "library_name": "vpt_fast",
        "pipeline_tag": "image-classification",
        "tags": ["visual-prompt-tuning"],
    }
    assert 'vpt_fast.load_pretrained("me/prompts")' in text


@pytest.mark.parametrize("how", ["loaded", "loaded at a revision"])
def test_what_was_uploaded_computes_the_same(hub: Any, how: str) -> None:
    assert hub.found[how] == 0


def test_of_a_repository_only_the_models_own_files_are_downloaded(hub: Any) -> None:
    assert hub.downloaded == {"config.json", "model.safetensors"}


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (
            "no revision",
            "FileNotFoundError: me/prompts@v2: is no folder, and cannot be read from the Hugging",
        ),
        (
            "no repository",
            "FileNotFoundError: me/none: is no folder, and cannot be read from the Hugging Face",
        ),
        ("no folder", "FileNotFoundError: prompts: has no config.json, want a folder that save_pretrained"),
        ("no backbone", "ValueError: backbone: got 'hf-hub:me/none', whose config.json cannot be read: 404"),
        (
            "vit_tiny_patch16_224",
            "ValueError: pretrained: the weights of vit_tiny_patch16_224 cannot be downloaded: 404",
        ),
        (
            "sup_vitb16_imagenet21k",
            "ValueError: pretrained: the weights of sup_vitb16_imagenet21k cannot be",
        ),
        ("no safetensors", "ValueError: pretrained: hf-hub:me/pickled has no model.safetensors, and nothing"),
    ],
)
def test_what_is_not_there_is_named(hub: Any, case: str, message: str) -> None:
    assert hub.found[case].startswith(message)


def test_messages_leave_out_the_hubs_hints(hub: Any) -> None:
    assert "authentication" not in hub.found["no repository"] + hub.found["no backbone"]


def test_the_hub_here_knows_all_that_is_asked_of_it(hub: Any) -> None:
    assert [request for request in hub.refused if "agent-harnesses" not in request] == []


@pytest.mark.parametrize(
    ("origin", "base_model"),
    [
        (Origin("vit_base_patch16_224.augreg_in21k", True, {}), "timm/vit_base_patch16_224.augreg_in21k"),
        (Origin("hf-hub:me/vit@v1", True, {}), "me/vit"),
        (Origin("vit_base_patch16_224", False, {}), None),
        (Origin("vit_base_patch16_224", False, {}, checkpoint="vit.npz"), None),
        (Origin("vit_base_patch16_224", True, {"pretrained_cfg_overlay": {"file": "vit.npz"}}), None),
        (
            Origin("vit_tiny_patch16_224", True, {"pretrained_cfg_overlay": {"crop_pct": 1.0}}),
            "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k",
        ),
        (Origin("local-dir:/vit", True, {}), None),
        (Origin("vpt_fast_demo", True, {}), None),
        (Origin(None, False, {}), None),
    ],
)
def test_the_card_links_the_repository_that_has_the_backbones_weights(
    origin: Origin, base_model: str | None
) -> None:
    card = model_card("me/p", "PromptedViT", origin, 5, task="", stores_backbone=False, call=None)
    assert yaml.safe_load(card.split("---\n")[1]).get("base_model") == base_model
    named = f"[{base_model}](https://huggingface.co/{base_model})" if base_model else origin.name
    assert f"for 5 classes, on {named or 'a backbone that was built in Python'}. " in card


@pytest.mark.parametrize(
    ("origin", "call", "stores_backbone", "argument"),
    [
        (Origin("vit_base_patch16_224", True, {}), None, False, ""),
        (Origin(None, False, {}), None, False, ", backbone=..."),
        (Origin("local-dir:/vit", True, {}), None, True, ", backbone=..."),
        (
            Origin("vit_base_patch16_224", False, {}),
            "vit_base_patch16_224, mlp_layer=...",
            False,
            ", backbone=...",
        ),
        (Origin("vit_base_patch16_224", False, {}, checkpoint="vit.npz"), None, False, ", checkpoint=..."),
        (Origin("vit_base_patch16_224", False, {}, checkpoint="vit.npz"), None, True, ""),
    ],
    ids=["name", "instance", "folder", "arguments", "file", "file_that_is_not_needed"],
)
def test_the_card_asks_for_what_loading_needs(
    origin: Origin, call: str | None, stores_backbone: bool, argument: str
) -> None:
    card = model_card("me/p", "PromptedViT", origin, 5, task="", stores_backbone=stores_backbone, call=call)
    assert f'load_pretrained("me/p"{argument})' in card
