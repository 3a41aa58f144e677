"""Mean average precision as COCO counts it, by pycocotools.

An object is {bbox, category}, a prediction has a `score` too; a box is x, y, width and height in pixels.
"""

import contextlib
import io
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

MOST_DETECTIONS = 100  # of an image that count
CARD_METRICS = {
    "map": ("map", "mAP 50-95"),
    "map_50": ("map_50", "mAP 50"),
    "map_75": ("map_75", "mAP 75"),
    "mar_100": ("mar_100", "recall of 100 boxes"),
}  # {result name: (the Hub's metric, label)}
Objects = Sequence[dict[str, Any]]


class Measured(NamedTuple):
    """Precision and recall over all overlaps (.5, .55, ... .95).

    Attributes:
        precision: [10 overlaps, 101 recalls, labels], -1 where a label has no object.
        recall: [10 overlaps, labels], of the best 100 boxes of an image.
    """

    precision: np.ndarray
    recall: np.ndarray


def require_pycocotools() -> None:
    """Refuse a run that couldn't be scored.

    Raises:
        ValueError: with what to install.
    """
    if find_spec("pycocotools") is None:
        raise ValueError('object detection is scored by pycocotools: pip install "deepseek-hf[images]"')


def coco_results(predictions: Sequence[Objects], image_ids: Sequence[Any], numbers: dict[str, int]) -> list[dict]:
    """Predictions in COCO's results format: image_id, category_id, bbox, score."""
    return [
        {
            "image_id": image,
            "category_id": numbers[one["category"]],
            "bbox": one["bbox"],
            "score": one["score"],
        }
        for image, found in zip(image_ids, predictions, strict=True)
        for one in found
    ]


def measured(
    predictions: Sequence[Objects],
    targets: Sequence[Objects],
    labels: Sequence[str],
    crowds: Sequence[Objects] | None = None,
) -> Measured:
    """Each image's predictions beside its objects.

    Args:
        crowds: boxes with many objects; predictions that lie in them count neither for nor against.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    numbers = {label: number for number, label in enumerate(labels)}
    images = range(len(targets))
    objects: list[dict[str, Any]] = [
        {"image_id": image, "category_id": numbers[one["category"]], "bbox": one["bbox"], "iscrowd": is_crowd}
        for is_crowd, boxes in enumerate((targets, crowds or [[]] * len(targets)))
        for image, found in zip(images, boxes, strict=True)
        for one in found
        if one["category"] in numbers  # there may be crowds of what the model can't know
    ]
    for number, one in enumerate(objects, start=1):
        one |= {"id": number, "area": one["bbox"][2] * one["bbox"][3]}
    results = coco_results(predictions, images, numbers)
    with contextlib.redirect_stdout(io.StringIO()):  # it tells what it does
        truth, found = COCO(), COCO()
        content: dict[str, Any] = {"info": {}, "images": [{"id": image} for image in images]}
        content["categories"] = [{"id": number, "name": label} for label, number in numbers.items()]
        truth.dataset = content | {"annotations": objects}
        truth.createIndex()
        found = truth.loadRes(results) if results else COCO()
        evaluation = COCOeval(truth, found, "bbox")
        evaluation.params.maxDets = [MOST_DETECTIONS]
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.evaluate()
        evaluation.accumulate()
    return Measured(evaluation.eval["precision"][:, :, :, 0, 0], evaluation.eval["recall"][:, :, 0, 0])


def _mean(values: np.ndarray) -> float:
    """Of what there is: -1 stands for a label without objects."""
    return float(values[values > -1].mean())


def summary(found: Measured) -> dict[str, float]:
    """`map` over all overlaps, `map_50` and `map_75` at one, `mar_100`: all 0 to 1; nothing where no image has an
    object."""
    if not (found.recall > -1).any():
        return {}
    return {
        "map": _mean(found.precision),
        "map_50": _mean(found.precision[0]),
        "map_75": _mean(found.precision[5]),
        "mar_100": _mean(found.recall),
    }


def by_label(found: Measured, targets: Sequence[Objects], labels: Sequence[str]) -> pd.DataFrame:
    """The same for each label that has objects, and their number."""
    counts = pd.Series([one["category"] for objects in targets for one in objects], dtype=object).value_counts()
    rows = {
        label: {**summary(Measured(found.precision[..., [n]], found.recall[..., [n]])), "objects": int(counts[label])}
        for n, label in enumerate(labels)
        if label in counts
    }
    return pd.DataFrame(rows).T.rename_axis("label")
