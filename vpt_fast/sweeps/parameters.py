"""How much each method trains and stores: the "Total params" column of the VPT paper's Table 1.

The total is over 24 tasks (19 of VTAB-1k, 5 of FGVC), in units of the backbone: one shared backbone plus all
that is stored for each task, including its head. Full fine-tuning shares no backbone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vpt_fast.backbones.creation import without_values
from vpt_fast.backbones.resolve import CONVNET, kind_of, resolve_backbone
from vpt_fast.backbones.sources import finding_sources_once
from vpt_fast.backbones.vit import TimmViT
from vpt_fast.data.tasks import TASKS
from vpt_fast.sweeps.published import PAPER_TOTALS
from vpt_fast.training.methods import model_settings
from vpt_fast.training.recipe import Recipe

BACKBONE = "vit_base_patch16_224"

# Prompt lengths that the paper chose for each task with that backbone: deep, shallow. Derived from published
# parameter counts, which do not include the shallow lengths of FGVC.
PROMPT_LENGTHS: dict[str, tuple[int, int | None]] = {
    "vtab/cifar": (10, 100),
    "vtab/caltech101": (10, 5),
    "vtab/dtd": (10, 1),
    "vtab/oxford_flowers102": (1, 200),
    "vtab/oxford_iiit_pet": (1, 50),
    "vtab/svhn": (50, 200),
    "vtab/sun397": (5, 1),
    "vtab/patch_camelyon": (100, 5),
    "vtab/eurosat": (100, 50),
    "vtab/resisc45": (10, 50),
    "vtab/diabetic_retinopathy": (1, 10),
    "vtab/clevr_count": (50, 100),
    "vtab/clevr_dist": (200, 200),
    "vtab/dmlab": (100, 100),
    "vtab/kitti": (50, 100),
    "vtab/dsprites_loc": (10, 100),
    "vtab/dsprites_ori": (50, 100),
    "vtab/smallnorb_azi": (200, 200),
    "vtab/smallnorb_ele": (200, 200),
    "fgvc/cub": (10, None),
    "fgvc/nabirds": (50, None),
    "fgvc/flowers": (5, None),
    "fgvc/dogs": (100, None),
    "fgvc/cars": (200, None),
}
_SHORTEST, _LONGEST = 1, 200  # range of prompt lengths in the paper's search

# Adapter reductions in the paper's search for each task.
REDUCTIONS = (8, 64, 256)


@dataclass(frozen=True)
class MethodParameters:
    """One method's counts. Each pair is (minimum, maximum), which differ if some settings are not known.

    trained: parameters trained and stored per task without its head, averaged over the tasks.
    stored: parameters stored for all 24 tasks, with their heads.
    total: of all tasks together, in units of the backbone.
    paper: the total in the paper, for its backbone.
    """

    method: str
    trained: tuple[int, int]
    stored: tuple[int, int]
    total: tuple[float, float]
    paper: float | None


@finding_sources_once()
def count_parameters(
    backbone: str = BACKBONE, backbone_arg: Mapping[str, Any] | Sequence[str] = ()
) -> tuple[list[MethodParameters], dict[str, str]]:
    """The counts of every method on a backbone, which is built without its weights; and for each method that
    it does not support, the reason. `backbone_arg` is as in a Recipe.

    Raises:
        ValueError: the backbone cannot be built, or is not supported.
    """
    kind = kind_of(backbone)
    deep, shallow = ({name: lengths[i] for name, lengths in PROMPT_LENGTHS.items()} for i in (0, 1))
    ways: list[tuple[str, Mapping[str, int | None] | None, dict[str, Any]]] = [
        ("linear", None, {}),
        ("mlp-3", None, {}),
        ("partial-1", None, {}),
        ("sidetune", None, {}),
        ("bias", None, {}),
        *((f"adapter, d/{r}", None, {"adapter_reduction": r}) for r in REDUCTIONS),
        ("lora, rank 8", None, {"lora_rank": 8}),
        ("cls-token", None, {}),
        ("vpt-shallow", shallow, {"prompt_location": "pad"} if kind is CONVNET else {}),
        ("vpt-deep", deep, {}),
        ("vpt+bias", deep, {}),
        ("full", None, {}),
    ]
    # The recipe also parses a list of KEY=VALUE texts in backbone_arg.
    recipe = Recipe(data="", backbone=backbone, pretrained=False, backbone_arg=backbone_arg)  # type: ignore
    is_papers = (backbone, recipe.backbone_arg) == (BACKBONE, {})
    rows: list[MethodParameters] = []
    reasons: dict[str, str] = {}
    with without_values():
        vit, _ = resolve_backbone(backbone, False, recipe.backbone_arg, kind=kind)
        for name, lengths, settings in ways:
            method = name.partition(",")[0]
            paper = PAPER_TOTALS.get(method) if is_papers else None
            try:
                rows.append(_count(name, lengths, replace(recipe, method=method, **settings), vit, paper))
            except ValueError as error:
                if not rows:  # the linear probe, which every supported backbone has
                    raise
                reasons[method] = str(error)
    return rows, reasons


def _count(
    name: str, lengths: Mapping[str, int | None] | None, recipe: Recipe, vit: TimmViT, paper: float | None
) -> MethodParameters:
    def build(num_prompts: int | None = None) -> Any:
        resolved = replace(recipe, num_prompts=num_prompts).resolved(num_train_images=1, device_type="cpu")
        constructor, settings = model_settings(resolved)
        return constructor(vit, 1, **settings)

    model = build(1 if lengths else None)
    per_class = model.num_features + 1
    one = model.num_trainable_parameters - per_class
    least = most = one * len(TASKS)
    if lengths:
        per_prompt = build(2).num_trainable_parameters - model.num_trainable_parameters
        least += per_prompt * sum((p or _SHORTEST) - 1 for p in lengths.values())
        most += per_prompt * sum((p or _LONGEST) - 1 for p in lengths.values())
    heads = per_class * sum(task.num_classes for task in TASKS.values())
    shared = 0 if model.stores_backbone else model.num_backbone_parameters
    stored = (least + heads, most + heads)
    low, high = ((shared + count) / model.num_backbone_parameters for count in stored)
    trained = (round(least / len(TASKS)), round(most / len(TASKS)))
    return MethodParameters(name, trained, stored, (low, high), paper)


def table(rows: list[MethodParameters]) -> list[tuple[str, ...]]:
    """The rows as text, after a header; a pair whose ends differ is shown as a range."""

    def span(pair: tuple[float, float], form: str) -> str:
        ends = [format(end, form) for end in pair]
        return ends[0] if ends[0] == ends[1] else " to ".join(ends)

    header = (
        "method",
        "trained for a task, beside the head",
        "stored for 24 tasks",
        "total",
        "paper's total",
    )
    return [
        header,
        *(
            (
                row.method,
                span(row.trained, ","),
                span(row.stored, ","),
                span(row.total, ".2f"),
                "" if row.paper is None else f"{row.paper:.2f}",
            )
            for row in rows
        ),
    ]
