"""A conversation with a language model: its messages, and the keys and values of what the model has read of it.

Every turn the whole conversation goes through the chat format, as it is. Of the ids that come out, the model reads
only those behind what they have in common with the turn before: a format that leaves out earlier reasoning, or another
system message, makes that shorter, and the cache is cut.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Any, Literal, NamedTuple

import torch
from transformers import LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from tokenization_deepseek import AnswerParser, DeepSeekTokenizer
from tokenization_deepseek.answer_parsing import EOS, Form

from .arguments import ChatArguments
from .chat_format import ChatFormat
from .language_model import LanguageModel
from .messages import checked_messages
from .sampling import Finite, Sampling, settled
from .streaming import Stopper, TextStream

THOUGHTS = Form(headers=(), opens=("<think>\n", "<think>"), closes=("</think>\n\n", "</think>\n", "</think>"), ends=())
RESERVE = 4  # turns are left out when less than this part of the positions is free for the answer
ANSWER = "the answer"

Message = dict[str, Any]
Show = Callable[[list[dict[str, Any]]], Any]


class Turn(NamedTuple):
    """An answer. `read` counts the prompt's tokens that weren't in the cache, `left_out` the turns that don't fit."""

    message: Message
    finish_reason: Literal["stop", "length", "interrupted"]
    tokens: int
    read: int
    left_out: int


class Ear(StoppingCriteria):
    """Hears each token behind the prompt as it comes, and stops when it has heard enough."""

    def __init__(self, heard: Callable[[int], bool], length: int):
        self.heard, self.length, self.is_done = heard, length, False

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """[1, S + N] ids -> [1] whether that is enough; tokens behind the last one count for nothing. Where tokens are
        guessed, several come at once."""
        new, self.length = input_ids[0, self.length :].tolist(), input_ids.shape[1]
        self.is_done = self.is_done or any(map(self.heard, new))
        return torch.tensor([self.is_done], device=input_ids.device)


def parser_of(tokenizer: Any, ids: Sequence[int]) -> tuple[Any, str]:
    """What reads an answer to this prompt: by the chat format where it is one of ours, else reasoning in `<think>`.
    And the mark by which it knows the end of an answer, since what stands before it may belong to the format."""
    if isinstance(tokenizer, DeepSeekTokenizer):
        try:
            return tokenizer.get_response_parser(prefix=list(ids)), EOS[0]
        except ValueError:
            pass  # a template of no known generation
    is_open = tokenizer.decode(list(ids[-8:])).rstrip().endswith("<think>")
    return AnswerParser(THOUGHTS, "<think>" if is_open else None), ""


def common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two texts begin with in common."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


class Conversation:
    """Messages, settings and the cache of one conversation.

    Args:
        keeps_cache: False reads all of it anew at every turn.

    Raises:
        ValueError: for settings that the chat format has no place for.
    """

    def __init__(self, lm: LanguageModel, arguments: ChatArguments, keeps_cache: bool = True):
        self.lm = lm
        is_causal = getattr(lm.model.config, "attention_direction", "causal") == "causal"
        self.keeps_cache = keeps_cache and is_causal  # else what was read would look at what comes behind it
        self.messages: list[Message] = []
        self.first = 0  # of the messages that still fit
        self.turns = 0  # so far, those before a reset too: each draws with numbers of its own
        self.set(arguments)
        self.forget()

    def set(self, arguments: ChatArguments) -> None:
        """Other settings from the next answer on.

        Raises:
            ValueError: for what the chat format has no place for; the settings stay as they were.
        """
        chat_format = ChatFormat(self.lm.tokenizer, self.lm.name, arguments.thinking)
        self.arguments, self.format = arguments, chat_format
        self.sampling = Sampling.of(arguments, self.lm.defaults)

    def change(self, **changes: Any) -> None:
        """The same for some of them.

        Raises:
            ValueError: for a value that a setting doesn't take.
        """
        self.set(replace(self.arguments, **changes))

    def forget(self) -> None:
        """Drop what was read; the messages stay."""
        self.cache: Any = None
        self.read: list[int] = []

    def reset(self) -> None:
        """Begin anew, under the same system message."""
        self.messages, self.first = [], 0

    def load(self, messages: Any) -> None:
        """Go on with these messages, of which a first system message becomes the conversation's own; without one it
        has none.

        Raises:
            ValueError: for what is no conversation; the one before stays.
        """
        found = checked_messages(messages, "the conversation")
        is_first = found[0]["role"] == "system" and isinstance(found[0].get("content"), str)
        self.arguments = replace(self.arguments, system=found.pop(0)["content"] if is_first else None)
        self.messages, self.first = found, 0

    @property
    def whole(self) -> list[Message]:
        """All messages, the system message first."""
        system = self.arguments.system
        return [*([{"role": "system", "content": system}] if system is not None else []), *self.messages]

    # -- an answer --

    def answer(self, text: str, show: Show = lambda events: None, is_stopped: Callable[[], bool] = bool) -> Turn:
        """Say something and hear the answer.

        Args:
            show: is given what happens while the answer is written, as `get_response_parser` gives it.
            is_stopped: is asked after each token; what was written up to then is the answer.

        Raises:
            ValueError: if the text doesn't fit, or scores are no numbers; the conversation is then as it was before.
        """
        count, first = len(self.messages), self.first
        self.messages.append({"role": "user", "content": text})
        try:
            return self._answer(show, is_stopped)
        except BaseException:  # an interruption in the middle of a layer, too
            del self.messages[count:]
            self.first = first
            self.forget()
            raise

    def _answer(self, show: Show, is_stopped: Callable[[], bool]) -> Turn:
        before = self.first
        ids, room = self._fitting()
        cache = self._kept(ids)
        answer = _Answer(self, ids, show, is_stopped)
        self.turns += 1
        kept = 0 if cache is None else len(self.read)
        sequence, cache = self.lm.generate_on(
            ids,
            cache,
            generation_config=settled(
                self.lm.defaults, self.sampling, self.lm.pad, self.lm.ends, room, is_output=True
            ),
            logits_processor=answer.processors(self.sampling.stream(self.turns)),
            stopping_criteria=StoppingCriteriaList([Ear(answer.heard, len(ids))]),
        )
        self.cache = cache
        self.read = sequence[: cache.get_seq_length()] if cache is not None else []
        message = answer.message()
        self.messages.append(message)
        left_out = sum(part["role"] == "user" for part in self.messages[before : self.first])
        return Turn(message, answer.finish_reason, answer.tokens, len(ids) - kept, left_out)

    def _fitting(self) -> tuple[list[int], int]:
        """The conversation's ids without its oldest turns, if they leave too little room, and the room there is."""
        limit, most = self.lm.max_positions, self.sampling.max_new_tokens
        ids = self._ids()
        if limit is None:
            return ids, most
        reserve = min(most, limit // RESERVE)
        starts = [n for n, message in enumerate(self.messages) if message["role"] == "user" and n > self.first]
        while len(ids) + reserve > limit and starts:
            self.first = starts.pop(0)
            ids = self._ids()
        if len(ids) >= limit:
            raise ValueError(
                f"the message: {len(ids):,} tokens with what stands around it leave no room in the model's {limit:,} "
                "positions; say it shorter."
            )
        return ids, limit - len(ids)

    def _ids(self) -> list[int]:
        system = self.whole[: len(self.whole) - len(self.messages)]
        return self.format.encode([*system, *self.messages[self.first :]], "the conversation")

    def _kept(self, ids: list[int]) -> Any:
        """The cache of what these ids begin with, one token less than all at most; None if there is none."""
        size = min(common(self.read, ids), len(ids) - 1)
        usable = self.cache is not None and self.keeps_cache and self.cache.is_croppable
        if not size or not usable or any(self.cache.is_sliding):
            self.forget()
        elif size < len(self.read):
            try:
                self.cache.crop(size - len(self.read))
                self.read = self.read[:size]
            except RuntimeError:  # layers that keep sums in place of tokens
                self.forget()
        return self.cache


class _Answer:
    """One answer while it is written."""

    def __init__(self, conversation: Conversation, ids: Sequence[int], show: Show, is_stopped: Callable[[], bool]):
        self.lm, self.show, self.is_stopped = conversation.lm, show, is_stopped
        self.parser, self.mark = parser_of(self.lm.tokenizer, ids)
        self.stream = TextStream(self.lm.tokenizer)
        self.stopper = Stopper(conversation.sampling.stop)
        self.sampling, self.ends, self.finite = conversation.sampling, set(self.lm.ends), Finite()
        self.finish_reason: Literal["stop", "length", "interrupted"] = "length"
        self.end, self.tokens = "", 0

    def processors(self, stream: Any) -> LogitsProcessorList:
        return LogitsProcessorList([self.finite, *self.sampling.processors([stream])])

    def heard(self, token: int) -> bool:
        """Show what a token adds; whether it is the last."""
        if self.finite.first(1) is not None:
            raise self.lm.broken(ANSWER)
        self.tokens += 1
        self.show(self.parser.feed(self.stopper.put(self.stream.put(token))))
        if token in self.ends or self.stopper.has_stopped:
            self.finish_reason, self.end = "stop", self.mark if token in self.ends else ""
        elif self.is_stopped():
            self.finish_reason = "interrupted"
        return self.finish_reason != "length"

    def message(self) -> Message:
        """The end has come; the message, in which a tool call that can't be read is text."""
        rest = self.stopper.put(self.stream.end()) + self.stopper.end()
        self.show(self.parser.feed(rest + self.end))
        message, events = self.parser.finalize()
        self.show(events)
        unread = "".join(call["text"] for call in message.pop("invalid_tool_calls", []))
        return message | {"content": message["content"] + unread}
