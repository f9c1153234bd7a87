"""Saved models: what their files hold, and that a model is built again from them alone."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from tiny import random_batch, tiny_swin, tiny_vit
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrize

from vpt_fast import (
    LinearProbe,
    PromptedSwin,
    PromptedViT,
    load_pretrained,
)
from vpt_fast.classifier import TunedClassifier
from vpt_fast.tuning.adapter import AdapterTuning
from vpt_fast.tuning.bias import BiasTuning
from vpt_fast.tuning.full import FullTuning
from vpt_fast.tuning.partial import PartialTuning
from vpt_fast.tuning.probes import MLPProbe

SAVED = {
    "deep": dict(num_prompts=5, prompt_dropout=0.25, pool="image"),
    "some_blocks": dict(num_prompts=5, prompt_layers=[0, 2], after_prompts="drop"),
    "projection": dict(num_prompts=5, prompt_project=4, prompt_type="shallow"),
    "pad": dict(num_prompts=4, prompt_type="shallow", prompt_location="pad"),
    "concat_channel": dict(num_prompts=2, prompt_type="shallow", prompt_location="concat-channel"),
    "add": dict(prompt_location="add"),
}


@pytest.mark.parametrize("settings", SAVED.values(), ids=SAVED)
def test_round_trip_gives_the_same_logits_and_settings(settings: dict, tmp_path: Path) -> None:
    vit = tiny_vit()
    model = PromptedViT(vit, 5, **settings).double().eval()
    images, _ = random_batch(model)
    model.save_pretrained(tmp_path)
    again = PromptedViT.from_pretrained(tmp_path, backbone=vit).double().eval()
    assert torch.equal(again(images), model(images))
    assert again.config == model.config


def test_folder_holds_settings_and_what_was_trained_alone(tmp_path: Path) -> None:
    PromptedViT(tiny_vit(), 5, 7, prompt_project=4).save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    names = ["head.bias", "head.weight", "prompt_projection.bias", "prompt_projection.weight", "prompts"]
    assert sorted(tensors) == names
    settings = json.loads((tmp_path / "config.json").read_text())
    assert settings["options"]["num_prompts"] == 7 and len(settings["backbone"]["fingerprint"]) == 64


def test_named_backbone_is_built_again_from_its_settings(tmp_path: Path) -> None:
    model = PromptedViT("vpt_fast_demo", 5, 4, "shallow", prompt_location="pad").eval()
    model.save_pretrained(tmp_path)
    again = PromptedViT.from_pretrained(tmp_path).eval()
    images = torch.randn(2, 3, *model.image_size)
    assert torch.equal(again(images), model(images))


def test_dtype_may_differ_from_the_saved_one(tmp_path: Path) -> None:
    vit = tiny_vit(dtype=torch.float32)
    PromptedViT(vit, 5, 4).save_pretrained(tmp_path)
    again = PromptedViT.from_pretrained(tmp_path, vit, dtype=torch.bfloat16)
    assert again.backbone.blocks[0].qkv_weight.dtype == torch.bfloat16


def test_load_pretrained_gives_the_class_that_was_saved(tmp_path: Path) -> None:
    vit = tiny_vit()
    PromptedViT(vit, 5, 4).save_pretrained(tmp_path / "prompted")
    LinearProbe(vit, 5).save_pretrained(tmp_path / "linear")
    assert type(load_pretrained(tmp_path / "prompted", vit)) is PromptedViT
    assert type(load_pretrained(tmp_path / "linear", vit)) is LinearProbe


def test_saved_model_of_another_class_is_refused(tmp_path: Path) -> None:
    LinearProbe(tiny_vit(), 5).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a LinearProbe, want a PromptedViT"):
        PromptedViT.from_pretrained(tmp_path, tiny_vit())


def test_a_class_that_is_not_known_is_named(tmp_path: Path) -> None:
    LinearProbe(tiny_vit(), 5).save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"LinearProbe"', '"LinearProbe2"'))
    with pytest.raises(ValueError, match="holds a 'LinearProbe2', want one of .*PromptedViT"):
        load_pretrained(tmp_path, tiny_vit())


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (LinearProbe, "from_pretrained of LinearProbe: got pool, want dtype or .* or checkpoint"),
        (FullTuning, "from_pretrained of FullTuning: got pool, want none"),
    ],
)
def test_an_override_that_the_class_does_not_have_is_named(kind, message: str, tmp_path: Path) -> None:
    kind(tiny_vit(), 5).save_pretrained(tmp_path)
    with pytest.raises(TypeError, match=message):
        kind.from_pretrained(tmp_path, pool="image")


def test_other_weights_are_refused(tmp_path: Path) -> None:
    PromptedViT(tiny_vit(seed=0), 5, 4).save_pretrained(tmp_path)
    other = tiny_vit(seed=0)
    with torch.no_grad():
        other.blocks[1].mlp.fc1.weight[3, 4] += 1e-3
    with pytest.raises(ValueError, match="not those that .* was trained on"):
        PromptedViT.from_pretrained(tmp_path, other)


def test_fingerprint_is_of_the_backbone_and_not_of_how_it_is_run() -> None:
    vit = tiny_vit(dtype=torch.float32, num_classes=3)
    prints = {
        PromptedViT(vit, 5, 4).backbone.fingerprint,
        PromptedViT(vit, 9, 4, dtype=torch.bfloat16).backbone.fingerprint,
        LinearProbe(vit, 5).backbone.fingerprint,
    }
    assert len(prints) == 1


def test_instance_without_a_name_must_be_given_again(tmp_path: Path) -> None:
    PromptedViT(tiny_vit(), 5, 4).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="backbone=..."):
        PromptedViT.from_pretrained(tmp_path)


def test_name_of_the_backbone_outlives_loading_with_an_instance(tmp_path: Path) -> None:
    LinearProbe("vpt_fast_demo", 5).save_pretrained(tmp_path)
    again = LinearProbe.from_pretrained(tmp_path, timm.create_model("vpt_fast_demo"))
    assert again.config.backbone.name == "vpt_fast_demo"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_file_is_named(name: str, tmp_path: Path) -> None:
    PromptedViT(tiny_vit(), 5, 4).save_pretrained(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"has no {name}, want a folder"):
        PromptedViT.from_pretrained(tmp_path, tiny_vit())


@pytest.mark.parametrize("text", ["{", "[" * 100_000], ids=["cut off", "deep"])
def test_settings_that_are_not_json_are_named(text: str, tmp_path: Path) -> None:
    PromptedViT(tiny_vit(), 5, 4).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json: is not JSON"):
        PromptedViT.from_pretrained(tmp_path, tiny_vit())


@pytest.mark.parametrize(
    "change, message",
    [
        (None, r"config\.json: holds None, want a mapping"),
        ({"backbone": 7}, r"config\.json: backbone is 7, want a mapping"),
        ({"options": ["pool"]}, r"config\.json: options is \['pool'\], want a mapping"),
        ({"model": ["PromptedViT"]}, r"config\.json: model is \['PromptedViT'\], want text"),
        (
            {"backbone": {}},
            r"config\.json: lacks backbone\.architecture, backbone\.fingerprint, backbone\.kwargs",
        ),
    ],
)
def test_settings_that_are_none_are_named(change, message: str, tmp_path: Path) -> None:
    PromptedViT(tiny_vit(), 5, 4).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(change and {**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        load_pretrained(tmp_path, tiny_vit())


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("backbone", {"fingerprint": None}, r"config\.json: backbone\.fingerprint is None, want text"),
        ("backbone", {"name": 7}, r"config\.json: backbone\.name is 7, want text or null"),
        ("backbone", {"kwargs": None}, r"config\.json: backbone\.kwargs is None, want a mapping"),
        ("backbone", {"revision": "x"}, r"config\.json: backbone has revision, want name, pretrained"),
        ("options", {"dtype": "bfloat17"}, "dtype: got 'bfloat17', want a floating-point torch.dtype"),
        ("options", {"backbone": 1}, r"config\.json describes a model that cannot be built: .*backbone"),
        ("options", {"num_prompts": 10**30}, r"config\.json describes a model that cannot be built"),
        ("options", {"prompt_layers": "x"}, "cannot be built: prompt_layers: got 'x', want a whole number"),
        ("options", {"prompt_project": 7}, "trained tensors: missing prompt_projection.bias"),
    ],
)
def test_setting_that_was_edited_is_named_with_the_folder(part, change, message, tmp_path: Path) -> None:
    PromptedViT(tiny_vit(), 5, 4).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    settings = json.loads(path.read_text())
    settings[part] |= change
    path.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=f"{tmp_path}.*{message}"):
        load_pretrained(tmp_path, tiny_vit())


def test_argument_that_is_not_the_folders_is_not_blamed_on_it(tmp_path: Path) -> None:
    PromptedViT(tiny_vit(), 5, 4).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="^backend: got 'cuda'"):
        load_pretrained(tmp_path, tiny_vit(), backend="cuda")


def test_lack_of_memory_for_a_saved_model_is_no_fault_of_its_settings(tmp_path: Path) -> None:
    PromptedViT(tiny_vit(), 5, 4).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    settings = json.loads(path.read_text())
    settings["options"]["num_prompts"] = 10**13
    path.write_text(json.dumps(settings))
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        load_pretrained(tmp_path, tiny_vit())


@pytest.mark.parametrize("part", ["options", "kwargs"])
@pytest.mark.parametrize("named", ["cache_dir", "url"])
def test_file_of_settings_cannot_have_anything_downloaded_from_or_to_a_place_it_names(
    named: str, part: str, tmp_path: Path
) -> None:
    LinearProbe("vit_tiny_patch16_224", 5).save_pretrained(tmp_path)
    path, evil = tmp_path / "config.json", tmp_path / "evil.pth"
    evil.write_text("import os")  # a line that Python runs at its start, from a .pth file beside packages
    arguments = {"cache_dir": str(tmp_path / "packages")}
    if named == "url":
        arguments = {"pretrained_cfg_overlay": {"url": evil.as_uri(), "hf_hub_id": None}}
    settings = json.loads(path.read_text())
    settings["backbone"]["pretrained"] = True
    (settings["options"] if part == "options" else settings["backbone"]["kwargs"]).update(arguments)
    path.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=rf"{tmp_path}: its config\.json names .*{named}.*backbone=\.\.\."):
        load_pretrained(tmp_path)


def test_folder_of_downloads_is_not_saved(tmp_path: Path) -> None:
    LinearProbe("vpt_fast_demo", 5, cache_dir="downloads").save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["backbone"]["kwargs"] == {}
    assert load_pretrained(tmp_path).num_classes == 5


def test_url_of_weights_is_saved_as_an_instance_is(tmp_path: Path) -> None:
    overlay = {"url": "https://example.org/weights.pth"}
    model = LinearProbe("vpt_fast_demo", 5, pretrained_cfg_overlay=overlay)
    with pytest.warns(UserWarning, match=r"example\.org.*backbone="):
        model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["backbone"]["name"] is None


def test_files_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    PromptedViT(tiny_vit(), 5, 4).save_pretrained(tmp_path)
    load_file, read = safetensors.torch.load_file, []
    monkeypatch.setattr(safetensors.torch, "load_file", lambda file: read.append(file) or load_file(file))
    load_pretrained(tmp_path, tiny_vit())
    assert read == [tmp_path / "model.safetensors"]


def test_settings_of_before_there_were_checkpoints_are_read(tmp_path: Path) -> None:
    PromptedViT(tiny_vit(), 5, 4).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    settings = json.loads(path.read_text())
    del settings["backbone"]["checkpoint"]
    path.write_text(json.dumps(settings))
    assert load_pretrained(tmp_path, tiny_vit()).num_classes == 5


def test_numbers_of_numpy_are_saved(tmp_path: Path) -> None:
    settings = dict(num_prompts=np.int64(4), prompt_dropout=np.float32(0.25))
    PromptedViT(tiny_vit(), np.int64(5), **settings).save_pretrained(tmp_path)
    again = PromptedViT.from_pretrained(tmp_path, tiny_vit())
    assert (again.prompt_settings.num_prompts, again.prompt_settings.prompt_dropout) == (4, 0.25)
    assert type(again.num_classes) is int
    again.reset_classifier(np.int32(7))
    again.save_pretrained(tmp_path)
    MLPProbe(tiny_vit(), 5, np.int64(2)).save_pretrained(tmp_path)


@pytest.mark.parametrize("kept", [0, 100])
def test_truncated_tensors_are_named(kept: int, tmp_path: Path) -> None:
    PromptedViT(tiny_vit(), 5, 4).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"model\.safetensors: cannot be read"):
        PromptedViT.from_pretrained(tmp_path, tiny_vit())


@pytest.mark.parametrize("model_class", [PromptedViT, FullTuning])
def test_keyword_that_json_cannot_hold_is_saved_as_an_instance_is(
    model_class: type[TunedClassifier], tmp_path: Path
) -> None:
    prompts = {"num_prompts": 4} if model_class is PromptedViT else {}
    model = model_class("vpt_fast_demo", 5, act_layer=torch.nn.SiLU, **prompts).eval()
    with pytest.warns(UserWarning, match=r"vpt_fast_demo, act_layer=.*SiLU.*backbone="):
        model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"backbone: .*\(vpt_fast_demo, act_layer=.*SiLU.*backbone="):
        load_pretrained(tmp_path)
    backbone = timm.create_model("vpt_fast_demo", act_layer=torch.nn.SiLU)
    again = load_pretrained(tmp_path, backbone).eval()
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(again(images), model(images))


@pytest.mark.filterwarnings("ignore:config.json cannot hold the keyword arguments")
@pytest.mark.parametrize("model_class", [PromptedViT, FullTuning])
def test_keyword_that_json_cannot_hold_is_still_recorded_after_loading_and_saving_again(
    model_class: type[TunedClassifier], tmp_path: Path
) -> None:
    prompts = {"num_prompts": 4} if model_class is PromptedViT else {}
    first = model_class("vpt_fast_demo", 5, act_layer=torch.nn.SiLU, **prompts)
    first.save_pretrained(tmp_path / "first")
    backbone = timm.create_model("vpt_fast_demo", act_layer=torch.nn.SiLU)
    load_pretrained(tmp_path / "first", backbone).save_pretrained(tmp_path / "again")
    with pytest.raises(ValueError, match=r"backbone: .*\(vpt_fast_demo, act_layer=.*SiLU.*backbone="):
        load_pretrained(tmp_path / "again")


def test_config_of_a_keyword_that_json_cannot_hold_is_a_dictionary_that_it_can() -> None:
    config = PromptedViT("vpt_fast_demo", 5, 4, act_layer=torch.nn.SiLU).config
    found = json.loads(json.dumps(config.to_dict()))
    assert found["backbone"]["name"] is None and found["backbone"]["kwargs"] == {}
    assert config.backbone.name == "vpt_fast_demo"


def test_full_disk_leaves_the_last_good_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = PromptedViT(tiny_vit(), 5, 4)
    model.save_pretrained(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full_disk(tensors: dict, path: Path) -> None:
        path.write_bytes(b"half a fi")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_settings_are_written_again_only_if_they_changed(tmp_path: Path) -> None:
    model, file = PromptedViT("test_vit", 3, 2), tmp_path / "config.json"

    def save(model: PromptedViT) -> tuple[int, int]:
        model.save_pretrained(tmp_path)
        return file.stat().st_ino, (tmp_path / "model.safetensors").stat().st_ino

    (settings, weights), again = save(model), save(model)
    assert again[0] == settings and again[1] != weights
    file.write_text("{")
    assert save(model)[0] != again[0] and json.loads(file.read_text())["num_classes"] == 3
    other = PromptedViT("test_vit", 4, 2)
    save(other)
    assert json.loads(file.read_text())["num_classes"] == 4


def test_saved_model_leaves_no_files_of_a_process_killed_while_saving(tmp_path: Path) -> None:
    for name in (".config.json.abcd_123.json", ".model.safetensors.abcd_123.safetensors"):
        (tmp_path / name).touch()
    PromptedViT(tiny_vit(), 5, 4).save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What the hub was sent: the token, whether the repository is private, and the texts of files."""
    sent = SimpleNamespace(token=None, private=None, texts={})

    class Hub:
        def __init__(self, token: str | None = None) -> None:
            sent.token = token

        def create_repo(self, repo_id: str, private: bool | None, exist_ok: bool):
            sent.private = private
            return huggingface_hub.RepoUrl(f"https://huggingface.co/me/{repo_id}")

        def file_exists(self, repo_id: str, file: str) -> bool:
            return False

        def upload_folder(self, repo_id: str, folder_path: str, commit_message: str) -> SimpleNamespace:
            files = [path for path in Path(folder_path).iterdir() if path.suffix != ".safetensors"]
            sent.texts = {path.name: path.read_text(encoding="utf-8") for path in files}
            return SimpleNamespace(commit_url="https://huggingface.co/commit")

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    return sent


def test_push_to_hub_passes_token_and_privacy_and_returns_the_commit(hub: SimpleNamespace) -> None:
    commit = PromptedViT(tiny_vit(), 5, 4).push_to_hub("prompts", private=True, token="t")
    assert (hub.token, hub.private) == ("t", True) and commit == "https://huggingface.co/commit"


def origins(folder: Path) -> dict[str, dict[str, Any]]:
    """Arguments of a model whose backbone, or whose weights, are in this folder."""
    vit = timm.create_model("test_vit", num_classes=0)
    timm.models.save_for_hf(vit, folder, safe_serialization=True)
    file = str(folder / "model.safetensors")
    return {
        "folder": {"backbone": f"local-dir:{folder}", "pretrained": True},
        "checkpoint": {"backbone": "test_vit", "checkpoint": file},
        "file": {"backbone": "test_vit", "pretrained": True, "pretrained_cfg_overlay": {"file": file}},
        "class": {"backbone": "test_vit", "checkpoint": file, "act_layer": torch.nn.GELU},
    }


@pytest.mark.filterwarnings("ignore:config.json cannot hold the keyword arguments")
@pytest.mark.parametrize("origin", ["folder", "checkpoint", "file", "class"])
def test_no_path_of_this_machine_is_uploaded(origin: str, hub: SimpleNamespace, tmp_path: Path) -> None:
    folder = tmp_path / "own"
    model = PromptedViT(num_classes=3, num_prompts=2, **origins(folder)[origin])
    model.push_to_hub("prompts")
    assert sorted(hub.texts) == ["README.md", "config.json"]
    assert not any(str(tmp_path) in text for text in hub.texts.values())
    assert ("own" if origin == "folder" else "model.safetensors") in hub.texts["config.json"]
    assert model.config.backbone.without_folders() != model.config.backbone  # what is saved here has it


@pytest.mark.parametrize(
    ("origin", "message", "given"),
    [
        ("folder", "^backbone: own, the folder that .* was trained on, is not there; pass", "backbone"),
        ("checkpoint", "^checkpoint: model.safetensors, which the backbone of .* is not there", "checkpoint"),
    ],
)
def test_what_was_uploaded_asks_for_the_path_that_it_lacks(
    origin: str, message: str, given: str, hub: SimpleNamespace, tmp_path: Path
) -> None:
    arguments = origins(tmp_path / "own")[origin]
    model = PromptedViT(num_classes=3, num_prompts=2, **arguments)
    model.push_to_hub("prompts")
    model.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "config.json").write_text(hub.texts["config.json"])
    with pytest.raises(ValueError, match=message):
        load_pretrained(tmp_path / "saved")
    assert load_pretrained(tmp_path / "saved", **{given: arguments[given]}).config == model.config


def test_warning_about_an_upload_names_the_repository(hub: SimpleNamespace) -> None:
    model = LinearProbe("vpt_fast_demo", 5, act_layer=torch.nn.SiLU)
    with pytest.warns(UserWarning, match="to load probe, build the backbone") as warned:
        model.push_to_hub("probe")
    assert warned[0].filename == __file__


def test_a_loaded_model_that_holds_its_backbone_records_where_its_folder_is_now(tmp_path: Path) -> None:
    origins(tmp_path / "own")
    FullTuning(f"local-dir:{tmp_path / 'own'}", 3).save_pretrained(tmp_path / "saved")
    moved = (tmp_path / "own").rename(tmp_path / "moved")
    load_pretrained(tmp_path / "saved", f"local-dir:{moved}").save_pretrained(tmp_path / "again")
    assert load_pretrained(tmp_path / "again").config.backbone.name == f"local-dir:{moved}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("prompts"), "missing prompts"),
        (lambda t: t.update(extra=torch.zeros(1)), "unknown extra"),
        (lambda t: t.update(prompts=torch.zeros(3, 5, 32)), r"prompts has shape \(3, 5, 32\)"),
    ],
    ids=["missing", "unknown", "shape"],
)
def test_trained_tensors_that_do_not_fit_change_nothing(change, message: str) -> None:
    model = PromptedViT(tiny_vit(), 5, 4)
    before = {name: t.clone() for name, t in model.trainable_state_dict().items()}
    tensors = {name: torch.zeros_like(t) for name, t in before.items()}
    change(tensors)
    with pytest.raises(ValueError, match=message):
        model.load_trainable_state_dict(tensors)
    assert all(torch.equal(t, before[name]) for name, t in model.trainable_state_dict().items())


@pytest.mark.parametrize("frozen", ["head", "everything"])
def test_what_was_frozen_after_the_model_was_built_is_stored(frozen: str, tmp_path: Path) -> None:
    vit = tiny_vit()
    model = PromptedViT(vit, 5, 4).eval()
    (model.head if frozen == "head" else model).requires_grad_(False)
    model.save_pretrained(tmp_path)
    again = PromptedViT.from_pretrained(tmp_path, vit).eval()
    images, _ = random_batch(model)
    assert torch.equal(again(images), model(images))


def test_model_whose_file_would_lack_the_prompts_is_not_saved(tmp_path: Path) -> None:
    model = PromptedViT(tiny_vit(), 5, 4)
    parametrize.register_parametrization(model, "prompts", torch.nn.Tanh())
    with pytest.raises(ValueError, match="prompts: no parameter of the model any more"):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    parametrize.remove_parametrizations(model, "prompts")
    model.save_pretrained(tmp_path / "new")
    again = PromptedViT.from_pretrained(tmp_path / "new", tiny_vit())
    assert torch.equal(again.prompts, model.prompts)


def test_model_with_a_module_that_loading_would_not_build_is_not_saved(tmp_path: Path) -> None:
    model = PromptedViT(tiny_vit(), 5, 4)
    model.second_head = torch.nn.Linear(model.num_features, 3)
    with pytest.raises(ValueError, match="second_head.bias, second_head.weight: of a module that was added"):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    del model.second_head
    model.save_pretrained(tmp_path / "new")


def test_model_that_is_split_over_processes_is_not_saved(tmp_path: Path) -> None:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = fully_shard(PromptedViT(tiny_vit(), 5, 4), mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match="prompts: got a DTensor, .* want the model as it was built"):
            model.save_pretrained(tmp_path / "new")
    finally:
        torch.distributed.destroy_process_group()
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("kind, backbone", [(PromptedViT, tiny_vit), (PromptedSwin, tiny_swin)])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_model_into_which_another_backbone_was_loaded_is_not_saved_and_gives_away_what_is_trained(
    kind, backbone, device: str, tmp_path: Path
) -> None:
    vit = backbone(torch.float32)
    model = kind(backbone(torch.float32, seed=1).to(device), 5, 4)
    model.load_state_dict(kind(vit, 5, 4).state_dict(), assign=device == "meta")
    with pytest.raises(ValueError, match="load_state_dict has replaced backbone.* right.load_trainable"):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    right = kind(vit, 5, 4)
    right.load_trainable_state_dict(model.trainable_state_dict())
    right.save_pretrained(tmp_path / "new")
    images, _ = random_batch(model, dtype=torch.float32)
    assert torch.equal(kind.from_pretrained(tmp_path / "new", vit)(images), model(images))


@pytest.mark.parametrize("kind", [BiasTuning, AdapterTuning, PartialTuning, LinearProbe])
@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "data"])
def test_model_whose_frozen_weights_were_initialised_anew_is_not_saved(
    kind, in_place, tmp_path: Path
) -> None:
    def init(module: torch.nn.Module) -> None:
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            weight = module.weight if in_place else module.weight.data
            torch.nn.init.normal_(weight, std=0.02)

    model = kind(tiny_vit(torch.float32), 5)
    model.head.apply(init)
    model.save_pretrained(tmp_path / "head alone")
    model.apply(init)
    with pytest.raises(ValueError, match=r"other values are in backbone\..*, as after model.apply"):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_model_whose_frozen_weights_were_rounded_is_saved(dtype, tmp_path: Path) -> None:
    BiasTuning(tiny_vit(torch.float32), 5).to(dtype).save_pretrained(tmp_path)


def test_model_with_the_backbone_of_a_model_with_other_weights_is_not_saved(tmp_path: Path) -> None:
    prompted, probe = PromptedViT(tiny_vit(), 5, 4), LinearProbe(tiny_vit(seed=1), 5)
    probe.backbone = prompted.backbone
    with pytest.raises(ValueError, match="model.backbone is another model's"):
        probe.save_pretrained(tmp_path)
    probe = LinearProbe(tiny_vit(), 5)
    probe.backbone = prompted.backbone
    probe.save_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [PromptedViT, BiasTuning, FullTuning])
def test_model_into_which_its_own_state_was_loaded_is_saved(kind, dtype: torch.dtype, tmp_path: Path) -> None:
    settings = {"num_prompts": 4} if kind is PromptedViT else {}
    model, trained = (kind(tiny_vit(torch.float32), 5, **settings) for _ in range(2))
    with torch.no_grad():
        for parameter in trained.trainable_state_dict().values():
            parameter.mul_(2.0)
        for parameter in trained.backbone.parameters():  # as much as folding on another machine
            parameter.mul_(1 + 1e-6)
    torch.nn.Sequential(model).load_state_dict(torch.nn.Sequential(trained.to(dtype)).state_dict())
    model.save_pretrained(tmp_path)


@pytest.mark.parametrize("kind, backbone", [(PromptedViT, tiny_vit), (PromptedSwin, tiny_swin)])
def test_what_was_unfrozen_outside_of_the_blocks_is_stored_and_stays_stored(
    kind, backbone, tmp_path: Path
) -> None:
    model = kind(backbone(torch.float32), 5, 4)
    model.backbone.stem.norm.requires_grad_(True)
    with torch.no_grad():
        model.backbone.stem.norm.weight.mul_(2.0)
    images, _ = random_batch(model, dtype=torch.float32)
    for folder in ("trained", "frozen"):  # a model that was loaded and frozen is saved whole, too
        model.save_pretrained(tmp_path / folder)
        again = kind.from_pretrained(tmp_path / folder, backbone(torch.float32))
        assert torch.equal(again(images), model(images))
        assert again.backbone.stem.norm.weight.requires_grad
        model = again.requires_grad_(False)


def test_a_frozen_model_takes_trained_tensors() -> None:
    model, frozen = PromptedViT(tiny_vit(), 5, 4), PromptedViT(tiny_vit(), 5, 4).requires_grad_(False)
    frozen.load_trainable_state_dict(model.trainable_state_dict())
    assert torch.equal(frozen.prompts, model.prompts)
