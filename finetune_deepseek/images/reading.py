"""Images out of folders, tables and data sets of the Hub: rows of a source, a label and the number of a picture.

A folder holds train, validation and test folders with one folder per label; the image column of a table has packed
images, paths beside the table, or numbers. Every image is opened once, here, so that a broken one is counted and named
before training begins; colour is RGB.
"""

import hashlib
import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from datasets import Dataset
from PIL import Image, UnidentifiedImageError

from tokenization_deepseek.processing_deepseek import in_rgb

from ..data.arguments import SPLITS, DataArguments
from ..data.cells import Column, absent, one
from ..data.fault_report import finding
from ..data.sources import Part, read_splits
from .arguments import ImageArguments, PictureArguments

FOLDERS = {"train": ("train", "training"), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}
LOSSLESS = ("RGB", "L", "1", "P")  # modes that lose nothing as RGB


class NoImage(ValueError):
    """What can't be opened as an image, with the reason."""


@dataclass
class Pictures:
    """The images of a split, still packed.

    Attributes:
        cells: paths, packed bytes or arrays [H, W] or [H, W, 3] of 0 to 255, by number.
        sizes: height and width of each.
        faults: what was found while they were read, for the data report: {check: names}.
        empty: labels that have a folder and no image, or no object.
        category_ids: the numbers that annotations give to categories.
    """

    cells: list[Any] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    faults: dict[str, list[str]] = field(default_factory=dict)
    empty: list[str] = field(default_factory=list)
    category_ids: dict[str, int] = field(default_factory=dict)

    def note(self, check: str, name: str) -> None:
        self.faults.setdefault(check, []).append(name)

    def __getitem__(self, number: int) -> Image.Image:
        return opened(self.cells[number])[0]


def opened(cell: Any) -> tuple[Image.Image, str]:
    """An image in RGB, and the mode that it had.

    Raises:
        NoImage: if it can't be read to its end.
    """
    if isinstance(cell, np.ndarray):
        return Image.fromarray(cell).convert("RGB"), "RGB"
    try:
        with Image.open(io.BytesIO(cell) if isinstance(cell, bytes) else cell) as image:
            image.load()
            return in_rgb(image), image.mode
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise NoImage(" ".join(str(error).split())) from error


def array_of(cell: Any, pixel_max: float) -> np.ndarray:
    """[H, W] or [H, W, 3] bytes out of numbers from 0 to `pixel_max`, rows of them, or all of a square's.

    Raises:
        NoImage: if they are no image.
    """
    try:
        array = np.array(cell, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise NoImage("its numbers are no rows of equal length") from error
    if array.ndim == 1:
        side = math.isqrt(array.size)
        if side * side != array.size:
            raise NoImage(f"{array.size} numbers in a row are no square; give rows of them")
        array = array.reshape(side, side)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if not array.size or array.ndim not in (2, 3) or array.ndim == 3 and array.shape[2] != 3:
        raise NoImage(f"numbers of shape {' x '.join(map(str, array.shape))} are no grey or colour image")
    if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= pixel_max):
        raise NoImage(f"a number isn't from 0 to --pixel_max {pixel_max:g}")
    return np.round(array * (255 / pixel_max)).astype(np.uint8)


def packed(cell: Any, beside: Path, pixel_max: float) -> Any:
    """What is kept of a cell of the image column: a path, bytes, or an array.

    Raises:
        NoImage: if it can't be an image.
    """
    if isinstance(cell, Mapping):  # as data sets of the Hub and their parquet files have it
        cell = cell.get("bytes") or cell.get("path")
    if isinstance(cell, str) and cell.strip():
        return beside / cell
    if isinstance(cell, bytes) and cell:
        return cell
    if isinstance(cell, list):
        return array_of(cell, pixel_max)
    raise NoImage("no image")


Named: TypeAlias = Iterator[tuple[str, Any, Any]]  # a name, a cell or what is wrong with it, and a label or None
Columns: TypeAlias = dict[str, Any]


def read_images(arguments: ImageArguments) -> dict[str, tuple[Dataset, Pictures]]:
    """Rows of `source`, `target`, `image` (its number) and `pixels` (a hash of them), and the pictures, by split.

    Raises:
        ValueError: with one line, for whatever can't be opened, and for a split without an image.
    """
    found = {
        split: gathered(split, parts, lambda label, name, size, pictures: {"target": label})
        for split, parts in _named_cells(arguments).items()
    }
    for split, empty in _empty_folders(arguments).items():
        found[split][1].empty = empty
    return found


def gathered(
    split: str, parts: Named, target_of: Callable[[Any, str, tuple[int, int], Pictures], Columns]
) -> tuple[Dataset, Pictures]:
    """A split's rows and pictures; every image is opened once.

    Args:
        target_of: the columns that a row has of its label, name, height and width; may note faults.

    Raises:
        ValueError: for a split without an image.
    """
    pictures = Pictures()
    rows: list[Columns] = []
    for name, cell, label in parts:
        if label is None:
            pictures.note("without_label", name)
        elif (image := _added(pictures, name, cell)) is not None:
            own = target_of(label, name, (image.height, image.width), pictures)
            digest = hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()[:16]
            rows.append({"source": name, **own, "image": len(rows), "pixels": digest})
    if not rows:
        first = next((names[0] for names in pictures.faults.values() if names), "there is none")
        raise ValueError(f"{split}: no row has an image and a label ({first}).")
    return Dataset.from_dict({column: [row[column] for row in rows] for column in rows[0]}), pictures


def _added(pictures: Pictures, name: str, cell: Any) -> Image.Image | None:
    """An image that pictures have now; None, and a note, for what is none."""
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
    return image


# Where they come from ------------------------------------------------------------------------------------------------


def _named_cells(arguments: ImageArguments) -> dict[str, Named]:
    folders = split_folders(arguments)
    if folders:
        limits = arguments.limits
        return {split: _of_folder(paths, limits[split]) for split, paths in folders.items()}
    try:
        parts = read_splits(arguments)
    except ValueError as error:
        also = "; images themselves lie in train/LABEL/ and the like" if arguments.data_dir else ""
        raise ValueError(f"{str(error).rstrip('.')}{also}.") from error
    return {split: _of_tables(parts[split], arguments) for split in SPLITS if split in parts}


def split_folders(arguments: DataArguments) -> dict[str, list[Path]]:
    """The folders of each split in those of --data_dir, where there are any."""
    found = {
        split: [Path(folder) / name for folder in arguments.data_dir or () for name in names]
        for split, names in FOLDERS.items()
    }
    present = {split: [path for path in paths if path.is_dir()] for split, paths in found.items()}
    return {split: paths for split, paths in present.items() if paths}


def _empty_folders(arguments: ImageArguments) -> dict[str, list[str]]:
    return {
        split: [
            label.name for path in paths for label in sorted(path.iterdir()) if label.is_dir() and not _files(label)
        ]
        for split, paths in split_folders(arguments).items()
    }


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))


def _of_folder(paths: Sequence[Path], limit: int | None) -> Named:
    endings = Image.registered_extensions()
    for path in paths:
        for file in _files(path)[:limit]:
            name, place = file.relative_to(path.parent).as_posix(), file.relative_to(path)
            label = place.parts[0] if len(place.parts) > 1 else None
            cell = file if file.suffix.lower() in endings else NoImage(f"{file.suffix or 'no ending'} is no image's")
            yield name, cell, label


def _of_tables(parts: Sequence[Any], arguments: ImageArguments) -> Named:
    for part in parts:
        labels = one(part.rows, Column(arguments.label_column, "label", "label_column"), part.where)
        yield from table_cells(part, labels, arguments)


def table_cells(part: Part, labels: Sequence[Any], arguments: PictureArguments, beside: Path | None = None) -> Named:
    """The images of a table, with their labels; paths are from its folder, or from `beside`.

    Raises:
        ValueError: without a column of images.
    """
    column = Column(arguments.image_column, "value", "image_column")
    if column.name not in part.rows:
        raise ValueError(f"{part.where}: {absent(column, part.rows)}")
    short = Path(part.where).name
    for number, (cell, label) in enumerate(zip(part.rows[column.name], labels, strict=True), start=1):
        name = f"{short}, row {number}"
        try:
            yield name, packed(cell, beside or Path(part.where).parent, arguments.pixel_max), label
        except NoImage as error:
            yield name, error, label


def held_out(rows: Dataset, classes: Sequence[str], share: float, seed: int) -> tuple[Dataset, Dataset]:
    """Training rows and validation rows: a share of each of the rows' classes, at least one of a class of two or more.

    Raises:
        ValueError: if no class has two rows.
    """
    targets, draws = np.array(classes), np.random.default_rng(seed)
    held: list[int] = []
    for label in sorted(set(targets.tolist())):
        numbers = np.flatnonzero(targets == label)
        count = min(max(round(share * len(numbers)), 1), len(numbers) - 1)
        held += draws.permutation(numbers)[:count].tolist()
    if not held:
        raise ValueError(f"--validation_share {share:g}: no class has two images, so none can be held out.")
    kept = sorted(set(range(len(rows))) - set(held))
    return rows.select(kept), rows.select(sorted(held))


def tell(split: str, pictures: Pictures) -> None:
    """Say on the screen what was left out, however the data are checked."""
    for check, words in (("broken_images", "that can't be opened"), ("one_pixel_images", "of one pixel"),
                         ("without_label", "without a label")):  # fmt: skip
        if names := pictures.faults.get(check):
            print(f"{split}: left out {len(names):,} images {words}, such as {names[0]}")


def report(pictures: Pictures) -> dict[str, Any]:
    """The faults for the data report."""
    found = {check: finding(names) for check, names in pictures.faults.items()}
    return found | ({"empty_classes": finding(pictures.empty)} if pictures.empty else {})
