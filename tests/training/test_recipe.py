"""The recipe: its numbers, its text form, its flags."""

from __future__ import annotations

import dataclasses
import inspect
import math

import pytest
import torch
import yaml

from vpt_fast.commands import cli
from vpt_fast.training.methods import model_settings
from vpt_fast.training.recipe import Recipe, lr_factor
from vpt_fast.training.setting_values import read_yaml


def make(**values) -> Recipe:
    return Recipe(**{"data": "images", "backbone": "vit_base_patch16_224", **values})


def resolve(
    recipe: Recipe, num_train_images: int = 1000, device_type: str = "cpu", world_size: int = 1
) -> Recipe:
    return recipe.resolved(num_train_images=num_train_images, device_type=device_type, world_size=world_size)


@pytest.mark.parametrize(
    "epoch, factor",
    [(0, 0.0), (1, 0.1), (9, 0.9), (10, 1.0), (55, 0.5), (99, 0.5 * (1 + math.cos(math.pi * 89 / 90)))],
)
def test_lr_warms_up_for_ten_epochs_then_follows_half_a_cosine(epoch, factor):
    assert lr_factor(epoch, warmup_epochs=10, epochs=100) == pytest.approx(factor, abs=1e-12)


def test_lr_without_warm_up_starts_at_its_peak():
    assert lr_factor(0, warmup_epochs=0, epochs=1) == 1.0


def test_lr_scales_with_the_batch():
    recipe = resolve(make(base_lr=2.5, batch_size=64))
    assert recipe.learning_rate(10) == pytest.approx(2.5 * 64 / 256)


def test_defaults_are_the_papers_schedule():
    recipe = resolve(make())
    assert (recipe.optimizer, recipe.momentum, recipe.epochs, recipe.warmup_epochs) == ("sgd", 0.9, 100, 10)


@pytest.mark.parametrize(
    "settings, batch_size",
    [
        ({"num_prompts": 50}, 128),
        ({"num_prompts": 100}, 64),
        ({"method": "vpt-shallow", "num_prompts": 200}, 64),
        ({"method": "linear"}, 2048),
        ({"prompt_location": "add-1"}, 128),
        ({"batch_size": 32}, 32),
    ],
)
def test_batch_size_follows_the_recipe(settings, batch_size):
    assert resolve(make(**settings), num_train_images=10_000).batch_size == batch_size


@pytest.mark.parametrize("method, batch", [("linear", 2048), ("partial-1", 1280)])
@pytest.mark.parametrize("num_images", [800, 1000])  # of a search on VTAB-1k, and of its final runs
def test_learning_rate_is_scaled_by_the_recipe_s_batch_where_the_images_are_fewer(method, batch, num_images):
    recipe = resolve(make(method=method, base_lr=0.5, task="vtab/cifar"), num_train_images=num_images)
    assert recipe.peak_lr == pytest.approx(0.5 * batch / 256)


@pytest.mark.parametrize(("num_images", "batch"), [(240, 64), (2048, 2048), (40, 64)])
def test_images_of_ones_own_that_are_fewer_than_the_recipe_s_batch_have_small_steps(num_images, batch):
    assert resolve(make(method="linear"), num_train_images=num_images).batch_size == batch


def test_batch_that_is_given_stays_where_the_images_are_fewer():
    assert resolve(make(method="linear", batch_size=2048), num_train_images=240).batch_size == 2048


def test_learning_rate_does_not_depend_on_the_number_of_processes():
    recipe = make(method="linear", task="vtab/cifar")
    rates = {resolve(recipe, world_size=size).peak_lr for size in (1, 2, 3)}
    assert len(rates) == 1


def test_steps_have_at_most_the_training_set():
    recipe = resolve(make(batch_size=2048), num_train_images=801)
    assert recipe.step_images(801) == 801


@pytest.mark.parametrize("batch_size", [800, 2048])
def test_batch_of_all_images_need_not_be_shared_evenly(batch_size):
    recipe = resolve(make(batch_size=batch_size), num_train_images=800, world_size=3)
    assert recipe.batch_size == batch_size and recipe.step_images(800, 3) == 267


def test_batch_size_that_processes_cannot_share_is_refused():
    with pytest.raises(ValueError, match="batch_size is 63; 2 processes"):
        resolve(make(batch_size=63), world_size=2)


@pytest.mark.parametrize("method, dropout", [("vpt-deep", 0.1), ("vpt-shallow", 0.0), ("linear", None)])
def test_prompt_dropout_follows_the_method(method, dropout):
    assert resolve(make(method=method)).prompt_dropout == dropout


def test_prompts_that_are_pixels_are_not_dropped():
    assert resolve(make(method="vpt+bias", backbone="resnet10t")).prompt_dropout == 0.0


@pytest.mark.parametrize(("location", "prompts"), [("prepend", 10), ("add", None), ("add-1", None)])
def test_prompts_have_a_default_number_unless_their_place_gives_it(location, prompts):
    assert resolve(make(prompt_location=location)).num_prompts == prompts


def test_prompt_dropout_of_zero_stays_zero():
    assert resolve(make(prompt_dropout=0)).prompt_dropout == 0.0


@pytest.mark.parametrize("epochs, warmup", [(5, 0), (20, 2), (100, 10), (300, 10)])
def test_warm_up_shortens_with_the_run(epochs, warmup):
    assert resolve(make(epochs=epochs)).warmup_epochs == warmup


@pytest.mark.parametrize(
    ("method", "optimizer", "rate"),
    [("vpt-deep", None, 1.0), ("vpt-deep", "adamw", 1e-3), ("full", None, 1e-3), ("full", "sgd", 1.0)],
)
def test_learning_rate_is_the_optimizer_s_where_none_is_given(method, optimizer, rate):
    assert resolve(make(method=method, optimizer=optimizer)).base_lr == rate


def test_warm_up_of_a_method_that_uses_adamw_is_half_as_long():
    assert resolve(make(method="bias", epochs=100)).warmup_epochs == 5


def test_settings_that_may_change_in_a_run_that_goes_on_are_those_that_no_result_depends_on():
    free = {field.name for field in dataclasses.fields(Recipe) if not field.metadata["result"]}
    where = {"data", "data_root", "checkpoint", "device"}  # data and weights are held against the run's
    how = {"resident", "workers", "eval_every", "cuda_graph", "tensorboard"}
    assert free == where | how | {"test"}


def test_file_of_a_setting_that_is_out_of_range_is_named(tmp_path):
    (tmp_path / "mine.yaml").write_text("data: x\nbackbone: y\nepochs: 0\n")
    with pytest.raises(ValueError, match=r"^configuration file .*mine\.yaml: epochs is 0"):
        Recipe.from_yaml(tmp_path / "mine.yaml")


@pytest.mark.parametrize(
    "device_type, has_bf16, precision",
    [("cpu", True, "fp32"), ("cuda", True, "bf16"), ("cuda", False, "fp16")],
)
def test_precision_follows_the_device(monkeypatch, device_type, has_bf16, precision):
    # PyTorch emulates bf16 where a GPU does not compute in it, at a crawl.
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    assert resolve(make(), device_type=device_type).precision == precision


def test_resolving_twice_changes_nothing():
    recipe = resolve(make())
    assert resolve(recipe) == recipe


def test_yaml_round_trip(tmp_path):
    recipe = make(
        prompt_layers=[0, 2],
        backbone_arg={"img_size": [64, 32]},
        weight_decay=1e-5,
        prompt_shared=True,
        num_prompts=7,
    )
    (tmp_path / "config.yaml").write_text(recipe.to_yaml())
    assert Recipe.from_yaml(tmp_path / "config.yaml") == recipe


def test_numbers_that_yaml_reads_as_text_are_numbers():
    values = yaml.safe_load("{data: images, backbone: x, weight_decay: 1e-4, base_lr: 1}")
    recipe = Recipe.from_dict(values)
    assert (recipe.weight_decay, recipe.base_lr) == (1e-4, 1.0)


def test_off_in_yaml_is_the_choice_of_that_name():
    assert Recipe.from_dict(yaml.safe_load("{data: x, backbone: y, resident: off}")).resident == "off"


@pytest.mark.parametrize("given", [2**63 + 1, str(2**63 + 1)])
def test_large_seed_is_not_rounded(given):
    assert make(seed=given).seed == 2**63 + 1


@pytest.mark.parametrize(
    "text, message",
    [
        ("epochs: 3\nbackbone_arg: {a: 1}\nepochs: 4\n", r"'epochs' comes twice \(line 3\)"),
        ("backbone_arg:\n  img_size: 48\n  img_size: 64\n", r"'img_size' comes twice \(line 3\)"),
        ("epochs: [1\n", r"is not YAML: expected .* \(line 2\)"),
        ("seed: 2026-13-01\n", "is not YAML: month must be in 1..12"),
        ("seed: !!int ''\n", "is not YAML: string index"),
        ("seed: " + 1000 * "[", "is not YAML: .*recursion"),
        (
            "a: &a [1, 1]\n" + "".join(f"{b}: &{b} [{25 * f'*{a},'}]\n" for a, b in ("ab", "bc", "cd", "de")),
            "more than 100,000 values",
        ),
        ("backbone_arg: &a {x: *a}\n", "more than 100,000 values"),
        ("epochs: \0\n", "is not YAML: unacceptable character .* special characters are not allowed"),
        ("- epochs\n", "holds no mapping of settings"),
    ],
)
def test_yaml_that_says_something_twice_or_nothing_or_too_much_is_refused_in_one_line(
    tmp_path, text, message
):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as raised:
        Recipe.from_yaml(path)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


def test_types_of_the_settings_are_found_once_and_not_for_each_recipe(monkeypatch):
    make()
    monkeypatch.setattr("vpt_fast.training.recipe.get_type_hints", None)
    assert make(seed="7").seed == 7


def test_yaml_may_merge_mappings(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("<<: {epochs: 3, seed: 1}\nepochs: 4\n")
    assert read_yaml(path) == {"epochs": 4, "seed": 1}


def test_folder_is_no_configuration_file(tmp_path):
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        Recipe.from_yaml(tmp_path)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"backbone_arg": ["img_size=[1"]}, r"'img_size=\[1', whose value '\[1' is not YAML"),
        ({"backbone_arg": ["img_size=48", "img_size=64"]}, "img_size is given before"),
        ({"backbone_arg": {1: 2}}, "backbone_arg is {1: 2}; its key 1 must be text"),
        ({"backbone_arg": 7}, "backbone_arg is 7; it must be a mapping"),
        ({"backbone_arg": "img_size=48"}, "it must be a mapping, or a list"),
        ({"seed": 2**64}, "seed is 18446744073709551616; it must be at least 0 and below"),
        ({"base_lr": 1e300}, "base_lr is 1e\\+300; it must be positive and at most 1e\\+38"),
        ({"base_lr": 10**400}, "base_lr is 1000.*; it must be a number"),
        ({"base_lr": math.nan}, "base_lr is nan; it must be a number"),
        ({"weight_decay": 1e300}, "weight_decay is 1e\\+300"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_values_that_nothing_could_be_made_of_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)


@pytest.mark.parametrize(
    "text, layers", [("3", 3), ("-2", -2), ("0,2,5", [0, 2, 5]), ("4,", [4])], ids=lambda v: str(v)
)
def test_prompt_layers_are_a_count_or_indices(text, layers):
    assert make(prompt_layers=text).prompt_layers == layers


def test_backbone_arguments_are_typed_as_in_yaml():
    recipe = make(backbone_arg=["img_size=384", "global_pool=avg", "dynamic_img_size=true"])
    assert recipe.backbone_arg == {"img_size": 384, "global_pool": "avg", "dynamic_img_size": True}


@pytest.mark.parametrize(
    "name, value",
    [
        ("num_prompts", 0),
        ("num_prompts", "many"),
        ("epochs", 0),
        ("epochs", 2.5),
        ("warmup_epochs", 100),
        ("base_lr", 0),
        ("base_lr", "nan"),
        ("base_lr", "inf"),
        ("batch_size", 0),
        ("accumulate", 0),
        ("momentum", 1.0),
        ("weight_decay", -0.1),
        ("prompt_dropout", 1),
        ("label_smoothing", -0.1),
        ("clip_grad_norm", 0),
        ("val_fraction", 1.0),
        ("val_fraction", 0),
        ("train_fraction", 0),
        ("train_fraction", 1.5),
        ("shots", 0),
        ("shots", 1.5),
        ("prompt_project", 0),
        ("adapter_reduction", 0),
        ("lora_rank", 0),
        ("head_channels", 0),
        ("aux_weight", 0),
        ("warmup_epochs", -1),
        ("clip_grad_norm", "inf"),
        ("seed", -1),
        ("workers", -1),
        ("eval_every", -1),
        ("method", "partial"),
        ("method", "mlp-0"),
        ("method", "partial-K"),
        ("method", "partial-٣"),
        ("pretrained", "yes"),
        ("prompt_layers", "first"),
        ("prompt_layers", [0.5, 1]),
        ("backbone_arg", ["img_size"]),
        ("precision", "int8"),
        ("precision", False),
    ],
)
def test_bad_value_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"^{name} is "):
        make(**{name: value})


@pytest.mark.parametrize(
    "settings",
    [
        {
            "num_prompts": 1,
            "prompt_project": 1,
            "prompt_dropout": 0,
            "batch_size": 1,
            "workers": 0,
            "seed": 0,
        },
        {"epochs": 1, "warmup_epochs": 0, "momentum": 0, "weight_decay": 0, "seed": 2**64 - 1},
        {"method": "adapter", "adapter_reduction": 1, "base_lr": 1e38, "weight_decay": 1e38},
        {"method": "lora", "lora_rank": 1, "epochs": 2, "warmup_epochs": 1},
        {"task": "segmentation", "head_channels": 1},
    ],
    ids=lambda settings: next(iter(settings)) + settings.get("method", ""),
)
def test_values_at_the_ends_of_their_ranges_are_taken(settings):
    recipe = make(**settings)
    assert {name: getattr(recipe, name) for name in settings} == settings


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"prompt_location": "key-value"}, "prompt_location key-value"),
        ({"method": "vpt-shallow", "prompt_location": "pad"}, "prompt_location pad"),
        ({"prompt_project": 4}, "prompt_project 4"),
    ],
    ids=["key-value", "pad", "project"],
)
def test_prompts_that_are_no_tokens_do_not_start_from_them(settings, named):
    with pytest.raises(ValueError, match=f"^prompt_init is tokens beside {named}, "):
        make(prompt_init="tokens", **settings)


def test_convnets_prompts_do_not_start_from_tokens():
    recipe = make(backbone="resnet10t", method="vpt-shallow", prompt_init="tokens", num_prompts=2)
    with pytest.raises(ValueError, match="^prompt_init is 'tokens' with backbone 'resnet10t', a ConvNet, "):
        model_settings(recipe)


def test_settings_of_other_methods_are_refused_with_the_methods_that_have_them():
    message = "^num_prompts, prompt_shared: method linear has no .* choose vpt-deep or vpt-shallow$"
    with pytest.raises(ValueError, match=message):
        make(method="linear", num_prompts=5, prompt_shared=True)


@pytest.mark.parametrize(
    "settings", [{"optimizer": "adamw"}, {"method": "bias"}], ids=["given", "methods_own"]
)
def test_momentum_is_refused_with_adamw(settings):
    with pytest.raises(ValueError, match="^momentum is 0.8, and adamw has no such setting"):
        make(momentum=0.8, **settings)
    assert make(momentum=0.8, method="bias", optimizer="sgd").momentum == 0.8


def test_val_fraction_is_refused_with_a_task():
    with pytest.raises(ValueError, match="^val_fraction is 0.3, and fgvc/cub has a val split of its own"):
        make(task="cub", val_fraction=0.3)


@pytest.mark.parametrize("checkpoint, pretrained", [(None, True), ("ViT-B_16.npz", False)])
def test_published_weights_are_loaded_where_there_is_no_checkpoint(checkpoint, pretrained):
    resolved = make(checkpoint=checkpoint).resolved(num_train_images=100, device_type="cpu")
    assert resolved.pretrained is pretrained
    assert Recipe.from_dict(resolved.to_dict()) == resolved


def test_weights_of_a_backbone_s_folder_are_read_where_no_others_are_wanted(tmp_path):
    backbone = f"local-dir:{tmp_path}"
    assert make(backbone=backbone).weights_file == str(tmp_path / "model.safetensors")
    assert make(backbone=backbone, pretrained=False).weights_file is None
    assert make(backbone=backbone, checkpoint="ViT-B_16.npz").weights_file == "ViT-B_16.npz"
    assert make().weights_file is None


def test_shots_beside_a_fraction_are_refused():
    with pytest.raises(ValueError, match="train_fraction is 0.5 beside shots 4; leave one of them out"):
        make(train_fraction=0.5, shots=4)


def test_fraction_to_hold_out_where_nothing_is_held_out_is_refused():
    with pytest.raises(ValueError, match="val_fraction is 0.5 beside train_on train.val"):
        make(train_on="train+val", val_fraction=0.5)


def test_pretrained_beside_a_checkpoint_is_refused():
    with pytest.raises(ValueError, match="pretrained is on beside checkpoint ViT-B_16.npz"):
        make(checkpoint="ViT-B_16.npz", pretrained=True)


def test_shallow_refuses_prompt_layers():
    with pytest.raises(ValueError, match="prompt_layers only applies to method vpt-deep"):
        make(method="vpt-shallow", prompt_layers=2)


def test_unknown_setting_is_refused_with_close_names():
    with pytest.raises(ValueError, match="unknown setting 'num_prompt'; close names: num_prompts"):
        Recipe.from_dict({"data": "images", "backbone": "x", "num_prompt": 3})


def test_missing_data_is_refused():
    with pytest.raises(ValueError, match="data is not given"):
        Recipe.from_dict({"backbone": "x"})


def test_differences_leave_out_what_changes_no_result():
    one, other = make(workers=0, seed=1), make(workers=4, seed=2)
    assert one.differences(other) == {"seed": (1, 2)}


def test_every_field_is_a_flag():
    own = {"out", "config", "fresh", "debug"}
    assert inspect.signature(cli.train).parameters.keys() - own == {
        f.name for f in dataclasses.fields(Recipe)
    }


def test_flags_go_over_the_configuration_file(tmp_path, command, monkeypatch):
    seen = []

    def train(recipe, out, **settings):
        seen.append(recipe)
        raise ValueError("seen enough")

    monkeypatch.setattr("vpt_fast.training.loop.train", train)
    config, data = tmp_path / "recipe.yaml", str(tmp_path)
    config.write_text(make(data=data, epochs=7, base_lr=3.0, prompt_shared=True).to_yaml())
    command("train", "--config", config, "--epochs", 9, "--no-prompt-shared", "--backbone-arg", "img_size=32")
    assert seen == [make(data=data, epochs=9, base_lr=3.0, backbone_arg={"img_size": 32})]


@pytest.mark.parametrize("dtype, precision", [("float16", "bf16"), ("bfloat16", "fp16")])
def test_frozen_weights_in_the_16_bit_type_that_autocast_has_not_are_refused(dtype, precision):
    with pytest.raises(ValueError, match=f"dtype is {dtype} and precision {precision} on cpu"):
        resolve(make(dtype=dtype, precision=precision))


@pytest.mark.parametrize("dtype, precision", [("float16", "fp16"), ("bfloat16", "bf16"), ("float16", "fp32")])
def test_frozen_weights_in_16_bits_go_with_autocast_to_the_same_and_with_none(dtype, precision):
    assert resolve(make(dtype=dtype, precision=precision)).dtype == dtype
