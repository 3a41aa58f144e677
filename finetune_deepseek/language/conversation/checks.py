"""What is wrong with a conversation, by name; a report counts such rows and names them."""

import json
from typing import Any

from tokenization_deepseek.tool_calls import read_json

from ..serving.messages import ROLES
from .layouts import Faulty, Turn

LEFT_OUT = {
    "broken": "not a conversation (left out)",
    "empty": "no turn (left out)",
    "unknown_role": "unknown role (left out)",
    "assistant_twice": "two assistant turns in a row (left out)",
    "tool_without_call": "tool result without a call (left out)",
    "bad_arguments": "tool call whose arguments are no JSON object (left out)",
    "no_answer": "no assistant turn (left out)",
    "refused": "refused by the chat template (left out)",
    "unread": "holds what the chat template doesn't write (left out)",
    "untrained": "no trained token (left out)",
    "too_long": "longer than the model, at its last turns alone (left out)",
}
FAULTS = LEFT_OUT | {
    "cut": "longer than the model (oldest turns cut)",
    "empty_answers": "an empty answer",
    "duplicates": "same as an earlier conversation",
    "replacement_characters": "U+FFFD in place of undecodable bytes",
    "in_train": "conversation is in the training split",
}


def checked(messages: list[Turn]) -> list[Turn]:
    """The messages, calls in one form.

    Raises:
        Faulty: for the first fault.
    """
    if not messages:
        raise Faulty("empty", "no messages")
    found = [_checked(turn, number) for number, turn in enumerate(messages, start=1)]
    open_calls: list[Any] = []
    before = ""
    for number, turn in enumerate(found, start=1):
        role = turn["role"]
        if role == before == "assistant":
            raise Faulty("assistant_twice", f"turns {number - 1} and {number}")
        open_calls = _answer(turn, open_calls, number) if role == "tool" else _calls(turn, number)
        before = role
    if not any(turn["role"] == "assistant" for turn in found):
        raise Faulty("no_answer", f"roles {', '.join(turn['role'] for turn in found)}")
    return found


def _checked(turn: Turn, number: int) -> Turn:
    role, content = turn["role"], turn.get("content")
    if role not in ROLES:
        raise Faulty("unknown_role", f"turn {number}, role {role!r}")
    if content is None and not (turn.get("tool_calls") or turn.get("reasoning_content")):
        raise Faulty("broken", f"turn {number} has no content")
    if not isinstance(content, (str, list, type(None))):
        raise Faulty("broken", f"the content of turn {number} is {str(content)[:40]!r}, not a text")
    if not isinstance(turn.get("reasoning_content", ""), str):
        raise Faulty("broken", f"the reasoning of turn {number} is no text")
    calls = turn.get("tool_calls") or []
    if not isinstance(calls, list) or calls and role != "assistant":
        raise Faulty("broken", f"tool_calls of turn {number}: {'not a list' if role == 'assistant' else role}")
    found = {name: value for name, value in turn.items() if name != "tool_calls"} | {"content": content or ""}
    return found | ({"tool_calls": [_call(call, number) for call in calls]} if calls else {})


def _call(call: Any, number: int) -> dict[str, Any]:
    """A call as `{"type": "function", "function": {"name", "arguments"}}`; its arguments stay a text or an object."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise Faulty("broken", f"a call of turn {number} names no function")
    arguments = function.get("arguments", {})
    try:
        value = read_json(arguments if isinstance(arguments, str) else json.dumps(arguments))
    except (ValueError, TypeError):  # NaN, or what JSON has no form for
        value = None
    if not isinstance(value, dict):
        raise Faulty("bad_arguments", f"turn {number}, {function['name']}: {str(arguments)[:40]!r}")
    identity = {"id": call["id"]} if call.get("id") is not None else {}
    return {**identity, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _calls(turn: Turn, number: int) -> list[Any]:
    """The ids of the calls that a turn makes, None for one without."""
    return [call.get("id") for call in turn.get("tool_calls", [])]


def _answer(turn: Turn, open_calls: list[Any], number: int) -> list[Any]:
    """The calls that are still open when a tool's turn has answered one."""
    asked = turn.get("tool_call_id")
    if not open_calls:
        raise Faulty("tool_without_call", f"turn {number}")
    if asked is None or None in open_calls:
        return open_calls[1:]
    if asked not in open_calls:
        raise Faulty("tool_without_call", f"turn {number} answers {asked!r}, which no call is named")
    return [call for call in open_calls if call != asked]
