"""Sheets: images in rows and columns, each pixel enlarged to a square."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

GAP, GROUND = 2, 255  # pixels between images, and their grey
SMALLEST = 128  # pixels along a side of an image on a sheet


def sheet(rows: list[list[np.ndarray]], enlarge: int | None = None) -> Image.Image:
    """One picture of images [H, W, 3] of bytes, all of one size."""
    height, width = rows[0][0].shape[:2]
    enlarge = enlarge or max(1, SMALLEST // max(height, width))
    gap = GAP * (len(rows) * len(rows[0]) > 1)
    columns = max(map(len, rows))
    tall, wide = height * enlarge + gap, width * enlarge + gap
    canvas = np.full((len(rows) * tall + gap, columns * wide + gap, 3), GROUND, dtype=np.uint8)
    for line, images in enumerate(rows):
        for column, image in enumerate(images):
            top, left = line * tall + gap, column * wide + gap
            large = image.repeat(enlarge, 0).repeat(enlarge, 1)
            canvas[top : top + large.shape[0], left : left + large.shape[1]] = large
    return Image.fromarray(canvas)


def packed(picture: Image.Image, form: str = "PNG") -> bytes:
    file = io.BytesIO()
    picture.save(file, form)
    return file.getvalue()


def form_of(path: Path) -> str:
    """Pillow's name of the form that a file's ending asks for.

    Raises:
        ValueError: for an ending of no image that can be written.
    """
    form = Image.registered_extensions().get(path.suffix.lower())
    if form not in Image.SAVE:
        raise ValueError(f"--output {path}: {path.suffix or 'no ending'} is no image that can be written; try .png.")
    return form
