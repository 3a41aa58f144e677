"""What `generate` continues: words of the command line, lines of text, or texts and conversations in a table."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...data.cells import Column, absent, in_brackets, plain
from ...data.files import json_line, read_lines
from ...data.table import Columns, is_table, read_columns
from .messages import checked_messages

COLUMNS = ("prompt", "messages")  # the first of them that a table has


@dataclass(frozen=True)
class Prompt:
    """A text or a conversation (one of the two), its place in the input from 1, and the id that its row has."""

    row: int
    where: str
    text: str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[Any] | None = None
    id: Any = None

    @property
    def shown(self) -> dict[str, Any]:
        """What an output line says of it."""
        said: dict[str, Any] = {"row": self.row} | ({} if self.id is None else {"id": self.id})
        said |= {"prompt": self.text} if self.messages is None else {"messages": self.messages}
        return said | ({"tools": self.tools} if self.tools else {})


def read_prompts(words: Sequence[str], path: str | None, column: str | None = None) -> list[Prompt]:
    """The prompts in order; of a file without a table's ending, or of standard input, one for each line.

    Args:
        column: of a table; None for the first of `COLUMNS` that it has.

    Raises:
        ValueError: for a file that can't be read, with the row for what is no prompt.
    """
    if path and is_table(path):
        return [*map(_whole, table_prompts(read_columns(path), path, column))]
    if column:
        raise ValueError("--column names a column of a table; --input has none (.jsonl, .json, .csv, .tsv, .parquet).")
    texts = words or read_lines(path)
    kind = "prompt" if words else f"{path or 'standard input'}, line"
    return [_whole(Prompt(number, f"{kind} {number}", text)) for number, text in enumerate(texts, 1)]


def _whole(prompt: Prompt) -> Prompt:
    """The prompt, if it is made of whole characters: JSON may name half of one, and a terminal hand on other bytes."""
    try:
        json_line(prompt.shown).encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{prompt.where}: it holds half of a character (such as \\ud83d); mend it.") from None
    return prompt


def table_prompts(columns: Columns, path: str, column: str | None) -> list[Prompt]:
    """The prompts of a table's rows. A list is a conversation, also one written as JSON in a column `messages`."""
    name = column or next((name for name in COLUMNS if name in columns), COLUMNS[0])
    if name not in columns:
        raise ValueError(f"{path}: {absent(Column(name, 'text', 'column'), columns)}")
    size = len(columns[name])
    ids, tools = columns.get("id", [None] * size), columns.get("tools", [None] * size)
    return [
        _prompt(number, f"{path}, row {number}", name, *cells)
        for number, cells in enumerate(zip(columns[name], ids, tools, strict=True), 1)
    ]


def _prompt(number: int, where: str, name: str, cell: Any, identifier: Any, tools: Any) -> Prompt:
    cell, tools, identifier = plain(cell), in_brackets(plain(tools)), plain(identifier)
    identifier = identifier if isinstance(identifier, str | int | None) else str(identifier)
    if name == "messages":
        cell = in_brackets(cell)
    if tools is not None and not isinstance(tools, list):
        raise ValueError(f"{where}: 'tools' is no list; write the tools' schemas as JSON.")
    if isinstance(cell, str) and name != "messages":
        return Prompt(number, where, text=cell, tools=tools, id=identifier)
    if cell is None:
        raise ValueError(f"{where}: {name!r} is empty; write a prompt, or leave the row out.")
    if not isinstance(cell, list):
        raise ValueError(f"{where}: {name!r} is {type(cell).__name__}, neither a text nor a conversation (a list).")
    return Prompt(number, where, messages=checked_messages(cell, where), tools=tools, id=identifier)
