"""What each method trains and stores, against the paper and closed forms."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest

from vpt_fast.data.tasks import TASKS
from vpt_fast.sweeps.parameters import PROMPT_LENGTHS, count_parameters, table
from vpt_fast.sweeps.published import PAPER_TOTALS

DOCS = Path(__file__).parent.parent.parent / "docs"
BLOCK = 12 * 768**2 + 13 * 768  # of ViT-B: weights, and biases and norms
SWIN_B = 2 * 128 + 2 * 256 + 18 * 512 + 2 * 1024  # widths of all blocks
RESNET50 = 3 * 64 + 4 * 128 + 6 * 256 + 3 * 512
counted = functools.cache(count_parameters)  # of a large backbone it takes seconds


@pytest.fixture(scope="module")
def rows():
    found, reasons = count_parameters()
    assert not reasons
    return {row.method: row for row in found}


@pytest.mark.parametrize("method", [name for name in PAPER_TOTALS if name != "adapter"])
def test_totals_are_the_papers(rows, method):
    low, high = (round(total, 2) for total in rows[method].total)
    assert low <= PAPER_TOTALS[method] <= high and high - low < 0.02


def test_papers_adapters_lie_between_the_reductions_that_it_chose_among(rows):
    assert rows["adapter, d/256"].total[1] < PAPER_TOTALS["adapter"] < rows["adapter, d/8"].total[0]


@pytest.mark.parametrize(
    ("method", "trained"),
    [
        ("linear", 0),
        ("mlp-3", 2 * (768**2 + 768)),
        ("partial-1", BLOCK + 2 * 768),
        ("sidetune", 2_469_696 + 9217 * 768 + 1),
        ("bias", 12 * 11 * 768 + 2 * 768),
        ("adapter, d/8", 12 * (2 * 768 * 96 + 96 + 768)),
        ("lora, rank 8", 12 * 8 * 6 * 768),
        ("cls-token", 768),
        ("full", 12 * BLOCK + 16 * 16 * 3 * 768 + (197 + 4) * 768),
    ],
)
def test_trained_parameters_are_the_closed_form(rows, method, trained):
    assert rows[method].trained == (trained, trained)


@pytest.mark.parametrize(
    ("backbone", "method", "trained"),
    [
        # A block of the last stage with its table of 13 x 13 offsets for each head, and the final norm.
        ("swin_base_patch4_window7_224", "partial-1", 12 * 1024**2 + 13 * 1024 + 169 * 32 + 2 * 1024),
        # Eleven widths a block, the patch embedding, norms of four patches, the final norm; and prompts.
        (
            "swin_base_patch4_window7_224",
            "vpt+bias",
            11 * SWIN_B
            + 2 * 128
            + 4 * (128 + 256 + 512)
            + 1024
            + round(SWIN_B * sum(deep for deep, _ in PROMPT_LENGTHS.values()) / len(TASKS)),
        ),
        # The last bottleneck: 1x1, 3x3 and 1x1 convolutions, each with a BatchNorm.
        ("resnet50", "partial-1", 2 * 2048 * 512 + 9 * 512**2 + 2 * (512 + 512 + 2048)),
        # The rank times what each convolution's kernel reads and gives: 20 widths a bottleneck, and in the
        # first of a stage, which has a shortcut, twice its input.
        ("resnet50", "lora, rank 8", 8 * (20 * RESNET50 + 2 * (64 + 256 + 512 + 1024))),
    ],
)
def test_trained_parameters_of_a_swin_and_a_convnet_are_the_closed_form(backbone, method, trained):
    found = {row.method: row for row in counted(backbone)[0]}
    assert found[method].trained == (trained, trained)


@pytest.mark.parametrize("backbone", ["swin_base_patch4_window7_224", "resnet50"])
def test_a_swin_and_a_convnet_have_no_cls_token_to_train(backbone):
    rows, reasons = counted(backbone)
    assert "cls-token" in reasons and {"linear", "vpt-shallow", "full"} <= {row.method for row in rows}


def test_a_head_on_two_tokens_is_not_counted_beside_the_head():
    sizes = dict(img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2)
    linear, *_ = count_parameters("deit_tiny_distilled_patch16_224", sizes)[0]
    assert linear.method == "linear" and linear.trained == (0, 0)


def test_prompt_lengths_are_of_the_24_tasks():
    assert PROMPT_LENGTHS.keys() == TASKS.keys()
    assert sum(task.num_classes for task in TASKS.values()) == 940 + 1173


def test_table_in_the_docs_is_what_is_counted(rows):
    header, *body = table(list(rows.values()))
    lines = [header, ("---",) * len(header), *body]
    text = "".join("| " + " | ".join(line) + " |\n" for line in lines)
    assert text in (DOCS / "methods.md").read_text()


def test_methods_command_leaves_out_what_a_backbone_cannot_have(command):
    result = command("methods", "--backbone", "train_test_vit", "--json")
    found = {row["method"]: row for row in json.loads(result.stdout)}
    assert result.exit_code == 0 and found["cls-token"]["trained"] == [32, 32]
    assert "sidetune" not in found and "sidetune: backbone: its images are 3x16x16" in result.stderr


def test_methods_command_refuses_an_unknown_backbone(command):
    result = command("methods", "--backbone", "vit_bass_patch16_224")
    assert result.exit_code == 2 and "vit_base_patch16_224" in result.stderr
