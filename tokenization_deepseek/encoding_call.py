"""One call of encoding with settings of its own, so that threads may share a tokenizer.

transformers 5.23 sets padding, truncation and `encode_special_tokens` on the shared `tokenizers.Tokenizer` before each
call. A `Call` takes its place for one call: it keeps those settings, reads the tokenizer, and never writes to it.
"""

import copy
import json
from collections.abc import Callable, Sequence
from typing import Any

from tokenizers import Encoding, Tokenizer, models

Rows = Sequence[Any]  # texts, pairs of texts, or lists of words


class Call:
    """What `PreTrainedTokenizerFast._encode_plus` asks of its `_tokenizer`, for one call.

    backend: that of the tokenizer, only read. encode_special_tokens, as transformers sets it, is answered by
    as_text: gives the encoder for texts whose control tokens are text.
    encoder: encodes in the backend's place, each text changed by `rewrite`.
    own_bos, own_eos: ids that a text may begin and end with already. They are cut there where the post-processor
        puts them on, so that they are special tokens at the edge of each window, and never doubled.
    """

    def __init__(
        self,
        backend: Tokenizer,
        as_text: Callable[[Rows], Tokenizer] | None = None,
        encoder: Tokenizer | None = None,
        rewrite: Callable[[str], str] | None = None,
        own_bos: int | None = None,
        own_eos: int | None = None,
    ) -> None:
        self.backend, self.encoder = backend, encoder or backend
        self.as_text, self.rewrite = as_text, rewrite
        self.own_bos, self.own_eos = own_bos, own_eos
        self.encode_special_tokens = False
        self.truncation: dict[str, Any] | None = None
        self.padding: dict[str, Any] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def enable_truncation(self, **settings: Any) -> None:
        self.truncation = settings

    def no_truncation(self) -> None:
        self.truncation = None

    def enable_padding(self, **settings: Any) -> None:
        self.padding = settings

    def no_padding(self) -> None:
        self.padding = None

    def encode_batch(
        self, rows: Rows, add_special_tokens: bool = True, is_pretokenized: bool = False
    ) -> list[Encoding]:
        """As in tokenizers."""
        encoder = self.as_text(rows) if self.encode_special_tokens and self.as_text else self.encoder
        if self.rewrite is not None:
            rows = [_each_string(self.rewrite, row) for row in rows]
        pairs = [_is_pair(row, is_pretokenized) for row in rows]
        first = [row[0] if pair else row for row, pair in zip(rows, pairs, strict=True)]
        second = [row[1] for row, pair in zip(rows, pairs, strict=True) if pair]
        firsts = encoder.encode_batch(first, is_pretokenized, add_special_tokens=False)
        seconds = iter(encoder.encode_batch(second, is_pretokenized, add_special_tokens=False))
        finisher = self._finisher()
        encodings = []
        for encoding, pair in zip(firsts, pairs, strict=True):
            other = _part(next(seconds), slice(None), type_id=1) if pair else None
            if add_special_tokens:
                encoding, other = self._without_own_ends(encoding, other)
            encodings.append(finisher.post_process(encoding, other, add_special_tokens))
        return self._padded(encodings)

    def _finisher(self) -> Tokenizer:
        """Truncates and adds special tokens as the tokenizer would; it has no vocabulary, so it costs nothing."""
        finisher = Tokenizer(models.BPE())
        if self.backend.post_processor is not None:
            finisher.post_processor = self.backend.post_processor
        if self.truncation is not None:
            finisher.enable_truncation(**self.truncation)
        return finisher

    def _without_own_ends(self, first: Encoding, second: Encoding | None) -> tuple[Encoding, Encoding | None]:
        if self.own_bos is not None and first.ids[:1] == [self.own_bos]:
            first = _part(first, slice(1, None))
        last = first if second is None else second
        if self.own_eos is not None and last.ids[-1:] == [self.own_eos]:
            last = _part(last, slice(-1), type_id=int(second is not None))
        return (last, None) if second is None else (first, last)

    def _padded(self, encodings: list[Encoding]) -> list[Encoding]:
        if self.padding is None or not encodings:
            return encodings
        settings = dict(self.padding)
        length, multiple = settings.pop("length"), settings.pop("pad_to_multiple_of")
        length = max(len(encoding) for encoding in encodings) if length is None else length
        if multiple:
            length = -(-length // multiple) * multiple
        for encoding in encodings:
            encoding.pad(length, **settings)
        return encodings


def view(tokenizer: Any, call: Call) -> Any:
    """The tokenizer with `call` in place of its backend: a shallow copy, to be used for one call."""
    other = copy.copy(tokenizer)
    other._tokenizer = call
    return other


def _is_pair(row: Any, is_pretokenized: bool) -> bool:
    return not isinstance(row, str) and len(row) == 2 and not (is_pretokenized and isinstance(row[0], str))


def _each_string(change: Callable[[str], str], text: Any) -> Any:
    return change(text) if isinstance(text, str) else type(text)(_each_string(change, part) for part in text)


def _part(encoding: Encoding, tokens: slice, type_id: int = 0) -> Encoding:
    """Some of the tokens with their own offsets, as a text's of its kind (0 first, 1 second) that isn't processed yet.

    `Encoding.truncate` would keep the others as overflow.
    """
    state = json.loads(encoding.__getstate__())
    for name, values in state.items():
        if isinstance(values, list) and name != "overflowing":
            state[name] = values[tokens]
    state |= {"type_ids": [type_id] * len(state["ids"]), "sequence_ranges": {}}
    part = Encoding()
    part.__setstate__(json.dumps(state).encode())
    return part
