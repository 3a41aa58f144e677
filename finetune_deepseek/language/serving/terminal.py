"""The terminal of `deepseek-hf chat`: lines in, answers out as they are written, commands that begin with a slash.

Standard output is for answers alone; what else there is to say goes to standard error. Where standard input is no
terminal, a fault ends the program, for what follows in a script may depend on it.
"""

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import NoneType
from typing import Any

import yaml

from ...data.files import json_of, read_text, write_text
from ...data.words import nearest_match
from .conversation import Conversation, Turn

HELP = """/system TEXT          set the system message; without a text there is none
/reset                begin anew
/save FILE            write the conversation as JSON, for /load and for generate --input
/load FILE            go on with a conversation
/params NAME=VALUE    settings: {settings}; null leaves one to the model
/help                 this
/exit                 end, as Ctrl-D does; Ctrl-C stops an answer
\"\"\"                   around several lines makes them one message; // sends a message that begins with a slash"""
SETTINGS = (
    *("max_new_tokens", "do_sample", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "stop", "seed"),
    *("thinking", "show_reasoning"),
)
WORDS = {float: "a number", int: "a whole number", bool: "true or false"}
QUOTES = '"""'
DIM, PLAIN = "\x1b[2m", "\x1b[0m"
# A model's words can't move the cursor or change the terminal's colours.
HARMLESS: dict[int, None] = dict.fromkeys({*range(32), *range(127, 160)} - {ord("\n"), ord("\t")})


class Terminal:
    """Reads lines and commands, and writes answers.

    Args:
        show_reasoning: as the flag; None for a terminal only.
    """

    def __init__(self, conversation: Conversation):
        self.conversation = conversation
        self.asks, self.is_shown = sys.stdin.isatty(), sys.stdout.isatty()
        self.is_coloured = self.is_shown and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        self.files: set[Path] = set()  # those that hold this conversation, and may be written anew
        self.field = ""  # of the message, of what was written last
        self.line = 0
        self.commands: dict[str, Callable[[str], Any]] = {
            "system": self.system, "reset": self.reset, "save": self.save, "load": self.load, "params": self.params,
            "help": self.help, "exit": self.exit,
        }  # fmt: skip
        self.is_over = False

    def run(self) -> None:
        """Until the input ends, or /exit.

        Raises:
            ValueError: with the line, for the first fault in a script.
        """
        while not self.is_over and (text := self.read()) is not None:
            try:
                self.take(text)
            except ValueError as error:
                if not self.asks:
                    raise ValueError(f"line {self.line}: {error}") from error
                self.note(f"error: {' '.join(str(error).split())}")

    # -- reading --

    def read(self) -> str | None:
        """The next message or command, which may have several lines; None at the end."""
        text = self.read_line(">>> ")
        if text is None or not text.startswith(QUOTES):
            return text
        lines = [text.removeprefix(QUOTES)]
        while not lines[-1].rstrip().endswith(QUOTES) and (more := self.read_line("... ")) is not None:
            lines.append(more)
        return "\n".join(lines).rstrip().removesuffix(QUOTES)

    def read_line(self, sign: str) -> str | None:
        """A line without its end; None at the end of the input."""
        self.line += 1
        if not self.asks:
            return self.read_bytes()
        try:
            if self.is_shown:
                return input(sign)  # edited by readline
            print(sign, end="", file=sys.stderr, flush=True)
            return self.read_bytes()
        except EOFError:
            print(file=sys.stderr)
            return None
        except KeyboardInterrupt:
            self.note("\n/exit or Ctrl-D ends.")
            return ""

    def read_bytes(self) -> str | None:
        line = sys.stdin.buffer.readline()
        try:
            return line.decode("utf-8").rstrip("\r\n") if line else None
        except UnicodeDecodeError as error:
            raise ValueError(f"line {self.line}: not UTF-8 text ({error.reason}).") from error

    # -- doing --

    def take(self, text: str) -> None:
        """Do a command, or say a message; nothing for an empty line.

        Raises:
            ValueError: with one line, for a fault in either.
        """
        if text.startswith("/") and not text.startswith("//"):
            name, _, rest = text[1:].strip().partition(" ")
            if name not in self.commands:
                raise ValueError(f"no such command: /{name}{nearest_match(name, self.commands)}; /help lists them.")
            self.commands[name](rest.strip())
        elif text.strip():
            self.say(text[1:] if text.startswith("//") else text)

    def say(self, text: str) -> None:
        """Say something and write the answer."""
        self.field = ""
        try:
            with stoppable() as is_stopped:
                turn = self.conversation.answer(text, self.show, is_stopped)
        except KeyboardInterrupt:
            self.close()
            self.note("stopped; the message is taken back.")
        except BaseException:
            self.close()
            raise
        else:
            self.close(is_whole=True)
            self.remark(turn)

    def remark(self, turn: Turn) -> None:
        """What there is to know about an answer, beside it."""
        if turn.left_out:
            limit = self.conversation.lm.max_positions
            self.note(
                f"the oldest {turn.left_out} turns no longer fit into the model's {limit:,} positions; left out."
            )
        if turn.finish_reason == "length":
            self.note(f"cut at {turn.tokens:,} tokens (/params max_new_tokens=N).")

    def show(self, events: list[dict[str, Any]]) -> None:
        """Write what came of an answer, reasoning dimmed, or left out where nobody looks."""
        shows = self.conversation.arguments.show_reasoning
        for event in events:
            if event["type"] != "region_chunk":
                continue
            is_thought = event["field"] == "reasoning_content"
            if is_thought and not (self.is_shown if shows is None else shows):
                continue
            self.turn_to("thought" if is_thought else "answer")
            self.write(event["text"].translate(HARMLESS) if self.is_shown else event["text"])

    def turn_to(self, field: str) -> None:
        """From reasoning to answer, or to the end."""
        if self.field == field:
            return
        if self.field == "thought":
            self.write(PLAIN + "\n\n" if self.is_coloured else "\n</think>\n\n")
        if field == "thought":
            self.write(DIM if self.is_coloured else "<think>\n")
        self.field = field

    def close(self, is_whole: bool = False) -> None:
        """The answer is over, or broken off."""
        if self.field == "thought":
            self.turn_to("")
        elif self.field or is_whole:
            self.write("\n")

    def write(self, text: str) -> None:
        sys.stdout.buffer.write(text.encode("utf-8", "replace"))
        sys.stdout.buffer.flush()

    def note(self, text: str) -> None:
        """A line beside the answers."""
        print(text, file=sys.stderr, flush=True)

    # -- commands --

    def system(self, text: str) -> None:
        self.conversation.arguments = replace(self.conversation.arguments, system=text or None)

    def reset(self, _: str) -> None:
        self.conversation.reset()
        self.files.clear()

    def save(self, name: str) -> None:
        path = _path(name, "save")
        if path.exists() and path.resolve() not in self.files:
            raise ValueError(f"/save {name}: it is there already; name another file.")
        try:
            write_text(path, json.dumps({"messages": self.conversation.whole}, ensure_ascii=False, indent=1) + "\n")
        except OSError as error:
            raise ValueError(f"/save {name}: can't be written ({error.strerror}).") from error
        self.files.add(path.resolve())

    def load(self, name: str) -> None:
        path = _path(name, "load")
        found = json_of(read_text(str(path), f"/load {name}"), f"/load {name}")
        messages: Any = found.get("messages") if isinstance(found, dict) else found
        before = self.conversation.arguments.system
        try:
            self.conversation.load(messages)
        except ValueError as error:
            raise ValueError(f"/load {name}: {error}") from error
        self.files = {path.resolve()}
        is_dropped = before is not None and self.conversation.arguments.system is None
        what = ", none of the system; the system message from before is dropped" * is_dropped
        self.note(f"{len(self.conversation.messages)} messages{what}.")

    def params(self, text: str) -> None:
        changes: dict[str, Any] = {}
        for word in text.split():
            name, equals, value = word.partition("=")
            if name not in SETTINGS or not equals:
                near = nearest_match(name, SETTINGS)
                raise ValueError(f"/params {word}: write name=value{near}; there is {', '.join(SETTINGS)}.")
            changes[name] = _value(name, value)
        self.conversation.change(**changes)
        sampling, arguments = self.conversation.sampling, self.conversation.arguments
        said = f"next token: {sampling.shown}; max_new_tokens {sampling.max_new_tokens}"
        self.note(said + ("" if arguments.thinking is None else f"; thinking {str(arguments.thinking).lower()}"))

    def help(self, _: str) -> None:
        self.note(HELP.format(settings=", ".join(SETTINGS)))

    def exit(self, _: str) -> None:
        self.is_over = True


def _path(name: str, command: str) -> Path:
    if not name:
        raise ValueError(f"/{command}: name a file.")
    return Path(name).expanduser()


KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("max_new_tokens", "seed"), (int,)),
    "top_k": (int, NoneType),
    **dict.fromkeys(("temperature", "top_p", "min_p", "repetition_penalty"), (float, int, NoneType)),
    **dict.fromkeys(("do_sample", "thinking", "show_reasoning"), (bool, NoneType)),
}


def _value(name: str, text: str) -> Any:
    """What a setting is set to: `stop` to a text, others to a number, true or false, or null.

    Raises:
        ValueError: for another kind of value.
    """
    value = yaml.safe_load(text)
    if name == "stop":
        return [] if value is None else [text]
    if type(value) not in KINDS[name]:
        raise ValueError(f"/params {name}={text}: it takes {WORDS[KINDS[name][0]]}.")
    return value


@contextmanager
def stoppable() -> Iterator[Callable[[], bool]]:
    """Ctrl-C, asked for rather than thrown: an answer ends behind a whole token. A second one is thrown."""
    pressed: list[int] = []

    def press(*_: Any) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(1)

    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)
