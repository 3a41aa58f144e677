"""Passages and questions as tokens whose place in the text is known, and the windows that a long passage is read in.

A window is `BOS question \\n passage EOS`, or with the question on both sides it has `\\n question` before EOS too.
Its last token sees everything, whatever the attention's direction; pointing at it means no answer.
"""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

from transformers import PreTrainedTokenizerBase

from tokenization_deepseek import encode_text

from ..data.languages import HAN

Offset = tuple[int, int]
# With characters apart a token never holds two Chinese characters or signs, between which an answer may begin.
PIECES = re.compile(rf"[{HAN}]|[^\x00-\x7f\w\s]|(?:(?![{HAN}])[\x00-\x7f\w\s])+")
SEPARATOR = "\n"


class Window(NamedTuple):
    """Token ids; their kinds (see `Layout`); where the passage begins, which of its tokens that is, how many come."""

    input_ids: list[int]
    token_type_ids: list[int]
    begin: int
    first: int
    length: int


class Passage(NamedTuple):
    """A text, and the stretch of it that each of its tokens stands for, without space around."""

    text: str
    ids: list[int]
    offsets: list[Offset]

    def tokens_of(self, start: int, end: int) -> Offset | None:
        """The first and last token of a stretch of the text; None if it begins or ends in no token."""
        first = next((number for number, (low, high) in enumerate(self.offsets) if low <= start < high), None)
        last = next(
            (n for n in range(len(self.ids) - 1, -1, -1) if self.offsets[n][0] < end <= self.offsets[n][1]), None
        )
        return None if first is None or last is None or last < first else (first, last)

    def is_whole(self, start: int, end: int) -> bool:
        """Whether a stretch begins and ends where tokens do."""
        place = self.tokens_of(start, end)
        return place is not None and self.offsets[place[0]][0] == start and self.offsets[place[1]][1] == end


class Encoder:
    """Tokens of passages and questions, kept for the next question about the same passage.

    Args:
        characters: Chinese characters apart.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, characters: bool) -> None:
        if not tokenizer.is_fast:
            raise ValueError("Extractive question answering needs a fast tokenizer, which says where tokens stand.")
        self.tokenizer, self.characters = tokenizer, characters
        self.known: dict[str, tuple[list[int], list[Offset]]] = {}
        self.passages: dict[str, Passage] = {}

    def pieces(self, text: str) -> list[str]:
        return PIECES.findall(text) if self.characters else [text]

    def passage(self, text: str) -> Passage:
        if text not in self.passages:
            ids, offsets = self._encode(text)
            self.passages[text] = Passage(text, ids, [trimmed(text, *offset) for offset in offsets])
        return self.passages[text]

    def ids(self, text: str) -> list[int]:
        return self._encode(text)[0]

    def _encode(self, text: str) -> tuple[list[int], list[Offset]]:
        pieces = self.pieces(text)
        missing = list(dict.fromkeys(piece for piece in pieces if piece not in self.known))
        if missing:
            encoded = encode_text(
                self.tokenizer, missing, add_special_tokens=False, return_offsets_mapping=True, verbose=False
            )
            for piece, ids, offsets in zip(missing, encoded["input_ids"], encoded["offset_mapping"], strict=True):
                self.known[piece] = ids, [tuple(offset) for offset in offsets]
        all_ids: list[int] = []
        all_offsets: list[Offset] = []
        place = 0
        for piece in pieces:
            ids, offsets = self.known[piece]
            all_ids += ids
            all_offsets += [(low + place, high + place) for low, high in offsets]
            place += len(piece)
        return all_ids, all_offsets


def trimmed(text: str, low: int, high: int) -> Offset:
    """The stretch without space around; byte-level tokens begin with the space before a word."""
    while low < high and text[low].isspace():
        low += 1
    while high > low and text[high - 1].isspace():
        high -= 1
    return low, high


OTHER, PASSAGE, MATCH = range(3)
TOKEN_TYPES = 3


class Layout:
    """How questions and passages become windows, or prompts.

    A token is of the passage or not, and of the passage's those are apart that the question has too, in whatever case:
    the exact match of Chen et al., arXiv 1704.00051, section 3.2, which few questions don't teach.

    Args:
        arguments: `max_seq_length`, `doc_stride`, `max_question_length` (tokens) and `question_placement`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, arguments: Any, characters: bool) -> None:
        self.encoder = Encoder(tokenizer, characters)
        self.arguments = arguments
        self.begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        self.end: list[int] = [tokenizer.eos_token_id]
        self.separator = self.encoder.ids(SEPARATOR)
        self.words: dict[int, str | int] = {}  # by token, for the match

    def around(self, question: str) -> tuple[list[int], list[int]]:
        """Tokens before and after the passage; a question of more than --max_question_length tokens is cut."""
        ids = self.encoder.ids(question)[: self.arguments.max_question_length]
        after = [*self.separator, *ids] if self.arguments.question_placement == "both" else []
        return [*self.begin, *ids, *self.separator], [*after, *self.end]

    def windows(self, question: str, passage: Passage) -> Iterator[Window]:
        """Windows of --max_seq_length tokens over a passage, neighbours sharing --doc_stride tokens of it."""
        before, after = self.around(question)
        asked = {self._word(token) for token in self.encoder.ids(question)}
        kinds = [MATCH if self._word(token) in asked else PASSAGE for token in passage.ids]
        room = self.arguments.max_seq_length - len(before) - len(after)
        step = room - self.arguments.doc_stride
        if step < 1:
            raise ValueError(
                f"--max_seq_length {self.arguments.max_seq_length}: a question of {len(before) + len(after)} tokens "
                f"leaves {room} for the passage, not more than --doc_stride {self.arguments.doc_stride}; raise the "
                "first, or lower --doc_stride or --max_question_length."
            )
        first = 0
        while True:
            ids = passage.ids[first : first + room]
            types = [*[OTHER] * len(before), *kinds[first : first + room], *[OTHER] * len(after)]
            yield Window([*before, *ids, *after], types, len(before), first, len(ids))
            if first + room >= len(passage.ids):
                break
            first += step

    def _word(self, token: int) -> str | int:
        """A token without the space before it and without capitals; its id if it is but a part of a character."""
        if token not in self.words:
            text = cast(str, self.encoder.tokenizer.decode([token]))
            self.words[token] = token if "\ufffd" in text else text.strip().lower()
        return self.words[token]
