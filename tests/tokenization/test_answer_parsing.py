"""Answers read back: what a template writes comes back as the message it was made of, whole and piece by piece."""

import json
import random

import pytest
import torch

from tokenization_deepseek import CHAT_TEMPLATES, AnswerParser, encode_answers
from tokenization_deepseek.answer_parsing import FORMS, form_of, parse_answer, split_at_mark
from tokenization_deepseek.tokenization_deepseek import EOS, PAD

ASSISTANT = "<｜Assistant｜>"
ASK = {"role": "user", "content": "hi"}
PLAIN = ("coder", "v2", "v2.5")  # generations without reasoning
NO_CALLS = ("coder", "v2")
ARGUMENTS = [
    {"city": 'Köln "x"', "days": 3},
    {},
    {"deep": {"a": [1, 2.5, None, True, {"b": "北京 🦆\n"}], "c": []}, "text": "a\nb\\n <b> & ```json\n{}\n```"},
    {"empty": "", "false": False, "number": "7", "json": '{"a": 1}'},
]


def message(content: str, reasoning: str = "", arguments: tuple = ()) -> dict:
    calls = [{"type": "function", "function": {"name": f"get_{i}", "arguments": a}} for i, a in enumerate(arguments)]
    whole = {"role": "assistant", "content": content, "reasoning_content": reasoning, "tool_calls": calls}
    return {key: part for key, part in whole.items() if part or key == "content"}


MESSAGES = [
    message("hello"),
    message(""),
    message(" a\n\n b \n"),
    message("see <b> and ｜DSML｜ and <｜tool▁sep｜>"),
    message("4", "2 and 2\n\nis 4"),
    message("", "only a thought"),
    message("x", "<think> about ```json"),
    message("", "", (ARGUMENTS[1],)),
    message("Let me see.", "", (ARGUMENTS[0], ARGUMENTS[1])),
    message("Let me see.", "I must look.", (ARGUMENTS[2],)),
    message("", "so", tuple(ARGUMENTS)),
]


def fits(template: str, answer: dict) -> bool:
    has_no_place = (template in PLAIN and "reasoning_content" in answer) or (
        template in NO_CALLS and "tool_calls" in answer
    )
    return not has_no_place


CASES = [(name, answer) for name in CHAT_TEMPLATES for answer in MESSAGES if fits(name, answer)]


@pytest.mark.parametrize(("template", "answer"), CASES)
def test_what_a_template_writes_comes_back(trained, template, answer):
    trained.chat_template = CHAT_TEMPLATES[template]
    chat = encode_answers(trained, [ASK, answer])
    start, stop = chat.answers[0]
    prompt, ids = chat.input_ids[:start], chat.input_ids[start:stop]
    assert trained.parse_response(ids, prefix=prompt) == answer
    assert trained.parse_response(trained.decode(ids), prefix=trained.decode(prompt)) == answer
    assert trained.parse_response([*ids, *trained.convert_tokens_to_ids([PAD, PAD])], prefix=prompt) == answer
    whole = trained.apply_chat_template([ASK, answer], tokenize=False)
    assert trained.parse_response("", prefix=whole) == answer  # all of it was prefilled


@pytest.mark.parametrize(("template", "answer"), CASES)
def test_pieces_give_the_same_as_the_whole(trained, template, answer):
    trained.chat_template = CHAT_TEMPLATES[template]
    chat = encode_answers(trained, [ASK, answer])
    start, stop = chat.answers[0]
    text = trained.decode(chat.input_ids[start:stop])
    for size in (1, 2, 3, 7, 1000):
        parser = trained.get_response_parser(prefix=chat.input_ids[:start])
        events = [event for i in range(0, len(text), size) for event in parser.feed(text[i : i + size])]
        given, last = parser.finalize()
        events += last
        assert given == answer
        for name in ("content", "reasoning_content"):
            chunks = [event["text"] for event in events if event["type"] == "region_chunk" and event["field"] == name]
            assert "".join(chunks) == answer.get(name, "")
        calls = [e["value"] for e in events if e["type"] == "region_close" and e["field"] == "tool_calls"]
        assert calls == answer.get("tool_calls", [])
        assert [e["type"] for e in events if e["type"] != "region_chunk"] == ["region_open", "region_close"] * (
            sum(key != "role" and bool(part) for key, part in answer.items()) - bool(calls) + len(calls)
        )


def test_random_pieces_of_every_answer_at_every_cut(trained):
    """A text cut short anywhere gives no more than what was written, and loses nothing of it."""
    draw = random.Random(0)
    for template, answer in CASES:
        trained.chat_template = CHAT_TEMPLATES[template]
        prompt = trained.apply_chat_template([ASK], tokenize=False, add_generation_prompt=True)
        text = trained.apply_chat_template([ASK, answer], tokenize=False)[len(prompt) - len("</think>") :]
        for cut in {draw.randrange(len(text)) for _ in range(12)}:
            whole = parse_answer(FORMS[template], text[:cut], "")
            parser, place = AnswerParser(FORMS[template], ""), 0
            while place < cut:
                step = draw.randint(1, 9)
                parser.feed(text[place : min(cut, place + step)])
                place += step
            assert parser.finalize()[0] == whole
            kept = whole["content"] + whole.get("reasoning_content", "")
            kept += "".join(invalid["text"] for invalid in whole.get("invalid_tool_calls", []))
            letters = {char for char in text[:cut] if char.isalnum()}
            if not whole.get("tool_calls") and "tool" not in text[:cut] and "DSML" not in text[:cut]:
                assert letters <= {*kept, *"thinkEOT", *EOS, "o"}


# ---- reasoning


def test_where_reasoning_ends(trained):
    trained.chat_template = CHAT_TEMPLATES["v3.1"]
    parse = trained.parse_response
    assert parse(f"so</think>yes{EOS}") == message("yes", "so")  # without the prompt, by the tag alone
    assert parse(f"<think>so</think>yes{EOS}") == message("yes", "so")
    assert parse(f"</think>yes{EOS}") == message("yes")
    assert parse("so", prefix="<think>") == message("", "so")  # cut short
    assert parse(f"so{EOS}", prefix="<think>") == message("", "so")
    assert parse("yes </think> no", prefix="</think>") == message("yes </think> no")
    assert parse(["so</think>yes", "no"], prefix=["<｜Assistant｜><think>", "<｜Assistant｜></think>"]) == [
        message("yes", "so"),
        message("no"),
    ]
    trained.chat_template = CHAT_TEMPLATES["r1"]
    assert parse("<think>\nso\n</think>\n\nyes") == parse("so\n</think>\n\nyes") == message("yes", "so")
    assert parse("<think>so</think>yes") == message("yes", "so")
    assert parse("yes") == message("yes")


def test_a_prompt_is_read_from_its_last_header_on(trained):
    trained.chat_template = CHAT_TEMPLATES["v3.2"]
    call = message("", "I look.", ({},))
    chat = [{"role": "user", "content": "<｜Assistant｜><think>"}, call, {"role": "tool", "content": "<think>"}]
    for thinking, expected in ((True, message("yes", "so")), (False, message("so</think>yes"))):
        prompt = trained.apply_chat_template(chat, add_generation_prompt=True, tokenize=False, thinking=thinking)
        assert trained.parse_response(f"so</think>yes{EOS}", prefix=prompt) == expected


# ---- calls that can't be read

BLOCK, END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL, SEP, CLOSED = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
DSML, DSML_END = "<｜DSML｜function_calls>\n", "\n</｜DSML｜function_calls>"
INVOKE, INVOKED = '<｜DSML｜invoke name="get">\n', "\n</｜DSML｜invoke>"
PARAMETER = '<｜DSML｜parameter name="{}" string="{}">{}</｜DSML｜parameter>'.format
GOOD = {"type": "function", "function": {"name": "get", "arguments": {}}}
BAD = [
    ("v3.1", BLOCK, f'{CALL}get{SEP}{{"a": {CLOSED}', END, "the arguments are no JSON"),
    ("v3.1", BLOCK, f"{CALL}get{SEP}[1]{CLOSED}", END, "the arguments are no JSON object but list"),
    ("v3.1", BLOCK, f'{CALL}get{SEP}{{"a": {"[" * 5000}{CLOSED}', END, "too many lists and objects in one another"),
    ("v3.1", BLOCK, f'{CALL}get{SEP}{{"a": 1, "a": 2}}{CLOSED}', END, "'a' is there twice"),
    ("v3.1", BLOCK, f'{CALL}get{SEP}{{"a": NaN}}{CLOSED}', END, "NaN is none of JSON's numbers"),
    ("v3.1", BLOCK, f"{CALL}get{CLOSED}", END, "no <｜tool▁sep｜> between"),
    ("v3.1", BLOCK, f"{CALL}{SEP}{{}}{CLOSED}", END, "the call has no name"),
    ("v3.1", BLOCK, "well, then", END, "text between tool calls"),
    ("v3.1", BLOCK, f"{CALL}get{SEP}{{}}", END, "the call isn't closed"),
    ("v3.1", BLOCK, f"{CALL}get{SEP}{{}}", "", "the text ends before the call does"),
    ("v3.1", BLOCK, f"{CALL}get{SEP}{{}}", EOS, "the call isn't closed"),
    ("v3", BLOCK, f"{CALL}function{SEP}get\n{{}}{CLOSED}", END, "not of the form type"),
    ("v3", BLOCK, f"{CALL}function{SEP}get\n```json\n{{'a': 1}}\n```{CLOSED}", END, "the arguments are no JSON"),
    ("v3.2", DSML, f"{INVOKE}{PARAMETER('a', 'false', 'x')}{INVOKED}", DSML_END, "parameter 'a' is no JSON"),
    ("v3.2", DSML, f"{INVOKE}{PARAMETER('a', 'yes', 'x')}{INVOKED}", DSML_END, "not a parameter"),
    ("v3.2", DSML, f"{INVOKE}{PARAMETER('a', 'true', 'x') * 2}{INVOKED}", DSML_END, "parameter 'a' is given twice"),
    ("v3.2", DSML, f"<｜DSML｜invoke get>{INVOKED}", DSML_END, 'no name="..."'),
    ("v3.2", DSML, f"{INVOKE}{PARAMETER('a', 'true', 'x')[:40]}", "", "the text ends before"),
]


@pytest.mark.parametrize(("form", "begin", "bad", "end", "reason"), BAD)
def test_a_call_that_cannot_be_read_is_kept_with_the_reason(form, begin, bad, end, reason):
    good = {"v3.1": f"{CALL}get{SEP}{{}}{CLOSED}", "v3": f"{CALL}function{SEP}get\n```json\n{{}}\n```{CLOSED}"}.get(
        form, f"{INVOKE}{INVOKED}"
    )
    text = f"Let me see.{begin}{good}{bad}{end}"
    answer = parse_answer(FORMS[form], text)
    assert (answer["content"], answer["tool_calls"]) == ("Let me see.", [GOOD])
    (invalid,) = answer["invalid_tool_calls"]
    assert reason in invalid["error"] and invalid["text"].strip() == bad.strip() and "\n" not in invalid["error"]
    parser = AnswerParser(FORMS[form])
    events = [event for char in text for event in parser.feed(char)]
    given, last = parser.finalize()
    assert given == answer
    assert [{k: e[k] for k in ("error", "text")} for e in events + last if e["type"] == "region_error"] == [invalid]


def test_the_next_call_is_read_after_one_that_isn_t_closed():
    answer = parse_answer(FORMS["v3.1"], f"{BLOCK}{CALL}now{SEP}{{}}{CALL}get{SEP}{{}}{CLOSED}{END}{EOS}")
    assert answer["tool_calls"] == [GOOD] and answer["invalid_tool_calls"][0]["text"] == f"{CALL}now{SEP}{{}}"


def test_dsml_calls_may_hold_one_json_object():
    answer = parse_answer(FORMS["v3.2"], f'{DSML}{INVOKE}{{"a": [1]}}{INVOKED}{DSML_END}')
    assert answer["tool_calls"][0]["function"]["arguments"] == {"a": [1]}


def test_texts_are_read_by_the_schemas_of_tools(trained):
    trained.chat_template = CHAT_TEMPLATES["v3.2"]
    given = {"n": "7", "s": "7", "b": "true", "l": "[1", "x": "7"}
    text = (
        DSML + INVOKE + "\n".join(PARAMETER(name, "true", value) for name, value in given.items()) + INVOKED + DSML_END
    )
    kinds = {"n": "integer", "s": "string", "b": "boolean", "l": "array"}
    schema = {"type": "object", "properties": {name: {"type": kind} for name, kind in kinds.items()}}
    tools = [{"type": "function", "function": {"name": "get", "parameters": schema}}]
    (call,) = trained.parse_response(text, tools=tools)["tool_calls"]
    assert call["function"]["arguments"] == {"n": 7, "s": "7", "b": True, "l": "[1", "x": "7"}
    (call,) = trained.parse_response(text)["tool_calls"]
    assert call["function"]["arguments"] == given


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        ("integer", "true", "true"),
        ("integer", "1.5", "1.5"),
        ("number", "1.5", 1.5),
        ("number", "NaN", "NaN"),
        ("boolean", "1", "1"),
        ("array", "5", "5"),
        ("array", "[" * 5000, "[" * 5000),
        ("object", "[1]", "[1]"),
        ("object", '{"a": 1}', {"a": 1}),
        (["string", "null"], "1", "1"),
    ],
)
def test_a_text_becomes_a_value_of_its_schemas_type_or_stays(kind, text, value):
    tools = [{"name": "get", "parameters": {"properties": {"a": {"type": kind}}}}]
    (call,) = parse_answer(
        FORMS["v3.2"], f"{DSML}{INVOKE}{PARAMETER('a', 'true', text)}{INVOKED}{DSML_END}", None, tools
    )["tool_calls"]
    assert json.dumps(call["function"]["arguments"]["a"]) == json.dumps(value)


# ---- the tokenizer's methods


def test_batches_of_texts_ids_and_tensors(trained):
    trained.chat_template = CHAT_TEMPLATES["v3.1"]
    texts = [f"a{EOS}", f"so</think>b{EOS}"]
    expected = [message("a"), message("b", "so")]
    batch = trained(texts, padding=True, padding_side="right", add_special_tokens=False, return_tensors="pt")[
        "input_ids"
    ]
    for given in (texts, batch, batch.tolist(), batch.numpy()):
        assert trained.parse_response(given) == expected
    assert trained.parse_response(batch[1]) == expected[1]
    assert trained.parse_response(batch[:1], prefix=torch.tensor([trained.encode(ASSISTANT)])) == expected[:1]
    with pytest.raises(ValueError, match="2 answers have 3 prefixes; give one, or one for each"):
        trained.parse_response(texts, prefix=["", "", ""])


def test_the_form_is_that_of_the_template_or_named(trained):
    for name, template in CHAT_TEMPLATES.items():
        assert form_of(template) == FORMS[name], name
    assert set(FORMS) == set(CHAT_TEMPLATES)
    trained.chat_template = "{{ messages }}"
    assert trained.parse_response("so</think>yes", "v3.1") == message("yes", "so")
    with pytest.raises(ValueError, match="is of no known generation; name the form of answers: coder, v2"):
        trained.parse_response("yes")
    with pytest.raises(ValueError, match="there is no form of answers named 'v9'; there are coder, v2"):
        trained.get_response_parser("v9")


def test_a_response_template_of_transformers_is_followed_as_there(trained):
    content = {"open": "<a>", "close": "</a>", "content": "text"}
    template = {"start_anchor": "<s>", "fields": {"content": content}, "defaults": {"role": "assistant"}}
    assert trained.parse_response("<a> x </a>", template, prefix="") == {"role": "assistant", "content": "x"}
    trained.response_template = template
    assert trained.parse_response("<a>x</a>", prefix="") == {"role": "assistant", "content": "x"}
    assert trained.get_response_parser(prefix="").feed("<a>x")[0] == {"type": "region_open", "field": "content"}


def test_marks_that_may_still_grow_wait():
    marks = ("</think>", "</think>\n", "\n<x>")
    assert split_at_mark("a</think>", marks, final=False) == ("a", "", "</think>")
    assert split_at_mark("a</think>", marks, final=True) == ("a", "</think>", "")
    assert split_at_mark("a</think>\nb", marks, final=False) == ("a", "</think>\n", "b")
    assert split_at_mark("a</thi", marks, final=False) == ("a", "", "</thi")
    assert split_at_mark("a\n", marks, final=False) == ("a", "", "\n")
    assert split_at_mark("ab", (), final=False) == ("ab", "", "")


def test_arguments_come_back_as_json_writes_them(trained):
    """Numbers keep their kind, and names their order."""
    trained.chat_template = CHAT_TEMPLATES["v3.2"]
    arguments = {"z": 1.0, "a": 10**20, "m": -0.5}
    text = trained.apply_chat_template([ASK, message("", "", (arguments,))], tokenize=False)
    back = trained.parse_response("", prefix=text)["tool_calls"][0]["function"]["arguments"]
    assert json.dumps(back) == json.dumps(arguments)
