"""Published numbers of Jia et al., "Visual Prompt Tuning", ECCV 2022: accuracies in percent, and parameters.

For ViT-B/16 supervised on ImageNet-21k, the means of Table 1 and the appendix's accuracies by task; for other
backbones, means only. Backbones are named as in `backbones.known`.
"""

from __future__ import annotations

from dataclasses import dataclass

from vpt_fast.backbones.known import find_known

BACKBONE = "sup_vitb16_imagenet21k"

_METHODS = ("full", "vpt-shallow", "vpt-deep")
_ROWS = {
    "vtab/cifar": (68.9, 77.7, 78.8),
    "vtab/caltech101": (87.7, 86.9, 90.8),
    "vtab/dtd": (64.3, 62.6, 65.8),
    "vtab/oxford_flowers102": (97.2, 97.5, 98.0),
    "vtab/oxford_iiit_pet": (86.9, 87.3, 88.3),
    "vtab/svhn": (87.4, 74.5, 78.1),
    "vtab/sun397": (38.8, 51.2, 49.6),
    "vtab/patch_camelyon": (79.7, 78.2, 81.8),
    "vtab/eurosat": (95.7, 92.0, 96.1),
    "vtab/resisc45": (84.2, 75.6, 83.4),
    "vtab/diabetic_retinopathy": (73.9, 72.9, 68.4),
    "vtab/clevr_count": (56.3, 50.5, 68.5),
    "vtab/clevr_dist": (58.6, 58.6, 60.0),
    "vtab/dmlab": (41.7, 40.5, 46.5),
    "vtab/kitti": (65.5, 67.1, 72.8),
    "vtab/dsprites_loc": (57.5, 68.7, 73.6),
    "vtab/dsprites_ori": (46.7, 36.1, 47.9),
    "vtab/smallnorb_azi": (25.7, 20.2, 32.9),
    "vtab/smallnorb_ele": (29.1, 34.1, 37.8),
    "fgvc/cub": (87.3, 86.7, 88.5),
    "fgvc/nabirds": (82.7, 78.8, 84.2),
    "fgvc/flowers": (98.8, 98.4, 99.0),
    "fgvc/dogs": (89.4, 90.7, 90.2),
    "fgvc/cars": (84.5, 68.7, 83.6),
}

PAPER_TOTALS = {
    "linear": 1.02,
    "partial-1": 3.00,
    "mlp-3": 1.35,
    "sidetune": 3.69,
    "bias": 1.05,
    "adapter": 1.23,
    "vpt-shallow": 1.04,
    "vpt-deep": 1.18,
}
"""Method -> the total parameters of Table 1, ViT-B/16: `parameters`."""

ACCURACIES: dict[str, dict[str, float]] = {
    method: {task: row[column] for task, row in _ROWS.items()} for column, method in enumerate(_METHODS)
}
"""Method -> task -> accuracy of `BACKBONE`."""

GROUP_MEANS: dict[str, dict[str, float]] = {
    "full": {"natural": 75.88, "specialized": 83.36, "structured": 47.64},
    "vpt-shallow": {"natural": 76.81, "specialized": 79.66, "structured": 46.98},
    "vpt-deep": {"natural": 78.48, "specialized": 82.43, "structured": 54.98},
}
"""Method -> group of VTAB -> mean accuracy of `BACKBONE`."""


@dataclass(frozen=True)
class Published:
    """Published numbers of one backbone.

    Attributes:
        means: method -> group of VTAB -> mean accuracy.
        accuracies: method -> task -> accuracy; empty if only means were published.
        location: prompt location that all of them used.
    """

    means: dict[str, dict[str, float]]
    accuracies: dict[str, dict[str, float]]
    location: str = "prepend"


def _means(
    method: str, natural: float, specialized: float, structured: float, location: str = "prepend"
) -> Published:
    groups = {"natural": natural, "specialized": specialized, "structured": structured}
    return Published({method: groups}, {}, location)


PUBLISHED: dict[str, Published] = {
    BACKBONE: Published(GROUP_MEANS, ACCURACIES),
    "swinb_imagenet22k_224": _means("vpt-deep", 76.78, 84.53, 53.35),
    "mae_vitb16": _means("vpt-deep", 36.02, 60.61, 26.57),
    "mocov3_vitb": _means("vpt-deep", 70.27, 83.04, 42.38),
    "imagenet22k_sup_rnx_base": _means("vpt-shallow", 78.48, 83.00, 44.64, location="pad"),
}
"""Backbone -> its published numbers."""


def published_of(backbone: str, prompt_location: str | None = None) -> Published | None:
    """Looks up a backbone by its name in `PUBLISHED`, or timm's name for the same weights; None if nothing
    was published for it, or not with this `prompt_location`."""
    known = find_known(backbone)
    found = None if known is None else PUBLISHED.get(known.name)
    return found if found is None or prompt_location in (None, found.location) else None
