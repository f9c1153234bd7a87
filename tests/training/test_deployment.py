"""The code of docs/deployment.md, in its order, on a run."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from vpt_fast.training.inference import predict_images
from vpt_fast.training.loop import train

PAGE = Path(__file__).parents[2] / "docs" / "deployment.md"
# AOTInductor compiles for half a minute; ONNX is no dependency of this project.
NOT_RUN = ("onnx", "aoti_")


@pytest.fixture
def after_each_block(recipe, color_images, tmp_path, monkeypatch) -> list[dict[str, Any]]:
    """The variables after each block of code that is run."""
    monkeypatch.chdir(tmp_path)
    train(dataclasses.replace(recipe, epochs=1, warmup_epochs=0), Path("RUN"))
    for name, color in (("photo.jpg", "red"), ("other.jpg", "blue")):
        Image.open(color_images / "test" / color / "0.png").save(name)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    variables: dict[str, Any] = {}
    found = []
    for block in blocks:
        if not any(name in block for name in NOT_RUN):
            exec(block, variables)
            found.append(dict(variables))
    return found


def test_code_of_the_page_gives_the_logits_of_the_run(after_each_block) -> None:
    loaded, exported, as_timm = after_each_block
    predicted = predict_images(loaded["run"], [Path("photo.jpg"), Path("other.jpg")], 1)
    assert loaded["names"] == [answer["predictions"][0]["class"] for answer in predicted]
    torch.testing.assert_close(exported["logits"], loaded["logits"])
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(as_timm["plain"](images), as_timm["model"](images), rtol=1e-4, atol=1e-4)
