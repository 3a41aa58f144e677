"""A form of answers in transformers' own words: the `response_template` of a tokenizer that is opened without us.

    tokenizer.response_template = response_template(FORMS["v3.1"])     saved in tokenizer_config.json

By it `parse_response`, `get_response_parser`, the text-generation pipeline and `transformers serve` read what
`AnswerParser` reads. What differs: arguments that are no JSON stay a text, a broken call stays in the content, and
blanks around the content of "v2" are lost.
"""

import re
from collections.abc import Iterable
from typing import Any

from .answer_parsing import FORMS, Form
from .tool_calls import bare_call, fenced_call

_BY_TYPE = {"type": "{type}", "function": {"name": "{name}", "arguments": "{content}"}}
_FUNCTION = _BY_TYPE | {"type": "function"}
_JSON = {"allow_non_json": True}


def response_template(form: Form) -> dict[str, Any]:
    """The form as transformers' `load_response_template` takes it."""
    ends = _any(form.ends)
    content = {
        "close_pattern": (rf"\s*{re.escape(form.block_end)}|" if form.call else "") + rf"{ends}.*\Z",
        "content_args": {"strip": bool(form.lead)},
        "repeats": True,
        "join": "",
    }
    fields: dict[str, dict[str, Any]] = {"content": content}
    if form.opens:
        fields["reasoning_content"] = {
            "open_pattern": rf"\A(?:{_any(form.opens)}|(?={_any(form.closes)}))",
            "close_pattern": f"{_any(form.closes)}|(?={ends})",
            "content_args": {"strip": False},
        }
    if form.call:
        fields["tool_calls"] = _calls(form, ends)
    return {"defaults": {"role": "assistant", "content": ""}, "start_anchor": [*form.headers], "fields": fields}


def is_own(template: Any) -> bool:
    """Whether a response template is that of a form, which `AnswerParser` reads better."""
    return any(template == response_template(form) for form in FORMS.values())


def _any(marks: Iterable[str]) -> str:
    """A pattern of the marks, the longest of those at a place."""
    return f"(?:{'|'.join(map(re.escape, sorted(marks, key=len, reverse=True)))})"


def _calls(form: Form, ends: str) -> dict[str, Any]:
    """Tool calls: each begins with its mark, the first with that of the block, whose end is a mark of the content."""
    head, tail, arguments = _ways(form)
    call, call_end, block_end = map(re.escape, (form.call, form.call_end, form.block_end))
    return {
        "open_pattern": rf"{_any(form.blocks)}?\s*{call}{head}",
        "close_pattern": rf"{tail}{call_end}|(?={block_end}|{ends})",
        "repeats": True,
        "transform": _BY_TYPE if "<type>" in head else _FUNCTION,
        **arguments,
    }


def _ways(form: Form) -> tuple[str, str, dict[str, Any]]:
    """What stands in a call before its arguments, what behind them, and how these are read."""
    separator, as_json = "<｜tool▁sep｜>", {"content": "json", "content_args": _JSON}
    if form.read is bare_call:
        return rf"(?P<name>[^<\n]+){separator}", "", as_json
    if form.read is fenced_call:
        return rf"(?P<type>[^<\n]*){separator}(?P<name>[^\n]+)\n```json\n", r"(?:\n```\s*)?", as_json
    opening, closing = f"<｜DSML｜{form.parameter} name=", f"</｜DSML｜{form.parameter}>"
    # A text stands as it is: its quotes are the tag's end and the closing tag, by which transformers knows a string.
    value = rf'(?:false">(?P<value>.*?){closing}|(?P<value>true">.*?{closing}))'
    reading = {"name": "json", "args": _JSON | {"string_delims": [['true">', closing]]}}
    parameters = {"tag_pattern": rf'{opening}"(?P<key>[^"]*)" string="{value}', "value_parser": reading}
    head = rf'name="(?P<name>[^"]+)">(?=\s*(?:{opening}|{re.escape(form.call_end)}))'
    return head, r"\s*", {"content": "xml-inline", "content_args": parameters}
