"""Object detection: an image in, boxes with a class and a score each out.

The labels are the categories of the training objects and stand in the saved config as `id2label`; a detector keeps
its own. Any detector of `AutoModelForObjectDetection` with N + 1 logits is trained and scored alike, so also DETR and
YOLOS of transformers.
"""

import json
from functools import partial
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForObjectDetection, DetrImageProcessorPil

from configuration_deepseek import DeepSeekConfig

from ...data.fault_report import Report
from ...data.sources import Rows
from ...training.saved import Saved
from ...training.scoring.eval_loss import Predicted
from ...training.scoring.labels import refuse_unknown, sort_key
from ...training.scoring.ranks import highest
from ...training.task import Scores
from ..checks import check_images, class_balance
from ..image_task import ImageTask
from ..reading import held_out
from .arguments import DetectionArguments
from .boxes import BoxCollator
from .checks import FAULTS, categories_of, rarest_of
from .figures import SHOWN, drawn
from .reading import read_objects
from .scores import (
    CARD_METRICS,
    MOST_DETECTIONS,
    Measured,
    by_label,
    coco_results,
    measured,
    require_pycocotools,
    summary,
)

# Letters: B images, G objects of an image, K predictions of an image.
HEAD = "ObjectDetection"
LEAST_SCORE = 0.01  # of predictions; what is below counts next to nothing
CARD_CODE = """import modeling_deepseek
from transformers import pipeline

detect = pipeline("object-detection", model="{name}")
print(detect("image.png", threshold=0.4))"""


class ObjectDetection(ImageTask):
    """See the module. Rows are as in reading.py."""

    name = "object_detection"
    next_command = "deepseek-hf predict {task} {folder} --test_file FILE (or --data_dir FOLDER)"
    arguments_class = DetectionArguments
    arguments: DetectionArguments
    auto_class = AutoModelForObjectDetection
    processor_class = partial(DetrImageProcessorPil, do_pad=False)
    fault_names = FAULTS
    most_tokens = 28

    def __init__(self, arguments: DetectionArguments, seed: int) -> None:
        super().__init__(arguments, seed)
        require_pycocotools()
        self.has_labels = False  # whether the model is a detector already
        self.processor: Any = None

    # -- rows --

    def load_splits(self) -> dict[str, Rows]:
        return self.take(read_objects(self.arguments))

    def held_out(self, rows: Dataset, share: float) -> tuple[Dataset, Dataset]:
        counts = categories_of(rows)
        return held_out(rows, [rarest_of(target, counts) for target in rows["target"]], share, self.seed)

    def check_splits(self, splits: dict[str, Rows], tokenizer: Any) -> Report:
        return check_images(splits, self.pictures)

    # -- model --

    def check_saved(self, saved: Saved, is_trained: bool) -> None:
        super().check_saved(saved, is_trained)
        self.has_labels = saved.head == HEAD or saved.task == self.name

    def config_fields(self, splits: dict[str, Rows], saved: dict[str, Any]) -> dict[str, Any]:
        """`id2label` and `label2id`, a detector's own, else the data's; and a stem for a language model of ours.

        Raises:
            ValueError: if there are no objects, or one has an unknown category.
        """
        if self.has_labels:
            self.labels = [saved["id2label"][number] for number in sorted(saved["id2label"], key=int)]
        elif "train" in splits:
            self.labels = sorted(categories_of(splits["train"]), key=sort_key)
        if not self.labels:
            raise ValueError(f"{self.arguments.data_name}: no object to learn.")
        for split, rows in splits.items():
            refuse_unknown(categories_of(rows), self.labels, split)
        if "train" in splits:
            print(class_balance(list(categories_of(splits["train"]).elements()), self.labels))
        ids = {label: number for number, label in enumerate(self.labels)}
        return {"id2label": dict(enumerate(self.labels)), "label2id": ids} | self.stem_fields(saved)

    def tokens_of(self, config: DeepSeekConfig, height: int, width: int) -> int:
        learned = config.num_detection_tokens if config.box_prediction == "set" else 0
        return super().tokens_of(config, height, width) + learned

    def prepare_model(self, model: Any, tokenizer: Any) -> None:
        super().prepare_model(model, tokenizer)
        self.processor = tokenizer

    # -- features --

    def features(self, rows: Rows, tokenizer: Any, is_training: bool) -> Rows:
        """The image's number in `pixels`, `corners` [G, 4] in shares of it, `classes` [G], its `size` before it is
        scaled, `is_annotated`, `length` in tokens, and the row's `number`."""
        split = next(name for name, known in self.splits.items() if known is rows)
        ids = {label: number for number, label in enumerate(self.labels)}
        corners = [[_corners(one["bbox"], row["width"], row["height"]) for one in row["target"]] for row in iter(rows)]
        return Dataset.from_dict(
            {
                "image": self.numbers(split),
                "corners": corners,
                "classes": [[ids[one["category"]] for one in target] for target in rows["target"]],
                "size": [[row["height"], row["width"]] for row in iter(rows)],
                "is_annotated": rows["is_annotated"],
                "length": [self.length] * len(rows),
                "number": list(range(len(rows))),
            }
        )

    def collator(self, tokenizer: Any) -> BoxCollator:
        return BoxCollator(self.pixels, tokenizer, self.arguments.variations, self.fill(), self.seed)

    def loss_function(self, label_smoothing: float) -> None:
        """The model's own.

        Raises:
            ValueError: for label smoothing, which it hasn't.
        """
        if label_smoothing:
            raise ValueError(f"--label_smoothing_factor {label_smoothing:g}: boxes have none; leave it out.")

    # -- scores and reports --

    def predict_batch(self, model: Any, inputs: dict[str, Any]) -> Predicted:
        """The batch's loss, a mean over its objects, for each image by the number of these; and [B, K, 6], corners in
        pixels, score and class, the best first and -1 behind the last."""
        labels = inputs["labels"]
        outputs = model(pixel_values=inputs["pixel_values"], labels=labels)
        counts = torch.tensor([len(one["class_labels"]) for one in labels], device=outputs.loss.device)
        # The loss of a batch without objects counts as that of one, if it is known that there is none.
        counts[0] += (counts.sum() == 0) & inputs["is_annotated"].all().to(counts.device)
        found = self.processor.post_process_object_detection(outputs, 0.0, inputs["size"])
        predicted = torch.full((len(labels), MOST_DETECTIONS, 6), -1.0, device=counts.device)
        for row, one in zip(predicted, found, strict=True):
            scores, order = highest(one["scores"], MOST_DETECTIONS)
            columns = (one["boxes"][order].float(), scores[:, None], one["labels"][order].float()[:, None])
            row[: len(order)] = torch.cat(columns, dim=-1)
        return Predicted(outputs.loss.float() * counts, counts, predicted)

    def decode(self, outputs: np.ndarray, tokenizer: Any) -> list[list[dict[str, Any]]]:
        """A list of {bbox, category, score} for each image."""
        return [[self._prediction(one) for one in row if one[4] >= LEAST_SCORE] for row in outputs.tolist()]

    def _prediction(self, row: list[float]) -> dict[str, Any]:
        x, y, right, bottom, score, number = row
        bbox = [round(side, 2) for side in (x, y, right - x, bottom - y)]
        return {"bbox": bbox, "category": self.labels[int(number)], "score": round(score, 5)}

    def score(self, predictions: list[Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
        return summary(self._measured(predictions, rows))

    def _measured(self, predictions: list[Any], rows: list[dict[str, Any]]) -> Measured:
        return measured(predictions, [row["target"] for row in rows], self.labels, [row["crowds"] for row in rows])

    def baseline(self, train: Rows | None, rows: list[dict[str, Any]]) -> list[Any] | None:
        """The objects of the training image with the smallest squared difference, scaled to the image."""
        nearest = self.nearest(rows) if self.arguments.nearest_baseline else None
        if nearest is None or not isinstance(train, Dataset):
            return None
        return [_scaled(train[number], row) for number, row in zip(nearest, rows, strict=True)]

    def report(self, predictions: list[Any], rows: list[dict[str, Any]], train: Rows | None) -> Scores:
        """Scores by label, predictions in COCO's results format, and some drawn onto their images."""
        targets = [row["target"] for row in rows]
        table = by_label(self._measured(predictions, rows), targets, self.labels)
        pictures = self.pictures["test"]
        numbers = {label: number for number, label in enumerate(self.labels)} | pictures.category_ids
        results = coco_results(predictions, [row["image_id"] for row in rows], numbers)
        images = {number: pictures[rows[number]["image"]] for number in range(min(SHOWN, len(rows)))}
        files: dict[str, str | bytes] = {
            "labels.csv": table.to_csv(lineterminator="\n"),
            "predictions_coco.json": json.dumps(results),
            "predictions.png": drawn(images, predictions, targets, self.labels),
        }
        return Scores({}, files=files)

    def card_data(self) -> dict[str, Any]:
        arguments = self.arguments
        width, height = self.pixels.size
        varied = ", ".join(f"{name} {value:g}" for name, value in arguments.variations.items())
        return {
            "language": None,
            "pipeline_tag": "object-detection",
            "datasets": [arguments.dataset_name] if arguments.dataset_name else [],
            "metrics": CARD_METRICS,
            "dataset_name": arguments.data_name,
            "baseline": "boxes of the nearest training image",
            "title": "object detection",
            "head": HEAD,
            "code": CARD_CODE,
            "prompt": "",
            "prediction": f"up to {MOST_DETECTIONS} boxes of an image, with a label and a score each",
            "data": f"Found: {', '.join(self.labels)}",
            "preprocessing": f"RGB, {height} x {width} pixels, normalised by the training images"
            f"{'; training images varied with their boxes by ' + varied if varied else ''}",
        }


def _corners(bbox: list[float], width: int, height: int) -> list[float]:
    x, y, across, down = bbox
    return [x / width, y / height, (x + across) / width, (y + down) / height]


def _scaled(row: dict[str, Any], other: dict[str, Any]) -> list[dict[str, Any]]:
    """A row's objects as predictions for another image."""
    across, down = other["width"] / row["width"], other["height"] / row["height"]
    scales = (across, down, across, down)
    return [
        {
            "bbox": [side * scale for side, scale in zip(one["bbox"], scales, strict=True)],
            "category": one["category"],
            "score": 0.5,
        }
        for one in row["target"]
    ]
