"""Texts found by their meaning and by their words: vectors, BM25, an index of passages, a reranker."""

from typing import Any

NAMES = ("PassageIndex", "Retriever")


def __getattr__(name: str) -> Any:
    """`PassageIndex` and `Retriever`, imported when they are asked for: an index needs more than most do here."""
    if name not in NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import passage_index

    return getattr(passage_index, name)
