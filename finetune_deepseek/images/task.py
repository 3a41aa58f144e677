"""Image classification: an image in, one label out, by a stem before the trunk and a head on the mean of its tokens.

Images come from folders, tables or the Hub (reading.py), are scaled to one size and normalised by the training split's
mean and deviation, which the saved image processor has (pixels.py). The labels are those of the training images and
stand in the saved config as `id2label`; a model that has them already keeps them.
"""

from collections.abc import Callable, Iterator
from typing import Any

import evaluate
import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from scipy.special import softmax
from sklearn.metrics import classification_report
from sklearn.neighbors import KNeighborsClassifier
from torch.nn import functional as F
from transformers import AutoModelForImageClassification

from configuration_deepseek import DeepSeekConfig
from configuration_deepseek.fields import DeepSeekFields
from configuration_deepseek.official import SOURCES
from modeling_deepseek.image_stem import STEMS

from ..data.fault_report import Report
from ..data.sources import Rows
from ..training.arguments import ModelArguments
from ..training.saved import Saved
from ..training.scoring.eval_loss import Predicted
from ..training.scoring.labels import CARD_METRICS, Accuracy, MacroF1, balanced_weights, refuse_unknown, sort_key
from ..training.task import Scores, Task
from .arguments import ImageArguments
from .checks import FAULTS, check_images, class_balance
from .figures import confusion_matrix, worst_images
from .pixels import ImageCollator, ImageProcessor, Pixels, border_colour, most_frequent_size, new_processor
from .reading import Pictures, held_out, read_images, tell

# Letters: B images, N labels.
MOST_TOKENS = 16  # along a side, of a new model whose config doesn't say how far its stem reduces images
NEIGHBOURS_AMONG = 50_000  # training images, at most, that the nearest is looked for among
CARD_CODE = """import modeling_deepseek
{imports}
from PIL import Image
from transformers import AutoImageProcessor

processor = AutoImageProcessor.from_pretrained("{name}")
{opening}
logits = model(**processor(Image.open("image.png"), return_tensors="pt")).logits
print(model.config.id2label[logits.argmax().item()])"""


def tokens_of(config: DeepSeekConfig, height: int, width: int) -> int:
    """How many tokens the stem makes of an image of that size."""
    with torch.device("meta"):
        stem = STEMS[str(config.image_stem)](config)
        return stem(torch.empty(1, config.num_channels, height, width)).states.shape[1]


class ImageClassification(Task):
    """See the module. Rows are `source`, the image's name, `target`, its label, `image`, its number among the split's,
    and `pixels`, a hash of them."""

    name = "image_classification"
    next_command = "deepseek-hf predict {task} {folder} --test_file FILE (or --data_dir FOLDER)"
    arguments_class = ImageArguments
    auto_class = AutoModelForImageClassification
    tokenizer_class = ImageProcessor
    peft_task_type = None
    fault_names = FAULTS

    def __init__(self, arguments: ImageArguments, seed: int) -> None:
        super().__init__(arguments, seed)
        self.pictures: dict[str, Pictures] = {}
        self.splits: dict[str, Dataset] = {}
        self.pixels: Pixels  # known with the image processor
        self.labels: list[str] = []  # known with the model
        self.length = 1  # tokens of an image
        self.weights: np.ndarray | None = None
        self.label_smoothing = 0.0
        self.logits = np.empty((0, 0))  # of the split that was scored last, in the order of its rows

    # -- rows --

    def load_splits(self) -> dict[str, Rows]:
        found = read_images(self.arguments)
        for split, (rows, pictures) in found.items():
            tell(split, pictures)
            self.splits[split], self.pictures[split] = rows, pictures
        share = self.arguments.validation_share
        if share is not None:
            if "train" not in found or "validation" in found:
                raise ValueError("--validation_share holds out training images, where there is no validation split.")
            train, validation = held_out(self.splits["train"], share, self.seed)
            self.splits |= {"train": train, "validation": validation}
            self.pictures["validation"] = self.pictures["train"]
        return dict(self.splits)

    def tokenizer_texts(self, splits: dict[str, Rows]) -> Iterator[str]:
        yield from ()

    def check_splits(self, splits: dict[str, Rows], tokenizer: Any) -> Report:
        return check_images(splits, self.pictures)

    # -- image processor and model --

    def needs_new_tokenizer(self, saved: Saved) -> bool:
        """Whether it has read no images yet: a language model, whose trunk is to learn it."""
        return not (saved.with_tokenizer.folder / "preprocessor_config.json").is_file()

    def new_tokenizer(self, arguments: ModelArguments, splits: dict[str, Rows]) -> Any:
        """The image processor of a new model: the size, and mean and deviation of the training images."""
        pixels = self._scaled(*self._size())
        return new_processor(pixels, self._numbers("train"))

    def _scaled(self, height: int, width: int) -> Pixels:
        own = {split: one for split, one in self.pictures.items() if one is not self.pictures.get("train")}
        train = {"train": self.pictures["train"]} if "train" in self.pictures else {}
        self.pixels = Pixels(train | own, height, width)
        return self.pixels

    def _numbers(self, split: str) -> list[int]:
        """The numbers of a split's rows in `pixels`."""
        home = "train" if self.pictures[split] is self.pictures.get("train") else split
        return [self.pixels.begins[home] + number for number in self.splits[split]["image"]]

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
        is_language = saved.get("model_type") in SOURCES and not saved.get("image_stem")
        return fields | (self._stem_fields(DeepSeekConfig.from_dict(dict(saved))) if is_language else {})

    def model_config(self, config: Any) -> Any:
        """The config of a new model with a stem; of one of transformers' own classes as it is."""
        if not isinstance(config, DeepSeekConfig):
            return config
        asked = self.arguments.stem
        if asked and config.image_stem not in (None, asked):
            raise ValueError(f"--stem {asked} clashes with image_stem {config.image_stem} of the config; drop one.")
        fields = self._stem_fields(config) | {"vocab_size": 1, "pad_token_id": None}
        fields |= {"bos_token_id": None, "eos_token_id": None}  # no tokens of text are read
        made = DeepSeekConfig.from_dict(config.to_dict() | fields)
        made.max_position_embeddings = max(made.max_position_embeddings, tokens_of(made, *self._size()))
        return made

    def _size(self) -> tuple[int, int]:
        """Height and width of the images of a new model."""
        return self.arguments.size or most_frequent_size(next(iter(self.pictures.values())).sizes)

    def _stem_fields(self, config: DeepSeekConfig) -> dict[str, Any]:
        """The stem that was asked for, and attention in both directions; where the config has its defaults, the stem
        reduces images to a grid of at most `MOST_TOKENS` a side."""
        size = self._size()
        fields = {"image_stem": self.arguments.stem or config.image_stem or "conv"}
        fields |= {"attention_direction": "bidirectional"}
        plain = DeepSeekFields()
        if config.patch_size == plain.patch_size:
            fields["patch_size"] = max(config.patch_size, -(-max(size) // MOST_TOKENS))
        channels, pooling = list(config.conv_channels), list(config.conv_pooling)
        if (channels, pooling) == (plain.conv_channels, plain.conv_pooling):
            while max(size) > MOST_TOKENS * 2 ** sum(step > 1 for step in pooling):
                channels.append(2 * channels[-1])
                pooling.append(2)
            fields |= {"conv_channels": channels, "conv_pooling": pooling}
        return fields

    def prepare_model(self, model: Any, tokenizer: Any) -> None:
        """Measure how many tokens an image makes."""
        size = tokenizer.size
        if not hasattr(self, "pixels"):
            self._scaled(size["height"], size["width"])
        if isinstance(model.config, DeepSeekConfig):
            self.length = tokens_of(model.config, size["height"], size["width"])

    # -- features --

    def features(self, rows: Rows, tokenizer: Any, is_training: bool) -> Rows:
        """The image's number in `pixels`, `labels`, `length` in tokens, and the row's `number`."""
        split = next(name for name, known in self.splits.items() if known is rows)
        ids = {label: number for number, label in enumerate(self.labels)}
        return Dataset.from_dict(
            {
                "image": self._numbers(split),
                "labels": [ids[target] for target in rows["target"]],
                "length": [self.length] * len(rows),
                "number": list(range(len(rows))),
            }
        )

    def collator(self, tokenizer: Any) -> ImageCollator:
        amounts = self.arguments.variations
        fill = (
            border_colour(self.pixels, self._numbers("train"))
            if amounts and "train" in self.splits
            else torch.zeros(3)
        )
        return ImageCollator(self.pixels, tokenizer, amounts, fill, len(self.labels), self.seed)

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
        if not self.arguments.nearest_baseline or not isinstance(train, Dataset) or len(train) > NEIGHBOURS_AMONG:
            return None
        known = self._flat(self._numbers("train"))
        nearest = KNeighborsClassifier(1).fit(known, train["target"])
        return nearest.predict(self._flat([self.pixels.begins["test"] + row["image"] for row in rows])).tolist()

    def _flat(self, numbers: list[int]) -> np.ndarray:
        return np.stack([self.pixels[number].numpy().reshape(-1) for number in numbers]).astype(np.float32)

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
