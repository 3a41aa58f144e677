"""Floors for question answering: what is reached without reading. A reader that isn't above them hasn't learned."""

import random
import re
from collections.abc import Callable
from typing import Any

from ..data.languages import HAN

# A sentence ends with a stop, or a line does.
SENTENCE = re.compile(r"[^\n]+?(?:[.!?](?=\s|$)|[。！？]|(?=\n)|$)")
# A Chinese character or another word.
WORD = re.compile(f"[{HAN}]|[^\\W{HAN}]+")
LONGEST_RANDOM_SPAN = 10


def sentences(passage: str) -> list[str]:
    return [found for match in SENTENCE.finditer(passage) if (found := match[0].strip())] or [passage.strip()]


def words(text: str) -> set[str]:
    return set(WORD.findall(text.lower()))


def overlap_sentence(question: str, passage: str, rng: random.Random) -> str:
    """The sentence with most words of the question, the earliest of several."""
    asked = words(question)
    return max(sentences(passage), key=lambda sentence: len(asked & words(sentence)))


def first_sentence(question: str, passage: str, rng: random.Random) -> str:
    return sentences(passage)[0]


def random_span(question: str, passage: str, rng: random.Random) -> str:
    """From 1 to 10 words in a row, Chinese characters being words."""
    places = [match.span() for match in WORD.finditer(passage)] or [(0, len(passage))]
    first = rng.randrange(len(places))
    last = min(first + rng.randrange(LONGEST_RANDOM_SPAN), len(places) - 1)
    return passage[places[first][0] : places[last][1]]


FLOORS: dict[str, Callable[[str, str, random.Random], str]] = {
    "overlap_sentence": overlap_sentence,
    "first_sentence": first_sentence,
    "random_span": random_span,
}
NAMES = {
    "overlap_sentence": "the sentence with most words of the question",
    "first_sentence": "the first sentence",
    "random_span": "a random span",
}


def floor_answers(name: str, rows: list[dict[str, Any]], seed: int) -> list[str]:
    """The answers of a floor to rows with `source`, the question, and `context`."""
    rng = random.Random(seed)
    return [FLOORS[name](row["source"], row["context"], rng) for row in rows]
