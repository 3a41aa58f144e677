"""Layouts of conversations in tables, each read as messages of `role` and `content` as chat templates take them.

    messages            `messages` (or `conversations`): a list of {role, content}; also `tools`
    prompt_completion   `prompt`, `completion`: texts, or lists of messages; also `tools`
    sharegpt            `conversations` (or `messages`): a list of {from, value}; also `system`, `tools`
    alpaca              `instruction`, `output`; also `input`, `system`, `history` (pairs of instruction and output)

A layout is told by the columns, and the first two by the keys of the first turn. Cells of a csv file are JSON.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from tokenization_deepseek.tool_calls import read_json

from ...data.cells import Column, in_brackets, plain, typed

Turn: TypeAlias = dict[str, Any]
TURNS = ("messages", "conversations")
SPEAKERS = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    **{"system": "system", "function_call": "function_call"},
}


class Faulty(Exception):
    """A row that is no conversation which can be trained; `fault` is a key of checks.FAULTS."""

    def __init__(self, fault: str, detail: str) -> None:
        super().__init__(detail)
        self.fault, self.detail = fault, detail


class Layout(NamedTuple):
    """How a table holds conversations.

    Attributes:
        columns: those that it is told by; of `TURNS` one stands for the other.
        texts: further ones, whose cells are texts.
        read: the messages of a row, whose list of turns is in `turns`.
    """

    columns: tuple[str, ...]
    texts: tuple[str, ...]
    read: Callable[[dict[str, Any]], list[Turn]]


class Conversations(NamedTuple):
    """The rows of a table.

    Attributes:
        layout: a word of `LAYOUTS`.
        rows: messages and tools of each row, or what is wrong with it.
    """

    layout: str
    rows: list["tuple[list[Turn], list[Any]] | Faulty"]


# -- a row as messages --


def without_nulls(value: Any) -> Any:
    """A value without keys that hold nothing, as parquet gives each object the keys of all."""
    if isinstance(value, Mapping):
        return {name: without_nulls(part) for name, part in value.items() if part is not None}
    return [without_nulls(part) for part in value] if isinstance(value, (list, tuple)) else value


def turns_of(value: Any, what: str) -> list[Any]:
    try:
        value = in_brackets(plain(value))
    except ValueError as error:
        raise Faulty("broken", f"{what} are {error}") from None
    if value is None:
        return []
    if not isinstance(value, (list, tuple)):
        raise Faulty("broken", f"{what} is {str(value)[:40]!r}, not a list of turns")
    return list(value)


def of_messages(row: dict[str, Any]) -> list[Turn]:
    return [_turn(turn, "role") for turn in turns_of(row["turns"], "messages")]


def of_sharegpt(row: dict[str, Any]) -> list[Turn]:
    turns = [_turn(turn, "from") for turn in turns_of(row["turns"], "conversations")]
    return [*_system(row), *map(_of_speaker, turns)]


def of_prompt(row: dict[str, Any]) -> list[Turn]:
    return [*_said("user", row.get("prompt"), "prompt"), *_said("assistant", row.get("completion"), "completion")]


def of_alpaca(row: dict[str, Any]) -> list[Turn]:
    found = _system(row)
    for pair in turns_of(row.get("history"), "history"):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise Faulty("broken", f"history holds {str(pair)[:40]!r}, not a pair of instruction and output")
        found += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    question = "\n".join(text for text in (row.get("instruction"), row.get("input")) if text)
    if not question and row.get("output") is None:
        return found
    return [*found, {"role": "user", "content": question}, {"role": "assistant", "content": row.get("output")}]


def _turn(turn: Any, key: str) -> Turn:
    if not isinstance(turn, Mapping):
        raise Faulty("broken", f"a turn is {str(turn)[:40]!r}, not an object")
    known = without_nulls(turn)
    if key not in known:
        raise Faulty("broken", f"a turn has no {key!r}: it has {', '.join(known) or 'nothing'}")
    return known


def _of_speaker(turn: Turn) -> Turn:
    role = SPEAKERS.get(turn["from"]) if isinstance(turn["from"], str) else None
    if role is None:
        raise Faulty("unknown_role", f"from {turn['from']!r}")
    if role != "function_call":
        return {"role": role, "content": turn.get("value")}
    calls = _json(turn.get("value"))
    return {"role": "assistant", "content": "", "tool_calls": calls if isinstance(calls, list) else [calls]}


def _json(text: Any) -> Any:
    try:
        return read_json(text) if isinstance(text, str) else text
    except ValueError:
        raise Faulty("bad_arguments", f"a call is {str(text)[:40]!r}") from None


def _system(row: dict[str, Any]) -> list[Turn]:
    return [{"role": "system", "content": row["system"]}] if row.get("system") else []


def _said(role: str, value: Any, what: str) -> list[Turn]:
    found = in_brackets(value) if isinstance(value, str) and value.lstrip().startswith("[{") else plain(value)
    if isinstance(found, (list, tuple)) and all(isinstance(turn, Mapping) and "role" in turn for turn in found):
        return [_turn(turn, "role") for turn in found]
    return [] if value is None else [{"role": role, "content": plain(value)}]


def tools_of(cell: Any) -> list[Any]:
    """The functions that a conversation may call, each as `{"type": "function", "function": {...}}`."""
    try:
        found = in_brackets(plain(cell))
    except ValueError as error:
        raise Faulty("broken", f"tools are {error}") from None
    found = [found] if isinstance(found, Mapping) else found or []
    if not isinstance(found, (list, tuple)) or not all(isinstance(tool, Mapping) for tool in found):
        raise Faulty("broken", f"tools are {str(cell)[:40]!r}, not a list of objects")
    tools = [without_nulls(tool) for tool in found]
    tools = [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]
    for function in (tool["function"] for tool in tools):
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise Faulty("broken", f"a tool names no function: {str(function)[:40]!r}")
    return tools


# -- a table --

LAYOUTS = {
    "messages": Layout(("messages",), (), of_messages),
    "sharegpt": Layout(("conversations",), ("system",), of_sharegpt),
    "prompt_completion": Layout(("prompt", "completion"), (), of_prompt),
    "alpaca": Layout(("instruction", "output"), ("instruction", "output", "input", "system"), of_alpaca),
}


def read_conversations(raw: Mapping[str, Sequence[Any]], where: str, asked: str = "auto") -> Conversations:
    """The conversations in raw columns.

    Raises:
        ValueError: if they have no known layout, or several; for a cell that is no text where one has to be.
    """
    name = layout_of(raw, where) if asked == "auto" else asked
    layout = LAYOUTS[name]
    turns = next((column for column in TURNS if column in raw), None)
    if missing := [c for c in layout.columns if c not in raw and (turns is None or c not in TURNS)]:
        raise ValueError(f"{where}: no column {missing[0]!r}, which --layout {name} has; it has {', '.join(raw)}.")
    cells = typed(raw, [Column(column, "text", required=False) for column in layout.texts], where)
    others = {column: list(raw[column]) for column in ("prompt", "completion", "history", "tools") if column in raw}
    cells |= {**others, **({"turns": list(raw[turns])} if turns else {})}
    rows = (dict(zip(cells, row, strict=True)) for row in zip(*cells.values(), strict=True))
    return Conversations(name, [_read(row, layout) for row in rows])


def _read(row: dict[str, Any], layout: Layout) -> "tuple[list[Turn], list[Any]] | Faulty":
    try:
        return layout.read(row), tools_of(row.get("tools"))
    except Faulty as fault:
        return fault


def layout_of(raw: Mapping[str, Sequence[Any]], where: str) -> str:
    """The layout of a table.

    Raises:
        ValueError: if it is none, or can't be told from another.
    """
    found = [name for name, layout in LAYOUTS.items() if set(layout.columns) <= set(raw)]
    if len(found) == 1 and found[0] in ("messages", "sharegpt"):
        return _keys_of_turns(raw[LAYOUTS[found[0]].columns[0]]) or found[0]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(
            f"{where}: its columns {', '.join(raw)} are of several layouts: {', '.join(found)}. Name the one that is "
            "meant by --layout, or take the other's columns out."
        )
    known = "; ".join(f"{name}: {', '.join(layout.columns)}" for name, layout in LAYOUTS.items())
    raise ValueError(f"{where}: its columns {', '.join(raw) or '(none)'} are no known layout ({known}).")


def _keys_of_turns(cells: Sequence[Any]) -> str | None:
    """The layout that the first turn's keys tell; None if there is no turn."""
    for cell in cells:
        turns = in_brackets(plain(cell))
        if isinstance(turns, (list, tuple)) and turns and isinstance(turns[0], Mapping):
            return "sharegpt" if "from" in turns[0] else "messages"
    return None
