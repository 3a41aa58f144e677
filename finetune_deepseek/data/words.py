"""Words and texts: the known word that is nearest, two texts as one."""

import difflib
from collections.abc import Iterable


def nearest_match(word: str, known: Iterable[str]) -> str:
    """`" (did you mean 'x'?)"` for the known word that is nearest, or nothing if none is near."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def pair_text(question: str, passage: str) -> str:
    """What a reranker reads, in training and after it."""
    return f"{question.strip()}\n{passage.strip()}"
