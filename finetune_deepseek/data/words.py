"""Words and texts: the known word that is nearest, whether a language has spaces, two texts as one."""

import difflib
import re
from collections.abc import Iterable

LANGUAGES_WITHOUT_SPACES = ("zh", "ja", "th", "lo", "km", "my")


def has_spaces(language: str) -> bool:
    """Whether a language, given by a code such as en or zh-CN, has spaces between words."""
    return re.split("[-_]", language)[0].lower() not in LANGUAGES_WITHOUT_SPACES


def nearest_match(word: str, known: Iterable[str]) -> str:
    """`" (did you mean 'x'?)"` for the known word that is nearest, or nothing if none is near."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def pair_text(question: str, passage: str) -> str:
    """What a reranker reads, in training and after it."""
    return f"{question.strip()}\n{passage.strip()}"
