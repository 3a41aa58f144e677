"""Tables in files: csv, tsv, RecBole's .inter, JSON, JSON lines and parquet, also compressed, as columns of raw cells;
and texts, whose documents are the rows of a column `text`.

The one reader of rows. A cell of a csv file is a text, None where nothing stands; JSON and parquet keep their types,
and a key that a JSON row lacks is None. What a column has to be is asked for in cells.py. Rows are numbered from 1,
below the header.
"""

import csv
import gzip
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, groupby, islice
from pathlib import Path
from typing import IO, Any, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from .files import DoubledKey, unique_keys, why

Columns: TypeAlias = dict[str, list[Any]]

RECBOLE = (".inter", ".user", ".item")  # tabs between, no quotes, heads such as user_id:token
RECBOLE_TYPES = ("token", "token_seq", "float", "float_seq")
ENDINGS = (".json", ".jsonl", ".csv", ".parquet", ".tsv", *RECBOLE)
TEXT_ENDINGS = (".txt", ".text", ".md")  # taken where it is said what separates the documents
SEPARATORS = ("file", "line", "blank_line")  # anything else is a line that stands between two documents
DOCUMENTS = 1_000  # that are read at once
PACKED = {".gz": b"\x1f\x8b", ".zst": b"\x28\xb5\x2f\xfd"}  # how such files begin, whatever they are called
DELIMITERS = (";", "\t", "|")  # of a .csv whose header has no comma
ROWS = 10_000  # that are read at once
LISTS = 500  # rows of csv that are lists at one time: more wake Python's garbage collector, at thrice the cost
SPACE = re.compile(r"[ \t\n\r]*")  # of JSON
LINE_END = re.compile(r"\r?\n\Z")
DECODER = json.JSONDecoder(object_pairs_hook=unique_keys)
LONGEST_CELL = 2**31 - 1  # a C long everywhere; csv's own limit is 128 KiB


def ending_of(path: str | Path) -> str:
    """The ending of a file's name below that of its compression."""
    name = Path(path)
    return (Path(name.stem) if name.suffix in PACKED else name).suffix


def is_table(path: str | Path, endings: Sequence[str] = ENDINGS) -> bool:
    return ending_of(path) in endings


def read_columns(path: str, limit: int | None = None, names: Sequence[str] = (), least: int = 0) -> Columns:
    """All columns of a file, at most `limit` rows; `names` and `least` as in `batches`.

    Raises:
        ValueError: for a file that is missing, empty or broken, with the line or row.
    """
    return merged(batches(path, names, least), limit)


def merged(parts: Iterable[Columns], limit: int | None = None) -> Columns:
    """Parts in one; a column that a part lacks is None there."""
    columns: Columns = {}
    count = 0
    for part in parts:
        size = max(map(len, part.values()), default=0)
        columns |= {name: [None] * count for name in part if name not in columns}
        for name, cells in columns.items():
            cells.extend(part.get(name, [None] * size))
        count += size
        if limit and count >= limit:
            return {name: cells[:limit] for name, cells in columns.items()}
    return columns


def batches(path: str, names: Sequence[str] = (), least: int = 0, separator: str | None = None) -> Iterator[Columns]:
    """The columns of a file in parts of `ROWS` rows; one part at least, even without rows.

    Args:
        names: of the columns of a file with tabs between them that has neither a header nor quotes.
        least: of these so many have to be in a row.
        separator: of the documents of a text file, see `documents`; without it such files aren't taken.

    Raises:
        ValueError: as `read_columns`.
    """
    ending, endings = ending_of(path), taken_endings(separator)
    if ending not in endings:
        raise ValueError(
            f"{path}: unknown ending; use {', '.join(endings)} (each may be followed by {' or '.join(PACKED)})."
        )
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file.")
    try:
        with open_bytes(path) as file:
            if not file.peek(1):
                raise ValueError(f"{path}: the file is empty.")
            if ending in (".json", ".jsonl"):
                yield from _json(file, path)
            elif ending == ".parquet":
                yield from _parquet(file, path)
            elif ending in TEXT_ENDINGS:
                texts = documents(file, path, str(separator))
                yield from ({"text": part} for part in _parts(texts, DOCUMENTS))
            else:
                yield from separated(file, path, names, least)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}, {wrong_encoding(path)}.") from error
    except (OSError, EOFError) as error:  # pyarrow's are OSErrors, too
        what = "read" if isinstance(error, PermissionError) else "unpacked"
        raise ValueError(f"{path}: can't be {what}: {error}.") from error


def open_bytes(path: str) -> Any:
    """The bytes of a file, unpacked if it begins like a packed one."""
    with open(path, "rb") as file:
        start = file.read(4)
    if start.startswith(PACKED[".gz"]) or path.endswith(".gz") and start:
        return io.BufferedReader(gzip.open(path))  # type: ignore[arg-type]
    if start == PACKED[".zst"] or path.endswith(".zst") and start:
        return io.BufferedReader(pa.input_stream(path, compression="zstd"))  # type: ignore[type-var]
    return open(path, "rb")


def wrong_encoding(path: str) -> str | None:
    """The first line of a file that isn't UTF-8, None if all are."""
    with open_bytes(path) as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                byte = f"byte 0x{line[error.start]:02x} at {error.start + 1}"
                return f"line {number}: can't be read as UTF-8 text ({byte}); convert the file"
    return None


def _parts(rows: Iterable[Any], size: int = ROWS) -> Iterator[list[Any]]:
    """Rows in lists of `size`, the first of which may be empty."""
    rows = iter(rows)
    part = list(islice(rows, size))
    yield part
    while part := list(islice(rows, size)):
        yield part


# -- texts --


def taken_endings(separator: str | None) -> tuple[str, ...]:
    """The endings of files that are read, those of texts where it is said what separates their documents."""
    return ENDINGS if separator is None else (*TEXT_ENDINGS, *ENDINGS)


def documents(file: IO[bytes], path: str, separator: str) -> Iterator[str]:
    """The documents of a text, each as it stands there, but for the one line end before a separator or at the end.

    Args:
        separator: "file" for one document, "line" for each line that isn't blank, "blank_line", or the line that
            stands between two documents. Only a line feed ends a line.

    Raises:
        ValueError: for zero bytes, which no text has.
    """
    lines = io.TextIOWrapper(file, encoding="utf-8-sig", newline="\n")
    for text in _documents(lines, separator):
        if "\0" in text:
            raise ValueError(f"{path}: holds zero bytes, so it is no text, or UTF-16; convert it to UTF-8.")
        yield text


def _documents(lines: io.TextIOWrapper, separator: str) -> Iterator[str]:
    if separator == "file":
        yield lines.read()
    elif separator == "line":
        yield from (line.rstrip("\r\n") for line in lines if line.strip())
    else:
        border = "" if separator == "blank_line" else separator.strip()
        for is_border, group in groupby(lines, lambda line: line.strip() == border):
            if not is_border:
                yield LINE_END.sub("", "".join(group))


# -- csv and the like --


def separated(file: IO[bytes], path: str, names: Sequence[str] = (), least: int = 0) -> Iterator[Columns]:
    """The columns of csv and the like, as `batches`; `path` says of which kind they are."""
    lines = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    header = next((line for line in lines if line.strip()), "")
    if "\0" in header:
        raise ValueError(f"{path}, line 1: holds zero bytes, as UTF-16 does; convert the file to UTF-8.")
    csv.field_size_limit(LONGEST_CELL)
    dialect: Any = {"delimiter": _delimiter(header, path), "strict": True}
    if names or ending_of(path) in RECBOLE:
        dialect["quoting"] = csv.QUOTE_NONE
    reader = csv.reader(chain([header], lines), **dialect)
    names = names or _names(_taken(reader, 1, path, -1)[0], path)
    parts = _csv_parts(reader, names, least or len(names), path)
    while part := merged(islice(parts, ROWS // LISTS)):
        yield part


def _csv_parts(reader: Iterator[list[str]], names: Sequence[str], least: int, path: str) -> Iterator[Columns]:
    count, rows = 0, _taken(reader, LISTS, path, 0)
    while rows or not count:
        if set(map(len, rows)) - {len(names)}:
            rows = [_of_width(row, len(names), least, f"{path}, row {count + n}") for n, row in enumerate(rows, 1)]
        cells = zip(*rows, strict=True) if rows else [()] * len(names)
        yield {name: _filled(column) for name, column in zip(names, cells, strict=True)}
        count += len(rows) or 1
        rows = _taken(reader, LISTS, path, count)


def _filled(cells: Sequence[str]) -> list[str | None]:
    return [cell or None for cell in cells] if "" in cells else list(cells)


def _delimiter(header: str, path: str) -> str:
    """A comma, or a tab by the file's name; in a csv without commas the one other that its header has."""
    if ending_of(path) != ".csv":
        return "\t"
    others = [delimiter for delimiter in DELIMITERS if delimiter in header]
    return others[0] if "," not in header and len(others) == 1 else ","


def _taken(reader: Iterator[list[str]], number: int, path: str, before: int) -> list[list[str]]:
    """The next rows that aren't blank, after so many before."""
    rows: list[list[str]] = []
    try:
        rows.extend(islice(filter(None, reader), number))  # keeps those before a broken one
    except csv.Error as error:
        row = before + len(rows) + 1
        raise ValueError(f"{path}, row {row}: broken quotes or line ends: {error}.") from error
    return rows


def _names(header: list[str], path: str) -> list[str]:
    if ending_of(path) in RECBOLE:
        parts = [name.rpartition(":") for name in header]
        header = [name if colon and kind in RECBOLE_TYPES else f"{name}{colon}{kind}" for name, colon, kind in parts]
    for name in header:
        if name and header.count(name) > 1:
            raise ValueError(f"{path}: two columns are named {name!r}; rename one.")
    return header


def _of_width(cells: list[str], width: int, least: int, where: str) -> list[str]:
    """A row as wide as the table, without the empty cell that a delimiter at the end makes.

    Raises:
        ValueError: for a row of another width; where cells belong is then unknown.
    """
    if len(cells) == width + 1 and not cells[-1]:
        cells = cells[:-1]
    if not least <= len(cells) <= width:
        raise ValueError(f"{where}: {len(cells)} cells in a table of {width} columns; mend the row or the header.")
    return cells + [""] * (width - len(cells))


# -- JSON --


def _json(file: IO[bytes], path: str) -> Iterator[Columns]:
    for part in _parts(_objects(file, path)):
        names = dict.fromkeys(name for row in part for name in row)
        yield {name: [row.get(name) for row in part] for name in names}


def _objects(file: IO[bytes], path: str) -> Iterator[dict[str, Any]]:
    """Objects one per line, one after the other over several lines, or in a list; or columns as pandas writes them.

    Only a line feed ends a line: texts may hold other characters that count as such.
    """
    lines = chain([file.readline().removeprefix(b"\xef\xbb\xbf")], file)
    head: list[bytes] = []
    filled: list[bytes] = []
    while len(filled) < 2 and (line := next(lines, b"")):
        head.append(line)
        filled += [line] if line.strip() else []
    if len(filled) < 2 or not _is_object(filled[0]):  # one object may hold columns
        yield from _whole(b"".join(chain(head, lines)).decode("utf-8"), path)
        return
    for number, line in enumerate(chain(head, lines), start=1):
        if line.strip():
            yield _object(line.decode("utf-8"), f"{path}, line {number}")


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line.decode("utf-8")), dict)
    except json.JSONDecodeError:
        return False
    except RecursionError:
        return line.lstrip().startswith(b"{")


def _object(text: str, where: str) -> dict[str, Any]:
    try:
        return _checked(DECODER.decode(text), where)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: broken JSON: {error.msg} (column {error.colno}).") from error
    except (DoubledKey, RecursionError) as error:
        raise ValueError(f"{where}: {why(error)}; {_advice(error)}.") from None


def _advice(error: Exception) -> str:
    return "rename or remove one" if isinstance(error, DoubledKey) else "write it flatter"


def _checked(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        kind = "a list" if isinstance(row, list) else repr(json.dumps(row, ensure_ascii=False)[:40])
        raise ValueError(f"{where}: expected an object in braces, found {kind}.")
    return row


def _whole(text: str, path: str) -> list[dict[str, Any]]:
    """The objects in a text that isn't one per line."""
    values, end = [], SPACE.match(text).end()  # type: ignore[union-attr]
    try:
        while end < len(text):
            value, end = DECODER.raw_decode(text, end)
            end = SPACE.match(text, end).end()  # type: ignore[union-attr]
            values.append(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: broken JSON: {error.msg} (column {error.colno}).") from error
    except (DoubledKey, RecursionError) as error:
        where = f"{path}, {_place(text, end, len(values))}"
        raise ValueError(f"{where}: {why(error)}; {_advice(error)}.") from None
    if len(values) == 1 and isinstance(values[0], list):
        return [_checked(row, f"{path}, row {number}") for number, row in enumerate(values[0], start=1)]
    rows = [_checked(value, f"{path}, object {number}") for number, value in enumerate(values, start=1)]
    return _rows_of_columns(rows[0]) if len(rows) == 1 else rows


def _place(text: str, start: int, before: int) -> str:
    """Which object after so many, or row of a list, can't be read: it is in the value that begins at `start`."""
    if text[start] != "[":
        return f"object {before + 1}"
    row, end = 0, start + 1
    try:
        while True:
            row, end = row + 1, re.compile(r"[\s,]*").match(text, end).end()  # type: ignore[union-attr]
            _, end = DECODER.raw_decode(text, end)
    except (DoubledKey, RecursionError):
        return f"row {row}"


def _rows_of_columns(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The one object of a file, or where it is {column: {number: cell}} as pandas' `to_json` writes it, its rows."""
    cells = list(row.values())
    keys = list(cells[0]) if cells and isinstance(cells[0], dict) else []
    if not keys or not all(isinstance(c, dict) and list(c) == keys for c in cells):
        return [row]
    if not all(key.isdecimal() for key in keys):
        return [row]
    return [{name: column[key] for name, column in row.items()} for key in keys]


# -- parquet --


def _parquet(file: Any, path: str) -> Iterator[Columns]:
    try:
        source = pq.ParquetFile(path if isinstance(file.raw, io.FileIO) else pa.BufferReader(file.read()))
        names = source.schema_arrow.names
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"{path}: two columns are named {twice[0]!r}; rename one.")
        if not source.metadata.num_rows:
            yield {name: [] for name in source.schema_arrow.names}
        labels = _class_labels(source.schema_arrow, path)
        for batch in source.iter_batches(ROWS):
            yield {name: label_names(labels.get(name), cells) for name, cells in batch.to_pydict().items()}
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}.") from error


def _class_labels(schema: Any, path: str) -> dict[str, Any]:
    """The columns of class numbers whose names a data set of the Hub keeps in its parquet files."""
    if b"huggingface" not in (schema.metadata or {}):
        return {}
    from datasets import ClassLabel, Features  # takes a second

    try:
        features = Features.from_arrow_schema(schema)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: datasets can't read the types that its schema names: {why(error)}.") from error
    inner = {name: getattr(feature, "feature", feature) for name, feature in features.items()}
    return {name: feature for name, feature in inner.items() if isinstance(feature, ClassLabel)}


def label_names(labels: Any, cell: Any) -> Any:
    """The names of class numbers, or of lists of them; None for -1, as unlabelled test splits have it.

    Args:
        labels: the column's ClassLabel; without one the cell stays as it is.
    """
    if labels is None:
        return cell
    if isinstance(cell, list):
        return [label_names(labels, one) for one in cell]
    return None if cell is None or cell < 0 else labels.int2str(cell)
