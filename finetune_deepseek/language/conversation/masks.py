"""A conversation as ids, with labels where it is trained; a longer one than the model cut at its turns.

    train_on    assistant: what the template marks; last: of the last answer alone; all: every token but the first
    thinking    where reasoning is written, and whether it is trained in earlier answers; see arguments.py

Letters: S tokens of a conversation.
"""

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from tokenization_deepseek import AnsweredChat, encode_answers
from tokenization_deepseek.tool_calls import read_json

from ...training.optimization import IGNORED_LABEL
from .arguments import ConversationArguments
from .checks import Faulty
from .layouts import Turn
from .templates import REFUSALS, argument_form, prompt_of

OPENING, CLOSING = "<think>", "</think>"


class Encoded(NamedTuple):
    """A conversation as the model takes it.

    Attributes:
        input_ids, labels: [S], labels -100 where nothing is trained.
        reply: the last answer's first token, and the one behind its last.
        cut: how many turns were cut at the beginning.
        header: of the last answer to a user, where it isn't what generation puts there without a flag.
    """

    input_ids: list[int]
    labels: list[int]
    reply: tuple[int, int]
    cut: int
    header: str = ""

    @property
    def num_trained(self) -> int:
        return sum(label != IGNORED_LABEL for label in self.labels)


class Encoder:
    """Encodes conversations of one tokenizer, by its chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, arguments: ConversationArguments) -> None:
        self.tokenizer, self.arguments = tokenizer, arguments
        self.form = argument_form(tokenizer)
        self.prompt = prompt_of(tokenizer)

    def __call__(self, messages: list[Turn], tools: list[Any]) -> Encoded:
        """The conversation, without its oldest turns where it has more tokens than `max_seq_length`.

        Raises:
            Faulty: if the template can't write it, nothing of it is trained, or its last turns alone are too long.
        """
        turns = [self._as_written(turn) for turn in messages]
        self._check_written(turns, tools)
        whole = self._encoded(turns, tools, 0)
        limit = self.arguments.max_seq_length
        encoded = whole if len(whole.input_ids) <= limit else self._shortened(turns, tools, len(whole.input_ids))
        if not encoded.num_trained:
            raise Faulty("untrained", f"{len(encoded.input_ids)} tokens")
        return encoded

    # -- what the template gets --

    def _as_written(self, turn: Turn) -> Turn:
        """A turn with its reasoning in `reasoning_content`, and arguments as the template takes them."""
        found = {**turn}
        content = turn["content"]
        if turn["role"] == "assistant" and isinstance(content, str) and content.lstrip().startswith(OPENING):
            thought, closing, rest = content.lstrip().removeprefix(OPENING).partition(CLOSING)
            is_known = "reasoning_content" in self._template([]) or self.arguments.thinking == "drop"
            if closing and is_known and not turn.get("reasoning_content"):
                found |= {"content": rest.lstrip("\n"), "reasoning_content": thought.strip("\n")}
        if self.arguments.thinking == "drop":
            found.pop("reasoning_content", None)
        if "tool_calls" in turn and self.form:
            found["tool_calls"] = [_with_arguments(call, self.form) for call in turn["tool_calls"]]
        return found

    def _template(self, tools: list[Any]) -> str:
        return self.tokenizer.get_chat_template(tools=tools or None)

    def _check_written(self, turns: list[Turn], tools: list[Any]) -> None:
        """Raises Faulty for what the template would leave out without a word."""
        template = self._template(tools)
        held = {name for turn in turns for name in ("tool_calls", "reasoning_content") if turn.get(name)}
        for name in sorted(held | ({"tools"} if tools else set())):
            if name not in template:
                raise Faulty("unread", f"the template has no word for {name}")

    # -- ids and masks --

    def _encoded(self, turns: list[Turn], tools: list[Any], cut: int) -> Encoded:
        kept = self.arguments.thinking == "keep" and any(turn.get("reasoning_content") for turn in turns)
        chat = self._spliced(turns, tools) if kept else self._chat(turns, tools)
        labels = [
            token if is_trained else IGNORED_LABEL
            for token, is_trained in zip(chat.input_ids, self._trained(chat, turns, tools), strict=True)
        ]
        return Encoded(chat.input_ids, labels, chat.answers[-1], cut, self._other_header(chat, turns))

    def _other_header(self, chat: AnsweredChat, turns: list[Turn]) -> str:
        last = max(_places(turns))
        if not (last and self.prompt and turns[last - 1]["role"] == "user"):
            return ""
        span = chat.answers[-1]
        header: Any = self.tokenizer.decode(chat.input_ids[_with_prompt(chat, span) : span[0]])
        return "" if header.strip() == self.prompt.strip() else header  # decoding may add or lose a space

    def _chat(self, turns: list[Turn], tools: list[Any]) -> AnsweredChat:
        try:
            chat = encode_answers(self.tokenizer, turns, tools or None)
        except (*REFUSALS, ValueError) as error:
            raise Faulty("refused", " ".join(str(error).split())) from error
        if len(chat.answers) != len(_places(turns)):
            raise Faulty("refused", f"it marks {len(chat.answers)} of {len(_places(turns))} answers")
        return chat

    def _spliced(self, turns: list[Turn], tools: list[Any]) -> AnsweredChat:
        """Each answer as it stands where it is the last one, with what is between them as it stands in the whole."""
        whole = self._chat(turns, tools)
        ids: list[int] = []
        answered: list[int] = []
        supplied: list[int] = []
        answers, done = [], 0
        for place, span in zip(_places(turns), whole.answers, strict=True):
            own = self._chat(turns[: place + 1], tools)
            start, stop = own.answers[-1]
            parts = [(whole, done, _with_prompt(whole, span)), (own, _with_prompt(own, own.answers[-1]), stop)]
            for chat, begin, end in parts:
                ids += chat.input_ids[begin:end]
                answered += chat.assistant_mask[begin:end]
                supplied += chat.prompt_mask[begin:end]
            answers.append((len(ids) - (stop - start), len(ids)))
            done = span[1]
        rest = len(whole.input_ids) - done
        return AnsweredChat(ids + whole.input_ids[done:], answered + [0] * rest, supplied + [0] * rest, answers)

    def _trained(self, chat: AnsweredChat, turns: list[Turn], tools: list[Any]) -> list[bool]:
        """[S], whether a token is trained."""
        arguments, size = self.arguments, len(chat.input_ids)
        masks = zip(chat.assistant_mask, chat.prompt_mask, strict=True)
        supplied = arguments.train_prompt_tokens
        if arguments.train_on == "all":
            trained = [supplied or not prompt for _, prompt in masks]
        else:
            trained = [bool(answer or supplied and prompt) for answer, prompt in masks]
        if arguments.train_on == "last":
            begin, end = _with_prompt(chat, chat.answers[-1]), chat.answers[-1][1]
            trained = [found and begin <= place < end for place, found in enumerate(trained)]
        if arguments.thinking == "last":
            for start, stop in self._earlier_thoughts(chat, turns, tools):
                trained[start:stop] = [False] * (stop - start)
        return [False, *trained[1:size]]  # nothing stands before the first token

    def _earlier_thoughts(self, chat: AnsweredChat, turns: list[Turn], tools: list[Any]) -> Iterator[tuple[int, int]]:
        """The reasoning in all answers but the last: what they have more than without it, at their beginning."""
        places = _places(turns)[:-1]
        bare = [
            {name: value for name, value in turn.items() if place not in places or name != "reasoning_content"}
            for place, turn in enumerate(turns)
        ]
        if bare == turns:
            return
        without = self._chat(bare, tools)
        for (start, stop), (begin, end) in zip(chat.answers[:-1], without.answers[:-1], strict=True):
            same = 0
            while same < min(stop - start, end - begin) and (
                chat.input_ids[stop - same - 1] == without.input_ids[end - same - 1]
            ):
                same += 1
            yield start, stop - same

    # -- length --

    def _shortened(self, turns: list[Turn], tools: list[Any], length: int) -> Encoded:
        """The conversation without its oldest turns, up to a user's turn; system turns stay.

        Raises:
            Faulty: if its last question and what follows are too long by themselves.
        """
        limit = self.arguments.max_seq_length
        last = max(_places(turns))
        starts = [n for n, turn in enumerate(turns[:last]) if turn["role"] == "user" and _begins_later(turns, n)]
        if not starts:
            raise Faulty("too_long", f"{length:,} tokens, one question")
        low, high = 0, len(starts) - 1
        found = self._from(turns, tools, starts[high])
        if len(found.input_ids) > limit:
            raise Faulty("too_long", f"{length:,} tokens, {len(found.input_ids):,} from the last question on")
        while low < high:  # the earliest start that fits
            middle = (low + high) // 2
            tried = self._from(turns, tools, starts[middle])
            if len(tried.input_ids) <= limit:
                high, found = middle, tried
            else:
                low = middle + 1
        return found

    def _from(self, turns: list[Turn], tools: list[Any], start: int) -> Encoded:
        systems = [turn for turn in turns[:start] if turn["role"] == "system"]
        return self._encoded([*systems, *turns[start:]], tools, start - len(systems))


def _places(turns: list[Turn]) -> list[int]:
    return [place for place, turn in enumerate(turns) if turn["role"] == "assistant"]


def _begins_later(turns: list[Turn], place: int) -> bool:
    return any(turn["role"] != "system" for turn in turns[:place])


def _with_prompt(chat: AnsweredChat, span: tuple[int, int]) -> int:
    """Where what the generation prompt supplies before an answer begins."""
    start = span[0]
    while start and chat.prompt_mask[start - 1]:
        start -= 1
    return start


def _with_arguments(call: dict[str, Any], form: type) -> dict[str, Any]:
    arguments = call["function"]["arguments"]
    if form is dict and isinstance(arguments, str):
        arguments = read_json(arguments)
    elif form is str and not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return call | {"function": call["function"] | {"arguments": arguments}}
