"""What tasks on images are told: which images, how they are made ready, and how they are varied."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from ..data.arguments import DataArguments

VARIATIONS = ("shift", "rotation", "zoom", "flip", "flip_vertical", "colour", "noise", "mixup")


@dataclass
class PictureArguments(DataArguments):
    """Which images, how they are made ready, and how those of training are varied: of every task on images."""

    FIRST = (*DataArguments.FIRST, "image_column", "stem")
    SAVED: ClassVar[tuple[str, ...]] = ("image_column", "pixel_max")

    image_column: str = field(
        default="image",
        metadata={
            "help": "Column of the image: packed (PNG, JPEG, ...), a file's path, or its numbers, rows of them."
        },
    )
    pixel_max: float = field(
        default=255, metadata={"help": "White, where images are numbers; 0 is black: 255, 1 or what it may be."}
    )
    image_size: list[int] | None = field(
        default=None,
        metadata={
            "help": "Height and width in pixels that images are scaled to, or one number for squares. Without it the "
            "most frequent size, at most 224.",
            "metavar": "PIXELS",
        },
    )
    stem: Literal["patch", "conv", "conv_lstm"] | None = field(
        default=None,
        metadata={"help": "How a new model makes tokens of pixels: conv if neither this nor its config says it."},
    )
    validation_share: float | None = field(
        default=None, metadata={"help": "Hold out this share of the training images, of each class, for validation."}
    )
    shift: float = field(
        default=0, metadata={"help": "Move training images by up to so many pixels, parts of one too."}
    )
    rotation: float = field(default=0, metadata={"help": "Turn them by up to so many degrees."})
    zoom: float = field(default=0, metadata={"help": "Enlarge or reduce them by up to this share; 0.1: by a tenth."})
    flip: bool = field(default=False, metadata={"help": "Mirror every second one, left to right."})
    flip_vertical: bool = field(default=False, metadata={"help": "Mirror every second one, top to bottom."})
    colour: float = field(
        default=0,
        metadata={"help": "Multiply each channel, and brighten or darken, by normal noise of this deviation."},
    )
    noise: float = field(default=0, metadata={"help": "Add normal noise of this deviation; 1 is white."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.names_data:
            raise ValueError("Name data by --dataset_name, --data_dir, or --train_file and the like.")
        if self.image_size is not None and len(self.image_size) > 2:
            raise ValueError(
                f"--image_size {' '.join(map(str, self.image_size))}: give height and width, or one number."
            )

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width, if they are given."""
        return None if self.image_size is None else (self.image_size[0], self.image_size[-1])

    @property
    def config_defaults(self) -> dict[str, Any]:
        """The stem: a config without layers is one of images only."""
        return {"image_stem": self.stem or "conv"}

    @property
    def variations(self) -> dict[str, float]:
        """What training images are varied by, without what is off."""
        return {name: value for name in VARIATIONS if (value := float(getattr(self, name, 0)))}


@dataclass
class ImageArguments(PictureArguments):
    """Which images, and what to predict for them."""

    FIRST = (*DataArguments.FIRST, "image_column", "label_column", "stem")
    SAVED = ("image_column", "label_column", "pixel_max")
    EXAMPLES = """examples:
  deepseek-hf finetune image_classification --preset tiny_llm --data_dir pets --output_dir runs/pets
      from random weights on a folder pets/train/cat/1.jpg, pets/test/dog/7.png, ...
  deepseek-hf finetune image_classification --preset tiny_llm --stem conv_lstm --dataset_name ylecun/mnist \\
      --shift 1 --rotation 10 --output_dir runs/digits
      convolutions, LSTM, attention on a data set of the Hub, with varied images"""

    label_column: str = field(default="label", metadata={"help": "Column of the label; of folders it is their name."})
    balance: Literal["none", "weights", "sampler"] = field(
        default="none",
        metadata={"help": "Against unequal classes: weigh the loss by them, or draw images of each equally often."},
    )
    mixup: float = field(
        default=0, metadata={"help": "Blend pairs of images and labels (mixup) by Beta(A, A); 0.2 is usual, 0 is off."}
    )
    nearest_baseline: bool = field(
        default=True,
        metadata={"help": "Score the label of the nearest training image beside the model (--do_predict)."},
    )
