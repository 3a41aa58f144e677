"""The chat template that conversations are written in: chosen, checked, and asked where an answer ends."""

import json
import re
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from tokenization_deepseek import CHAT_TEMPLATES, control_tokens, encode_answers, generation_prompt
from tokenization_deepseek.answer_parsing import form_of
from tokenization_deepseek.response_templates import response_template

from ..serving.chat_format import SWITCHES, choose_template
from .layouts import Turn

PROBE = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
CONTROL = re.compile(r"<[|｜][^|｜<>{}]+[|｜]>")  # as most families spell control tokens
REFUSALS = (TemplateError, TypeError, KeyError, AttributeError)  # of templates that meet what they aren't for
ARGUMENTS = '{"key": 1}'


def trained_template(tokenizer: PreTrainedTokenizerBase, asked: str | None) -> None:
    """Give the tokenizer the template that is asked for, or leave it its own, and what reads its answers.

    Raises:
        ValueError: for one that marks no answers, or that writes control tokens which the tokenizer hasn't.
    """
    choose_template(tokenizer, asked, "conversation")
    if asked or getattr(tokenizer, "response_template", None) is None:
        tokenizer.response_template = _reading(tokenizer)
    words = f"one of {', '.join(CHAT_TEMPLATES)}, or a file"
    try:
        written: Any = tokenizer.apply_chat_template(PROBE, tokenize=False)
        if lacking := sorted(set(CONTROL.findall(written)) - set(control_tokens(tokenizer))):
            raise ValueError(f"the tokenizer has no token {lacking[0]!r}, which it writes")
        encode_answers(tokenizer, PROBE)
    except REFUSALS:
        return  # it wants more of a conversation, which each row is asked for
    except ValueError as error:
        raise ValueError(
            f"the chat template can't be trained with: {error}. By --chat_template name {words} with a copy of it "
            "that marks what the assistant writes."
        ) from error


def _reading(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any] | None:
    """Transformers' template of answers, None for those of other families."""
    try:
        return response_template(form_of(tokenizer.get_chat_template()))
    except ValueError:
        return None


def ends_of_answers(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a reply: the template's own, if that is a control token, and the tokenizer's."""
    found = {tokenizer.eos_token_id}
    try:
        probe = encode_answers(tokenizer, PROBE)
    except REFUSALS:
        return sorted(found)
    last = probe.input_ids[probe.answers[-1][1] - 1]
    return sorted(found | ({last} & set(control_tokens(tokenizer).values())))


def prompt_of(tokenizer: PreTrainedTokenizerBase, thinking: bool | None = None) -> str:
    """What the template puts before an answer to a user, with its switch for reasoning as it is, or set; "" if it
    refuses."""
    try:
        return generation_prompt(tokenizer, **({} if thinking is None else dict.fromkeys(SWITCHES, thinking)))
    except REFUSALS:
        return ""


def argument_form(tokenizer: PreTrainedTokenizerBase) -> type | None:
    """How the template takes the arguments of a call: as `str` alone, as `dict` alone, or None for either.

    Many templates write JSON of an object and put quotes around a text; others join a text to their own.
    """
    as_text, as_object = (_writes_arguments(tokenizer, given) for given in (ARGUMENTS, json.loads(ARGUMENTS)))
    return None if as_text == as_object else str if as_text else dict


def _writes_arguments(tokenizer: PreTrainedTokenizerBase, given: Any) -> bool:
    function = {"name": "get", "arguments": given}
    call: Turn = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}
    try:
        text: Any = tokenizer.apply_chat_template([PROBE[0], call], tokenize=False)
    except REFUSALS:
        return False
    return r"\"key\"" not in text and "{'key'" not in text
