"""A conversation as ids: a chat template filled with texts in which control tokens stay text, and masks of answers.

    encode_chat(tokenizer, messages, tools=..., ...)       as `apply_chat_template(tokenize=True)`
    encode_answers(tokenizer, messages, tools=..., ...)    ids, what the model writes, what its prompt supplies
    generation_prompt(tokenizer, ...)                      what an answer to a user begins after

Both serve any fast tokenizer; DeepSeekTokenizer's own `apply_chat_template` is the first.
"""

import dataclasses
import inspect
import json
import re
import threading
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, NamedTuple

from transformers import BatchEncoding, PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from .control_tokens import control_tokens, pattern_of, twin_of, twin_view
from .tool_calls import read_json

_THOUGHT = "<think>"
# What isn't a variable of the template, or is one (`bos_token`) that names a special token.
_SPECIAL = frozenset(PreTrainedTokenizerBase.SPECIAL_TOKENS_ATTRIBUTES)
_TEMPLATE_OPTIONS = _SPECIAL.union(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters)
_SWITCHES: tuple[dict[str, bool], ...] = tuple(
    {"thinking": thinks, "enable_thinking": thinks} for thinks in (False, True)
)
# How a template goes through the arguments of a tool call, as a mapping.
_WALKS = re.compile(r"arguments\s*(\.items\(|\|\s*(items|dictsort)\b)")
_ASK = {"role": "user", "content": "x"}
_PROMPTS: dict[str, list[str]] = {}  # generation prompts by template, variables and what they stand behind
Span = tuple[int, int]


class AnsweredChat(NamedTuple):
    """A conversation as ids. A loss on answers takes assistant_mask; with `prompt_mask` added, headers are learnt too.

    input_ids: [S].
    assistant_mask: [S], 1 for what the model itself writes: reasoning, content, tool calls, end of sentence.
    prompt_mask: [S], 1 for what stands before an answer because the generation prompt supplies it: the role's header,
        a forced `<think>` or `</think>`, an empty block of reasoning. No token is in both masks.
    answers: for each answer its first token and the one behind its last, prompt left out.
    """

    input_ids: list[int]
    assistant_mask: list[int]
    prompt_mask: list[int]
    answers: list[Span]


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
    tokenizer, given = _filled(tokenizer, conversation, tools, documents, options)
    encoded: Any = PreTrainedTokenizerBase.apply_chat_template(tokenizer, **given, **options)
    if not answers:
        return encoded
    if options.get("continue_final_message") or not isinstance(encoded, BatchEncoding):
        raise ValueError("return_assistant_tokens_mask needs return_dict=True and no continue_final_message")
    return _with_assistant_masks(tokenizer, encoded, given, options)


def encode_answers(
    tokenizer: PreTrainedTokenizerBase,
    conversation: Any,
    tools: Any = None,
    documents: Any = None,
    chat_template: str | None = None,
    **variables: Any,
) -> AnsweredChat:
    """One conversation with masks of what its answers consist of.

    Args:
        chat_template: a template or the name of one of the tokenizer's; its default if None. It marks what the model
            writes by `{% generation %}`, as all of `CHAT_TEMPLATES` do.
        variables: as for `apply_chat_template` (thinking, say).

    Raises:
        ValueError: a template that marks nothing; as `encode_text`.
        TypeError: options of encoding (padding, say), which nothing here takes.
        TemplateError: for what the template has no place for.
    """
    options = {"chat_template": chat_template, **variables}
    if not conversation or isinstance(conversation[0], list):
        raise ValueError("encode_answers takes one conversation, a list of messages; call it for each of several")
    if unused := variables.keys() & _TEMPLATE_OPTIONS - _SPECIAL:
        raise TypeError(
            f"encode_answers gives lists for one whole conversation; it takes no {', '.join(sorted(unused))}"
        )
    tokenizer, given = _filled(tokenizer, conversation, tools, documents, options)
    chat = given["conversation"]
    text, marked = _rendered(tokenizer, chat, given, options)
    if not marked and any(message["role"] == "assistant" for message in chat):
        raise ValueError(
            "the chat template doesn't mark answers by {% generation %}; take one that does, "
            'tokenization_deepseek.CHAT_TEMPLATES["v3"] say'
        )
    prompts = _generation_prompts(tokenizer, chat, given, options) if marked else []
    supplied = [_supplied(text, span, prompts) for span in marked]
    written = [(max(start, stop), end) for (start, end), (_, stop) in zip(marked, supplied, strict=True)]
    encoding = tokenizer(text, add_special_tokens=False).encodings[0]
    mask = _mask(encoding.offsets, written)
    before = [there and not one for there, one in zip(_mask(encoding.offsets, supplied), mask, strict=True)]
    return AnsweredChat(encoding.ids, mask, list(map(int, before)), _token_ranges(encoding.offsets, written))


def generation_prompt(tokenizer: PreTrainedTokenizerBase, **variables: Any) -> str:
    """What the default template of a tokenizer appends behind a user's message for the answer to begin after; "" if
    it refuses such a conversation or the variables (thinking, say)."""
    template, settings = _template_and_settings(tokenizer, {"tools": None, **variables}, {})
    return next(iter(_appended(template, [_ASK], settings)), "")


# ---- what a template is filled with


def _filled(
    tokenizer: Any, conversation: Any, tools: Any, documents: Any, options: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """The tokenizer that encodes the rendered text, and what the template gets. Takes its variables out of options."""
    template = tokenizer.get_chat_template(options.get("chat_template"), tools)
    given = {"conversation": plain_chat(conversation, template), "tools": _plain(tools)}
    given |= {"documents": _plain(documents)}
    given |= {name: options.pop(name) for name in options.keys() - _TEMPLATE_OPTIONS}
    pattern = pattern_of(control_tokens(tokenizer))
    if _changed(given, lambda text: pattern.sub("", text)) != given or _joins_into_control(given, pattern):
        twin = twin_of(tokenizer, given)
        given, tokenizer = _changed(given, twin.mark, twin.closing), twin_view(tokenizer, twin, twin.respell_unmarked)
    return tokenizer, given


def plain_chat(conversation: Any, template: str) -> Any:
    """Conversations as lists and dictionaries, arguments of tool calls as the template takes them.

    Arguments may be JSON or a dictionary. A template that walks through them gets a dictionary.
    Raises ValueError, naming the message, for calls that are no list and arguments that are no JSON object.
    """
    conversation = _plain(conversation)
    chats = conversation if conversation and isinstance(conversation[0], list) else [conversation]
    walks = _WALKS.search(template) is not None
    for chat in chats:
        for number, message in enumerate(chat, 1):
            for function in _functions(message, number):
                arguments = _arguments(function, number)
                if walks:
                    function["arguments"] = arguments
    return conversation


def _functions(message: Any, number: int) -> list[dict[str, Any]]:
    calls = message.get("tool_calls") if isinstance(message, dict) else None
    calls = calls or []
    functions = [call.get("function", call) if isinstance(call, dict) else None for call in calls]
    if not isinstance(calls, list) or not all(isinstance(function, dict) for function in functions):
        form = '[{"type": "function", "function": {"name": ..., "arguments": ...}}]'
        raise ValueError(f"message {number}: tool_calls are {calls!r}, not of the form {form}")
    return functions  # type: ignore[return-value]  # each was looked at


def _arguments(function: dict[str, Any], number: int) -> dict[str, Any]:
    given, why = function.get("arguments") or {}, ""
    arguments = given
    try:
        arguments = read_json(given) if isinstance(given, str) else given
    except ValueError as error:
        why = f" ({error})"
    if not isinstance(arguments, dict):
        call = f"message {number}: the arguments of the tool call {function.get('name')!r}"
        raise ValueError(f"{call} are no JSON object{why}: {given!r}")
    return arguments


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


# ---- masks


def _rendered(tokenizer: Any, chat: Any, given: dict[str, Any], options: dict[str, Any]) -> tuple[str, list[Span]]:
    """The text of one conversation and the spans in it that its template marks as generated."""
    template, settings = _template_and_settings(tokenizer, given, options)
    prompt = {"add_generation_prompt": options.get("add_generation_prompt", False)}
    return _render(template, chat, given["tools"], given["documents"], settings | prompt)


def _template_and_settings(
    tokenizer: Any, given: dict[str, Any], options: dict[str, Any]
) -> tuple[str, dict[str, Any]]:
    variables = {name: given[name] for name in given.keys() - _TEMPLATE_OPTIONS}
    variables |= {name: options[name] for name in options.keys() & _SPECIAL}
    template = tokenizer.get_chat_template(options.get("chat_template"), given["tools"])
    return template, {**tokenizer.special_tokens_map, **variables}


def _render(template: str, chat: Any, tools: Any, documents: Any, settings: dict[str, Any]) -> tuple[str, list[Span]]:
    rendered: Any = render_jinja_template(  # said to be a string
        [[{key: part for key, part in turn.items() if part is not None} for turn in chat]],
        tools,
        documents,
        # transformers 5.23 keeps spans on the compiled template, which threads share: one for each thread
        chat_template=f"{template}{{# {threading.get_ident()} #}}",
        return_assistant_tokens_mask=True,
        **settings,
    )
    return rendered[0][0], rendered[1][0]


def _with_assistant_masks(
    tokenizer: Any, encoded: BatchEncoding, given: dict[str, Any], options: dict[str, Any]
) -> BatchEncoding:
    """Add `assistant_masks`: 1 for each token that lies in an answer, in part at least."""
    batched = isinstance(given["conversation"][0], list)
    chats = given["conversation"] if batched else [given["conversation"]]
    masks = [
        _mask(encoding.offsets, _rendered(tokenizer, chat, given, options)[1])
        for chat, encoding in zip(chats, encoded.encodings or (), strict=True)
    ]
    tensors = options.get("return_tensors")
    encoded["assistant_masks"] = masks if batched or tensors else masks[0]
    return encoded.convert_to_tensors(tensors) if tensors else encoded


def _mask(offsets: list[Span], spans: list[Span]) -> list[int]:
    """1 for each token that lies in a span, in part at least."""
    mask = [0] * len(offsets)
    for first, stop in _token_ranges(offsets, spans):
        mask[first:stop] = [1] * (stop - first)
    return mask


def _token_ranges(offsets: list[Span], spans: list[Span]) -> list[Span]:
    """For each span its first token and the one behind its last; offsets grow from token to token."""
    starts, ends = [start for start, _ in offsets], [end for _, end in offsets]
    ranges = [(bisect_right(ends, begin), bisect_left(starts, stop)) for begin, stop in spans]
    return [(first, stop) if first < stop else (0, 0) for first, stop in ranges]


def _generation_prompts(tokenizer: Any, chat: Any, given: dict[str, Any], options: dict[str, Any]) -> list[str]:
    """What the template appends as generation prompt behind the kinds of messages that are answered, longest first.

    With thinking as it is, on and off, since an answer in a conversation may have been asked for in either way.
    """
    before = [
        chat[place - 1] if place else _ASK for place, message in enumerate(chat) if message["role"] == "assistant"
    ]
    kinds = {(message["role"], message.get("task")) for message in before}
    prompts = {prompt for kind in kinds for prompt in _prompts_behind(tokenizer, *kind, given, options)}
    return sorted(prompts, key=len, reverse=True)


def _prompts_behind(
    tokenizer: Any, role: str, task: str | None, given: dict[str, Any], options: dict[str, Any]
) -> list[str]:
    """Those behind a message of this role and, in V4, with this task; kept, since many conversations share them."""
    template, settings = _template_and_settings(tokenizer, given, options)
    key = json.dumps([template, settings, role, task], default=repr)
    prompts = _PROMPTS.get(key)
    if prompts is None:
        last = {"role": role, "content": "x", **({"task": task} if task else {})}
        call = {"type": "function", "function": {"name": "x", "arguments": {}}}
        called = [{"role": "assistant", "content": "x", "tool_calls": [call]}] if role == "tool" else []
        chat: list[dict[str, Any]] = [last] if role == "user" else [_ASK, *called, last]
        prompts = [text for switches in ({}, *_SWITCHES) for text in _appended(template, chat, settings | switches)]
        if len(_PROMPTS) > 1000:
            _PROMPTS.clear()
        _PROMPTS[key] = prompts
    return prompts


def _appended(template: str, chat: list[dict[str, Any]], settings: dict[str, Any]) -> list[str]:
    try:
        without, with_prompt = (
            _render(template, chat, None, None, settings | {"add_generation_prompt": prompt})[0]
            for prompt in (False, True)
        )
    except import_module("jinja2").TemplateError:  # a format without thinking, or one that refuses such a beginning
        return []
    return [with_prompt.removeprefix(without)] if with_prompt.startswith(without) else []


def _supplied(text: str, span: Span, prompts: list[str]) -> Span:
    """Where the generation prompt stands: before the answer, or reaching into it where the template marks it too."""
    for prompt in prompts:
        place = text.find(prompt, max(0, span[0] - len(prompt)), span[0] + len(prompt))
        if prompt and place >= 0:
            return place, place + len(prompt)
    return span[0], span[0]
