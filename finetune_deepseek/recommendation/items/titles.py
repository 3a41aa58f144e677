"""Titles of items, from a file of items; where there is none, an item's id stands in for it."""

from collections.abc import Iterable

from .interactions import as_text, read_columns, require_column


def read_titles(path: str, item_column: str, title_column: str) -> dict[str, str]:
    """Titles by item id. Of an item that is there twice the first title counts.

    Raises:
        ValueError: for a file that can't be read, has no such columns, or no title.
    """
    columns = read_columns(path)
    items = as_text(require_column(columns, "item_column", item_column, path))
    texts = as_text(require_column(columns, "title_column", title_column, path))
    titles: dict[str, str] = {}
    for item, text in zip(items, texts, strict=True):
        if item is not None and text is not None:
            titles.setdefault(item, " ".join(text.split()))
    if not titles:
        raise ValueError(f"{path}: no row has an item and a title.")
    return titles


def with_titles(items: Iterable[str], titles: dict[str, str]) -> tuple[dict[str, str], int]:
    """A title for each item, and how many have none of their own."""
    named = {item: titles.get(item, item) for item in items}
    return named, sum(item not in titles for item in named)
