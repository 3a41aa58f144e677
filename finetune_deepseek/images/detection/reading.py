"""Images with objects, out of annotations in COCO's format, tables and data sets of the Hub.

A row has `source`, the image's name, `target`, a list of {bbox, category} with x, y, width and height in pixels of the
image, `crowds`, the same of boxes with many objects, `image_id`, the image's `height` and `width`, and `is_annotated`:
whether it is known what is in it. Boxes are cut to their image; those that have no area then are left out, counted and
named.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Dataset, Features

from ...data.arguments import SPLITS
from ...data.cells import label as as_label
from ...data.cells import number as as_number
from ...data.files import json_of, read_text
from ...data.sources import DatasetColumns, Part, read_splits, split_files
from ...data.table import read_columns
from ..reading import Columns, Named, NoImage, Pictures, gathered, split_folders, table_cells
from .arguments import DetectionArguments

ROUNDING = 1.0  # pixels that a box may stand out of its image without mention


def read_objects(arguments: DetectionArguments) -> dict[str, tuple[Dataset, Pictures]]:
    """Rows and pictures by split.

    Raises:
        ValueError: with one line, for whatever can't be read, and for a split without an image.
    """
    found = {}
    for split, (parts, categories) in _named_cells(arguments).items():
        rows, pictures = gathered(split, parts, _target)
        check_annotated(rows["is_annotated"], split)
        used = {one["category"] for target in rows["target"] for one in target}
        pictures.empty = [name for name in categories if name not in used]
        pictures.category_ids = dict(categories)
        found[split] = rows, pictures
    return found


def _target(objects: Mapping[str, Any], name: str, size: tuple[int, int], pictures: Pictures) -> Columns:
    """A row's own columns: the objects that are in the image, and what is wrong with the others noted."""
    height, width = size
    kept: list[dict[str, Any]] = []
    crowds: list[dict[str, Any]] = []
    for box, category, is_crowd in objects["objects"] or ():
        x, y, right, bottom = box[0], box[1], box[0] + box[2], box[1] + box[3]
        x0, y0, x1, y1 = max(x, 0.0), max(y, 0.0), min(right, float(width)), min(bottom, float(height))
        shown = f"{name}: {category} at {' '.join(f'{side:g}' for side in box)}"
        if x0 >= x1 or y0 >= y1:
            pictures.note("boxes_without_area", shown)
            continue
        if min(x, y) < -ROUNDING or right > width + ROUNDING or bottom > height + ROUNDING:
            pictures.note("boxes_outside", shown)
        one = {"bbox": [x0, y0, x1 - x0, y1 - y0], "category": category}
        if one in kept and not is_crowd:
            pictures.note("duplicate_boxes", shown)
            continue
        if is_crowd:
            pictures.note("crowds", shown)
        (crowds if is_crowd else kept).append(one)
    is_annotated = objects["objects"] is not None
    if not kept:
        pictures.note("images_without_objects" if is_annotated else "images_without_annotations", name)
    own = {"target": kept, "crowds": crowds, "is_annotated": is_annotated, "image_id": objects["image_id"]}
    return own | {"height": height, "width": width}


def check_annotated(found: Sequence[bool], split: str) -> None:
    """Refuse images without annotations where they would be learned from or scored.

    Raises:
        ValueError: for any in other splits than test, and for a test split that has both.
    """
    absent = len(found) - sum(found)
    if absent and (split != "test" or absent < len(found)):
        raise ValueError(
            f"{split}: {absent:,} of {len(found):,} images are from files without annotations; such are predicted "
            "only, as a --test_file of their own."
        )


# Where they come from ------------------------------------------------------------------------------------------------

Cells = tuple[Named, Mapping[str, int]]  # of a split, and the numbers of its categories


def _named_cells(arguments: DetectionArguments) -> dict[str, Cells]:
    if arguments.dataset_name:
        return {split: _of_tables(parts, arguments) for split, parts in read_splits(arguments).items()}
    files = _folder_files(arguments) or split_files(arguments)
    return {split: _of_files(files[split], arguments, split) for split in SPLITS if split in files}


def _folder_files(arguments: DetectionArguments) -> dict[str, list[str]]:
    """The annotations in the folders of each split, one file each: *.json, or a table named metadata."""
    found: dict[str, list[str]] = {}
    for split, folders in split_folders(arguments).items():
        for folder in folders:
            files = sorted(path for path in folder.iterdir() if path.suffix == ".json" or path.stem == "metadata")
            if len(files) != 1:
                names = ", ".join(path.name for path in files) or "none"
                raise ValueError(
                    f"{folder}: one file of annotations is needed, *.json or metadata.jsonl; there is {names}."
                )
            found.setdefault(split, []).append(str(files[0]))
    return found


def _of_files(paths: Sequence[str], arguments: DetectionArguments, split: str) -> Cells:
    limit, categories = arguments.limits[split], dict[str, int]()
    cells: list[Named] = []
    for path in paths:
        content: Any = json_of(read_text(path), path) if path.endswith(".json") else None
        if _is_coco(content):
            named, own = _of_coco(content, path, arguments, limit)
        else:
            named, own = _of_tables([Part(path, read_columns(path, limit))], arguments)
        cells.append(named)
        categories |= own
    return (cell for named in cells for cell in named), categories


def _is_coco(content: Any) -> bool:
    """Whether a JSON file is in COCO's format: a list of images, each with its fields."""
    images = content.get("images") if isinstance(content, dict) else None
    return isinstance(images, list) and all(isinstance(one, dict) for one in images)


def _of_coco(content: dict[str, Any], path: str, arguments: DetectionArguments, limit: int | None) -> Cells:
    """Annotations in COCO's format; None for an image's objects where the file has no annotations.

    Raises:
        ValueError: with one line, for annotations without what they need.
    """
    try:
        categories = {str(one["name"]): int(one["id"]) for one in content.get("categories", ())}
        names = {number: name for name, number in categories.items()}
        is_annotated = "annotations" in content
        objects: dict[Any, Any] = {one["id"]: [] if is_annotated else None for one in content["images"]}
        for one in content.get("annotations", ()):
            if one["category_id"] not in names or one["image_id"] not in objects:
                kind = "category" if one["category_id"] not in names else "image"
                raise ValueError(f"annotation {one.get('id')} names {kind} {one[f'{kind}_id']}, which isn't there")
            box = _box(one["bbox"], f"annotation {one.get('id')}")
            objects[one["image_id"]].append((box, names[one["category_id"]], bool(one.get("iscrowd"))))
        images = [(one["id"], str(one["file_name"])) for one in content["images"]][:limit]
    except (KeyError, TypeError, ValueError) as error:
        what = f"no {error} where COCO's format has one" if isinstance(error, KeyError) else error
        raise ValueError(f"{path}: {what}.") from error
    folders = [Path(folder) for folder in arguments.image_dir or [str(Path(path).parent)]]
    found = ((number, name, {"objects": objects[number], "image_id": number}) for number, name in images)
    return ((name, _file(name, folders), target) for _, name, target in found), categories


def _file(name: str, folders: Sequence[Path]) -> Path | NoImage:
    """An image file in the first folder that has it."""
    path = next((folder / name for folder in folders if (folder / name).is_file()), None)
    return path or NoImage(f"no such file in {', '.join(map(str, folders))} (--image_dir)")


def _of_tables(parts: Iterable[Part], arguments: DetectionArguments) -> Cells:
    beside = Path(arguments.image_dir[0]) if arguments.image_dir else None
    cells: list[Named] = []
    categories: dict[str, int] = {}
    for part in parts:
        names = arguments.category_names or _names_of(part, arguments.objects_column) or []
        categories |= {name: number for number, name in enumerate(names)}
        column = _column_of_images(part, arguments)
        targets = list(_targets(column, arguments, names))
        cells.append(table_cells(column, targets, arguments, beside))
    return (cell for named in cells for cell in named), categories


def _column_of_images(part: Part, arguments: DetectionArguments) -> Part:
    """The part, with the paths of `file_name`, as folders of images have it, where no other column was asked for."""
    rows, name = part.rows, arguments.image_column
    if name in rows or "file_name" not in rows:
        return part
    return Part(part.where, {**rows, name: rows["file_name"]})


def _targets(part: Part, arguments: DetectionArguments, names: Sequence[str]) -> Iterator[dict[str, Any] | None]:
    column = arguments.objects_column
    if column not in part.rows:
        known = ", ".join(part.rows)
        raise ValueError(f"{part.where}: no column {column!r}; it has {known}. Set --objects_column.")
    ids = part.rows.get("image_id")
    for number, cell in enumerate(part.rows[column], start=1):
        where = f"{part.where}, row {number}: {column!r}"
        image_id = number if ids is None else ids[number - 1]
        yield None if cell is None else {"objects": _objects(cell, where, names), "image_id": image_id}


def _objects(cell: Any, where: str, names: Sequence[str]) -> list[tuple[list[float], str, bool]]:
    """Boxes and categories of a cell, lists of both or a list of pairs, and whether a box is a crowd's (`iscrowd`).

    Raises:
        ValueError: if it has none.
    """
    try:
        if isinstance(cell, Mapping):
            crowds = cell.get("iscrowd") or [0] * len(cell["bbox"])
            found = list(zip(cell["bbox"], cell["category"], crowds, strict=True))
        else:
            found = [(one["bbox"], one["category"], one.get("iscrowd")) for one in cell]
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{where} has no bbox and category for each object, in lists of equal length.") from None
    return [(_box(box, where), _named(category, where, names), bool(is_crowd)) for box, category, is_crowd in found]


def _box(box: Any, where: str) -> list[float]:
    """x, y, width and height.

    Raises:
        ValueError: for other than four finite numbers.
    """
    try:
        found = [as_number(side) for side in box]
    except (TypeError, ValueError):
        found = []
    if len(found) != 4 or any(side is None or not math.isfinite(side) for side in found):
        raise ValueError(f"{where} has a bbox that is no x, y, width and height: {str(box)[:60]}")
    return [float(side) for side in found if side is not None]


def _named(category: Any, where: str, names: Sequence[str]) -> str:
    if isinstance(category, int) and names:
        if not 0 <= category < len(names):
            raise ValueError(f"{where} has category {category}; names are known from 0 to {len(names) - 1}.")
        return names[category]
    found = as_label(category)
    if found is None:
        raise ValueError(f"{where} has an object without a category.")
    return found


def _names_of(part: Part, column: str) -> list[str] | None:
    """The names of numbered categories, as a data set of the Hub or its parquet file has them."""
    if isinstance(part.rows, DatasetColumns):
        return _class_names(part.rows.rows.features.get(column))
    if not part.where.endswith(".parquet"):
        return None
    try:
        return _class_names(Features.from_arrow_schema(pq.read_schema(part.where)).get(column))
    except (pa.ArrowInvalid, ValueError, KeyError, TypeError):
        return None


def _class_names(feature: Any) -> list[str] | None:
    if isinstance(feature, ClassLabel):
        return list(feature.names)
    within = feature.values() if isinstance(feature, Mapping) else [getattr(feature, "feature", None)]
    return next((names for one in within if one is not None and (names := _class_names(one))), None)
