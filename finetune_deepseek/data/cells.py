"""What a column is asked to be: an id, a value, a text, a label, a number, a time, a list of these, or a record.

`typed` gives the cells of raw columns (table.py, or a data set of the Hub) as that, or refuses with file, row and
column. Text stays text: 01 is not 1, and 3.10 not 3.1. None is what is missing: an empty cell, null, not-a-number.
"""

import ast
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal, TypeAlias

from .files import why
from .table import Columns
from .times import parse_times
from .words import nearest_match

Kind: TypeAlias = Literal[
    "id", "value", "words", "text", "label", "number", "time", "ids", "texts", "labels", "record"
]

SHOWN = 40  # characters of a cell in a message
BETWEEN_ITEMS = re.compile(r"[,;|]")
STRINGS_WITHOUT_COMMA = re.compile(r"""['"]\s+['"]""")  # as numpy prints them; Python would join them
WHOLE = re.compile(r"-?\d+\.0")


@dataclass(frozen=True)
class Column:
    """A column that is asked for.

    Args:
        flag: what names it on the command line.
        required: refuse data without it.
        advice: what else to do about its absence, for the message.
    """

    name: str
    kind: Kind
    flag: str = ""
    required: bool = True
    advice: str = ""


def typed(raw: Mapping[str, Sequence[Any]], wanted: Iterable[Column], where: str, first_row: int = 1) -> Columns:
    """The cells of the wanted columns, by name; of those that are there, if they are not required.

    Args:
        where: the file, for messages.
        first_row: the number of the first cells.

    Raises:
        ValueError: for a column that isn't there, or a cell that isn't what is asked for.
    """
    found: Columns = {}
    for column in wanted:
        if column.name in raw:
            found[column.name] = _cells(raw[column.name], column, where, first_row)
        elif column.required:
            raise ValueError(f"{where}: {absent(column, raw)}")
    return found


def one(raw: Mapping[str, Sequence[Any]], column: Column, where: str) -> list[Any]:
    """The cells of one column, as `typed`."""
    return typed(raw, [column], where).get(column.name, [])


def absent(column: Column, names: Iterable[str]) -> str:
    """That there is no such column, and what to do."""
    names = list(names)
    known = ", ".join(names) or "none"
    joined = next((sign for sign in ";\t|" if len(names) == 1 and sign in names[0]), None)
    looks = f" (looks separated by {joined!r})" if joined else ""
    flag = f" Set --{column.flag}{nearest_match(column.name, names)}{column.advice}." if column.flag else ""
    return f"no column {column.name!r}; it has {known}{looks}.{flag}"


def _cells(values: Sequence[Any], column: Column, where: str, first_row: int) -> list[Any]:
    if column.kind == "time":
        return parse_times([plain(value) for value in values], where, column.name, first_row).tolist()
    read, cells = READERS[column.kind], []
    if column.kind in ("id", "text", "value", "label") and set(map(type, values)) <= {str, type(None)}:  # as in csv
        cells = list(values) if column.kind == "text" else [(value or "").strip() or None for value in values]
        return _without_points(cells, column, where, first_row)
    for number, value in enumerate(values, start=first_row):
        try:
            cells.append(read(plain(value)))
        except ValueError as error:
            shown = f"{column.name!r} is {_shown(value)!r}"
            raise ValueError(f"{where}, row {number}: {shown}, {error}.") from None
        except RecursionError as error:
            raise ValueError(f"{where}, row {number}: {column.name!r} holds {why(error)}.") from None
    return _without_points(cells, column, where, first_row)


def _shown(value: Any) -> str:
    try:
        return str(value)[:SHOWN]
    except RecursionError:
        return "[[[...]]]"


def _without_points(cells: list[Any], column: Column, where: str, first_row: int) -> list[Any]:
    """Ids that all end in .0 without it, and so labels that have gaps: whole numbers that became fractions on the way,
    as pandas makes them. Said aloud, with the first gap."""
    is_list = column.kind == "ids"
    if column.kind not in ("id", "ids") and not (column.kind in ("label", "labels") and None in cells):
        return cells
    found = [text for cell in cells if cell is not None for text in (cell if is_list else [cell])]
    if not found or not all(isinstance(text, str) and WHOLE.fullmatch(text) for text in found):
        return cells
    gap = ""
    if None in cells:
        gap = f"; row {first_row + cells.index(None)} has none, which is how fractions come about"
    print(
        f"{where}: all of {column.name!r} end in .0, as in {found[0]}; they are read as whole numbers{gap}",
        file=sys.stderr,
    )
    if is_list:
        return [cell and [text[:-2] for text in cell] for cell in cells]
    return [cell and cell[:-2] for cell in cells]


# -- one cell: ValueErrors say what it isn't --


def plain(value: Any) -> Any:
    """A cell of Python's own types, None if it is missing."""
    if value is None or isinstance(value, (str, list, tuple, dict, int)):
        return value
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return value
    if hasattr(value, "tolist"):  # numpy's
        return plain(value.tolist())
    return None if repr(value) == "<NA>" or value != value else value


def label(value: Any) -> str | None:
    """A text without space around, or another single value as one."""
    if isinstance(value, (list, tuple, dict, bytes)):
        raise ValueError("not one value")
    return None if value is None else str(value).strip() or None


def value(cell: Any) -> str | None:
    """A value of a feature. A float that is whole is an integer, which had gaps beside it."""
    if isinstance(cell, (float, Decimal)) and math.isfinite(cell) and cell == int(cell):
        cell = int(cell)
    return label(cell)


def identifier(cell: Any) -> str | None:
    if isinstance(cell, (bool, list, tuple, dict, bytes)):
        raise ValueError("not an id")
    return value(cell)


def words(cell: Any) -> str | None:
    """A value, or those of a list with commas between, to be read as text."""
    cell = in_brackets(cell)
    if isinstance(cell, (list, tuple)):
        return ", ".join(found for part in cell if (found := value(plain(part)))) or None
    return value(cell)


def as_ids(values: Iterable[Any]) -> list[str | None]:
    return [identifier(plain(value)) for value in values]


def text(value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise ValueError("not a text")
    return value


def number(value: Any) -> float | None:
    if value is None or value == "":
        return None
    try:
        found = float(value)
    except (TypeError, ValueError):
        raise ValueError("not a number") from None
    return found if math.isfinite(found) else None


def in_brackets(cell: Any) -> Any:
    """The list in a text such as `["a", "b"]`, in JSON or as Python prints it; anything else as it is.

    Raises:
        ValueError: for a list as numpy prints it, whose strings Python would join.
    """
    if not isinstance(cell, str) or not cell.lstrip().startswith(("[", "{", "(")):
        return cell
    try:
        return json.loads(cell)
    except (ValueError, RecursionError):
        pass
    if STRINGS_WITHOUT_COMMA.search(cell):
        raise ValueError("a list without commas; write it as JSON")
    try:
        return ast.literal_eval(cell.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return cell


def ids(value: Any) -> list[str] | None:
    """A list of ids, or a text of ids with spaces between, or with a list in brackets."""
    if isinstance(value, str):
        value = in_brackets(value)
    if isinstance(value, str):
        value = _parted(value)
    if value is None:
        return None
    if not isinstance(value, (list, tuple)):
        raise ValueError("not a list of items")
    return [item for item in as_ids(value) if item is not None]


def _parted(cell: str) -> list[str]:
    items = cell.split()
    if cell.lstrip().startswith(("[", "{", "(")):
        raise ValueError("not a list of items that JSON can read")
    if any(BETWEEN_ITEMS.search(item) if len(items) == 1 else BETWEEN_ITEMS.search(item[-1]) for item in items):
        raise ValueError('which may be one item or several; put spaces between items, or write ["a", "b"]')
    return items


def texts(value: Any) -> list[str] | None:
    """A list of texts, or one text; a text with a list of texts in brackets is the list."""
    inner = in_brackets(value)
    if isinstance(inner, (list, tuple)) and (inner is value or all(isinstance(item, str) for item in inner)):
        value = inner
    if value is None:
        return None
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, (list, tuple)) or not all(isinstance(item, str | None) for item in found):
        raise ValueError("not a text or a list of texts")
    return [item for item in found if item is not None]


def labels(value: Any) -> list[str] | str | None:
    """A list of labels; a text that holds none stays one text."""
    inner = in_brackets(value)
    if isinstance(inner, (list, tuple)):
        return [found for item in inner if (found := label(plain(item)))]
    return label(value)


READERS: dict[str, Callable[[Any], Any]] = {
    "id": identifier, "ids": ids, "value": value, "words": words, "text": text, "texts": texts, "label": label,
    "labels": labels, "number": number, "record": in_brackets,
}  # fmt: skip
