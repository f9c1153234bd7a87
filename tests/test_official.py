"""Moving prompts from and to the official code: what its files hold, and what is refused. The golden files'
prompts are moved in test_official_parity.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.models.deit import VisionTransformerDistilled
from tiny import tiny_swin, tiny_vit
from typer.testing import CliRunner

from vpt_fast import PromptedSwin, PromptedViT, load_pretrained
from vpt_fast.commands.cli import app
from vpt_fast.official import Unmapped, export_prompts, import_prompts, mapped_settings

PREFIX = "enc.transformer."


def save(tensors: dict[str, Any], path: Path) -> Path:
    torch.save({"model": tensors}, path)
    return path


def official_model(depth: int = 3, m: int = 2, dim: int = 32) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        f"{PREFIX}prompt_embeddings": torch.randn(1, m, dim),
        f"{PREFIX}deep_prompt_embeddings": torch.randn(depth - 1, m, dim),
        "head.last_layer.weight": torch.randn(5, dim),
        "head.last_layer.bias": torch.randn(5),
    }


@pytest.fixture
def vit():
    return tiny_vit(torch.float32)


@pytest.mark.parametrize("as_array", [True, False], ids=["arrays", "tensors"])
def test_prompts_of_an_epoch_are_read_and_get_a_new_head(vit, as_array: bool, tmp_path: Path) -> None:
    tensors = official_model()
    shallow, deep = tensors[f"{PREFIX}prompt_embeddings"], tensors[f"{PREFIX}deep_prompt_embeddings"]
    content = {"shallow_prompt": shallow, "deep_prompt": deep}
    torch.save({n: t.numpy() if as_array else t for n, t in content.items()}, tmp_path / "prompt_ep100.pth")
    model = import_prompts(tmp_path / "prompt_ep100.pth", vit, num_classes=7)
    assert torch.equal(model.prompts, torch.cat((shallow, deep)))
    assert model.num_classes == 7 and model.prompt_settings.prompt_layers is None


def test_arrays_of_older_numpy_are_read(vit, tmp_path: Path) -> None:
    path = tmp_path / "prompt_ep1.pth"
    array = np.ones((1, 2, 32), np.float32)
    torch.save({"shallow_prompt": array}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes().replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert import_prompts(path, vit, num_classes=7).prompt_settings.prompt_type == "shallow"


@pytest.mark.parametrize("location", ["pad", "concat-channel", "prepend-pixel"])
def test_prompts_that_are_pixels_tell_where_they_are_by_their_shapes(
    vit, location: str, tmp_path: Path
) -> None:
    model = PromptedViT(vit, 5, 2, "shallow", prompt_location=location)
    export_prompts(model, tmp_path / "file.pth")
    tensors = torch.load(tmp_path / "file.pth", weights_only=True)["model"]
    frozen = f"{PREFIX}embeddings.patch_embeddings.weight"  # in the official code's files, if not trained
    tensors.setdefault(frozen, vit.patch_embed.proj.weight.detach())
    again = import_prompts(save(tensors, tmp_path / "alone.pth"), vit)
    assert again.prompt_settings == model.prompt_settings
    ours = again.trainable_state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in model.trainable_state_dict().items())


def test_the_width_of_projected_prompts_is_that_of_their_projection(vit, tmp_path: Path) -> None:
    tensors = official_model(dim=8)
    tensors["head.last_layer.weight"] = torch.randn(5, 32)
    tensors |= {
        f"{PREFIX}prompt_proj.weight": torch.randn(32, 8),
        f"{PREFIX}prompt_proj.bias": torch.randn(32),
    }
    model = import_prompts(save(tensors, tmp_path / "file.pth"), vit)
    assert model.prompt_settings.prompt_project == 8
    assert torch.equal(model.prompt_projection.weight, tensors[f"{PREFIX}prompt_proj.weight"])


def test_fewer_deep_prompts_than_blocks_are_those_of_the_first(vit, tmp_path: Path) -> None:
    model = import_prompts(save(official_model(depth=2), tmp_path / "file.pth"), vit)
    assert model.prompt_settings.prompt_layers == 2


def test_deep_prompts_without_a_shallow_one_are_those_of_the_last_blocks(vit, tmp_path: Path) -> None:
    tensors = official_model()
    del tensors[f"{PREFIX}prompt_embeddings"]
    tensors[f"{PREFIX}deep_prompt_embeddings"] = torch.randn(2, 17, 32)  # a prompt for each token
    model = import_prompts(save(tensors, tmp_path / "file.pth"), vit, prompt={"LOCATION": "add"})
    assert model.prompt_settings.prompt_layers == -2
    export_prompts(model, tmp_path / "back.pth")
    again = torch.load(tmp_path / "back.pth", weights_only=True)["model"]
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())


def test_a_file_of_the_same_backbone_is_taken_and_of_another_refused(vit, tmp_path: Path) -> None:
    name, tensors = f"{PREFIX}embeddings.cls_token", official_model()
    tensors[f"{PREFIX}embeddings.patch_embeddings.weight"] = vit.patch_embed.proj.weight.detach()
    import_prompts(save({**tensors, name: vit.cls_token.detach()}, tmp_path / "same.pth"), vit)
    other = save({**tensors, name: vit.cls_token.detach() + 1e-3}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="backbone: .*other.pth was trained on another one"):
        import_prompts(other, vit)


@pytest.mark.parametrize(
    "extra, prompt, reason",
    [
        ({"head.projection.0.weight": torch.zeros(32, 32)}, {}, "trained beside the prompts"),
        ({f"{PREFIX}encoder.layer.0.adapter.weight": torch.zeros(2)}, {}, "trained beside the prompts"),
        ({}, {"REVERSE_DEEP": True, "NUM_DEEP_LAYERS": 3}, "slices off prompts that were never inserted"),
        ({}, {"NUM_TOKENS": 9}, "NUM_TOKENS 9 but the trained tensors have 2"),
        ({}, {"NUM_LAYERS": 9}, "unknown prompt settings"),
        ({f"{PREFIX}prompt_embeddings_of_more": torch.zeros(2)}, {}, "without a counterpart: .*_of_more"),
    ],
    ids=["mlp_head", "adapter", "reverse", "tokens", "key", "tensor"],
)
def test_what_has_no_counterpart_is_refused_with_the_reason(
    vit, extra: dict[str, Any], prompt: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    path = save({**official_model(), **extra}, tmp_path / "file.pth")
    with pytest.raises(Unmapped, match=reason):
        import_prompts(path, vit, prompt=prompt)


@pytest.mark.parametrize(
    "content",
    [
        {"shallow_prompt": "text"},
        {"model": {**official_model(), "head.last_layer.weight": 7}},
        {"model": {**official_model(), "enc.cls_token": 7}},
        {"model": official_model(), "prompt": {"PROJECT": "text"}},
    ],
    ids=["prompts", "head", "backbone", "setting"],
)
def test_a_file_that_only_looks_like_an_official_one_is_named(vit, content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "file.pth")
    num_classes = 5 if "shallow_prompt" in content else None
    with pytest.raises(ValueError, match=r"file\.pth: its prompts are not in the form"):
        import_prompts(tmp_path / "file.pth", vit, num_classes=num_classes)


@pytest.mark.parametrize(
    "name, changed, reason",
    [
        ("deep_prompt_embeddings", lambda t: None, "is a NoneType, want a tensor"),
        ("deep_prompt_embeddings", lambda t: t.transpose(0, 2), r"has shape \(32, 2, 2\) and prompt_emb"),
        ("prompt_embeddings", lambda t: t[0], r"has shape \(2, 32\), want 3 or 4 dimensions"),
        ("prompt_embeddings", lambda t: t.long(), "is of torch.int64, .* want dense floating-point"),
        ("prompt_embeddings", lambda t: t.to(torch.complex64), "is of torch.complex64"),
        ("head.last_layer.weight", lambda t: t.to("meta"), "is without values"),
        ("head.last_layer.bias", lambda t: t.to_sparse(), "is of torch.float32, torch.sparse_coo"),
        ("head.last_layer.bias", lambda t: t.numpy(), "is a ndarray, want a tensor"),
    ],
)
def test_a_trained_tensor_of_another_form_is_refused_by_its_name(
    vit, name: str, changed: Any, reason: str, tmp_path: Path
) -> None:
    tensors: dict[str, Any] = official_model()
    key = name if name in tensors else PREFIX + name
    tensors[key] = changed(tensors[key])
    with pytest.raises(ValueError, match=rf"file\.pth: .*{name} {reason}"):
        import_prompts(save(tensors, tmp_path / "file.pth"), vit)


def test_half_a_head_is_refused_not_replaced_by_a_new_one(vit, tmp_path: Path) -> None:
    tensors = official_model()
    del tensors["head.last_layer.weight"]
    with pytest.raises(ValueError, match="head.last_layer.bias without head.last_layer.weight"):
        import_prompts(save(tensors, tmp_path / "file.pth"), vit, num_classes=5)


def test_a_file_in_float16_is_of_the_backbone_that_it_was_trained_on(vit, tmp_path: Path) -> None:
    tensors = {**official_model(), f"{PREFIX}embeddings.cls_token": vit.cls_token.detach()}
    path = save({name: tensor.half() for name, tensor in tensors.items()}, tmp_path / "file.pth")
    half = tensors["head.last_layer.weight"].half().float()
    assert torch.equal(import_prompts(path, vit).head.weight, half)


@pytest.mark.parametrize(
    "encoder, prompt, reason",
    [
        ("sup", {"LOCATION": "prepend-pixel-imgnettransform"}, "takes the strip's pixels as they are"),
        ("sup", {"INITIATION": "zeros"}, "INITIATION 'zeros'"),
        ("sup", {"LOCATION": "pad", "VIT_POOL_TYPE": "img_pool"}, "img_pool with LOCATION pad"),
        ("sup", {"REVERSE_DEEP": True}, "need DEEP"),
        ("sup", {"FORWARD_DEEP_NOEXPAND": True}, "need DEEP"),
        ("sup", {"DEEP": True, "REVERSE_DEEP": True, "LOCATION": "add"}, "needs NUM_DEEP_LAYERS"),
        ("sup", {"DEEP": True, "NUM_DEEP_LAYERS": 0}, "NUM_DEEP_LAYERS 0 of 3 blocks"),
        ("sup", {"DEEP": True, "FORWARD_DEEP_NOEXPAND": True, "LOCATION": "add"}, "NOEXPAND with LOCATION"),
        ("mae", {"LOCATION": "add"}, "LOCATION add with mae"),
        ("swin", {"NUM_DEEP_LAYERS": 2}, "PromptedSwin has no such prompts"),
        ("swin", {"PROJECT": 0}, "PromptedSwin has no such prompts"),
        ("swin", {"DEEP_SHARED": True}, "PromptedSwin has no such prompts"),
    ],
)
def test_settings_that_the_official_code_or_ours_does_not_have_are_refused(
    encoder: str, prompt: dict[str, Any], reason: str
) -> None:
    with pytest.raises(Unmapped, match=reason):
        mapped_settings(prompt, encoder=encoder, depth=3, num_prompts=2)


@pytest.mark.parametrize("first, pool", [(2, "image"), (3, "image_and_prompts")])
def test_prompts_that_are_dropped_before_the_head_are_not_pooled(first: int, pool: str) -> None:
    prompt = {"DEEP": True, "FORWARD_DEEP_NOEXPAND": True, "VIT_POOL_TYPE": "imgprompt_pool"}
    prompt["NUM_DEEP_LAYERS"] = first
    assert mapped_settings(prompt, encoder="sup", depth=3, num_prompts=2)["pool"] == pool


def test_a_convnet_is_refused_by_its_kind(tmp_path: Path) -> None:
    path = save(official_model(), tmp_path / "file.pth")
    with pytest.raises(
        ValueError, match="backbone: got a timm.models.resnet.ResNet, want .* VisionTransformer"
    ):
        import_prompts(path, timm.create_model("resnet10t"))
    with pytest.raises(ValueError, match="backbone: 'resnet10t' is not a timm VisionTransformer"):
        import_prompts(path, "resnet10t")


def test_a_swins_prompts_on_a_vit_are_refused(vit, tmp_path: Path) -> None:
    tensors = {**official_model(), "enc.deep_prompt_embeddings_0": torch.zeros(1, 2, 16)}
    with pytest.raises(ValueError, match="the prompts of a Swin, by stages; got a ViT"):
        import_prompts(save(tensors, tmp_path / "file.pth"), vit)


@pytest.mark.parametrize(
    "num_classes, drop_head, what_to_do",
    [(5, False, "has a head; leave it out"), (None, True, "has no head; say how many classes")],
    ids=["two_heads", "no_head"],
)
def test_the_number_of_classes_is_asked_for_where_there_is_no_head(
    vit, num_classes: int | None, drop_head: bool, what_to_do: str, tmp_path: Path
) -> None:
    tensors = {n: t for n, t in official_model().items() if not (drop_head and n.startswith("head."))}
    with pytest.raises(ValueError, match=f"num_classes: got {num_classes}, and .* {what_to_do}"):
        import_prompts(save(tensors, tmp_path / "file.pth"), vit, num_classes=num_classes)


def test_a_file_without_prompts_is_refused(vit, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no prompts"):
        import_prompts(save({"head.weight": torch.zeros(2)}, tmp_path / "file.pth"), vit)


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (dict(prompt_layers=[0, 2]), r"prompt_layers \[0, 2\]"),
        (dict(prompt_layers=-2), "slices off prompts"),
        (dict(prompt_dropout=0.1, prompt_dropout_per="batch"), "prompt_dropout_per 'batch'"),
        (dict(prompt_shared=True, after_prompts="drop"), "prompt_shared True"),
        (
            dict(num_prompts=None, prompt_location="add", prompt_layers=-2, prompt_shared=True),
            "prompt_shared True",
        ),
    ],
    ids=["some", "last", "dropout", "shared", "shared_last"],
)
def test_a_model_that_the_official_code_does_not_have_is_not_written(
    vit, arguments: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    model = PromptedViT(vit, 5, **{"num_prompts": 2, **arguments})
    with pytest.raises(Unmapped, match=reason):
        export_prompts(model, tmp_path / "file.pth")
    assert not (tmp_path / "file.pth").exists()


@pytest.mark.parametrize("same", [(None, -3), (2, [0, 1]), (-2, [1, 2])], ids=["all", "first", "last"])
def test_the_same_blocks_are_written_alike_however_they_are_named(
    vit, same: tuple[Any, Any], tmp_path: Path
) -> None:
    written = [
        export_prompts(
            PromptedViT(vit, 5, prompt_location="add", prompt_layers=layers), tmp_path / "file.pth"
        )
        for layers in same
    ]
    assert written[0] == written[1]


@pytest.mark.parametrize("kind, backbone", [(PromptedViT, tiny_vit), (PromptedSwin, tiny_swin)])
def test_a_norm_that_was_unfrozen_is_not_written_under_a_name_that_nobody_reads(
    kind, backbone, tmp_path: Path
) -> None:
    model = kind(backbone(), 5, 2)
    model.backbone.stem.norm.requires_grad_(True)
    with pytest.raises(Unmapped, match=r"backbone\.stem\.norm\.bias, backbone\.stem\.norm\.weight: trained"):
        export_prompts(model, tmp_path / "file.pth")


def test_a_head_that_the_official_code_does_not_have_is_named(vit, tmp_path: Path) -> None:
    model = PromptedViT(vit, 5, 2)
    model.head = torch.nn.Identity()
    with pytest.raises(ValueError, match="head: got a Identity with no weights"):
        export_prompts(model, tmp_path / "file.pth")


@pytest.mark.parametrize("encoder, prefix", [("sup", PREFIX), ("mocov3", "enc.")])
def test_names_written_are_those_of_the_encoder(vit, encoder: str, prefix: str, tmp_path: Path) -> None:
    export_prompts(PromptedViT(vit, 5, 2, prompt_layers=[0, 1, 2]), tmp_path / "file.pth", encoder=encoder)
    names = torch.load(tmp_path / "file.pth", weights_only=True)["model"].keys()
    assert f"{prefix}deep_prompt_embeddings" in names


@pytest.mark.parametrize(
    "pooling",
    [
        {"global_pool": "map"},
        {"global_pool": "max"},
        {"global_pool": "avg", "pool_include_prefix": True},
        {"kind": VisionTransformerDistilled},
    ],
    ids=["map", "max", "prefix", "two_tokens"],
)
def test_a_pooling_that_the_official_code_does_not_have_is_not_written(
    pooling: dict[str, Any], tmp_path: Path
) -> None:
    model = PromptedViT(tiny_vit(torch.float32, **pooling), 5, 2)
    with pytest.raises(Unmapped, match="pool None: the official code has no such pooling"):
        export_prompts(model, tmp_path / "file.pth", encoder="sup")


@pytest.mark.parametrize("pool", ["image", "prompts"])
def test_a_pooling_that_the_official_swin_does_not_have_is_not_written(pool: str, tmp_path: Path) -> None:
    with pytest.raises(Unmapped, match=f"pool '{pool}': the official code has"):
        export_prompts(PromptedSwin(tiny_swin(), 5, 2, pool=pool), tmp_path / "file.pth")


def test_a_location_that_the_official_code_does_not_have_is_not_written(vit, tmp_path: Path) -> None:
    model = PromptedViT(vit, 5, 2, prompt_location="key-value")
    with pytest.raises(Unmapped, match="prompt_location 'key-value': the official code has no such prompts"):
        export_prompts(model, tmp_path / "file.pth", encoder="sup")


def test_a_setting_that_the_encoder_does_not_look_at_is_not_written(vit, tmp_path: Path) -> None:
    model = PromptedViT(vit, 5, 2, prompt_project=8)
    with pytest.raises(Unmapped, match="PROJECT 8 with mocov3: the official code does not look at it"):
        export_prompts(model, tmp_path / "file.pth", encoder="mocov3")


@pytest.mark.parametrize(
    "settings, pool",
    [
        (dict(prompt_layers=2, after_prompts="drop"), "imgprompt_pool"),
        (dict(prompt_layers=[0, 1]), "img_pool"),
        (dict(after_prompts="drop"), "img_pool"),
    ],
    ids=["dropped", "flow", "all"],
)
def test_patches_alone_are_pooled_with_prompts_only_where_these_are_dropped(
    vit, settings: dict[str, Any], pool: str, tmp_path: Path
) -> None:
    model = PromptedViT(vit, 5, 2, pool="image", **settings)
    assert export_prompts(model, tmp_path / "file.pth")["VIT_POOL_TYPE"] == pool


def test_the_backbones_name_tells_that_it_is_of_mocov3(tmp_path: Path) -> None:
    sizes: dict[str, Any] = dict(img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2)
    model = PromptedViT("mocov3_vitb", 5, 2, **sizes)
    export_prompts(model, tmp_path / "file.pth")
    names = torch.load(tmp_path / "file.pth", weights_only=True)["model"].keys()
    assert "enc.prompt_embeddings" in names


def test_same_prompts_give_the_same_file(vit, tmp_path: Path) -> None:
    model = PromptedViT(vit, 5, 2)
    files = [tmp_path / "one.pth", tmp_path / "other.pth"]
    for file in files:
        export_prompts(model, file, encoder="sup")
    assert files[0].read_bytes() == files[1].read_bytes()


def test_an_encoder_of_another_kind_is_refused(vit, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="encoder: got 'swin', want one of 'sup', 'mae', 'mocov3'"):
        export_prompts(PromptedViT(vit, 5, 2), tmp_path / "file.pth", encoder="swin")


def test_import_names_the_model_in_one_piece(vit, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr("vpt_fast.official.import_prompts", lambda *_, **__: PromptedViT(vit, 5, 2))
    monkeypatch.setattr(PromptedViT, "save_pretrained", lambda *_: None)
    out = tmp_path / ("long" * 10)
    file = save({}, tmp_path / "last_model.pth")
    done = CliRunner().invoke(app, ["import-prompts", str(file), "--backbone=x", "--out", str(out)])
    assert f"{out}: 2 deep prompts" in done.output


def test_the_commands_move_prompts_in_and_out(tmp_path: Path) -> None:
    tensors = official_model(depth=6, dim=64)
    path = save(tensors, tmp_path / "last_model.pth")

    def run(*arguments: Any) -> str:
        result = CliRunner().invoke(app, [str(a) for a in arguments])
        assert result.exit_code == 0, result.output
        return result.output

    model, back = tmp_path / "model", tmp_path / "back.pth"
    sizes: dict[str, Any] = dict(embed_dim=64, depth=6, num_heads=2, img_size=32)
    weights = tmp_path / "vit.pth"
    torch.save(timm.create_model("vit_base_patch16_224", **sizes).state_dict(), weights)
    backbone = ["--backbone", "vit_base_patch16_224", "--checkpoint", weights]
    backbone += [f"--backbone-arg={name}={size}" for name, size in sizes.items()]
    run("import-prompts", path, *backbone, "--out", model, "--setting", "VIT_POOL_TYPE=img_pool")
    assert load_pretrained(model).pool == "image"
    assert "VIT_POOL_TYPE: img_pool" in run("export-prompts", model, "--out", back)
    again = torch.load(back, weights_only=True)["model"]
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())
