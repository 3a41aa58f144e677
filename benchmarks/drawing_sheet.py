"""A sheet of drawings by captions in several languages, the nearest training image below each.

    python benchmarks/drawing_sheet.py MODEL --data ../shared/data/twemoji32 --output docs/pictures/drawn_emoji.png

Captions are those of some training images and, below them, of test images, evenly spread and not chosen: a row of
drawings for each column of captions, and a row of training images under it, as the model's tokens have them. The
captions are printed, and how many drawings are a training image, pixel by pixel.
"""

import argparse
from pathlib import Path

import numpy as np

from finetune_deepseek.drawing.arguments import ImageGenerationArguments
from finetune_deepseek.drawing.captions import read_captioned, scaled
from finetune_deepseek.drawing.drawer import Drawer
from finetune_deepseek.drawing.measures import nearest
from finetune_deepseek.drawing.sheet import sheet


def flat(images: np.ndarray) -> np.ndarray:
    """[N, H, W, 3] -> [N, P]"""
    return images.reshape(len(images), -1).astype(np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", required=True, help="folder with train and test files")
    parser.add_argument("--caption_column", nargs="+", default=["caption_en", "caption_zh"])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--number", type=int, default=12, help="captions of each split")
    parser.add_argument("--guidance_scale", type=float, default=1.0)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--enlarge", type=int, default=4)
    arguments = parser.parse_args()
    given = ImageGenerationArguments(data_dir=[arguments.data], caption_column=arguments.caption_column)
    splits, drawer = read_captioned(given), Drawer.open(arguments.model)
    images = scaled(splits["train"][1], splits["train"][0]["image"], drawer.tokens.size)
    known = drawer.tokens.decode(drawer.tokens.encode(images))
    rows: list[list[np.ndarray]] = []
    for split in ("train", "test"):
        found = splits[split][0]
        places = np.linspace(0, len(found) - 1, arguments.number).round().astype(int).tolist()
        for language, column in enumerate(arguments.caption_column):
            captions = [found[place]["captions"][language] for place in places]
            drawn = drawer.images(
                captions, temperature=arguments.temperature, guidance_scale=arguments.guidance_scale, seed=language
            )
            apart, beside = nearest(flat(drawn), flat(known))
            rows += [list(drawn), list(known[beside])]
            print(f"{split}, {column}, {int((apart == 0).sum())} copies: {', '.join(captions)}")
    sheet(rows, arguments.enlarge).save(arguments.output, optimize=True)


if __name__ == "__main__":
    main()
