"""Every template against what the releases' own templates and encoders give for the same chats.

released_chats.json: chats by name, two tools, and rows of template, chat, options, with tools or without, and the text
that the release's template gives (V2 to V3.1: the `chat_template` of its tokenizer_config.json; later: the encoder
that came with it). The releases' slips that ours don't share are left out, as is Coder's text about itself.
"""

import json
from collections import Counter
from pathlib import Path

import pytest

from tokenization_deepseek import CHAT_TEMPLATES, encode_answers

RELEASED = json.loads((Path(__file__).parent / "released_chats.json").read_text("utf-8"))
JINJA = ("coder", "v2", "v2.5", "v3", "r1", "r1-think", "v3.1")  # these leave reasoning and schemas out, silently
EOS = {"coder": "<|EOT|>"}


def rows_of(template: str) -> list[list]:
    return [row for row in RELEASED["rendered"] if row[0] == template]


def chat_of(row: list) -> list[dict]:
    left_out = ("reasoning_content", "response_format") if row[0] in JINJA else ()
    return [{key: part for key, part in turn.items() if key not in left_out} for turn in RELEASED["chats"][row[1]]]


def options_of(row: list) -> dict:
    special = {"eos_token": EOS[row[0]]} if row[0] in EOS else {}
    return {
        "chat_template": CHAT_TEMPLATES[row[0]],
        "tools": RELEASED["tools"] if row[3] else None,
        **row[2],
        **special,
    }


def test_each_template_has_at_least_twenty_chats():
    counts = {template: len({row[1] for row in rows_of(template)}) for template in CHAT_TEMPLATES}
    assert min(counts.values()) >= 20, counts
    assert set(counts) == set(Counter(row[0] for row in RELEASED["rendered"]))


@pytest.mark.parametrize("template", CHAT_TEMPLATES)
def test_texts_are_those_of_the_release(trained, template):
    for row in rows_of(template):
        text = trained.apply_chat_template(chat_of(row), tokenize=False, **options_of(row))
        assert text == row[4], (row[1], row[2])


@pytest.mark.parametrize("template", CHAT_TEMPLATES)
def test_ids_and_masks_belong_to_those_texts(trained, template):
    for row in rows_of(template)[::3]:
        options = options_of(row)
        encoded = trained.apply_chat_template(chat_of(row), **options, return_assistant_tokens_mask=True)
        assert trained.decode(encoded["input_ids"]) == row[4], (row[1], row[2])
        if not options.pop("add_generation_prompt", False):
            chat = encode_answers(trained, chat_of(row), **options)
            assert (chat.input_ids, chat.assistant_mask) == (encoded["input_ids"], encoded["assistant_masks"])
