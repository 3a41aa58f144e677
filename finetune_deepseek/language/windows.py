"""Held-out text in windows: every token of a document is counted once, however the document is cut.

A document is a token in front (BOS, or EOS where there is no BOS), its text, and EOS: `documents.document_ids`. All
but the token in front are counted, EOS among them; of bytes, those of the text alone. So

    perplexity      exp(nats / tokens)
    bits per byte   nats / ln 2 / bytes of the text in UTF-8, which tokenizers of any vocabulary can be compared by

Without a stride windows overlap by the one token that the next one begins with, and a token sees what its window has
before it. With a stride each window begins so many tokens after the one before and counts only what that one didn't.
"""

from collections.abc import Iterator
from typing import NamedTuple


class Window(NamedTuple):
    """Tokens `start` to `end` (without it) of a document, of which those from `counted` on are counted."""

    start: int
    end: int
    counted: int


def windows(length: int, size: int, stride: int | None = None) -> Iterator[Window]:
    """The windows of a document of so many tokens.

    Args:
        size: tokens of a window.
        stride: tokens between the beginnings of two windows, from 1 to size - 1, which it is without one.

    Raises:
        ValueError: for a stride that would leave tokens out.
    """
    step = size - 1 if stride is None else stride
    if not 1 <= step < size:
        raise ValueError(f"a stride of {step} tokens: give 1 to {size - 1}, less than a window of {size}")
    counted = 1
    for start in range(0, max(length - 1, 0), step):
        end = min(start + size, length)
        yield Window(start, end, counted)
        if end == length:
            return
        counted = end
