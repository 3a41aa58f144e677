"""Answers read back by transformers' own parser, by the templates that we save for it."""

import json

import pytest
from transformers.utils.chat_parsing import ResponseParser

from tests.tokenization.test_answer_parsing import ASK, MESSAGES, fits, message
from tokenization_deepseek import CHAT_TEMPLATES, DeepSeekTokenizer, encode_answers
from tokenization_deepseek.answer_parsing import FORMS, parse_answer
from tokenization_deepseek.response_templates import is_own, response_template
from tokenization_deepseek.tokenization_deepseek import EOS, PAD


def read(spec, prompt, text, size=1000):
    parser = ResponseParser(spec, prefix=prompt)
    for start in range(0, len(text), size):
        parser.feed(text[start : start + size])
    return parser.finalize()[0]


@pytest.mark.parametrize("template", CHAT_TEMPLATES)
def test_what_a_template_writes_comes_back(trained, template):
    trained.chat_template = CHAT_TEMPLATES[template]
    spec = json.loads(json.dumps(response_template(FORMS[template])))
    assert is_own(spec)
    for answer in MESSAGES:
        if not fits(template, answer):
            continue
        chat = encode_answers(trained, [ASK, answer])
        start, stop = chat.answers[0]
        prompt, text = trained.decode(chat.input_ids[:start]), trained.decode(chat.input_ids[start:stop])
        expected = answer | ({"content": answer["content"].strip()} if template == "v2" else {})
        for size in (1, 3, 1000):
            assert read(spec, prompt, text, size) == expected
        assert read(spec, prompt, text + PAD + PAD) == expected


CALL = "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get<｜tool▁sep｜>"


@pytest.mark.parametrize(
    ("template", "prompt", "text", "expected"),
    [
        ("v3.1", "<think>", f"so{EOS}", message("", "so")),
        ("v3.1", "</think>", f"yes </think> no{EOS}", message("yes </think> no")),
        ("v3.1", "<think>", "so", message("", "so")),
        ("v3.1", "", CALL + '{"a": 1', message("", "", ('{"a": 1',))),
        ("v3.1", "", CALL + f"{{'a': 1}}<｜tool▁call▁end｜><｜tool▁calls▁end｜>{EOS}", message("", "", ("{'a': 1}",))),
        ("v3.1", "", f"no<｜tool▁calls▁begin｜>{EOS}", message("no<｜tool▁calls▁begin｜>")),
        ("v3.2", "", 'x\n\n<｜DSML｜function_calls>\n<｜DSML｜invoke name="f">{"a": 1}', None),
        ("r1", "", "<think>\nso\n</think>\n\nyes", message("yes", "so")),
    ],
)  # fmt: skip
def test_what_is_broken_is_not_lost(template, prompt, text, expected):
    found = read(response_template(FORMS[template]), prompt, text)
    for call in found.get("tool_calls", []):
        call["function"]["name"] += "_0"
    assert found == (message(text) if expected is None else expected)


def test_texts_and_numbers_of_parameters_stay_apart():
    text = (
        '<｜DSML｜tool_calls>\n<｜DSML｜invoke name="f">\n'
        '<｜DSML｜parameter name="a" string="true">7</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="b" string="false">7</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="c" string="true">string="true">"</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
        "</｜DSML｜tool_calls>" + EOS
    )
    found = read(response_template(FORMS["v4"]), "", text)
    assert found == parse_answer(FORMS["v4"], text)
    assert found["tool_calls"][0]["function"]["arguments"] == {"a": "7", "b": 7, "c": 'string="true">"'}


def test_our_tokenizer_reads_by_its_own_parser_where_the_template_is_ours(trained, tmp_path):
    trained.chat_template = CHAT_TEMPLATES["v3.1"]
    trained.response_template = response_template(FORMS["v3.1"])
    trained.save_pretrained(tmp_path)
    loaded = DeepSeekTokenizer.from_pretrained(tmp_path)
    assert loaded.response_template == trained.response_template
    assert loaded.parse_response("so</think>yes") == message("yes", "so")  # transformers' wants a prefix
    broken = loaded.parse_response(CALL + "{<｜tool▁call▁end｜><｜tool▁calls▁end｜>")
    assert "invalid_tool_calls" in broken and "invalid_tool_calls" not in read(loaded.response_template, "", "x")
    parser = loaded.get_response_parser()
    parser.feed("so")
    assert parser.finalize()[0] == message("so")
