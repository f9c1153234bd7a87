"""Every method and setting of prompts on every kind of backbone: it trains, or says what excludes what."""

from __future__ import annotations

import sys
from pathlib import Path

import combinations as page
import pytest
import torch
from torch.nn import functional as F

ROOT = Path(__file__).parents[2]

NAMES = [combination.name for combination in page.combinations()]


@pytest.fixture(scope="module")
def built():
    return page.build_all()


def test_the_committed_page_is_the_generated_one(built) -> None:
    assert (ROOT / page.PAGE).read_text() == page.page(built), "run scripts/combinations.py"


def test_help_builds_and_writes_nothing(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["combinations.py", "--help"])
    monkeypatch.setattr(page, "build_all", lambda: pytest.fail("built"))
    with pytest.raises(SystemExit, match="^0$"):
        page.main()
    assert "docs/combinations.md" in capsys.readouterr().out


@pytest.mark.parametrize("name", NAMES)
def test_combination_trains_or_names_both_of_its_sides(name: str, built) -> None:
    combination, result = built[name]
    if isinstance(result, ValueError):
        assert_names_both_sides(combination, str(result))
    else:
        assert_trains(result)


def assert_names_both_sides(combination: page.Combination, message: str) -> None:
    settings, kind = combination.settings, combination.kind
    of_method = combination.method in message and f"a {kind.called}" in message
    if not settings:
        assert of_method, message
        return
    of_kind = any(name in message for name in settings) and f"a {kind.called}" in message
    # What one of vpt-deep and vpt-shallow takes is not the backbone's matter.
    of_type = any(name in message for name in settings) and (
        "prompt_type" in message or "vpt-deep" in message
    )
    assert of_method or of_kind or of_type, message


def assert_trains(model) -> None:
    """All that is trained gets a gradient, and a small step down it lowers the loss."""
    torch.manual_seed(1)  # of dropout
    images = torch.randn(4, 3, *model.image_size, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([0, 1, 2, 1])
    model.train()
    loss = F.cross_entropy(model(images), labels)
    loss.backward()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    missing = [name for name, p in parameters.items() if p.grad is None or not p.grad.isfinite().all()]
    assert not missing
    norm = torch.stack([p.grad.norm() for p in parameters.values()]).norm()
    with torch.no_grad():
        for p in parameters.values():
            p -= 0.01 / norm * p.grad
    torch.manual_seed(1)
    assert F.cross_entropy(model(images), labels) < loss
