"""Image generation: a caption in, the tokens of an image out, by a causal language model.

Pixels become tokens by a palette (palette.py) or a codebook (codes.py), made of the training images and saved with the
model (image_tokens.py). Only an image's tokens are learned and scored; held-out images are scored as they are drawn,
with no other token possible.
"""

from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import GenerationConfig, PreTrainedTokenizerBase

from configuration_deepseek import DeepSeekConfig

from ..data.fault_report import Report, finding
from ..data.files import json_text
from ..data.sources import Rows
from ..images.pixels import most_frequent_size
from ..images.reading import Pictures
from ..training.arguments import ModelArguments
from ..training.loading import pretrained_tokenizer
from ..training.optimization import IGNORED_LABEL, target_losses
from ..training.saved import Saved
from ..training.scoring.eval_loss import Predicted
from ..training.task import Scores, Task, lower
from . import image_tokens
from .arguments import ImageGenerationArguments
from .captions import FAULTS, check_captioned, held_out, read_captioned, scaled, tell
from .codes import trained_codes
from .image_tokens import ImageTokens, add_image_tokens, first_id
from .measures import Images, measured, psnr
from .palette import trained_palette
from .prompts import CaptionCollator, drawing_config, encode_captions, prompts_of, training_rows
from .sheet import packed, sheet

LARGEST = {"palette": 16, "codes": 64}  # pixels along a side, where nobody asked for a size
SHOWN = 24  # drawn images on the sheet, each above its nearest training image
SHOWN_PER_ROW = 12
NOT_IN_CODE = str.maketrans(dict.fromkeys('\\"{}'))  # what would break the line of a caption
CARD_CODE = """from finetune_deepseek.drawing import Drawer

drawer = Drawer.open("{name}")
drawer.draw(["{prompt}"]).save("drawn.png")"""


class ImageGeneration(Task):
    """See the module. Rows are those of `read_captioned`."""

    name = "image_generation"
    arguments_class = ImageGenerationArguments
    next_command = 'deepseek-hf draw {folder} "CAPTION" --output drawn.png'
    fault_names = FAULTS
    grows_vocabulary = True

    def __init__(self, arguments: ImageGenerationArguments, seed: int) -> None:
        super().__init__(arguments, seed)
        self.pictures: dict[str, Pictures] = {}
        self.splits: dict[str, Dataset] = {}
        self.tokens: ImageTokens  # known with the tokenizer
        self.first = 0  # the id of the first image token
        self.begun: Saved | None = None

    # -- rows --

    def load_splits(self) -> dict[str, Rows]:
        for split, (rows, pictures) in read_captioned(self.arguments).items():
            tell(split, pictures)
            self.splits[split], self.pictures[split] = rows, pictures
        share = self.arguments.validation_share
        if share is not None:
            if "train" not in self.splits or "validation" in self.splits:
                raise ValueError("--validation_share holds out training images, where there is no validation split.")
            train, validation = held_out(self.splits["train"], share, self.seed)
            self.splits |= {"train": train, "validation": validation}
            self.pictures["validation"] = self.pictures["train"]
        return dict(self.splits)

    def tokenizer_texts(self, splits: dict[str, Rows]) -> Iterator[str]:
        for captions in splits["train"]["captions"]:
            yield from captions

    def check_splits(self, splits: dict[str, Rows], tokenizer: PreTrainedTokenizerBase) -> Report:
        report, most = check_captioned(splits, self.pictures), self.arguments.max_caption_length
        for split, rows in splits.items():
            captions = list(dict.fromkeys(text for own in rows["captions"] for text in own))
            encoded = zip(captions, encode_captions(tokenizer, captions), strict=True)
            report[split]["long_captions"] = finding([text for text, ids in encoded if len(ids) > most])
        return report

    def _images(self, split: str) -> np.ndarray:
        """[N, H, W, 3] bytes of a split's rows, at the tokens' size."""
        return scaled(self.pictures[split], self.splits[split]["image"], self.tokens.size)

    # -- tokens and model --

    def check_saved(self, saved: Saved, is_trained: bool) -> None:
        super().check_saved(saved, is_trained)
        self.begun = saved

    def needs_new_tokenizer(self, saved: Saved) -> bool:
        """Whether it is a language model that has no image tokens yet."""
        return not (saved.with_tokenizer.folder / image_tokens.FOLDER / image_tokens.DESCRIPTION).is_file()

    def new_tokenizer(self, arguments: ModelArguments, splits: dict[str, Rows]) -> PreTrainedTokenizerBase:
        """The tokenizer of the language model, or a new one, with tokens for the training images."""
        is_saved = bool(arguments.model_name_or_path)
        tokenizer = pretrained_tokenizer(arguments) if is_saved else super().new_tokenizer(arguments, splits)
        self.tokens = self._new_tokens()
        add_image_tokens(tokenizer, self.tokens.number)
        height, width = self.tokens.grid
        print(f"image tokens: {self.tokens.kind}, {self.tokens.number:,} kinds, {height} x {width} for an image")
        return tokenizer

    def _new_tokens(self) -> ImageTokens:
        arguments, pictures = self.arguments, self.pictures["train"]
        kind = arguments.image_tokens or "palette"
        size = arguments.size or self._usual_size(pictures, kind)
        images = scaled(pictures, self.splits["train"]["image"], size)
        if kind == "palette":
            return trained_palette(images, arguments.colours, self.seed)
        return trained_codes(images, arguments.patch_pixels, arguments.codes, arguments.codes_steps, self.seed)

    def _usual_size(self, pictures: Pictures, kind: str) -> tuple[int, int]:
        """The most frequent size, at most `LARGEST`; of codes in whole squares."""
        height, width = most_frequent_size(pictures.sizes)
        shrink = min(1.0, LARGEST[kind] / max(height, width))
        unit = self.arguments.patch_pixels if kind == "codes" else 1
        return max(round(height * shrink / unit), 1) * unit, max(round(width * shrink / unit), 1) * unit

    def model_config(self, config: Any) -> Any:
        """The config with positions for a caption and an image."""
        needed = self.arguments.max_caption_length + 1 + prod(self.tokens.grid)
        if isinstance(config, DeepSeekConfig) and config.max_position_embeddings < needed:
            config = DeepSeekConfig.from_dict(config.to_dict() | {"max_position_embeddings": needed})
        return config

    def config_fields(self, splits: dict[str, Rows], saved: dict[str, Any]) -> dict[str, Any]:
        if saved.get("attention_direction") == "bidirectional":
            raise ValueError("attention_direction bidirectional: each token would see the next, which it predicts.")
        return {}

    def prepare_model(self, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        """Find the image tokens in the vocabulary; how images are drawn goes into the model's generation config."""
        if not hasattr(self, "tokens"):
            self.tokens = image_tokens.load(self._folder_of(tokenizer))
        self._check_flags()
        self.first = first_id(tokenizer, self.tokens.number)
        model.generation_config = self.generation_config(tokenizer, 1)

    def _folder_of(self, tokenizer: PreTrainedTokenizerBase) -> Path:
        """Where the image tokens lie: beside the tokenizer."""
        folder = Path(tokenizer.name_or_path)
        if folder.is_dir() or self.begun is None:
            return folder
        return image_tokens.folder_of(self.begun)

    def _check_flags(self) -> None:
        """Refuse flags that ask for other tokens than the model has."""
        kind, size = self.arguments.image_tokens, self.arguments.size
        if kind not in (None, self.tokens.kind):
            raise ValueError(f"--image_tokens {kind}: this model draws by {self.tokens.kind}; leave the flag out.")
        if size not in (None, self.tokens.size):
            height, width = self.tokens.size
            raise ValueError(f"--image_size: this model draws {height} x {width} pixels; leave the flag out.")

    def save_beside(self, folder: Path) -> None:
        image_tokens.save(self.tokens, folder)

    def fit_lengths(self, positions: int, tokenizer: PreTrainedTokenizerBase) -> None:
        """Cut captions where a model has too few positions.

        Raises:
            ValueError: if an image alone has more tokens.
        """
        room = positions - prod(self.tokens.grid) - 1
        if room < 2:
            raise ValueError(
                f"An image is {prod(self.tokens.grid)} tokens, the model has {positions} positions; lower "
                "--image_size, or raise max_position_embeddings by --config_overrides."
            )
        lower(self.arguments, positions, max_caption_length=room)

    # -- features --

    def features(self, rows: Rows, tokenizer: PreTrainedTokenizerBase, is_training: bool) -> Rows:
        """`prompts`, of every caption of a row for training and of its `source` for evaluation, and `image_ids`."""
        split = next(name for name, known in self.splits.items() if known is rows)
        captions = [row["captions"] if is_training else [row["source"]] for row in rows]
        encoded = iter(self._prompts([text for own in captions for text in own], tokenizer))
        prompts = [[next(encoded) for _ in own] for own in captions]
        return training_rows(prompts, self.tokens.encode(self._images(split)) + self.first)

    def _prompts(self, captions: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
        return prompts_of(tokenizer, captions, self.arguments.max_caption_length, self.first - 1)

    def prompts(self, rows: Rows, tokenizer: PreTrainedTokenizerBase) -> Dataset | None:
        """Captions of some test rows, evenly spread, which are drawn."""
        number = self.arguments.num_drawn
        if not number:
            return None
        places = np.linspace(0, len(rows) - 1, min(number, len(rows))).round().astype(int).tolist()
        chosen = [rows[place] for place in places]
        ids = self._prompts([row["source"] for row in chosen], tokenizer)
        texts = {name: [row[name] for row in chosen] for name in ("source", "target")}
        return Dataset.from_dict({"prompt_ids": ids, "length": [*map(len, ids)], **texts})

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> CaptionCollator:
        return CaptionCollator(tokenizer, self.arguments.caption_dropout, self.seed)

    def generation_config(self, tokenizer: PreTrainedTokenizerBase, num_beams: int) -> GenerationConfig:
        ids = range(self.first, self.first + self.tokens.number)
        arguments = self.arguments
        return drawing_config(tokenizer, ids, prod(self.tokens.grid), arguments.temperature, arguments.guidance_scale)

    # -- scores and reports --

    def predict_batch(self, model: Any, inputs: dict[str, Any]) -> Predicted:
        """The losses of images' tokens, among image tokens alone."""
        if "labels" not in inputs:
            return Predicted()
        logits = model(**{name: value for name, value in inputs.items() if name != "labels"})["logits"]
        own = logits[..., self.first : self.first + self.tokens.number]
        labels = inputs["labels"]
        labels = (labels - self.first).masked_fill(labels == IGNORED_LABEL, IGNORED_LABEL)
        return Predicted(*target_losses(own, labels), unit="token")

    def decode(self, outputs: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
        return (outputs - self.first).tolist()

    def score(self, predictions: list[Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Nothing: a caption has many images. What was drawn is measured by `report`."""
        return {}

    def report(self, predictions: list[Any], rows: list[dict[str, Any]], train: Rows | None) -> Scores:
        """The drawn images beside the nearest training images, as numbers and as a sheet."""
        drawn, test = self.tokens.decode(np.array(predictions)), self._images("test")
        real = self.tokens.decode(self.tokens.encode(test))
        lines, numbers = [drawn[:SHOWN]], {"drawn": len(drawn), "psnr": psnr(test, real)}
        if train is not None:
            known = self.tokens.decode(self.tokens.encode(self._images("train")))
            asked = [row["target"] for row in rows]
            found, places = measured(
                Images.of(drawn, asked, self.arguments.pixel_max),
                Images.of(known, list(train["target"]), self.arguments.pixel_max),
                Images.of(real, list(self.splits["test"]["target"]), self.arguments.pixel_max),
            )
            numbers |= found
            lines.append(known[places[:SHOWN]])
        captions = {"captions": [row["source"] for row in rows[:SHOWN]]}
        files: dict[str, str | bytes] = {
            "drawn.png": packed(sheet(_in_rows(lines))),
            "drawn.json": json_text(captions),
        }
        return Scores({f"test_{name}": value for name, value in numbers.items() if value is not None}, files=files)

    def card_data(self) -> dict[str, Any]:
        arguments, (height, width) = self.arguments, self.tokens.size
        caption = next(iter(self.splits.values()))[0]["source"].translate(NOT_IN_CODE)
        drawn = f"drawn at temperature {arguments.temperature:g}, guidance scale {arguments.guidance_scale:g}"
        return {
            "language": None,
            "pipeline_tag": "text-to-image",
            "datasets": [arguments.dataset_name] if arguments.dataset_name else [],
            "metrics": {"bits_per_token": ("bits_per_token", "bits per image token")},
            "dataset_name": arguments.data_name,
            "baseline": "-",
            "title": "image generation",
            "prompt": caption,
            "code": CARD_CODE.replace("{prompt}", caption),
            "data": "",
            "prediction": drawn,
            "preprocessing": f"RGB, {height} x {width} pixels, by {self.tokens.number:,} tokens ({self.tokens.kind}), "
            f"row by row; one of the captions at a time, none at {arguments.caption_dropout:g} of the times; scores: "
            "an image's tokens among image tokens",
        }


def _in_rows(columns: list[np.ndarray]) -> list[list[np.ndarray]]:
    """Images in rows of `SHOWN_PER_ROW`, those of each further list below."""
    starts = range(0, len(columns[0]), SHOWN_PER_ROW)
    return [list(images[start : start + SHOWN_PER_ROW]) for start in starts for images in columns]
