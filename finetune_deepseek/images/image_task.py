"""What tasks on images share: reading and scaling, the image processor, and the stem of a new model.

Images are scaled to one size and normalised by the mean and the deviation of the training split, which the saved image
processor has (pixels.py).
"""

from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import torch
from datasets import Dataset
from sklearn.neighbors import NearestNeighbors
from transformers import ViTImageProcessorPil

from configuration_deepseek import DeepSeekConfig
from configuration_deepseek.fields import DeepSeekFields
from configuration_deepseek.official import SOURCES
from modeling_deepseek.image_stem import STEMS

from ..data.sources import Rows
from ..training.arguments import ModelArguments
from ..training.saved import Saved
from ..training.task import Task
from .arguments import PictureArguments
from .pixels import ImageProcessor, Pixels, border_colour, most_frequent_size, new_processor
from .reading import Pictures, tell

NEIGHBOURS_AMONG = 50_000  # training images, at most, that the nearest is looked for among


class ImageTask(Task):
    """See the module. Rows have `image`, their image's number among the split's, beside `source` and `target`."""

    arguments: PictureArguments
    tokenizer_class = ImageProcessor
    processor_class: Any = ViTImageProcessorPil  # of new models
    peft_task_type = None
    most_tokens: ClassVar[int] = 16  # along a side, of a new model whose config leaves open how far images are reduced

    def __init__(self, arguments: Any, seed: int) -> None:
        super().__init__(arguments, seed)
        self.pictures: dict[str, Pictures] = {}
        self.splits: dict[str, Dataset] = {}
        self.pixels: Pixels  # known with the image processor
        self.labels: list[str] = []  # known with the model
        self.length = 1  # tokens of an image

    # -- rows --

    def held_out(self, rows: Dataset, share: float) -> tuple[Dataset, Dataset]:
        """Training and validation rows."""
        raise NotImplementedError

    def take(self, found: dict[str, tuple[Dataset, Pictures]]) -> dict[str, Rows]:
        """The rows that were read, some of those of training held out if asked."""
        for split, (rows, pictures) in found.items():
            tell(split, pictures)
            self.splits[split], self.pictures[split] = rows, pictures
        share = self.arguments.validation_share
        if share is not None:
            if "train" not in found or "validation" in found:
                raise ValueError("--validation_share holds out training images, where there is no validation split.")
            train, validation = self.held_out(self.splits["train"], share)
            self.splits |= {"train": train, "validation": validation}
            self.pictures["validation"] = self.pictures["train"]
        return dict(self.splits)

    def tokenizer_texts(self, splits: dict[str, Rows]) -> Iterator[str]:
        yield from ()

    # -- image processor and model --

    def needs_new_tokenizer(self, saved: Saved) -> bool:
        """Whether it has read no images yet: a language model, whose trunk is to learn it."""
        return not (saved.with_tokenizer.folder / "preprocessor_config.json").is_file()

    def new_tokenizer(self, arguments: ModelArguments, splits: dict[str, Rows]) -> Any:
        """The image processor of a new model: the size, and mean and deviation of the training images."""
        pixels = self._scaled(*self._size())
        return new_processor(pixels, self.numbers("train"), self.processor_class)

    def _scaled(self, height: int, width: int) -> Pixels:
        own = {split: one for split, one in self.pictures.items() if one is not self.pictures.get("train")}
        train = {"train": self.pictures["train"]} if "train" in self.pictures else {}
        self.pixels = Pixels(train | own, height, width)
        return self.pixels

    def numbers(self, split: str) -> list[int]:
        """The numbers of a split's rows in `pixels`."""
        home = "train" if self.pictures[split] is self.pictures.get("train") else split
        return [self.pixels.begins[home] + number for number in self.splits[split]["image"]]

    def stem_fields(self, saved: dict[str, Any]) -> dict[str, Any]:
        """The stem that a language model of ours gets; nothing for other saved models."""
        is_language = saved.get("model_type") in SOURCES and not saved.get("image_stem")
        return self._stem_fields(DeepSeekConfig.from_dict(dict(saved))) if is_language else {}

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
        made.max_position_embeddings = max(made.max_position_embeddings, self.tokens_of(made, *self._size()))
        return made

    def tokens_of(self, config: DeepSeekConfig, height: int, width: int) -> int:
        """How many tokens the trunk reads of an image of that size."""
        with torch.device("meta"):
            stem = STEMS[str(config.image_stem)](config)
            return stem(torch.empty(1, config.num_channels, height, width)).states.shape[1]

    def _size(self) -> tuple[int, int]:
        """Height and width of the images of a new model."""
        return self.arguments.size or most_frequent_size(next(iter(self.pictures.values())).sizes)

    def _stem_fields(self, config: DeepSeekConfig) -> dict[str, Any]:
        """The stem that was asked for, and attention in both directions; where the config has its defaults, the stem
        reduces images to a grid of at most `most_tokens` a side."""
        size = self._size()
        fields: dict[str, Any] = {"image_stem": config.image_stem or self.arguments.config_defaults["image_stem"]}
        fields |= {"attention_direction": "bidirectional"}
        plain = DeepSeekFields()
        if config.patch_size == plain.patch_size:
            fields["patch_size"] = max(config.patch_size, -(-max(size) // self.most_tokens))
        channels, pooling = list(config.conv_channels), list(config.conv_pooling)
        if (channels, pooling) == (plain.conv_channels, plain.conv_pooling):
            while max(size) > self.most_tokens * 2 ** sum(step > 1 for step in pooling):
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
            self.length = self.tokens_of(model.config, size["height"], size["width"])

    def fill(self) -> torch.Tensor:
        """[3], what lies beyond the edges of training images."""
        is_moved = self.arguments.variations and "train" in self.splits
        return border_colour(self.pixels, self.numbers("train")) if is_moved else torch.zeros(3)

    def nearest(self, rows: list[dict[str, Any]]) -> list[int] | None:
        """For test rows, the training row whose image has the smallest squared difference; None without any."""
        train = self.splits.get("train")
        if train is None or len(train) > NEIGHBOURS_AMONG:
            return None
        known = NearestNeighbors(n_neighbors=1).fit(self._flat(self.numbers("train")))
        asked = self._flat([self.pixels.begins["test"] + row["image"] for row in rows])
        return known.kneighbors(asked, return_distance=False)[:, 0].tolist()

    def _flat(self, numbers: list[int]) -> np.ndarray:
        return np.stack([self.pixels[number].numpy().reshape(-1) for number in numbers]).astype(np.float32)
