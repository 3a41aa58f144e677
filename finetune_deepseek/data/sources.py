"""Opening a task's data: local files, folders or a data set of the Hub, as raw rows by split.

`open_splits` is the way in. What columns mean is the task's affair; here are the flags that name data, the readers,
the limits, and the one-line errors of files that can't be used.
"""

import gzip
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, cast

from datasets import Dataset, IterableDataset, concatenate_datasets, interleave_datasets, load_dataset

from .arguments import SPLITS, DataArguments
from .hub import check_named
from .words import nearest_match

Rows: TypeAlias = Dataset | IterableDataset

# The file name's ending gives the reader of `datasets`; each may be gzipped.
READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
STREAM_SHUFFLE_ROWS = 10_000


@dataclass(frozen=True)
class Part:
    """One file, or one split of a data set: its raw rows, and what to call it in messages."""

    where: str
    rows: Rows


def named(parts: Iterable[Part]) -> str:
    return ", ".join(part.where for part in parts)


def file_reader(path: str) -> str:
    """The reader of `datasets` for a file name.

    Raises:
        ValueError: for an ending that isn't in `READERS`.
    """
    ending = Path(path.removesuffix(".gz")).suffix
    if ending not in READERS:
        raise ValueError(f"{path}: unknown ending; use {', '.join(READERS)} (each may be followed by .gz).")
    return READERS[ending]


def find_files(folder: str) -> dict[str, str]:
    """The data file of each split in a folder: the names begin with train, validation (or valid, dev) and test.

    Raises:
        ValueError: if there is no such folder or file, or more than one for a split.
    """
    if not Path(folder).is_dir():
        raise ValueError(f"--data_dir {folder}: no such folder.")
    paths = sorted(p for p in Path(folder).iterdir() if Path(p.name.removesuffix(".gz")).suffix in READERS)
    files = {}
    for split, beginnings in (("train", ("train",)), ("validation", ("valid", "dev")), ("test", ("test",))):
        found = [path for path in paths if path.name.startswith(beginnings)]
        if len(found) > 1:
            names = ", ".join(path.name for path in found)
            raise ValueError(f"--data_dir {folder}: several files for {split} ({names}); use --{split}_file.")
        if found:
            files[split] = str(found[0])
    if not files:
        raise ValueError(f"--data_dir {folder}: no file named train, validation or test with {', '.join(READERS)}.")
    return files


def split_files(arguments: DataArguments) -> dict[str, list[str]]:
    """The local files of each split."""
    if arguments.data_dir:
        folders = [find_files(folder) for folder in arguments.data_dir]
        found = {split: [files[split] for files in folders if split in files] for split in SPLITS}
    else:
        found = {split: getattr(arguments, f"{split}_file") or [] for split in SPLITS}
    return {split: paths for split, paths in found.items() if paths}


def _open_bytes(path: str) -> Any:
    return gzip.open(path) if path.endswith(".gz") else open(path, "rb")


def wrong_encoding(path: str) -> str | None:
    """The first line of a text file that isn't UTF-8, None if all are."""
    with _open_bytes(path) as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                byte = f"byte 0x{line[error.start]:02x} at {error.start + 1}"
                return f"line {number}: can't be read as UTF-8 text ({byte}); convert the file"
    return None


def broken_json(path: str) -> str | None:
    """Where and how a JSON or JSON-lines file is broken, None if it isn't."""
    try:
        if wrong := wrong_encoding(path):
            return wrong
        with _open_bytes(path) as file:
            if not path.removesuffix(".gz").endswith(".jsonl"):
                try:
                    json.load(file)
                    return None
                except json.JSONDecodeError as error:
                    if not error.msg.startswith("Extra data"):  # that is JSON lines in a .json file
                        return f"line {error.lineno}: broken JSON: {error.msg} (column {error.colno})"
                    file.seek(0)
            for number, line in enumerate(file, start=1):
                try:
                    row = json.loads(line) if line.strip() else {}
                except json.JSONDecodeError as error:
                    return f"line {number}: broken JSON: {error.msg} (column {error.colno})"
                if not isinstance(row, dict):
                    return f"line {number}: expected an object in braces, found {line.decode().strip()[:40]!r}"
    except (OSError, EOFError) as error:
        return f"can't be unpacked: {error}"
    return None


def read_file(path: str, text_columns: Iterable[str] = (), streaming: bool = False) -> Rows:
    """Open one local data file.

    Args:
        text_columns: hold text in csv files too, where 007 would be 7.

    Raises:
        ValueError: if it is missing, has an unknown ending, is empty, or is broken (for text with the line).
    """
    reader = file_reader(path)
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file.")
    with _open_bytes(path) as file:
        try:
            if not file.read(1):
                raise ValueError(f"{path}: the file is empty.")
        except (OSError, EOFError) as error:
            raise ValueError(f"{path}: can't be unpacked: {error}") from error
    try:
        options: dict[str, Any] = {}
        if reader == "csv":  # pandas takes words such as "NA" and "None" for no value
            options = {"converters": dict.fromkeys(text_columns, str), "keep_default_na": False, "na_values": [""]}
        dataset = load_dataset(reader, data_files={"train": path}, split="train", streaming=streaming, **options)
        if streaming:
            next(iter(dataset), None)  # opening a stream reads nothing: fail here rather than in training
        return dataset
    except Exception as error:  # datasets, pyarrow and pandas each raise classes of their own
        diagnose = {"json": broken_json, "csv": wrong_encoding}.get(reader, lambda path: None)
        cause = diagnose(path) or str(error.__cause__ or error)
        if "corresponds to no data" in cause:
            cause = "no rows"
        raise ValueError(f"{path}{', ' if cause.startswith('line') else ': '}{' '.join(cause.split())}.") from error


def _load_hub(name: str, config: str | None, streaming: bool) -> dict[str, Rows]:
    check_named("dataset_name", name, "dataset")
    try:
        dataset = load_dataset(name, config, streaming=streaming)
    except Exception as error:  # the Hub client, datasets and pyarrow each raise classes of their own
        raise ValueError(f"--dataset_name {name}: {' '.join(str(error).split())}") from error
    known = {split: dataset[split] for split in SPLITS if split in dataset}
    if not known:
        raise ValueError(
            f"--dataset_name {name}: has the splits {', '.join(dataset)}; train, validation or test are needed."
        )
    return known


def open_splits(
    arguments: DataArguments, text_columns: Sequence[str], streaming: bool = False
) -> dict[str, list[Part]]:
    """The raw rows that the flags name, by split, each file with at most its number of rows.

    Args:
        text_columns: the columns that hold text, see `read_file`.
        streaming: read the training rows as they are used. The other splits are read whole in any case: they are
            sorted and looked up by number.

    Raises:
        ValueError: with one line, for whatever can't be opened.
    """
    if arguments.dataset_name:
        loaded = _load_hub(arguments.dataset_name, arguments.dataset_config_name, streaming)
        raw = {split: [Part(f"{arguments.dataset_name}, split {split}", rows)] for split, rows in loaded.items()}
    else:
        raw = {
            split: [Part(path, read_file(path, text_columns, streaming)) for path in paths]
            for split, paths in split_files(arguments).items()
        }
    return {
        split: [Part(part.where, limited(part.rows, arguments.limits[split], split)) for part in parts]
        for split, parts in raw.items()
    }


def limited(rows: Rows, limit: int | None, split: str) -> Rows:
    """The first rows; a scored split comes whole, not as a stream."""
    if isinstance(rows, IterableDataset):
        rows = rows.take(limit) if limit else rows
        return rows if split == "train" else Dataset.from_list(list(rows))
    return rows.select(range(min(limit, len(rows)))) if limit else rows


def joined(parts: Sequence[Rows], seed: int) -> Rows:
    """The rows of several parts in one; streams take turns and are shuffled, for nobody can shuffle them later."""
    if isinstance(parts[0], Dataset):
        return concatenate_datasets(cast(list[Dataset], list(parts)))
    streams = cast(list[IterableDataset], list(parts))
    stream = streams[0]
    if len(streams) > 1:
        stream = interleave_datasets(streams, stopping_strategy="all_exhausted_without_replacement")
    return stream.shuffle(seed=seed, buffer_size=STREAM_SHUFFLE_ROWS)


def check_columns(where: str, columns: Sequence[str], wanted: dict[str, str]) -> None:
    """Whether the columns are there that flags ask for.

    Args:
        wanted: column by flag.

    Raises:
        ValueError: for the first that isn't.
    """
    for flag, column in wanted.items():
        if column not in columns:
            raise ValueError(
                f"{where}: no column {column!r}; it has {', '.join(columns)}. "
                f"Set --{flag}{nearest_match(column, columns)}."
            )


@contextmanager
def utf8_text(where: str) -> Iterator[None]:
    """Using rows of a file: arrow hands bytes through and decodes on use.

    Raises:
        ValueError: if a text isn't UTF-8.
    """
    try:
        yield
    except UnicodeDecodeError as error:
        path = where.partition(", ")[0]
        wrong = wrong_encoding(path) if Path(path).is_file() and file_reader(path) != "parquet" else None
        cause = f", {wrong}" if wrong else f": can't be read as UTF-8 text: {error}"
        raise ValueError(f"{where}{cause}.") from error


def progress(rows: Rows, label: str) -> dict[str, str]:
    """The words beside `map`'s progress bar; a stream has none."""
    return {"desc": label} if isinstance(rows, Dataset) else {}
