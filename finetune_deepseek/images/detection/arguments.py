"""What object detection is told: which images and boxes, beside what every task on images is told."""

from dataclasses import dataclass, field

from ...data.arguments import DataArguments
from ..arguments import PictureArguments


@dataclass
class DetectionArguments(PictureArguments):
    """Which images, and what is to be found in them."""

    FIRST = (*DataArguments.FIRST, "image_dir", "objects_column", "stem")
    SAVED = ("image_column", "objects_column", "pixel_max")
    EXAMPLES = """examples:
  deepseek-hf finetune object_detection --preset tiny_llm --train_file annotations/train.json \\
      --test_file annotations/test.json --image_dir images --output_dir runs/cells
      from random weights on annotations in COCO's format, with the images in a folder
  deepseek-hf finetune object_detection --preset tiny_llm --dataset_name cppe-5 --flip true --zoom 0.3 \\
      --output_dir runs/cppe
      a data set of the Hub with the columns image and objects, images varied with their boxes"""

    image_dir: list[str] | None = field(
        default=None,
        metadata={"help": "Folders of the images that annotations name; without it theirs.", "metavar": "DIR"},
    )
    objects_column: str = field(
        default="objects",
        metadata={"help": "Column of the objects: `bbox`, x, y, width and height in pixels, and `category` of each."},
    )
    category_names: list[str] | None = field(
        default=None, metadata={"help": "Names of categories that are numbers from 0 on.", "metavar": "NAME"}
    )
    nearest_baseline: bool = field(
        default=True,
        metadata={"help": "Score the boxes of the nearest training image beside the model (--do_predict)."},
    )
