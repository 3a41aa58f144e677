"""Whatever can't be trained is counted and named with its row, or refused in one line; nothing is dropped unsaid."""

import json

import pytest

from finetune_deepseek.language.conversation.arguments import ConversationArguments
from finetune_deepseek.language.conversation.checks import FAULTS, LEFT_OUT, Faulty, checked
from finetune_deepseek.language.conversation.task import Conversation
from finetune_deepseek.language.conversation.templates import trained_template

from .conftest import CHATS, call, turn, write

ASKED, ANSWERED = turn("user", "hi"), turn("assistant", "ho")
CALLED = turn("assistant", "", tool_calls=[call('{"a": 1}', id="c1")])
FAULTY = [
    ("unknown_role", [ASKED, turn("narrator", "x"), ANSWERED], "turn 2, role 'narrator'"),
    ("assistant_twice", [ASKED, ANSWERED, ANSWERED], "turns 2 and 3"),
    ("empty", [], "no messages"),
    ("tool_without_call", [ASKED, ANSWERED, turn("tool", "1"), ANSWERED], "turn 3"),
    ("tool_without_call", [ASKED, CALLED, turn("tool", "1"), turn("tool", "2"), ANSWERED], "turn 4"),
    ("tool_without_call", [ASKED, CALLED, turn("tool", "1", tool_call_id="c2"), ANSWERED], "'c2', which no call"),
    ("bad_arguments", [ASKED, turn("assistant", "", tool_calls=[call('{"a": ')])], "turn 2, get: '{\"a\": '"),
    ("bad_arguments", [ASKED, turn("assistant", "", tool_calls=[call("[1]")])], "turn 2, get: '[1]'"),
    (
        "bad_arguments",
        [ASKED, turn("assistant", "", tool_calls=[call('{"a": 1, "a": 2}')])],
        'turn 2, get: \'{"a": 1, "a": 2}\'',
    ),
    ("bad_arguments", [ASKED, turn("assistant", "", tool_calls=[call('{"a": NaN}')])], "turn 2, get: '{\"a\": NaN}'"),
    (
        "bad_arguments",
        [ASKED, turn("assistant", "", tool_calls=[call({"a": float("nan")})])],
        "turn 2, get: \"{'a': nan}",
    ),
    ("broken", [ASKED, turn("assistant", None)], "turn 2 has no content"),
    ("broken", [turn("user", 3), ANSWERED], "the content of turn 1 is '3', not a text"),
    ("broken", [ASKED, turn("assistant", "", tool_calls=[{"arguments": "{}"}])], "a call of turn 2 names no function"),
    ("no_answer", [turn("system", "s"), ASKED], "roles system, user"),
]


def encoded(folder, rows, tokenizer, **settings):
    """What is known of a split of these rows."""
    made = Conversation(ConversationArguments(train_file=[write(folder / "rows.jsonl", rows)], **settings), 0)
    splits = made.load_splits()
    trained_template(tokenizer, made.arguments.chat_template)
    made.check_splits(splits, tokenizer)
    return made


@pytest.mark.parametrize(("fault", "messages", "detail"), FAULTY)
def test_a_fault_is_found_and_named(fault, messages, detail):
    with pytest.raises(Faulty) as error:
        checked(messages)
    assert error.value.fault == fault and detail in error.value.detail


@pytest.mark.parametrize(
    ("row", "detail"),
    [
        ({"conversations": [{"from": ["human"], "value": "a"}]}, "from ['human']"),
        ({"conversations": [{"from": "human", "value": "a\ud83d"}, {"from": "gpt", "value": "b"}]}, "half of a char"),
        (
            {"conversations": [{"from": "human", "value": "a"}], "tools": [{"function": "f"}]},
            "a tool names no function",
        ),
        (
            {"conversations": [{"from": "human", "value": "a"}], "tools": [{"function": None}]},
            "a tool names no function",
        ),
    ],
)
def test_an_odd_row_is_counted_beside_good_ones(row, detail, tmp_path):
    good = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in (good, row)))
    made = Conversation(ConversationArguments(train_file=[str(path)]), 0)
    assert len(made.load_splits()["train"]) == 1
    (found,) = [found for found in made.found["train"].faults.values() if found]
    assert found[0][0] == "rows.jsonl, row 2" and detail in found[0][1]


def test_dates_beside_turns_are_no_fault(tmp_path):
    import datetime

    import pyarrow as pa
    import pyarrow.parquet as pq

    turns = [said | {"at": datetime.datetime(2025, 1, 2)} for said in (ASKED, ANSWERED)]
    pq.write_table(pa.table({"messages": [turns]}), tmp_path / "rows.parquet")
    made = Conversation(ConversationArguments(train_file=[str(tmp_path / "rows.parquet")]), 0)
    assert "2025-01-02" in made.load_splits()["train"]["conversation"][0]


def test_what_looks_alike_is_no_fault():
    two = turn("assistant", "", tool_calls=[call(), call({"a": 1})])
    for messages in (
        [ANSWERED, ASKED, turn("system", "s"), ANSWERED],
        [ASKED, two, turn("tool", "1"), turn("tool", "2"), ANSWERED],
        [ASKED, CALLED, turn("tool", "1", tool_call_id="c1"), CALLED, turn("tool", "2"), ANSWERED, ASKED],
        [turn("user", [{"type": "text", "text": "hi"}]), turn("assistant", "")],
    ):
        assert [m["role"] for m in checked(messages)] == [m["role"] for m in messages]


def test_every_fault_is_in_the_report_with_its_row(tmp_path, tokenizer):
    rows = [*CHATS, *(messages for _, messages, _ in FAULTY), CHATS[0], [ASKED, turn("assistant", "\ufffd")],
            [ASKED, turn("assistant", "")]]  # fmt: skip
    found = encoded(tmp_path, rows, tokenizer).found["train"]
    report = found.report()
    assert report["rows"] == len(rows) and found.sizes["conversations"] == len(CHATS) + 3
    for name in {name for name, _, _ in FAULTY}:
        numbers = [len(CHATS) + n for n, (fault, _, _) in enumerate(FAULTY, start=1) if fault == name]
        assert report[name]["places"] == [f"rows.jsonl, row {number}" for number in numbers]
        assert report[name]["count"] == len(numbers)
    last = len(CHATS) + len(FAULTY)
    for name, row in (("duplicates", 1), ("replacement_characters", 2), ("empty_answers", 3)):
        assert report[name]["places"] == [f"rows.jsonl, row {last + row}"]
    assert found.sizes["left_out"] == len(FAULTY)
    assert set(report) == {"rows", "layouts", *FAULTS} and set(LEFT_OUT) <= set(FAULTS)


def test_what_the_template_has_no_place_for_is_counted(tmp_path, tokenizer):
    rows = [CHATS[0], {"messages": CHATS[0], "tools": [{"name": "get"}]}, [ASKED, CALLED]]
    found = encoded(tmp_path, rows, tokenizer, chat_template="v2").found["train"]
    assert found.report()["refused"]["places"] == ["rows.jsonl, row 2", "rows.jsonl, row 3"]
    assert "no place for tools" in found.report()["refused"]["examples"][0]


def test_what_the_template_would_leave_out_without_a_word_is_counted(tmp_path, tokenizer):
    template = tmp_path / "bare.jinja"
    template.write_text(
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + eos_token }}"
        "{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    )
    thought = [ASKED, turn("assistant", "ho", reasoning_content="hm")]
    rows = [CHATS[0], thought, [ASKED, CALLED], {"messages": CHATS[0], "tools": [{"name": "get"}]}]
    found = encoded(tmp_path, rows, tokenizer, chat_template=str(template)).found["train"]
    assert found.report()["unread"]["places"] == [f"rows.jsonl, row {number}" for number in (2, 3, 4)]
    assert [detail for _, detail in found.faults["unread"]] == [
        f"the template has no word for {name}" for name in ("reasoning_content", "tool_calls", "tools")
    ]


def test_nothing_trained_is_counted_and_never_trained_on(tmp_path, tokenizer):
    """An answer that the template writes and marks, but as nothing."""
    template = tmp_path / "empty.jinja"
    template.write_text(
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
        "{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    )
    rows = [CHATS[0], [ASKED, turn("assistant", "")]]
    made = encoded(tmp_path, rows, tokenizer, chat_template=str(template))
    assert made.found["train"].report()["untrained"]["places"] == ["rows.jsonl, row 2"]
    assert len(made.encoded["train"]) == 1
    with pytest.raises(ValueError, match=r"no train conversation can be used; rows.jsonl, row 1: \d+ tokens \(no"):
        encoded(tmp_path, rows[1:], tokenizer, chat_template=str(template))


def test_templates_that_cannot_be_trained_with_are_refused(tmp_path, tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(
        ValueError, match=r"can't be trained with: .*doesn't mark answers by \{% generation %\}"
    ) as error:
        trained_template(tokenizer, None)
    assert "--chat_template" in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"--chat_template v33: no such format or file \(did you mean 'v3'\?\)"):
        Conversation(ConversationArguments(train_file="x", chat_template="v33"), 0)
    (tmp_path / "im.jinja").write_text("<|im_start|>{% generation %}x{% endgeneration %}")
    with pytest.raises(ValueError, match=r"the tokenizer has no token '<\|im_start\|>'"):
        trained_template(tokenizer, str(tmp_path / "im.jinja"))
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="its tokenizer has no chat format; name the one"):
        trained_template(tokenizer, None)


def test_a_file_without_a_usable_row_is_refused(tmp_path):
    path = write(tmp_path / "rows.jsonl", [[ASKED], [ASKED, ANSWERED, ANSWERED]])
    with pytest.raises(ValueError, match=r"no conversation can be used; rows.jsonl, row 2: turns 2 and 3 \(two assis"):
        Conversation(ConversationArguments(train_file=[path]), 0).load_splits()


def test_faults_can_be_refused_and_stand_in_the_files(tmp_path, converse):
    rows = [*CHATS, [ASKED, ANSWERED, ANSWERED]]
    with pytest.raises(ValueError, match=r"--data_checks refuse: train: two assistant turns in a row \(left"):
        converse(rows, data_checks="refuse")
    converse(rows, max_steps=1)
    report = json.loads((tmp_path / "out" / "data_report.json").read_text())
    assert report["train"]["assistant_twice"]["places"] == ["rows.jsonl, row 4"]
    assert report["validation"]["in_train"]["count"] == 3
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "| two assistant turns in a row (left out) | 1 | 1 | 1 |" in card and "layout messages" in card


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"answer_pattern": "#### (.*"}, "no regular expression"),
        ({"answer_pattern": "#### .*"}, "it has 0 groups; put one pair of parentheses around the answer"),
        ({}, "Name data by"),
        ({"max_seq_length": 0}, "max_seq_length"),
        ({"max_replies": -1}, "max_replies"),
    ],
)
def test_flags_that_cannot_work_are_refused(settings, match):
    with pytest.raises(ValueError, match=match):
        ConversationArguments(**({"train_file": "x"} if settings else {}), **settings)
