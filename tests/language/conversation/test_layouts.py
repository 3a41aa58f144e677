"""Every layout is recognised and read as messages; a mix or an unknown one is refused by name."""

import csv
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finetune_deepseek.data.table import read_columns
from finetune_deepseek.language.conversation.arguments import ConversationArguments
from finetune_deepseek.language.conversation.layouts import Faulty, read_conversations
from finetune_deepseek.language.conversation.task import Conversation

from .conftest import call, turn, write

ASKED, ANSWERED = turn("user", "hi"), turn("assistant", "ho")
TOOL = {"name": "get", "parameters": {"type": "object"}}
ROWS = {
    "messages": (
        {"messages": [ASKED, ANSWERED], "tools": [TOOL], "id": 3},
        [ASKED, ANSWERED],
    ),
    "sharegpt": (
        {
            "conversations": [
                {"from": "human", "value": "hi"},
                {"from": "function_call", "value": '{"name": "get", "arguments": {"a": 1}}'},
                {"from": "observation", "value": "1"},
                {"from": "gpt", "value": "ho"},
            ],
            "system": "short",
            "tools": json.dumps([TOOL]),
        },
        [
            turn("system", "short"),
            ASKED,
            turn("assistant", "", tool_calls=[{"name": "get", "arguments": {"a": 1}}]),
            turn("tool", "1"),
            ANSWERED,
        ],
    ),
    "prompt_completion": ({"prompt": "hi", "completion": "ho"}, [ASKED, ANSWERED]),
    "alpaca": (
        {"instruction": "add", "input": "1 2", "output": "3", "system": "short", "history": [["hi", "ho"]]},
        [turn("system", "short"), ASKED, ANSWERED, turn("user", "add\n1 2"), turn("assistant", "3")],
    ),
}


def read(folder, rows, asked="auto", name="rows.jsonl"):
    path = write(folder / name, rows)
    return read_conversations(read_columns(path), path, asked)


@pytest.mark.parametrize("layout", ROWS)
def test_every_layout_is_told_by_its_columns(tmp_path, layout):
    row, expected = ROWS[layout]
    found = read(tmp_path, [row, row])
    assert found.layout == layout
    for messages, tools in found.rows:
        assert messages == expected
        assert tools == ([{"type": "function", "function": TOOL}] if "tools" in row else [])


@pytest.mark.parametrize("layout", ROWS)
def test_parquet_and_csv_hold_the_same(tmp_path, layout):
    row, expected = ROWS[layout]
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "rows.parquet")
    with open(tmp_path / "rows.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(row)
        writer.writerow(cell if isinstance(cell, str) else json.dumps(cell) for cell in row.values())
    for name in ("rows.parquet", "rows.csv"):
        found = read_conversations(read_columns(str(tmp_path / name)), name)
        assert (found.layout, found.rows[0][0]) == (layout, expected)


def test_turns_tell_what_their_column_does_not(tmp_path):
    said = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]
    for column, turns, layout in (("conversations", [ASKED, ANSWERED], "messages"), ("messages", said, "sharegpt")):
        found = read(tmp_path, [{column: []}, {column: turns}])
        assert (found.layout, found.rows[1][0]) == (layout, [ASKED, ANSWERED])


def test_prompts_may_be_messages_and_texts_with_brackets_stay_texts(tmp_path):
    rows = [
        {"prompt": [turn("system", "s"), ASKED], "completion": [ANSWERED]},
        {"prompt": '[{"a": 1}]', "completion": "[1, 2]"},
    ]
    found = read(tmp_path, rows).rows
    assert found[0][0] == [turn("system", "s"), ASKED, ANSWERED]
    assert found[1][0] == [turn("user", '[{"a": 1}]'), turn("assistant", "[1, 2]")]


def test_nothing_that_tables_fill_up_remains(tmp_path):
    """Parquet gives each message the keys of all, and each object of arguments those of all calls."""
    called = turn("assistant", None, tool_calls=[call({"a": 1}), call({"b": {"c": 2}})])
    pq.write_table(pa.Table.from_pylist([{"messages": [ASKED, called]}]), tmp_path / "rows.parquet")
    found = read_conversations(read_columns(str(tmp_path / "rows.parquet")), "rows").rows[0][0]
    assert found == [ASKED, {"role": "assistant", "tool_calls": called["tool_calls"]}]


def test_a_mix_and_an_unknown_layout_are_refused_by_name(tmp_path):
    mixed = [{"messages": [ASKED, ANSWERED]}, {"instruction": "hi", "output": "ho"}]
    with pytest.raises(ValueError, match=r"rows.jsonl: .* several layouts: messages, alpaca. Name the one .*--layout"):
        read(tmp_path, mixed)
    found = read(tmp_path, mixed, "alpaca")
    assert [row[0] for row in found.rows] == [[], [ASKED, ANSWERED]]
    with pytest.raises(ValueError, match=r"rows.jsonl: its columns text are no known layout \(messages: messages; "):
        read(tmp_path, [{"text": "hi"}])
    with pytest.raises(ValueError, match="no column 'prompt', which --layout prompt_completion has; it has text"):
        read(tmp_path, [{"text": "hi"}], "prompt_completion")
    with pytest.raises(ValueError, match="row 2: 'output' is '3', not a text"):
        read(tmp_path, [{"instruction": "a", "output": "b"}, {"instruction": "a", "output": 3}])


def test_rows_that_are_no_lists_of_turns_are_faulty(tmp_path):
    wrong = ["hello", ["hello"], [{"content": "x"}], [{"role": None}]]
    found = read(tmp_path, [{"messages": [ASKED, ANSWERED]}, *({"messages": turns} for turns in wrong)]).rows
    assert [row.fault for row in found[1:]] == ["broken"] * 4 and all(isinstance(row, Faulty) for row in found[1:])
    assert found[1].detail == "messages is 'hello', not a list of turns"
    (odd,) = read(tmp_path, [{"conversations": [{"from": "narrator", "value": "x"}]}]).rows
    assert (odd.fault, odd.detail) == ("unknown_role", "from 'narrator'")


def test_the_report_names_each_files_layout(tmp_path, capsys):
    train = write(tmp_path / "train.jsonl", [ROWS["alpaca"][0]])
    test = write(tmp_path / "test.jsonl", [{"messages": [ASKED, ANSWERED]}])
    made = Conversation(ConversationArguments(train_file=[train], test_file=[test]), 0)
    made.load_splits()
    assert "train.jsonl: 1 conversation(s), layout alpaca" in capsys.readouterr().out
    assert {split: found.report()["layouts"] for split, found in made.found.items()} == {
        "train": {"train.jsonl": "alpaca"},
        "test": {"test.jsonl": "messages"},
    }
