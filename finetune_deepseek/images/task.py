"""Image classification: an image in, one label out, by a stem before the trunk and a head on the mean of its tokens.

Images come from folders, tables or the Hub (reading.py). The labels are those of the training images and stand in the
saved config as `id2label`; a model that has them already keeps them.
"""

from collections.abc import Callable
from typing import Any

import evaluate
import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from scipy.special import softmax
from sklearn.metrics import classification_report
from torch.nn import functional as F
from transformers import AutoModelForImageClassification

from ..data.fault_report import Report
from ..data.sources import Rows
from ..training.scoring.eval_loss import Predicted
from ..training.scoring.labels import CARD_METRICS, Accuracy, MacroF1, balanced_weights, refuse_unknown, sort_key
from ..training.task import Scores
from .arguments import ImageArguments
from .checks import FAULTS, check_images, class_balance
from .figures import confusion_matrix, worst_images
from .image_task import ImageTask
from .pixels import ClassCollator
from .reading import held_out, read_images

# Letters: B images, N labels.
CARD_CODE = """import modeling_deepseek
{imports}
from PIL import Image
from transformers import AutoImageProcessor

processor = AutoImageProcessor.from_pretrained("{name}")
{opening}
logits = model(**processor(Image.open("image.png"), return_tensors="pt")).logits
print(model.config.id2label[logits.argmax().item()])"""


class ImageClassification(ImageTask):
    """See the module. Rows are `source`, the image's name, `target`, its label, `image`, its number among the split's,
    and `pixels`, a hash of them."""

    name = "image_classification"
    next_command = "deepseek-hf predict {task} {folder} --test_file FILE (or --data_dir FOLDER)"
    arguments_class = ImageArguments
    arguments: ImageArguments
    auto_class = AutoModelForImageClassification
    fault_names = FAULTS

    def __init__(self, arguments: ImageArguments, seed: int) -> None:
        super().__init__(arguments, seed)
        self.weights: np.ndarray | None = None
        self.label_smoothing = 0.0
        self.logits = np.empty((0, 0))  # of the split that was scored last, in the order of its rows

    # -- rows --

    def load_splits(self) -> dict[str, Rows]:
        return self.take(read_images(self.arguments))

    def held_out(self, rows: Dataset, share: float) -> tuple[Dataset, Dataset]:
        return held_out(rows, rows["target"], share, self.seed)

    def check_splits(self, splits: dict[str, Rows], tokenizer: Any) -> Report:
        return check_images(splits, self.pictures)

    def config_fields(self, splits: dict[str, Rows], saved: dict[str, Any]) -> dict[str, Any]:
        """`problem_type`, `id2label` and `label2id`, the model's own if it has been a classifier, else the data's; and
        a stem for a language model of ours.

        Raises:
            ValueError: if there are no labels, or an image has an unknown one.
        """
        if saved.get("problem_type"):
            self.labels = [saved["id2label"][number] for number in sorted(saved["id2label"], key=int)]
        elif "train" in splits:
            self.labels = sorted(set(splits["train"]["target"]), key=sort_key)
        if len(self.labels) < 2:
            raise ValueError(f"{self.arguments.data_name}: {len(self.labels)} label(s) to learn; two are the least.")
        for split, rows in splits.items():
            refuse_unknown(rows["target"], self.labels, split)
        ids = {label: number for number, label in enumerate(self.labels)}
        if "train" in splits:
            print(class_balance(splits["train"]["target"], self.labels))
            if self.arguments.balance == "weights":
                self.weights = balanced_weights([ids[label] for label in splits["train"]["target"]], len(ids))
        fields = {
            "problem_type": "single_label_classification",
            "id2label": dict(enumerate(self.labels)),
            "label2id": ids,
        }
        return fields | self.stem_fields(saved)

    # -- features --

    def features(self, rows: Rows, tokenizer: Any, is_training: bool) -> Rows:
        """The image's number in `pixels`, `labels`, `length` in tokens, and the row's `number`."""
        split = next(name for name, known in self.splits.items() if known is rows)
        ids = {label: number for number, label in enumerate(self.labels)}
        return Dataset.from_dict(
            {
                "image": self.numbers(split),
                "labels": [ids[target] for target in rows["target"]],
                "length": [self.length] * len(rows),
                "number": list(range(len(rows))),
            }
        )

    def collator(self, tokenizer: Any) -> ClassCollator:
        variations = self.arguments.variations
        return ClassCollator(self.pixels, tokenizer, variations, self.fill(), self.seed, num_labels=len(self.labels))

    def row_weights(self, features: Dataset) -> torch.Tensor | None:
        """As many rows as there are, so that each class is equally likely, for --balance sampler."""
        if self.arguments.balance != "sampler":
            return None
        labels = np.array(features["labels"])
        return torch.tensor(1 / np.bincount(labels)[labels], dtype=torch.float32)

    def loss_function(self, label_smoothing: float) -> Callable[..., torch.Tensor]:
        """The mean loss of the images; labels are classes [B], or their shares [B, N]."""
        self.label_smoothing = label_smoothing

        def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None) -> Any:
            total = self._losses(outputs["logits"], labels).sum()
            shares = labels.shape[1] if labels.ndim == 2 else 1  # each counts as an item
            return total / (len(labels) if num_items_in_batch is None else num_items_in_batch / shares)

        return loss

    def _losses(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        weights = None if self.weights is None else torch.tensor(self.weights, dtype=torch.float32).to(logits.device)
        return F.cross_entropy(logits.float(), labels, weights, reduction="none", label_smoothing=self.label_smoothing)

    # -- scores and reports --

    def predict_batch(self, model: Any, inputs: dict[str, Any]) -> Predicted:
        """The images' losses as training counts them, and their logits [B, N]."""
        logits = model(pixel_values=inputs["pixel_values"])["logits"].float()
        labels = inputs["labels"]
        return Predicted(self._losses(logits, labels), torch.ones_like(labels), logits)

    def decode(self, outputs: np.ndarray, tokenizer: Any) -> list[str]:
        self.logits = outputs
        return [self.labels[number] for number in outputs.argmax(-1).tolist()]

    def score(self, predictions: list[Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
        ids = {label: number for number, label in enumerate(self.labels)}
        return evaluate.combine([Accuracy(), MacroF1()]).compute(
            predictions=[ids[label] for label in predictions], references=[ids[row["target"]] for row in rows]
        )

    def baseline(self, train: Rows | None, rows: list[dict[str, Any]]) -> list[Any] | None:
        """The label of the training image with the smallest squared difference."""
        nearest = self.nearest(rows) if self.arguments.nearest_baseline else None
        return None if nearest is None or train is None else [train["target"][number] for number in nearest]

    def report(self, predictions: list[Any], rows: list[dict[str, Any]], train: Rows | None) -> Scores:
        """Scores by label, the confusion matrix, and the images whose own label was the least likely."""
        targets = [row["target"] for row in rows]
        scores = classification_report(targets, predictions, labels=self.labels, output_dict=True, zero_division=0)
        table = pd.DataFrame({label: scores[label] for label in self.labels}).T.rename_axis("label")
        ids = {label: number for number, label in enumerate(self.labels)}
        chances = softmax(self.logits, axis=-1)[range(len(rows)), [ids[target] for target in targets]]
        wrong = [
            number for number in np.argsort(chances, kind="stable").tolist() if predictions[number] != targets[number]
        ]
        files: dict[str, str | bytes] = {
            "labels.csv": table.to_csv(lineterminator="\n"),
            "confusion_matrix.png": confusion_matrix(targets, predictions, self.labels),
        }
        if wrong:
            titles = [f"{target}, not {guess}" for target, guess in zip(targets, predictions, strict=True)]
            pictures = self.pictures["test"]
            images = {number: pictures[rows[number]["image"]] for number in wrong[:24]}
            files["worst_images.png"] = worst_images(wrong, images, titles)
        return Scores({}, files=files)

    def card_data(self) -> dict[str, Any]:
        arguments = self.arguments
        balance = {"none": "", "weights": ", loss weighed by class", "sampler": ", classes drawn equally often"}
        width, height = self.pixels.size
        varied = ", ".join(f"{name} {value:g}" for name, value in arguments.variations.items())
        return {
            "language": None,
            "pipeline_tag": "image-classification",
            "datasets": [arguments.dataset_name] if arguments.dataset_name else [],
            "metrics": CARD_METRICS,
            "dataset_name": arguments.data_name,
            "baseline": "nearest training image",
            "title": "image classification",
            "head": "ImageClassification",
            "code": CARD_CODE,
            "prompt": "",
            "prediction": "the label of the highest logit",
            "data": f"Predicted: {', '.join(self.labels)}",
            "preprocessing": f"RGB, {height} x {width} pixels, normalised by the training images"
            f"{'; training images varied by ' + varied if varied else ''}{balance[arguments.balance]}",
        }
