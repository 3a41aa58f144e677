"""Faults in images and their boxes, for the data report."""

from collections import Counter
from typing import Any

from ...data.sources import Rows
from ..checks import FAULTS as IMAGE_FAULTS

FAULTS = {
    "broken_images": IMAGE_FAULTS["broken_images"],
    "one_pixel_images": IMAGE_FAULTS["one_pixel_images"],
    "without_label": "no objects column (left out)",
    "boxes_without_area": "box without area in its image (left out)",
    "boxes_outside": "box beyond its image's edges (cut)",
    "duplicate_boxes": "box of an earlier object of the image, same category (left out)",
    "crowds": "box of a crowd (not learned, what is found in it not counted)",
    "images_without_objects": "image without an object",
    "images_without_annotations": "image of a file without annotations (predicted, not scored)",
    "empty_classes": "category without an object",
    "converted_images": IMAGE_FAULTS["converted_images"],
    "duplicate_images": IMAGE_FAULTS["duplicate_images"],
    "contradicting_labels": "same pixels as an earlier image, other objects",
    "images_in_train": IMAGE_FAULTS["images_in_train"],
    "near_images_in_train": IMAGE_FAULTS["near_images_in_train"],
}


def categories_of(rows: Rows) -> Counter[str]:
    """How many objects there are of each category."""
    return Counter(one["category"] for target in rows["target"] for one in target)


def rarest_of(target: list[dict[str, Any]], counts: Counter[str]) -> str:
    """The category of an image's objects that has the fewest; "" without any."""
    return min((one["category"] for one in target), key=lambda label: (counts[label], label), default="")
