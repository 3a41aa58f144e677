"""Generated text back into a message: reasoning, content and tool calls, whole or piece by piece.

Names and events are those of transformers' `ResponseParser`. Other than that one, a tool call that can't be read
doesn't end the parsing: its text is kept with the reason under `invalid_tool_calls`.

    AnswerParser(FORMS["v3.1"], prefix="<think>")
    .feed("so</thi"), .feed("nk>yes")     events
    .finalize()                           the message, and the last events
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .tool_calls import InvalidCall, bare_call, cast, dsml_call, fenced_call

EOS = ("<｜end▁of▁sentence｜>", "<|EOT|>")
Event = dict[str, Any]


@dataclass(frozen=True)
class Form:
    """How a generation writes answers. Each tuple lists spellings of one mark, all of which vanish from the message.

    headers: what a prompt ends with before the answer; the parser reads a prompt from the last one on.
    opens, closes: around reasoning. lead: one that may open the content. ends: behind the answer.
    blocks, block_end: around all tool calls; call, call_end: around one, which `read` takes apart; parameter: the name
        of the tags in it, if there are any.
    """

    headers: tuple[str, ...] = ("<｜Assistant｜>",)
    opens: tuple[str, ...] = ()
    closes: tuple[str, ...] = ()
    lead: str = ""
    ends: tuple[str, ...] = EOS
    blocks: tuple[str, ...] = ()
    block_end: str = ""
    call: str = ""
    call_end: str = ""
    parameter: str = ""
    read: Callable[[str], dict[str, Any]] = bare_call


_OUTPUTS = ("<｜Assistant｜>", "<｜tool▁outputs▁end｜>", "<｜tool▁output▁end｜>")
_TOKENS: dict[str, Any] = {
    "headers": _OUTPUTS,
    "blocks": ("<｜tool▁calls▁begin｜>",),
    "block_end": "<｜tool▁calls▁end｜>",
    "call": "<｜tool▁call▁begin｜>",
    "call_end": "<｜tool▁call▁end｜>",
}
_THOUGHT: dict[str, Any] = {"opens": ("<think>",), "closes": ("</think>",)}
_ON_LINES: dict[str, Any] = {
    "opens": ("<think>\n", "<think>"),
    "closes": tuple(f"{before}</think>{behind}" for before in ("\n", "") for behind in ("\n\n", "\n", "")),
}


def _dsml(block: str, invoke: str, parameter: str, *headers: str) -> Form:
    opening = f"<｜DSML｜{block}>"
    return Form(
        headers=("<｜Assistant｜>", *headers),
        blocks=("\n\n" + opening, opening),
        block_end=f"</｜DSML｜{block}>",
        call=f"<｜DSML｜{invoke} ",
        call_end=f"</｜DSML｜{invoke}>",
        parameter=parameter,
        read=dsml_call(parameter),
        **_THOUGHT,
    )


_V4 = _dsml("tool_calls", "invoke", "parameter")
_R1 = Form(**_TOKENS, **_ON_LINES, read=fenced_call)
FORMS: dict[str, Form] = {
    "coder": Form(headers=("### Response:\n",), ends=tuple(before + end for before in ("\n", "") for end in EOS)),
    "v2": Form(headers=("Assistant:",), lead=" "),
    "v2.5": Form(**_TOKENS, read=fenced_call),
    "v3": _R1,
    "r1": _R1,
    "r1-think": _R1,
    "v3.1": Form(**_TOKENS, **_THOUGHT),
    "v3.2": _dsml("function_calls", "invoke", "parameter", "</function_results>\n\n"),
    "v4": _V4,
    "v4-0731": _V4,
    "v4.1": _dsml(" calls", " invoke", " parameter"),
}
# What tells the forms apart in the text of a template, the telling ones first.
_SIGNS = (
    ("<｜DSML｜function_calls>", "v3.2"),
    ("<｜DSML｜tool_calls>", "v4"),
    ("<｜DSML｜ calls>", "v4.1"),
    ("```json", "v3"),
    ("<｜tool▁call▁begin｜>", "v3.1"),
    ("### Response:", "coder"),
    ("Assistant:", "v2"),
)


def form_of(template: str) -> Form:
    """The form of answers that a chat template writes. Raises ValueError for a template of no DeepSeek generation."""
    for sign, name in _SIGNS:
        if sign in template:
            return FORMS["v2.5" if name == "v3" and "split('</think>')" not in template else name]
    raise ValueError(f"this chat template is of no known generation; name the form of answers: {', '.join(FORMS)}")


@dataclass
class AnswerParser:
    """Reads one answer as it comes.

    Args:
        form: of `FORMS`.
        prefix: the prompt (its end is enough) or what of the answer was given to the model, which is read first: after
            a forced `<think>` the text is reasoning. None: the text begins with the answer.
        tools: in whose schemas a text that stands for a number or the like is read as such.

    initial_events: those of the prefix.
    """

    form: Form
    prefix: str | None = None
    tools: Sequence[Any] | None = None
    initial_events: list[Event] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._state, self._waiting, self._raw, self._open = "start", "", "", ""
        self._texts = {"reasoning_content": "", "content": ""}
        self._calls: list[dict[str, Any]] = []
        self._invalid: list[dict[str, str]] = []
        self._events: list[Event] = []
        if self.prefix:
            begins = [self.prefix.rfind(header) + len(header) for header in self.form.headers if header in self.prefix]
            self.initial_events = self.feed(self.prefix[max(begins, default=0) :])

    def feed(self, text: str) -> list[Event]:
        """More of the answer. Gives what happened, in transformers' form: `{"type": "region_open", "field": ...}`,
        "region_chunk" with `text` (`dirty`: raw text of a tool call), "region_close" with `value`; and "region_error"
        with `error` and `text` for a tool call that can't be read.
        """
        self._waiting += text
        return self._advance(final=False)

    def finalize(self) -> tuple[dict[str, Any], list[Event]]:
        """The end of the text has come. Gives the message and the last events.

        The message has `role` and `content`, and if there are any `reasoning_content`, `tool_calls` (arguments as
        dictionaries) and `invalid_tool_calls` (`error` and `text` of each).
        """
        events = self._advance(final=True)
        if self._state == "call":
            self._fail("the text ends before the call does")
        elif self._raw.strip():
            self._fail("text between tool calls")
        self._close()
        message = {"role": "assistant", **self._texts, "tool_calls": self._calls, "invalid_tool_calls": self._invalid}
        return {key: part for key, part in message.items() if part or key == "content"}, events + self._taken()

    def _advance(self, final: bool) -> list[Event]:
        while self._step(final):
            pass
        return self._taken()

    def _taken(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def _step(self, final: bool) -> bool:
        """Read up to the next mark; False if there is none yet."""
        marks = self._marks()
        before, mark, self._waiting = split_at_mark(self._waiting, marks, final)
        if self._state == "start":
            return self._start(before, mark, final)
        getattr(self, f"_{self._state}_text")(before)
        if mark:
            self._turn(mark)
        return bool(mark)

    def _marks(self) -> tuple[str, ...]:
        form = self.form
        return {
            "start": (*form.opens, *form.closes, *((form.lead,) if form.lead else ()), *form.blocks, *form.ends),
            "reasoning": (*form.closes, *form.ends),
            "content": (*form.blocks, *form.ends),
            "calls": (form.call, form.block_end, *form.ends),
            "call": (form.call_end, form.call, form.block_end, *form.ends),
            "done": (),
        }[self._state]

    def _start(self, before: str, mark: str, final: bool) -> bool:
        """An opening mark counts at the very beginning alone; other text is content."""
        form = self.form
        if not before and mark in (*form.opens, *form.closes, form.lead) and mark:
            self._state = "reasoning" if mark in form.opens else "content"
            return True
        if before or mark or final:
            self._state, self._waiting = "content", before + mark + self._waiting
            return True
        return False

    def _turn(self, mark: str) -> None:
        """A mark was read: what it ends and what it begins."""
        form, state = self.form, self._state
        if state == "call":
            self._read_call(mark)
        elif self._raw.strip():
            self._fail("text between tool calls")
        if mark in form.closes:
            self._begin("content")
        elif mark in form.blocks or (mark == form.call_end and state == "call"):
            self._begin("calls")
        elif mark == form.call:
            self._begin("call")
            self._raw = mark
        else:
            self._begin("content" if mark == form.block_end else "done")

    def _begin(self, state: str) -> None:
        self._close()
        self._state = state

    # ---- what is read in each state

    def _reasoning_text(self, text: str) -> None:
        self._write("reasoning_content", text)

    def _content_text(self, text: str) -> None:
        self._write("content", text)

    def _write(self, name: str, text: str) -> None:
        if text:
            self._texts[name] += text
            self._chunk(name, text)

    def _calls_text(self, text: str) -> None:
        self._raw += text

    def _call_text(self, text: str) -> None:
        if text:
            self._raw += text
            self._chunk("tool_calls", text, dirty=True)

    def _done_text(self, text: str) -> None:
        """Behind the end stands padding."""

    def _read_call(self, mark: str) -> None:
        if mark != self.form.call_end:
            return self._fail("the call isn't closed")
        try:
            call = cast(self.form.read(self._raw.removeprefix(self.form.call)), self.tools)
        except InvalidCall as error:
            self._raw += mark
            return self._fail(str(error))
        self._calls.append(call)
        self._close(call)
        self._raw = ""

    # ---- events

    def _chunk(self, name: str, text: str, dirty: bool = False) -> None:
        if self._open != name:
            self._open = name
            self._events.append({"type": "region_open", "field": name})
        self._events.append({"type": "region_chunk", "field": name, "text": text, "dirty": dirty})

    def _close(self, value: Any = None) -> None:
        if self._open:
            value = self._texts.get(self._open) if value is None else value
            self._events.append({"type": "region_close", "field": self._open, "value": value})
        self._open = ""

    def _fail(self, error: str) -> None:
        self._invalid.append({"error": error, "text": self._raw})
        self._events.append({"type": "region_error", "field": "tool_calls", "error": error, "text": self._raw})
        self._open = self._raw = ""


def split_at_mark(text: str, marks: Sequence[str], final: bool) -> tuple[str, str, str]:
    """Text before the first mark, the longest mark there, and what follows.

    Without a mark: the text that no mark can begin in, "", and the rest, which waits for more (unless `final`).
    """
    found = re.search("|".join(map(re.escape, sorted(marks, key=len, reverse=True))), text) if marks else None
    if found is not None and (final or not _may_grow(text[found.start() :], marks, found[0])):
        return text[: found.start()], found[0], text[found.end() :]
    limit = len(text) if found is None else found.start()
    if found is None and not final:
        longest = max(map(len, marks), default=0)
        beginnings = range(max(0, len(text) - longest + 1), len(text))
        limit = next((i for i in beginnings if any(mark.startswith(text[i:]) for mark in marks)), len(text))
    return text[:limit], "", text[limit:]


def _may_grow(rest: str, marks: Sequence[str], mark: str) -> bool:
    """Whether more text could make a longer mark of this one."""
    return any(len(other) > len(mark) and len(rest) < len(other) and other.startswith(rest) for other in marks)


def parse_answer(
    form: Form, text: str, prefix: str | None = None, tools: Sequence[Any] | None = None
) -> dict[str, Any]:
    """A whole answer as a message (see `AnswerParser`). Without a prefix, a `</think>` that nothing opens ends a
    thought that the prompt has opened.
    """
    if prefix is None and form.opens and "</think>" in text and "<think>" not in text.partition("</think>")[0]:
        prefix = form.opens[-1]
    parser = AnswerParser(form, prefix, tools)
    parser.feed(text)
    return parser.finalize()[0]
