"""The backbone that the package carries."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from timm.models.vision_transformer import VisionTransformer

from vpt_fast.backbones import demo

LOG = Path(__file__).parents[2] / "scripts" / "pretrain_demo_backbone.log.jsonl"


@pytest.fixture(scope="module")
def model() -> VisionTransformer:
    """Built without `pretrained`, which makes no difference."""
    return timm.create_model("vpt_fast_demo").eval()


def test_the_file_is_at_most_4_megabytes():
    assert demo.WEIGHTS.stat().st_size <= 4_000_000


def test_parameter_count_is_1_to_3_million_and_as_the_metadata_says(model):
    count = sum(p.numel() for p in model.parameters())
    assert 1_000_000 <= count <= 3_000_000
    assert count == int(demo.demo_metadata()["num_parameters"])


def test_weights_are_those_of_the_file_in_fp32(model):
    state = model.state_dict()
    with safe_open(demo.WEIGHTS, framework="pt") as file:
        assert set(file.keys()) == set(state)
        for name in file.keys():
            torch.testing.assert_close(state[name], file.get_tensor(name).float(), rtol=0, atol=0)


def test_features_are_finite(model):
    with torch.no_grad():
        features = model(torch.rand(2, 3, 32, 32) * 2 - 1)
    assert features.shape == (2, model.embed_dim)
    assert features.isfinite().all()


def test_preprocessing_is_that_of_pre_training(model):
    config = timm.data.resolve_model_data_config(model)
    assert config["input_size"] == (3, 32, 32)
    assert config["mean"] == config["std"] == (0.5, 0.5, 0.5)
    assert (config["crop_pct"], config["interpolation"]) == (1.0, "bicubic")


@pytest.mark.parametrize(
    ("arguments", "size", "width"),
    [
        ({"img_size": 48}, (48, 48), None),
        ({"img_size": (32, 64)}, (32, 64), None),
        ({"dynamic_img_size": True}, (40, 32), None),
        ({"num_classes": 7}, (32, 32), 7),
        ({"patch_drop_rate": 0.5}, (32, 32), None),
    ],
    ids=["img_size", "non_square", "dynamic_img_size", "num_classes", "patch_drop_rate"],
)
def test_takes_timm_arguments(arguments, size, width):
    model = timm.create_model("vpt_fast_demo", **arguments)
    assert model(torch.zeros(2, 3, *size)).shape == (2, width or model.embed_dim)


def test_accuracy_in_the_metadata_is_the_logs_last():
    last = json.loads(LOG.read_text().splitlines()[-1])
    metadata = demo.demo_metadata()
    assert float(metadata["accuracy"]) == last["accuracy"]
    assert int(metadata["held_out_images"]) == last["held_out_images"]
