"""Opening a task's data: local files, folders or a data set of the Hub, as raw rows by split.

`open_splits` is the way in. What columns mean is the task's affair; here are the flags that name data, the readers,
the limits, and the one-line errors of files that can't be used.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from datasets import (
    ClassLabel,
    Dataset,
    Image,
    IterableDataset,
    concatenate_datasets,
    interleave_datasets,
    load_dataset,
)

from .arguments import SPLITS, DataArguments
from .hub import check_named
from .mapped import Rows, text_rows
from .table import ENDINGS, is_table, label_names, read_columns, taken_endings

STREAM_SHUFFLE_ROWS = 10_000


@dataclass(frozen=True)
class Part:
    """One file, or one split of a data set: what to call it in messages, its rows or raw columns, and as an example
    the first row, None if there is none."""

    where: str
    rows: Any
    first: dict[str, Any] | None = None


def named(parts: Iterable[Part]) -> str:
    return ", ".join(part.where for part in parts)


def find_files(folder: str) -> dict[str, str]:
    """The data file of each split in a folder: the names begin with train, validation (or valid, dev) and test.

    Raises:
        ValueError: if there is no such folder or file, or more than one for a split.
    """
    shards = find_shards(folder)
    for split, paths in shards.items():
        if len(paths) > 1:
            names = ", ".join(Path(path).name for path in paths)
            raise ValueError(f"--data_dir {folder}: several files for {split} ({names}); use --{split}_file.")
    return {split: paths[0] for split, paths in shards.items()}


def find_shards(folder: str, endings: Sequence[str] = ENDINGS) -> dict[str, list[str]]:
    """As `find_files`, all files of each split, sorted by name.

    Raises:
        ValueError: if there is no such folder or file.
    """
    if not Path(folder).is_dir():
        raise ValueError(f"--data_dir {folder}: no such folder.")
    paths = sorted(path for path in Path(folder).iterdir() if is_table(path, endings))
    files = {
        split: [str(path) for path in paths if path.name.startswith(beginnings)]
        for split, beginnings in (("train", ("train",)), ("validation", ("valid", "dev")), ("test", ("test",)))
    }
    if not any(files.values()):
        raise ValueError(f"--data_dir {folder}: no file named train, validation or test with {', '.join(endings)}.")
    return {split: found for split, found in files.items() if found}


def split_files(arguments: DataArguments, separator: str | None = None) -> dict[str, list[str]]:
    """The local files of each split; several of a folder, and texts too, where a `separator` of documents is given."""
    if arguments.data_dir and separator is not None:
        shards = [find_shards(folder, taken_endings(separator)) for folder in arguments.data_dir]
        found = {split: [path for files in shards for path in files.get(split, ())] for split in SPLITS}
    elif arguments.data_dir:
        folders = [find_files(folder) for folder in arguments.data_dir]
        found = {split: [files[split] for files in folders if split in files] for split in SPLITS}
    else:
        found = {split: getattr(arguments, f"{split}_file") or [] for split in SPLITS}
    return {split: paths for split, paths in found.items() if paths}


class DatasetColumns(Mapping[str, list[Any]]):
    """The columns of a data set, each read when it is asked for; labels by their names, images as they are packed."""

    def __init__(self, rows: Dataset) -> None:
        self.rows = rows

    def __getitem__(self, name: str) -> list[Any]:
        if name not in self.rows.column_names:
            raise KeyError(name)
        feature = self.rows.features[name]
        if isinstance(feature, Image):
            return list(self.rows.cast_column(name, Image(decode=False))[name])
        labels, cells = getattr(feature, "feature", feature), list(self.rows[name])
        return label_names(labels, cells) if isinstance(labels, ClassLabel) else cells

    def __iter__(self) -> Iterator[str]:
        return iter(self.rows.column_names)

    def __len__(self) -> int:
        return len(self.rows.column_names)


def open_hub(name: str, config: str | None, **options: Any) -> Any:
    """What `load_dataset` gives.

    Raises:
        ValueError: with one line, if it gives nothing.
    """
    check_named("dataset_name", name, "dataset")
    try:
        return load_dataset(name, config, **options)
    except Exception as error:  # the Hub client, datasets and pyarrow each raise classes of their own
        raise ValueError(f"--dataset_name {name}: {' '.join(str(error).split())}") from error


def _hub_splits(arguments: DataArguments, streaming: bool) -> dict[str, list[Part]]:
    name = str(arguments.dataset_name)
    dataset = open_hub(name, arguments.dataset_config_name, streaming=streaming)
    known = {split: dataset[split] for split in SPLITS if split in dataset}
    if not known:
        raise ValueError(
            f"--dataset_name {name}: has the splits {', '.join(dataset)}; train, validation or test are needed."
        )
    return {split: [Part(f"{name}, split {split}", rows, next(iter(rows), None))] for split, rows in known.items()}


def read_splits(arguments: DataArguments) -> dict[str, list[Part]]:
    """The raw columns that the flags name, by split, each file with at most its number of rows.

    Raises:
        ValueError: with one line, for whatever can't be opened.
    """
    limits = arguments.limits
    if arguments.dataset_name:
        return {
            split: [Part(part.where, DatasetColumns(cast(Dataset, limited(part.rows, limits[split], split))))]
            for split, (part,) in _hub_splits(arguments, streaming=False).items()
        }
    return {
        split: [Part(path, read_columns(path, limits[split])) for path in paths]
        for split, paths in split_files(arguments).items()
    }


def open_splits(
    arguments: DataArguments, texts: Sequence[str], streaming: bool = False, separator: str | None = None
) -> dict[str, list[Part]]:
    """The rows that the flags name, by split, each file with at most its number of rows, not in memory.

    Args:
        texts: the columns of a file that are read, see `text_rows`.
        streaming: read the training rows as they are used. The other splits are read whole in any case: they are
            sorted and looked up by number.
        separator: what separates the documents of a text file; without it such files aren't taken.

    Raises:
        ValueError: with one line, for whatever can't be opened.
    """
    if arguments.dataset_name:
        raw = _hub_splits(arguments, streaming)
    else:
        raw = {
            split: [Part(path, *text_rows(path, texts, streaming, separator)) for path in paths]
            for split, paths in split_files(arguments, separator).items()
        }
    limits = arguments.limits
    return {
        split: [replace(part, rows=limited(part.rows, limits[split], split)) for part in parts]
        for split, parts in raw.items()
    }


def limited(rows: Rows, limit: int | None, split: str) -> Rows:
    """The first rows; a scored split comes whole, not as a stream."""
    if isinstance(rows, IterableDataset):
        rows = rows.take(limit) if limit else rows
        return rows if split == "train" else Dataset.from_list(list(rows))
    return rows.select(range(min(limit, len(rows)))) if limit else rows


def joined(parts: Sequence[Rows], seed: int | None) -> Rows:
    """The rows of several parts in one; streams take turns and are shuffled, for nobody can shuffle them later, unless
    there is no seed."""
    if isinstance(parts[0], Dataset):
        return concatenate_datasets(cast(list[Dataset], list(parts)))
    streams = cast(list[IterableDataset], list(parts))
    stream = streams[0]
    if len(streams) > 1:
        stream = interleave_datasets(streams, stopping_strategy="all_exhausted_without_replacement")
    return stream if seed is None else stream.shuffle(seed=seed, buffer_size=STREAM_SHUFFLE_ROWS)


def progress(rows: Rows, label: str) -> dict[str, str]:
    """The words beside `map`'s progress bar; a stream has none."""
    return {"desc": label} if isinstance(rows, Dataset) else {}
