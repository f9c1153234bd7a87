"""Labels of VTAB's tasks that are not their sets' classes, from what the sets say of each image.

Definitions are those of google-research/task_adaptation (Zhai et al., arXiv 1910.04867), names of fields
those of TensorFlow Datasets, and numbers are float32 as there.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

CLEVR_FEWEST = 3  # objects in a scene
CLEVR_EDGES = (8.0, 8.5, 9.0, 9.5, 10.0)  # of the closest object's depth
KITTI_EDGES = (8.0, 20.0, 999.0)  # of the closest vehicle's distance, in metres
KITTI_VEHICLES = 3  # of its types of objects the first: car, van, truck


@dataclass(frozen=True)
class LabelRule:
    """How a task's label comes of one field of its set.

    Attributes:
        field: its name; of a field in another one both, "objects/pixel_coords".
        label: the field's value to the class number.
        binned_from: classes that the field itself has, where it is a class number that is put into bins.
        scale: what the set's pixels are multiplied by, to be of 0 to 255.
    """

    field: str
    label: Callable[[Any], int]
    binned_from: int | None = None
    scale: int = 1


def count_objects(coordinates: Any) -> int:
    """(n, 3) of n objects, 3 to 10."""
    return len(coordinates) - CLEVR_FEWEST


def closest_object(coordinates: Any) -> int:
    """(n, 3): x and y in the image, and depth. A depth on an edge belongs to the bin below."""
    return bisect_left(CLEVR_EDGES, np.asarray(coordinates, np.float32)[:, 2].min())


def closest_vehicle(objects: Mapping[str, Any]) -> int:
    """`type` (n,), and `location` (n, 3): right, down and forward of the camera, in metres. No vehicle is the
    last class."""
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
"""Task -> the rule of its labels."""
