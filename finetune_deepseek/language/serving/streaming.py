"""Text as its tokens come: whole characters only, held back while it may be the beginning of a mark."""

from collections.abc import Iterable, Sequence
from typing import Any

HALF = "\ufffd"  # what decoding gives for bytes that are no whole character


class TextStream:
    """The text that each token adds; the pieces together are the text of all of them.

    A piece is what the tokens since the last piece add to those of the piece before: a tokenizer may write a token
    otherwise at the beginning of a text.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.before = self.done = 0  # where the piece before begins and ends

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def put(self, token: int) -> str:
        """What may be shown after one more token; "" in the middle of a character."""
        self.ids.append(token)
        known, text = self._decode(self.ids[self.before : self.done]), self._decode(self.ids[self.before :])
        if len(text) <= len(known) or text.endswith(HALF):
            return ""
        self.before, self.done = self.done, len(self.ids)
        return text[len(known) :]

    def end(self) -> str:
        """What was held back."""
        known, text = self._decode(self.ids[self.before : self.done]), self._decode(self.ids[self.before :])
        self.before = self.done = len(self.ids)
        return text[len(known) :]


def held_back(text: str, marks: Iterable[str]) -> int:
    """How many characters at the end of a text may begin one of the marks."""
    longest = max((len(mark) for mark in marks), default=0)
    for size in range(min(len(text), longest - 1), 0, -1):
        if any(mark.startswith(text[-size:]) for mark in marks if len(mark) > size):
            return size
    return 0


class Stopper:
    """Ends a text before the first of the stop texts in it."""

    def __init__(self, stops: Sequence[str]):
        self.stops, self.text, self.has_stopped = stops, "", False

    def put(self, piece: str) -> str:
        """What of the text so far may be shown now; nothing after a stop text."""
        if self.has_stopped:
            return ""
        self.text += piece
        places = [place for stop in self.stops if (place := self.text.find(stop)) >= 0]
        self.has_stopped = bool(places)
        end = min(places) if places else len(self.text) - held_back(self.text, self.stops)
        shown, self.text = self.text[:end], self.text[end:]
        return shown

    def end(self) -> str:
        """What was held back and began no stop text."""
        shown, self.text = ("" if self.has_stopped else self.text), ""
        return shown
