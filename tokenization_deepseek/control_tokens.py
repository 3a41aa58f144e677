"""Control tokens that only templates write: in users' text their letters stay letters.

A control token is an added token that is special, stands in brackets (`<think>`, `[INST]`, `｜DSML｜`), or is listed
in `tokenizer.chat_control_tokens`; other added tokens (words, letters, blanks) are text. transformers'
`split_special_tokens=True` splits special ones alone. These functions serve any fast tokenizer:

    encode_text(tokenizer, texts, ...)                                    text without a control token
    encode_parts(tokenizer, [Control("<｜User｜>"), text, ...], ...)       a prompt, of a template's parts and texts
    encode_chat(tokenizer, messages, tools=..., ...)                      a chat template filled with texts

How: a twin of the tokenizer spells its control tokens in characters that Unicode keeps out of texts, name by name as
long as the token, so that offsets are those of the text. A template's control tokens are respelled, a user's are not.
"""

import dataclasses
import inspect
import json
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from tokenizers import Tokenizer
from transformers import BatchEncoding, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from .encoding_call import Call, view

_BRACKETED = re.compile(r"[<\[{(|｜【].*[>\]})|｜】]", re.DOTALL)
_NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]
_THOUGHT = "<think>"
# What isn't a variable of the template, or is one (`bos_token`) that names a special token.
_SPECIAL = frozenset(PreTrainedTokenizerBase.SPECIAL_TOKENS_ATTRIBUTES)
_TEMPLATE_OPTIONS = _SPECIAL.union(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters)


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
        return _pattern(self.names).sub(lambda match: f"{self.opening}{match[0]}{self.closing}", text)

    def respell(self, text: str) -> str:
        """The text with its control tokens under their names in the twin."""
        return _pattern(self.names).sub(lambda match: self.names[match[0]], text)

    def respell_unmarked(self, text: str) -> str:
        """The text with those control tokens under their names that aren't marked as a user's."""
        if self.opening.encode("ascii", "backslashreplace").decode() in text:
            raise ValueError("the chat template escapes a text that holds a control token; take the token out of it")
        token = _pattern(self.names).pattern
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
        tokenizer = _twin_view(tokenizer, twin_of(tokenizer, [text, text_pair]))
    return tokenizer(text, text_pair, **options)


def encode_parts(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[str] | Sequence[Sequence[str]], **options: Any
) -> BatchEncoding:
    """One row of parts, or several, as `tokenizer("".join(parts), **options)`, with control tokens in `Control` alone.

    Neighbouring parts are encoded as one text, so ids don't depend on where a template is cut.
    Raises ValueError as `encode_text`.
    """
    pattern = _pattern(control_tokens(tokenizer))
    single = bool(rows) and isinstance(rows[0], str)
    parts: Any = [rows] if single else rows
    texts = ["".join(row) for row in parts]
    meant = [[found for part in row if isinstance(part, Control) for found in pattern.findall(part)] for row in parts]
    if meant != [pattern.findall(text) for text in texts]:
        twin = twin_of(tokenizer, texts)
        tokenizer = _twin_view(tokenizer, twin)
        texts = ["".join(twin.respell(part) if isinstance(part, Control) else part for part in row) for row in parts]
    return tokenizer(texts[0] if single else texts, **options)


def encode_chat(
    tokenizer: PreTrainedTokenizerBase, conversation: Any, tools: Any = None, documents: Any = None, **options: Any
) -> Any:
    """As transformers' `apply_chat_template(tokenize=True)`, but control tokens in what the template is filled with
    (messages, tools, documents, variables) are text. `<think>` at the very beginning of an assistant's content is
    read as the template's own: it opens the reasoning.

    Raises ValueError as `encode_text`; TemplateError for what the template has no place for.
    """
    options.pop("sanitize_control_tokens", None)  # done here, with masks and without losing characters
    answers = options.pop("return_assistant_tokens_mask", False)
    given = {"conversation": _plain(conversation), "tools": _plain(tools), "documents": _plain(documents)}
    given |= {name: options.pop(name) for name in options.keys() - _TEMPLATE_OPTIONS}
    pattern = _pattern(control_tokens(tokenizer))
    if _changed(given, lambda text: pattern.sub("", text)) != given or _joins_into_control(given, pattern):
        twin = twin_of(tokenizer, given)
        given, tokenizer = _changed(given, twin.mark, twin.closing), _twin_view(tokenizer, twin, twin.respell_unmarked)
    encoded = PreTrainedTokenizerBase.apply_chat_template(tokenizer, **given, **options)
    if not answers:
        return encoded
    if options.get("continue_final_message") or not isinstance(encoded, BatchEncoding):
        raise ValueError("return_assistant_tokens_mask needs return_dict=True and no continue_final_message")
    return _with_assistant_masks(tokenizer, encoded, given, options)


def holds_control(tokenizer: PreTrainedTokenizerBase, texts: Any) -> bool:
    """Whether a control token's letters stand in any of the nested strings."""
    pattern = _pattern(control_tokens(tokenizer))
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


def _twin_view(tokenizer: Any, twin: Twin, rewrite: Callable[[str], str] | None = None) -> Any:
    ends = tokenizer.own_ends() if hasattr(tokenizer, "own_ends") else {}
    return view(tokenizer, Call(tokenizer.backend_tokenizer, encoder=twin.backend, rewrite=rewrite, **ends))


@lru_cache
def _pattern_of(tokens: tuple[str, ...]) -> re.Pattern[str]:
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def _pattern(tokens: Iterable[str]) -> re.Pattern[str]:
    return _pattern_of(tuple(tokens))


# ---- chats


def _plain(value: Any) -> Any:
    """Chats and messages given as objects, as lists and dictionaries."""
    value = getattr(value, "messages", value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    elif callable(getattr(value, "model_dump", None)):
        value = value.model_dump()
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, (list, tuple)) else value


def _changed(value: Any, change: Callable[[str], str], joint: str = "") -> Any:
    """Nested lists and dictionaries with their strings changed, keys too, and `joint` behind each text part.

    An assistant's opening `<think>` stays as it is.
    """
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        changed = {_changed(key, change): _changed(part, change, joint) for key, part in value.items()}
        content = value.get("content")
        if value.get("role") == "assistant" and isinstance(content, str) and content.startswith(_THOUGHT):
            changed["content"] = _THOUGHT + change(content.removeprefix(_THOUGHT))
        if _is_text_part(value):
            changed["text"] += joint
        return changed
    return [_changed(part, change, joint) for part in value] if isinstance(value, (list, tuple)) else value


def _is_text_part(value: Any) -> bool:
    return isinstance(value, Mapping) and value.get("type") == "text" and isinstance(value.get("text"), str)


def _joins_into_control(value: Any, pattern: re.Pattern[str]) -> bool:
    """Whether neighbouring text parts form a control token that none of them holds."""
    if isinstance(value, Mapping):
        return any(_joins_into_control(part, pattern) for part in value.values())
    if not isinstance(value, (list, tuple)):
        return False
    texts = [part["text"] for part in value if _is_text_part(part)]
    return bool(pattern.search("".join(texts))) or any(_joins_into_control(part, pattern) for part in value)


def _with_assistant_masks(
    tokenizer: Any, encoded: BatchEncoding, given: dict[str, Any], options: dict[str, Any]
) -> BatchEncoding:
    """Add `assistant_masks`: 1 for each token that lies in an answer, in part at least."""
    variables = {name: given[name] for name in given.keys() - _TEMPLATE_OPTIONS}
    variables |= {name: options[name] for name in options.keys() & _SPECIAL}
    batched = isinstance(given["conversation"][0], list)
    chats = given["conversation"] if batched else [given["conversation"]]
    template = tokenizer.get_chat_template(options.get("chat_template"), given["tools"])
    spans: list[list[tuple[int, int]]] = render_jinja_template(  # type: ignore[assignment]  # said to be a string
        [[{key: part for key, part in turn.items() if part is not None} for turn in chat] for chat in chats],
        given["tools"],
        given["documents"],
        # transformers 5.23 keeps spans on the compiled template, which threads share: one for each thread
        chat_template=f"{template}{{# {threading.get_ident()} #}}",
        return_assistant_tokens_mask=True,
        add_generation_prompt=options.get("add_generation_prompt", False),
        **{**tokenizer.special_tokens_map, **variables},
    )[1]
    masks = [
        [int(any(start < stop and end > begin for begin, stop in answers)) for start, end in encoding.offsets]
        for answers, encoding in zip(spans, encoded.encodings or (), strict=True)
    ]
    tensors = options.get("return_tensors")
    encoded["assistant_masks"] = masks if batched or tensors else masks[0]
    return encoded.convert_to_tensors(tensors) if tensors else encoded
