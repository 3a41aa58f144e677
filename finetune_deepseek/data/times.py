"""A column of times, numbers or dates, read in one way for all its cells."""

import math
from collections.abc import Iterator, Sequence
from datetime import date
from itertools import product
from typing import Any

import numpy as np
import pandas as pd

SHOWN = 40  # characters of a cell in a message
INT64 = 2**63
ORDERS = (("%d", "%m", "%Y"), ("%m", "%d", "%Y"), ("%d", "%m", "%y"), ("%m", "%d", "%y"))
DAYS = [sign.join(order) for sign in "/.-" for order in ORDERS]
DAYS += [sign.join(("%d", month, "%Y")) for sign in " -/" for month in ("%b", "%B")]
DAYS += ["%b %d, %Y", "%B %d, %Y"]
HOURS = ("", " %H:%M", " %H:%M:%S", " %H:%M:%S.%f", " %I:%M %p", " %I:%M:%S %p", " %H:%M:%S %z")
FORMATS = [
    "ISO8601",
    *map("".join, product(DAYS, HOURS)),
    "%a, %d %b %Y %H:%M:%S %Z",
    "%a, %d %b %Y %H:%M:%S %z",
    "%a %b %d %H:%M:%S %Y",
    "%a %b %d %H:%M:%S %z %Y",
]


def parse_times(values: Sequence[Any], where: str, column: str, first_row: int = 1) -> np.ndarray:
    """Numbers of any unit as they are, integers exactly; dates as nanoseconds since 1970, or as microseconds where
    those don't reach. Without a zone a date is in UTC.

    Dates have one of `FORMATS` for all cells. Where the day or the month may stand first, a number above 12 decides.

    Raises:
        ValueError: naming the first value that is no time, or if nothing decides what the dates are.
    """
    numbers = [_number(value) for value in values]
    if any(number is not None for number in numbers) or not numbers:
        _refuse(values, [number is None for number in numbers], where, column, first_row, "are no time")
        if all(isinstance(number, int) and -INT64 <= number < INT64 for number in numbers):
            return np.array(numbers, dtype=np.int64)
        return np.array(numbers, dtype=np.float64)
    texts = pd.Series([value.isoformat() if isinstance(value, date) else value for value in values], dtype=object)
    _refuse(values, [not isinstance(text, str) for text in texts], where, column, first_row, "are no time")
    ways = list(_ways(texts))
    if not ways:
        is_bad = pd.to_datetime(texts, format="mixed", utc=True, errors="coerce").isna()
        what = "are no time" if is_bad.any() else "are dates of no known format; write them as 2024-12-31"
        _refuse(values, is_bad if is_bad.any() else [True] * len(values), where, column, first_row, what)
    _, found = max(ways, key=lambda way: way[1].notna().sum())
    whole = {name: dates for name, dates in ways if dates.notna().all()}
    if not whole:
        _refuse(values, found.isna(), where, column, first_row, "are no time in the format of the others")
    if any(not dates.equals(found) for dates in whole.values()):
        raise ValueError(
            f"{where}: nothing in {column!r} says whether {texts[0]!r} in row {first_row} is "
            f"{' or '.join(whole)}; write dates as 2024-12-31."
        )
    return _integers(found)


def _number(value: Any) -> int | float | None:
    """A finite number, or the text of one."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    for kind in (int, float) if isinstance(value, str) else ():
        try:
            value = kind(value)
            break
        except ValueError:
            continue
    return None if isinstance(value, str) or not math.isfinite(value) else value


def _ways(texts: pd.Series) -> Iterator[tuple[str, pd.Series]]:
    """The dates by each format that the first text has, NaT for others."""
    for name in FORMATS:
        if pd.to_datetime(texts[:1], format=name, utc=True, errors="coerce").notna().all():
            yield name, pd.to_datetime(texts, format=name, utc=True, errors="coerce")


def _refuse(values: Sequence[Any], is_bad: Sequence[bool], where: str, column: str, first_row: int, what: str) -> None:
    bad = np.flatnonzero(np.asarray(is_bad, dtype=bool))
    if len(bad):
        raise ValueError(
            f"{where}: {len(bad):,} of {len(values):,} values of {column!r} {what}, the first is "
            f"{str(values[bad[0]])[:SHOWN]!r} in row {first_row + bad[0]}; mend them, or set --timestamp_column none "
            "to take the file's order."
        )


def _integers(dates: pd.Series) -> np.ndarray:
    try:
        return dates.dt.as_unit("ns").astype("int64").to_numpy()
    except pd.errors.OutOfBoundsDatetime:
        return dates.dt.as_unit("us").astype("int64").to_numpy()
