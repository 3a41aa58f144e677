"""What image generation is told: which images and captions, which tokens they become, and how images are drawn."""

from dataclasses import dataclass, field
from typing import Literal

from ..data.arguments import DataArguments
from ..data.ranges import check_ranges
from ..training.arguments import ModelArguments


@dataclass
class ImageGenerationArguments(DataArguments):
    """Which images and captions, what becomes of their pixels, and how many are drawn of the test split."""

    FIRST = (*DataArguments.FIRST, "image_column", "caption_column", "image_tokens")
    SAVED = ("image_column", "caption_column", "pixel_max", "max_caption_length")
    EXAMPLES = """examples:
  deepseek-hf finetune image_generation --preset tiny_v3 --train_file emoji.parquet --image_size 16 \\
      --caption_column caption_en caption_zh --caption_dropout 0.1 --output_dir runs/emoji
      from random weights; an image is seen with one of its captions, and at every tenth time with none
  deepseek-hf finetune image_generation --preset tiny_v3 --train_file emoji.parquet --image_tokens codes \\
      --output_dir runs/emoji
      by a codebook of squares of 4 x 4 pixels, learned first
  deepseek-hf draw runs/emoji "a red heart" --guidance_scale 2 --output heart.png"""

    image_column: str = field(
        default="image",
        metadata={
            "help": "Column of the image: packed (PNG, JPEG, ...), a file's path, or its numbers, rows of them."
        },
    )
    caption_column: list[str] = field(
        default_factory=lambda: ["caption"],
        metadata={
            "help": "Columns of the captions, one of which is drawn each time; of folders the file's .txt, else the "
            "name of its folder.",
            "metavar": "COLUMN",
        },
    )
    captions_file: str | None = field(
        default=None,
        metadata={"help": 'JSON with the captions of each value of the column: {"7": ["a seven", "七"], ...}.'},
    )
    max_caption_length: int = field(default=64, metadata={"help": "Tokens of a caption; what is beyond is cut."})
    pixel_max: float = field(
        default=255, metadata={"help": "White, where images are numbers; 0 is black: 255, 1 or what it may be."}
    )
    image_size: list[int] | None = field(
        default=None,
        metadata={
            "help": "Height and width in pixels that images are scaled to, or one number for squares. Without it the "
            "most frequent size; at most 16 by palette, 64 by codes.",
            "metavar": "PIXELS",
        },
    )
    image_tokens: Literal["palette", "codes"] | None = field(
        default=None,
        metadata={"help": "A token for each pixel's colour (as without it), or for each square of pixels."},
    )
    colours: int = field(
        default=64, metadata={"help": "Colours of a new palette, at most: those that occur, or centres of k-means."}
    )
    codes: int = field(default=256, metadata={"help": "Vectors of a new codebook."})
    patch_pixels: int = field(default=4, metadata={"help": "Side of a square that a code stands for."})
    codes_steps: int = field(default=4000, metadata={"help": "Steps of 32 images that a new codebook is trained for."})
    caption_dropout: float = field(
        default=0.1, metadata={"help": "Share of training rows without their caption, for --guidance_scale."}
    )
    validation_share: float | None = field(
        default=None, metadata={"help": "Hold out this share of the training images for validation."}
    )
    num_drawn: int = field(default=100, metadata={"help": "Images drawn for captions of the test split; 0 for none."})
    temperature: float = field(default=1.0, metadata={"help": "Below 1 draws likely tokens more often."})
    guidance_scale: float = field(
        default=1.0, metadata={"help": "Above 1 follows the caption more closely (classifier-free guidance)."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.names_data:
            raise ValueError("Name data by --dataset_name, --data_dir, or --train_file and the like.")
        if self.image_size is not None and len(self.image_size) > 2:
            raise ValueError(
                f"--image_size {' '.join(map(str, self.image_size))}: give height and width, or one number."
            )
        self.caption_column = [name for names in self.caption_column for name in names.split(",") if name]
        if self.guidance_scale != 1 and self.caption_dropout == 0:
            raise ValueError(
                "--guidance_scale needs a model that has seen images without captions: --caption_dropout."
            )

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width, if they are given."""
        return None if self.image_size is None else (self.image_size[0], self.image_size[-1])


@dataclass
class DrawArguments:
    """What `deepseek-hf draw` takes."""

    captions: list[str] = field(default_factory=list, metadata={"help": "What is to be drawn; also given as words."})
    output: str | None = field(
        default=None,
        metadata={"help": "Image file (.png, .gif, ...); several images are a sheet, a row per caption."},
    )
    number: int = field(default=1, metadata={"help": "Images of each caption."})
    temperature: float = field(
        default=1.0, metadata={"help": "Below 1 draws likely tokens more often; 0 takes the likeliest."}
    )
    top_p: float | None = field(
        default=None, metadata={"help": "Draw from the likeliest tokens that together have this probability."}
    )
    top_k: int | None = field(default=None, metadata={"help": "Draw from the so many likeliest tokens; 0 from all."})
    guidance_scale: float = field(
        default=1.0,
        metadata={"help": "Above 1 follows the caption more closely, if it was trained with --caption_dropout."},
    )
    enlarge: int = field(default=8, metadata={"help": "Pixels of the file along a side of one drawn pixel."})
    seed: int = field(default=0, metadata={"help": "Of what is drawn."})
    batch_size: int = field(default=64, metadata={"help": "Images that are drawn at once."})
    dtype: Literal["float32", "bfloat16", "float16", "auto"] | None = field(
        default=None,
        metadata={"help": "Type of the weights; without it the checkpoint's on an accelerator, float32 on a CPU."},
    )
    device: str | None = field(
        default=None, metadata={"help": "cpu, cuda, cuda:1, mps, ...; without it the accelerator, if there is one."}
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of a model on the Hub."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run the code that comes with a Hub model."})

    def __post_init__(self) -> None:
        check_ranges(self)

    def model(self, name: str, dtype: str) -> ModelArguments:
        """How to open the model."""
        return ModelArguments(
            model_name_or_path=name,
            model_revision=self.model_revision,
            dtype=self.dtype or dtype,  # type: ignore[arg-type]
            trust_remote_code=self.trust_remote_code,
        )
