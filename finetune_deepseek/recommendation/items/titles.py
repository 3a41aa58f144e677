"""Titles of items, from a file of items; where there is none, an item's id stands in for it."""

from collections.abc import Iterable

from ...data.cells import Column, typed
from ...data.table import read_columns


def read_titles(path: str, item_column: str, title_column: str) -> dict[str, str]:
    """Titles by item id. Of an item that is there twice the first title counts.

    Raises:
        ValueError: for a file that can't be read, has no such columns, or no title.
    """
    wanted = [Column(item_column, "id", "item_column"), Column(title_column, "value", "title_column")]
    columns = typed(read_columns(path), wanted, path)
    titles: dict[str, str] = {}
    for item, text in zip(columns[item_column], columns[title_column], strict=True):
        if item is not None and text is not None:
            titles.setdefault(item, " ".join(text.split()))
    if not titles:
        raise ValueError(f"{path}: no row has an item and a title.")
    return titles


def with_titles(items: Iterable[str], titles: dict[str, str]) -> tuple[dict[str, str], int]:
    """A title for each item, and how many have none of their own."""
    named = {item: titles.get(item, item) for item in items}
    return named, sum(item not in titles for item in named)
