"""Control tokens that only templates write: in users' text their letters stay letters.

A control token is an added token that is special, stands in brackets (`<think>`, `[INST]`, `｜DSML｜`), or is listed
in `tokenizer.chat_control_tokens`; other added tokens (words, letters, blanks) are text. transformers'
`split_special_tokens=True` splits special ones alone. These functions serve any fast tokenizer
(as do those of chat_encoding.py, for chat templates):

    encode_text(tokenizer, texts, ...)                                    text without a control token
    encode_parts(tokenizer, [Control("<｜User｜>"), text, ...], ...)       a prompt, of a template's parts and texts

How: a twin of the tokenizer spells its control tokens in characters that Unicode keeps out of texts, name by name as
long as the token, so that offsets are those of the text. A template's control tokens are respelled, a user's are not.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from tokenizers import Tokenizer
from transformers import BatchEncoding, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .encoding_call import Call, view

_BRACKETED = re.compile(r"[<\[{(|｜【].*[>\]})|｜】]", re.DOTALL)
_NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]


class Control(str):
    """A part of a template: control tokens in it are meant as such."""


class Twin(NamedTuple):
    """A tokenizer whose control tokens have other names.

    names: by control token. filler begins each name; opening and closing stand around a user's control token and
    vanish when the text is encoded. No text that is encoded by this twin holds one of the three.
    """

    backend: Tokenizer
    names: dict[str, str]
    filler: str
    opening: str
    closing: str

    def mark(self, text: str) -> str:
        """The text with its control tokens marked as a user's."""
        return pattern_of(self.names).sub(lambda match: f"{self.opening}{match[0]}{self.closing}", text)

    def respell(self, text: str) -> str:
        """The text with its control tokens under their names in the twin."""
        return pattern_of(self.names).sub(lambda match: self.names[match[0]], text)

    def respell_unmarked(self, text: str) -> str:
        """The text with those control tokens under their names that aren't marked as a user's."""
        if self.opening.encode("ascii", "backslashreplace").decode() in text:
            raise ValueError("the chat template escapes a text that holds a control token; take the token out of it")
        token = pattern_of(self.names).pattern
        either = re.compile(f"{self.opening}(?:{token}){self.closing}|({token})")
        text = either.sub(lambda match: self.names[match[1]] if match[1] else match[0], text)
        # no mark in front: tokenizers like Llama's put a blank before what begins at the first character
        return text[1] + text[0] + text[2:] if text.startswith(self.opening) else text


_CONTROL: WeakKeyDictionary[Tokenizer, tuple[Any, dict[str, int]]] = WeakKeyDictionary()
_TWINS: WeakKeyDictionary[Tokenizer, tuple[Any, Twin]] = WeakKeyDictionary()


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Ids by control token. Raises ValueError for a tokenizer without the tokenizers library behind it."""
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"{type(tokenizer).__name__} isn't a fast tokenizer; save it with a tokenizer.json")
    backend = tokenizer.backend_tokenizer
    listed = tuple(getattr(tokenizer, "chat_control_tokens", None) or ())
    made_of = (backend.get_vocab_size(with_added_tokens=True), tuple(tokenizer.all_special_tokens), listed)
    known, tokens = _CONTROL.get(backend, (None, {}))
    if known != made_of:
        tokens = {
            token.content: token_id
            for token_id, token in backend.get_added_tokens_decoder().items()
            if token.special or token.content in listed or _BRACKETED.fullmatch(token.content)
        }
        _CONTROL[backend] = (made_of, tokens)
    return tokens


def encode_text(tokenizer: PreTrainedTokenizerBase, text: Any, text_pair: Any = None, **options: Any) -> BatchEncoding:
    """As `tokenizer(text, text_pair, **options)`, but control tokens in the texts are text.

    Special tokens are put on as usual (`add_special_tokens`). Where no text holds a control token, ids are those of
    the tokenizer itself. Decoding gives the texts back wherever it does so for text without control tokens.

    Raises ValueError: no fast tokenizer; one that makes a control token out of plain letters.
    """
    if holds_control(tokenizer, [text, text_pair]):
        tokenizer = twin_view(tokenizer, twin_of(tokenizer, [text, text_pair]))
    return tokenizer(text, text_pair, **options)


def encode_parts(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[str] | Sequence[Sequence[str]], **options: Any
) -> BatchEncoding:
    """One row of parts, or several, as `tokenizer("".join(parts), **options)`, with control tokens in `Control` alone.

    Neighbouring parts are encoded as one text, so ids don't depend on where a template is cut.
    Raises ValueError as `encode_text`.
    """
    pattern = pattern_of(control_tokens(tokenizer))
    single = bool(rows) and isinstance(rows[0], str)
    parts: Any = [rows] if single else rows
    texts = ["".join(row) for row in parts]
    meant = [[found for part in row if isinstance(part, Control) for found in pattern.findall(part)] for row in parts]
    if meant != [pattern.findall(text) for text in texts]:
        twin = twin_of(tokenizer, texts)
        tokenizer = twin_view(tokenizer, twin)
        texts = ["".join(twin.respell(part) if isinstance(part, Control) else part for part in row) for row in parts]
    return tokenizer(texts[0] if single else texts, **options)


def holds_control(tokenizer: PreTrainedTokenizerBase, texts: Any) -> bool:
    """Whether a control token's letters stand in any of the nested strings."""
    pattern = pattern_of(control_tokens(tokenizer))
    return any(pattern.search(text) for text in strings(texts))


def strings(value: Any) -> Iterator[str]:
    """Every string in nested lists, tuples and dictionaries, in order."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from strings([part for item in value.items() for part in item])
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from strings(part)


# ---- the twin


def twin_of(tokenizer: PreTrainedTokenizerBase, texts: Any) -> Twin:
    """The twin for these nested strings: made once, and anew where they hold the characters that it spells with."""
    backend = tokenizer.backend_tokenizer
    tokens = control_tokens(tokenizer)
    made_of = (tuple(tokens.items()), backend.get_vocab_size(with_added_tokens=True))
    known, twin = _TWINS.get(backend, (None, None))
    present = {char for text in strings(texts) for char in _NONCHARACTERS if char in text}
    if twin is None or known != made_of or present & {twin.filler, twin.opening, twin.closing}:
        free = [char for char in _NONCHARACTERS if char not in present]
        if len(free) < 3:
            raise ValueError("a text holds nearly all of the noncharacters U+FDD0 to U+FDEF; take them out")
        twin = _make_twin(backend, tokens, *free[:3])
        _TWINS[backend] = (made_of, twin)
    return twin


def _make_twin(backend: Tokenizer, tokens: dict[str, int], filler: str, opening: str, closing: str) -> Twin:
    # filler first, so that one character tells whether a text holds a name; then one of 65,534 private characters
    names = {token: filler + chr(0x100000 + place) + filler * (len(token) - 2) for place, token in enumerate(tokens)}
    state = json.loads(backend.to_str()) | {"padding": None, "truncation": None, "post_processor": None}
    for added in state["added_tokens"]:
        added["content"] = names.get(added["content"], added["content"])
    unknown = _rename(state["model"], names)
    vanish = [{"type": "Replace", "pattern": {"String": mark}, "content": ""} for mark in (opening, closing)]
    normalizers = [*vanish, *([state["normalizer"]] if state["normalizer"] else [])]
    state["normalizer"] = {"type": "Sequence", "normalizers": normalizers}
    twin = Twin(Tokenizer.from_str(json.dumps(state)), names, filler, opening, closing)
    _check_twin(twin, tokens, unknown)
    return twin


def _rename(model: dict[str, Any], names: dict[str, str]) -> int | None:
    """Rename control tokens in the model's state, drop merges of letters into one, and give the id of the unknown."""
    unknown = model.get("unk_token")
    if isinstance(model["vocab"], dict):
        unknown_id = model["vocab"].get(unknown)
        model["vocab"] = {names.get(token, token): token_id for token, token_id in model["vocab"].items()}
    else:  # pieces with their scores
        unknown_id = model.get("unk_id")
        model["vocab"] = [[names.get(token, token), score] for token, score in model["vocab"]]
    if unknown is not None:
        model["unk_token"] = names.get(unknown, unknown)
    if "merges" in model:
        pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
        model["merges"] = [pair for pair in pairs if names.keys().isdisjoint([*pair, "".join(pair)])]
    return unknown_id


def _check_twin(twin: Twin, tokens: dict[str, int], unknown: int | None) -> None:
    named = twin.backend.encode_batch(list(twin.names.values()), add_special_tokens=False)
    spelled = twin.backend.encode_batch(list(tokens), add_special_tokens=False)
    ids = set(tokens.values()) - {unknown}
    for (token, token_id), name, letters in zip(tokens.items(), named, spelled, strict=True):
        if token_id not in name.ids or ids.intersection(letters.ids):
            raise ValueError(f"this tokenizer can't tell the control token {token!r} from its letters in a text")


def twin_view(tokenizer: Any, twin: Twin, rewrite: Callable[[str], str] | None = None) -> Any:
    ends = tokenizer.own_ends() if hasattr(tokenizer, "own_ends") else {}
    return view(tokenizer, Call(tokenizer.backend_tokenizer, encoder=twin.backend, rewrite=rewrite, **ends))


@lru_cache
def _pattern(tokens: tuple[str, ...]) -> re.Pattern[str]:
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def pattern_of(tokens: Iterable[str]) -> re.Pattern[str]:
    return _pattern(tuple(tokens))
