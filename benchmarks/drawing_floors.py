"""What counting reaches on images as tokens: bits per pixel of test images by their neighbours, place and class.

python benchmarks/drawing_floors.py ../shared/data

Each table of counts is smoothed by the one with a context less (Witten and Bell 1991, with the number of different
tokens multiplied by a factor); contexts and factor are the best on a tenth of the training images. Palettes and pixels
are made as `deepseek-hf finetune image_generation` makes them.
"""

import itertools
import sys
from pathlib import Path

import numpy as np

from finetune_deepseek.drawing.arguments import ImageGenerationArguments
from finetune_deepseek.drawing.captions import read_captioned, scaled
from finetune_deepseek.drawing.palette import trained_palette

EDGE = 3  # pixels around an image
# Places of earlier pixels (rows up, columns to the right) with what their numbers are divided by, or what is known.
CONTEXTS = {
    "digits": [
        ["column", "row", "class", (0, -1, coarse), (1, 0, coarse), *more]
        for coarse in (4, 6)
        for more in ([], [(1, 1, coarse)])
    ],
    "emoji": [
        [(0, -1, 1), (1, 0, 1), (1, 1, 1), (1, -1, 1)],
        [(0, -1, 1), (1, 0, 1), (1, 1, 1), (1, -1, 1), (0, -2, 1)],
        [(1, 0, 1), (0, -1, 1), (1, 1, 1), (1, -1, 1), (0, -2, 1)],
    ],
}
FACTORS = (1, 2, 3, 4, 6)


def seen(grids: np.ndarray, classes: np.ndarray, context: list, outside: int) -> list[np.ndarray]:
    """What each part of a context is at each pixel of [N, H, W], [N * H * W] each."""
    count, height, width = grids.shape
    padded = np.full((count, height + EDGE, width + 2 * EDGE), outside)
    padded[:, EDGE:, EDGE:-EDGE] = grids
    known = {
        "column": np.arange(width)[None, None],
        "row": np.arange(height)[None, :, None],
        "class": classes[:, None, None],
    }
    found = []
    for part in context:
        if isinstance(part, str):
            values = np.broadcast_to(known[part], grids.shape)
        else:
            up, right, coarse = part
            top, left = EDGE - up, EDGE + right
            values = padded[:, top : top + height, left : left + width] // coarse
        found.append(values.reshape(-1))
    return found


def bits(train: tuple, test: tuple, context: list, factor: float) -> float:
    """Mean bits of the tokens of `test` by counts of `train`; both are tokens [N, H, W] and classes [N]."""
    kinds = int(train[0].max()) + 1
    own, other = train[0].reshape(-1), test[0].reshape(-1)
    parts, test_parts = (seen(*images, context, kinds) for images in (train, test))
    key, test_key = np.zeros(len(own), np.int64), np.zeros(len(other), np.int64)
    chance = np.full(len(other), 1 / kinds)
    for depth in range(len(context) + 1):
        if depth:
            size = max(kinds, int(parts[depth - 1].max())) + 1
            key, test_key = key * size + parts[depth - 1], test_key * size + test_parts[depth - 1]
        contexts, places = np.unique(key, return_inverse=True)
        pairs, counts = np.unique(places * kinds + own, return_counts=True)
        total, different = np.bincount(places), np.bincount(pairs // kinds)
        where = np.searchsorted(contexts, test_key).clip(max=len(contexts) - 1)
        is_known = contexts[where] == test_key
        wanted = where * kinds + other
        found = np.searchsorted(pairs, wanted).clip(max=len(pairs) - 1)
        count = np.where((pairs[found] == wanted) & is_known, counts[found], 0)
        weight = factor * np.where(is_known, different[where], 1)
        chance = (count + weight * chance) / (np.where(is_known, total[where], 0) + weight)
    return float(-np.log2(chance).mean())


def tokens_of(arguments: ImageGenerationArguments, size: tuple[int, int]) -> dict[str, tuple]:
    """Tokens [N, H, W] and classes [N] by split."""
    splits = read_captioned(arguments)
    images = {split: scaled(pictures, rows["image"], size) for split, (rows, pictures) in splits.items()}
    palette = trained_palette(images["train"], arguments.colours, 0)
    names = sorted({row for rows, _ in splits.values() for row in rows["target"]})
    return {
        split: (
            palette.encode(images[split]).reshape(-1, *size),
            np.array([names.index(one) for one in rows["target"]]),
        )
        for split, (rows, _) in splits.items()
    }


def main(folder: Path) -> None:
    digits = ImageGenerationArguments(
        data_dir=[str(folder / "optdigits")], image_column="pixels", pixel_max=16, caption_column=["label"]
    )
    emoji = ImageGenerationArguments(data_dir=[str(folder / "twemoji32")], caption_column=["caption_en"])
    for name, arguments, side in (("digits", digits, 8), ("emoji", emoji, 16)):
        tokens = tokens_of(arguments, (side, side))
        order = np.random.default_rng(0).permutation(len(tokens["train"][0]))
        tenth = len(order) // 10
        kept, held = (tuple(part[chosen] for part in tokens["train"]) for chosen in (order[tenth:], order[:tenth]))
        tried = list(itertools.product(CONTEXTS[name], FACTORS))
        context, factor = min(tried, key=lambda choice: bits(kept, held, *choice))
        score = bits(tokens["train"], tokens["test"], context, factor)
        print(f"{name}: {score:.3f} bits per pixel, by {context}, factor {factor}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
