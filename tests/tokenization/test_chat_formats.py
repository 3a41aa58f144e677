"""Chat formats against the released R1 template and against plain string building."""

import json

import pytest
from jinja2 import TemplateError

from tokenization_deepseek import CHAT_TEMPLATES
from tokenization_deepseek.tokenization_deepseek import BOS, EOS

USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"


def turn(role: str, content: str | None, **more) -> dict:
    return {"role": role, "content": content, **more}


def call(name: str, arguments: str | dict) -> dict:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


PLAIN = [
    turn("system", "Be brief."),
    turn("user", "你好 "),
    turn("assistant", "<think>a</think>b</think>\nhello"),
    turn("user", "2+2?"),
]
TOOLS = [
    turn("user", "weather?"),
    turn("assistant", None, tool_calls=[call("get", '{"c": "Köln"}'), call("get", '{"c": "北京"}')]),
    turn("tool", "rain"),
    turn("tool", "sun"),
    turn("assistant", "rain and </think>sun"),
]
CHATS = {
    "plain": PLAIN,
    "user": PLAIN[1:2],
    "answered": PLAIN[:3],
    "two system messages": [turn("system", "A"), turn("user", "x"), turn("system", "B")],
    "tools": TOOLS,
    "tool outputs pending": TOOLS[:4],
    "call with text": [TOOLS[0], turn("assistant", "Let me see.", tool_calls=TOOLS[1]["tool_calls"]), TOOLS[2]],
    "user after tools": [*TOOLS, turn("user", "thanks")],
}


@pytest.fixture
def render(trained):
    def render(template: str, chat: list[dict], **options) -> str:
        return trained.apply_chat_template(
            chat, chat_template=CHAT_TEMPLATES.get(template, template), tokenize=False, **options
        )

    return render


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("chat", CHATS.values(), ids=CHATS)
def test_r1_equals_the_released_template(render, released_folder, chat, prompt):
    released = json.loads((released_folder / "tokenizer_config.json").read_text("utf-8"))["chat_template"]
    # the released one reads a missing content as "is not none", and fails on it
    chat = [{**message, "content": message["content"] or ""} for message in chat]
    expected = render(released, chat, add_generation_prompt=prompt)
    assert render("r1", chat, add_generation_prompt=prompt) == expected
    assert render("v3", chat, add_generation_prompt=prompt) == expected


def test_v2_by_plain_strings(render):
    chat = [turn("system", "Be brief."), turn("user", "hi"), turn("assistant", "hello"), turn("user", "2+2?")]
    expected = f"{BOS}Be brief.\n\nUser: hi\n\nAssistant: hello{EOS}User: 2+2?\n\n"
    assert render("v2", chat) == expected
    assert render("v2", chat, add_generation_prompt=True) == expected + "Assistant:"


def test_v3_by_plain_strings(render):
    expected = f"{BOS}Be brief.{USER}你好 {ASSISTANT}\nhello{EOS}{USER}2+2?"
    assert render("v3", PLAIN) == expected
    assert render("v3", PLAIN, add_generation_prompt=True) == expected + ASSISTANT


def test_v3_1_by_plain_strings(render):
    expected = f"{BOS}Be brief.{USER}你好 {ASSISTANT}</think>b</think>\nhello{EOS}{USER}2+2?"
    assert render("v3.1", PLAIN) == expected
    assert render("v3.1", PLAIN, add_generation_prompt=True) == f"{expected}{ASSISTANT}</think>"
    assert render("v3.1", PLAIN, add_generation_prompt=True, thinking=True) == f"{expected}{ASSISTANT}<think>"
    assert render("v3.1", PLAIN[:3], add_generation_prompt=True) == expected.removesuffix(f"{USER}2+2?")


def test_v3_1_tool_calls_by_plain_strings(render):
    begin, separator, end = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
    expected = (
        f"{BOS}{USER}weather?{ASSISTANT}</think><｜tool▁calls▁begin｜>"
        f'{begin}get{separator}{{"c": "Köln"}}{end}{begin}get{separator}{{"c": "北京"}}{end}<｜tool▁calls▁end｜>{EOS}'
        "<｜tool▁output▁begin｜>rain<｜tool▁output▁end｜><｜tool▁output▁begin｜>sun<｜tool▁output▁end｜>"
    )
    assert render("v3.1", TOOLS[:4], add_generation_prompt=True) == expected
    assert render("v3.1", TOOLS) == f"{expected}rain and </think>sun{EOS}"
    as_dicts = [turn("assistant", None, tool_calls=[call("get", {"c": "Köln"}), call("get", {"c": "北京"})])]
    assert render("v3.1", [TOOLS[0], *as_dicts, *TOOLS[2:4]]) == expected


def test_a_second_round_of_tool_calls_is_written_like_the_first(render):
    once = render("r1", TOOLS[:4]).removeprefix(f"{BOS}{USER}weather?{ASSISTANT}")
    assert render("r1", [*TOOLS[:4], *TOOLS[1:4]]) == f"{BOS}{USER}weather?{ASSISTANT}{once}{once}"


@pytest.mark.parametrize(
    "template, learned", [("v2", " b" + EOS), ("v3", "b" + EOS), ("r1", "b" + EOS), ("v3.1", "b" + EOS)]
)
def test_the_assistant_mask_covers_answers_and_their_eos(trained, template, learned):
    chat = [turn("user", "a"), turn("assistant", "b"), turn("user", "b"), turn("assistant", "b")]
    encoded = trained.apply_chat_template(
        chat, chat_template=CHAT_TEMPLATES[template], return_assistant_tokens_mask=True
    )
    masked = [i for i, m in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if m]
    assert trained.decode(masked) == learned * 2


@pytest.mark.parametrize("template", CHAT_TEMPLATES)
def test_a_prompt_is_the_beginning_of_its_answered_chat(render, template):
    chat = [turn("system", "s"), turn("user", "a"), turn("assistant", "b")]
    assert render(template, chat).startswith(render(template, chat[:2], add_generation_prompt=True))


@pytest.mark.parametrize("template, role", [("v2", "tool"), ("v3", "critic"), ("v3.1", "critic")])
def test_unknown_roles_are_refused(render, template, role):
    with pytest.raises(TemplateError, match=f"this chat format has no role {role}"):
        render(template, [turn(role, "x")])


def test_a_chat_has_one_bos(trained):
    for template in CHAT_TEMPLATES.values():
        ids = trained.apply_chat_template(PLAIN, chat_template=template)["input_ids"]
        assert ids.count(trained.bos_token_id) == 1 and ids[0] == trained.bos_token_id
