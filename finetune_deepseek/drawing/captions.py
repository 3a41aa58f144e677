"""Images with captions out of folders, tables and data sets of the Hub.

In a folder train/ and the like, the caption of 1.png is the text of 1.txt beside it, else the name of its folder. In a
table each image has one or several columns of captions; a file may give several captions for each value of a column.
"""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from PIL import Image

from ..data.arguments import SPLITS
from ..data.cells import Column, absent, one
from ..data.fault_report import Report, finding
from ..data.files import json_of, read_text
from ..data.sources import Rows, read_splits
from ..images.reading import LOSSLESS, NoImage, Pictures, opened, packed, split_folders
from .arguments import ImageGenerationArguments

FAULTS = {
    "broken_images": "no image, or one that can't be opened (left out)",
    "one_pixel_images": "of one pixel (left out)",
    "without_caption": "no caption (left out)",
    "long_captions": "more tokens than --max_caption_length (cut)",
    "converted_images": "channels that RGB doesn't hold",
    "duplicate_images": "same pixels as an earlier image",
    "images_in_train": "same pixels as a training image",
}
Named = Iterator[tuple[str, Any, list[str]]]  # a name, a cell or what is wrong with it, and captions


def read_captioned(arguments: ImageGenerationArguments) -> dict[str, tuple[Dataset, Pictures]]:
    """Rows of `source`, a caption, `target`, the value that it is a caption of, all `captions`, `image` (its number)
    and `pixels` (a hash of them), and the pictures, by split.

    Raises:
        ValueError: with one line, for whatever can't be opened, and for a split without an image and its caption.
    """
    known = _captions_file(arguments.captions_file)
    found = {}
    for split, parts in _named_cells(arguments).items():
        pictures = Pictures()
        rows: list[dict[str, Any]] = []
        for name, cell, values in parts:
            if row := _row(pictures, name, cell, values, known):
                rows.append(row | {"source": row["captions"][len(rows) % len(row["captions"])]})
        if not rows:
            first = next(iter(pictures.faults.values()), ["there is none"])[0]
            raise ValueError(f"{split}: no row has an image and a caption ({first}).")
        found[split] = Dataset.from_list(rows), pictures
    return found


def _row(
    pictures: Pictures, name: str, cell: Any, values: list[str], known: dict[str, list[str]] | None
) -> dict[str, Any] | None:
    captions = values if known is None else [text for value in values for text in known.get(value, [])]
    if not captions:
        pictures.note("without_caption", name + ("" if known is None or not values else f": {values[0]}"))
        return None
    try:
        if isinstance(cell, NoImage):
            raise cell
        image, mode = opened(cell)
    except NoImage as error:
        pictures.note("broken_images", f"{name}: {error}")
        return None
    if image.size == (1, 1):
        pictures.note("one_pixel_images", name)
        return None
    if mode not in LOSSLESS:
        pictures.note("converted_images", f"{name}: {mode}")
    pictures.cells.append(cell)
    pictures.sizes.append((image.height, image.width))
    pixels = hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()[:16]
    return {"target": values[0], "captions": captions, "image": len(pictures.cells) - 1, "pixels": pixels}


def _captions_file(path: str | None) -> dict[str, list[str]] | None:
    """The captions of each value.

    Raises:
        ValueError: if the file can't be read, names a value twice, or holds anything else.
    """
    if path is None:
        return None
    found = json_of(read_text(path, f"--captions_file {path}"), f"--captions_file {path}")
    is_right = isinstance(found, dict) and all(
        isinstance(texts, list) and texts and all(isinstance(text, str) and text.strip() for text in texts)
        for texts in found.values()
    )
    if not is_right:
        raise ValueError(f'--captions_file {path}: expected {{"value": ["caption", ...], ...}}, texts in lists.')
    return found


def _named_cells(arguments: ImageGenerationArguments) -> dict[str, Named]:
    folders = split_folders(arguments)
    if folders:
        limits = arguments.limits
        return {split: _of_folders(paths, limits[split]) for split, paths in folders.items()}
    parts = read_splits(arguments)
    return {split: _of_tables(parts[split], arguments) for split in SPLITS if split in parts}


def _of_folders(folders: Sequence[Path], limit: int | None) -> Named:
    endings = Image.registered_extensions()
    for folder in folders:
        files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
        images = [path for path in files if path.suffix.lower() != ".txt"]
        for path in images[:limit]:
            beside, inside = path.with_suffix(".txt"), path.relative_to(folder).parts[:-1]
            text = " ".join(read_text(str(beside)).split()) if beside.is_file() else " ".join(inside)
            cell = path if path.suffix.lower() in endings else NoImage(f"{path.suffix or 'no ending'} is no image's")
            yield path.relative_to(folder.parent).as_posix(), cell, [text] if text else []


def _of_tables(parts: Sequence[Any], arguments: ImageGenerationArguments) -> Named:
    for part in parts:
        column = Column(arguments.image_column, "value", "image_column")
        if column.name not in part.rows:
            raise ValueError(f"{part.where}: {absent(column, part.rows)}")
        names = arguments.caption_column
        columns = [one(part.rows, Column(name, "label", "caption_column"), part.where) for name in names]
        beside, short = Path(part.where).parent, Path(part.where).name
        for number, (cell, *captions) in enumerate(zip(part.rows[column.name], *columns, strict=True), start=1):
            texts = [" ".join(caption.split()) for caption in captions if caption and caption.strip()]
            name = f"{short}, row {number}"
            try:
                yield name, packed(cell, beside, arguments.pixel_max), texts
            except NoImage as error:
                yield name, error, texts


def held_out(rows: Dataset, share: float, seed: int) -> tuple[Dataset, Dataset]:
    """Training rows and validation rows, one at least of each; images with equal pixels stay together.

    Raises:
        ValueError: if there are fewer than two different images.
    """
    pixels = np.array(rows["pixels"])
    different = np.unique(pixels)
    if len(different) < 2:
        raise ValueError(f"--validation_share {share:g}: there is one image only, so none can be held out.")
    count = min(max(round(share * len(different)), 1), len(different) - 1)
    is_held = np.isin(pixels, np.random.default_rng(seed).permutation(different)[:count])
    return rows.select(np.flatnonzero(~is_held)), rows.select(np.flatnonzero(is_held))


def check_captioned(splits: dict[str, Rows], pictures: dict[str, Pictures]) -> Report:
    """Faults by split, under the names of `FAULTS`."""
    found: Report = {}
    in_train = set(splits["train"]["pixels"]) if "train" in splits else set()
    for split, rows in splits.items():
        first = {row["pixels"]: row["image"] for row in reversed(list(rows))}
        again = [row["source"] for row in rows if first[row["pixels"]] != row["image"]]
        is_part = split != "train" and pictures[split] is pictures.get("train")  # held out, its faults are train's
        known = {} if is_part else {check: finding(names) for check, names in pictures[split].faults.items()}
        found[split] = {"rows": len(rows), **known, "duplicate_images": finding(again)}
        if split != "train":
            copies = [row["source"] for row in rows if row["pixels"] in in_train]
            found[split]["images_in_train"] = finding(copies)
    return found


def tell(split: str, pictures: Pictures) -> None:
    """Say on the screen what was left out, however the data are checked."""
    for check in ("broken_images", "one_pixel_images", "without_caption"):
        if names := pictures.faults.get(check):
            words = FAULTS[check].removesuffix(" (left out)")
            print(f"{split}: left out {len(names):,} rows, {words}, such as {names[0]}")


def scaled(pictures: Pictures, numbers: Sequence[int], size: tuple[int, int]) -> np.ndarray:
    """[N, H, W, 3] bytes of some images, each pixel the mean of what lies in it.

    Raises:
        ValueError: if one can't be read any more.
    """
    height, width = size
    images = np.empty((len(numbers), height, width, 3), dtype=np.uint8)
    for place, number in enumerate(numbers):
        try:
            image = pictures[number]
        except NoImage as error:
            raise ValueError(f"{pictures.cells[number]}: can't be read any more: {error}.") from error
        is_small = image.size == (width, height)
        images[place] = np.array(image if is_small else image.resize((width, height), Image.Resampling.BOX))
    return images
