"""Labels of the VTAB tasks that derive them from an image's annotations.

Definitions are those of google-research/task_adaptation (Zhai et al., arXiv 1910.04867). Field names are
those of TensorFlow Datasets, and numbers are float32 as there.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

CLEVR_FEWEST, CLEVR_MOST = 3, 10  # objects in a scene
CLEVR_EDGES = (8.0, 8.5, 9.0, 9.5, 10.0)  # bin edges of the closest object's depth
KITTI_EDGES = (8.0, 20.0, 999.0)  # bin edges of the closest vehicle's distance, in metres
KITTI_VEHICLES = 3  # the first three object types are vehicles: car, van, truck


@dataclass(frozen=True)
class LabelRule:
    """How a task's label is computed from one field of its data set.

    Attributes:
        field: the field's name; with its parent's for a nested one, "objects/pixel_coords".
        label: maps the field's value to the class number.
        binned_from: number of classes of the field, if it is itself a class number that is binned.
        scale: factor that brings the set's pixels to 0..255.
    """

    field: str
    label: Callable[[Any], int]
    binned_from: int | None = None
    scale: int = 1


def count_objects(coordinates: Any) -> int:
    """Label from the coordinates (n, 3) of n objects, 3 to 10."""
    return len(coordinates) - CLEVR_FEWEST


def closest_object(coordinates: Any) -> int:
    """Label from coordinates (n, 3): x and y in the image, and depth. A depth on an edge belongs to the bin
    below."""
    return bisect_left(CLEVR_EDGES, np.asarray(coordinates, np.float32)[:, 2].min())


def closest_vehicle(objects: Mapping[str, Any]) -> int:
    """Label from `type` (n,) and `location` (n, 3): right, down and forward of the camera, in metres. The
    last class is "no vehicle"."""
    is_vehicle = np.asarray(objects["type"]) < KITTI_VEHICLES
    distances = np.asarray(objects["location"], np.float32).reshape(-1, 3)[is_vehicle, 2]
    return bisect_left(KITTI_EDGES, distances.min(initial=1000.0))


LABEL_RULES = {
    "vtab/clevr_count": LabelRule("objects/pixel_coords", count_objects),
    "vtab/clevr_dist": LabelRule("objects/pixel_coords", closest_object),
    "vtab/kitti": LabelRule("objects", closest_vehicle),
    "vtab/dsprites_loc": LabelRule("label_x_position", lambda x: 16 * int(x) // 32, 32, scale=255),
    "vtab/dsprites_ori": LabelRule("label_orientation", lambda angle: 16 * int(angle) // 40, 40, scale=255),
    "vtab/smallnorb_azi": LabelRule("label_azimuth", int),
    "vtab/smallnorb_ele": LabelRule("label_elevation", int),
}
"""Task -> rule for its labels."""
