"""A conversation's messages as they come out of a file, checked: roles, contents, order of keys left alone."""

from collections.abc import Mapping
from typing import Any

ROLES = ("system", "developer", "user", "assistant", "tool", "latest_reminder")


def checked_messages(value: Any, where: str) -> list[dict[str, Any]]:
    """The messages without the keys that hold nothing, which parquet files give to every message.

    Raises:
        ValueError: with `where` and the number of the message, for an empty list, what is no message, a role that
            there isn't, or a content that is no text.
    """
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{where}: a conversation is a list of messages, found {type(value).__name__}.")
    if not value:
        raise ValueError(f"{where}: an empty conversation; write a message, or leave the row out.")
    return [_checked(message, f"{where}, message {number}") for number, message in enumerate(value, 1)]


def _checked(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ValueError(f'{where}: expected {{"role": ..., "content": ...}}, found {type(message).__name__}.')
    found = {name: part for name, part in message.items() if part is not None}
    role, content = found.get("role"), found.get("content")
    if role not in ROLES:
        raise ValueError(f"{where}: no such role: {role!r}; there is {', '.join(ROLES)}.")
    if content is None and not found.keys() & {"tool_calls", "reasoning_content"}:
        raise ValueError(f"{where}: it has no content; write a text, which may be empty.")
    if not isinstance(content, (str, list, tuple, type(None))):
        raise ValueError(f"{where}: its content is {type(content).__name__}, no text.")
    return found
