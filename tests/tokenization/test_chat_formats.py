"""Chat formats against the released R1 template and against plain string building."""

import copy
import importlib.util
import json
import os
from pathlib import Path

import pytest
from jinja2 import TemplateError

from tokenization_deepseek import CHAT_TEMPLATES, template_name
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


# ---- what V3.1 has besides


@pytest.mark.parametrize("options", [{}, {"thinking": True}, {"enable_thinking": True}], ids=str)
@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("chat", CHATS.values(), ids=CHATS)
def test_v3_1_equals_llama_cpps_copy_of_the_released_template(render, chat, prompt, options):
    folder = os.environ.get("DEEPSEEK_HF_LLAMA_CPP")
    if not folder:
        pytest.skip("DEEPSEEK_HF_LLAMA_CPP names no folder with llama.cpp's models/templates")
    template = Path(folder, "templates", "deepseek-ai-DeepSeek-V3.1.jinja").read_text("utf-8")
    # llama.cpp's copy opens the thought that the release closes alone, and quotes arguments that are text already
    template = template.replace("<think></think>", "</think>").replace("['arguments'] | tojson", "['arguments']")
    chat = [{**message, "content": message["content"] or ""} for message in chat]
    options = {"add_generation_prompt": prompt, **options}
    assert render("v3.1", chat, **options) == render(template, chat, **options)
    if chat[-1]["role"] == "assistant":
        prefixed = [*chat[:-1], {**chat[-1], "content": "so", "prefix": True}]
        assert render("v3.1", prefixed, **options) == render(template, prefixed, **options)


TOOL = {
    "type": "function",
    "function": {"name": "get", "description": "Weather of a city.", "parameters": {"type": "object", "city": "Köln"}},
}
DESCRIBED = """

## Tools
You have access to the following tools:

### get
Description: Weather of a city.

Parameters: {"type": "object", "city": "Köln"}

### now
Description: 

Parameters: {}

IMPORTANT: ALWAYS adhere to this exact format for tool use:
<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>tool_call_name<｜tool▁sep｜>tool_call_arguments<｜tool▁call▁end｜>\
{additional_tool_calls}<｜tool▁calls▁end｜>

Where:
- `tool_call_name` must be an exact match to one of the available tools
- `tool_call_arguments` must be valid JSON that strictly follows the tool's Parameters Schema
- For multiple tool calls, chain them directly without separators or spaces"""  # noqa: W291


def test_v3_1_describes_tools_as_its_model_card(render):
    tools = [TOOL, {"type": "function", "function": {"name": "now"}}]
    for system in ([turn("system", "Be brief.")], []):
        before = BOS + "".join(message["content"] for message in system)
        assert render("v3.1", [*system, TOOLS[0]], tools=tools) == f"{before}{DESCRIBED}{USER}weather?"


def test_v3_1_describes_functions_of_python(render):
    def double(number: int):
        """Twice a number.

        Args:
            number: which one
        """

    assert "### double\nDescription: Twice a number.\n\nParameters: {" in render("v3.1", PLAIN[1:2], tools=[double])


def test_v3_1_leaves_a_prefilled_thought_open(render):
    ask, start = turn("user", "hi"), f"{BOS}{USER}hi{ASSISTANT}"
    continued = {"continue_final_message": True}
    assert render("v3.1", [ask, turn("assistant", "<think>so")], **continued) == f"{start}<think>so"
    prefix = turn("assistant", "so", prefix=True)
    assert render("v3.1", [ask, prefix], thinking=True, **continued) == f"{start}<think>so"
    assert render("v3.1", [ask, prefix], **continued) == f"{start}</think>so"
    whole = turn("assistant", "<think>so</think>yes", prefix=True)
    assert render("v3.1", [ask, whole], thinking=True, **continued) == f"{start}<think>so</think>yes"
    assert render("r1", [ask, turn("assistant", "<think>so")], **continued) == f"{start}<think>so"


# ---- what all have in common

V4 = ("v4", "v4-0731", "v4.1")


def test_content_as_parts_is_their_text(render):
    parts = [{"type": "text", "text": "2+"}, {"type": "text", "text": "2?"}, "!"]
    for template in CHAT_TEMPLATES:
        apart = "\n\n" if template in V4 else ""
        chats = [
            [turn("system", content), turn("user", content), turn("assistant", content), turn("user", "x")]
            for content in (parts, apart.join(["2+", "2?", "!"]))
        ]
        assert render(template, chats[0]) == render(template, chats[1])
        for image in ({"type": "image", "url": "x"}, {"type": "image_url"}):
            with pytest.raises(TemplateError, match="has no place for a part of type image"):
                render(template, [turn("user", [*parts, image])])
    outputs = [[TOOLS[0], TOOLS[1], turn("tool", content)] for content in (parts, "2+2?!")]
    for template in ("v3", "v3.1"):
        assert render(template, outputs[0]) == render(template, outputs[1])


def test_reasoning_content_is_written_before_the_last_answer_alone(render):
    chat = [turn("user", "a"), turn("assistant", "b", reasoning_content="B"), turn("user", "c")]
    answer = turn("assistant", "d", reasoning_content="D")
    old = {"r1": f"{BOS}{USER}a{ASSISTANT}b{EOS}{USER}c{ASSISTANT}", "v3.1": f"{BOS}{USER}a{ASSISTANT}</think>b{EOS}"}
    assert render("r1", [*chat, answer]) == f"{old['r1']}<think>\nD\n</think>\n\nd{EOS}"
    assert render("v3.1", [*chat, answer]) == f"{old['v3.1']}{USER}c{ASSISTANT}<think>D</think>d{EOS}"
    assert render("r1", [*chat, answer], thinking=False) == f"{old['r1']}d{EOS}"
    assert render("v3.1", [*chat, answer], thinking=False) == f"{old['v3.1']}{USER}c{ASSISTANT}</think>d{EOS}"
    prompt = render("v3.1", chat, add_generation_prompt=True, thinking=True)
    assert render("v3.1", [*chat, answer], thinking=True).startswith(prompt)
    calling = turn("assistant", None, reasoning_content="D", tool_calls=[call("get", "{}")])
    assert f"{USER}c{ASSISTANT}<think>D</think><｜tool▁calls▁begin｜>" in render("v3.1", [*chat, calling])


def test_a_tool_call_without_a_type_is_a_functions(render):
    bare = [{"function": {"name": "get", "arguments": {"c": "Köln"}}}]
    full = [call("get", {"c": "Köln"})]
    for template in ("v3", "v3.1"):
        assert render(template, [turn("assistant", None, tool_calls=bare)]) == render(
            template, [turn("assistant", None, tool_calls=full)]
        )


def test_v2_reads_an_empty_content(render):
    assert render("v2", [turn("user", None), turn("assistant", None)]) == f"{BOS}User: \n\nAssistant: {EOS}"


def test_coder_by_plain_strings(render):
    chat = [turn("system", "Be brief."), turn("user", "hi"), turn("assistant", "hello"), turn("user", "2+2?")]
    answered = f"{BOS}Be brief.### Instruction:\nhi\n### Response:\nhello\n{EOS}\n"
    assert render("coder", chat) == f"{answered}### Instruction:\n2+2?\n"
    assert render("coder", chat, add_generation_prompt=True) == f"{answered}### Instruction:\n2+2?\n### Response:\n"


CALLS = turn("assistant", None, tool_calls=[call("get", "{}")])
REASONED = turn("assistant", "x", reasoning_content="so")
NO_TOOLS, NO_THINKING = ("coder", "v2", "v2.5", "v3", "r1", "r1-think"), ("coder", "v2", "v2.5", "v3", "r1")
REFUSED = [
    *((template, PLAIN[1:2], {"tools": [TOOL]}, "tools; describe") for template in NO_TOOLS),
    *((template, PLAIN[1:2], {"thinking": True}, "thinking=True") for template in NO_THINKING),
    *((template, PLAIN[1:2], {"documents": [{"text": "x"}]}, "documents") for template in CHAT_TEMPLATES),
    *((template, [CALLS], {}, "tool calls") for template in ("coder", "v2")),
    *((name, [REASONED], {}, "reasoning_content; thinking=False leaves it out") for name in ("coder", "v2", "v2.5")),
    *(
        (name, [*TOOLS[:3], REASONED], {}, "reasoning_content in an answer to tool")
        for name in ("v3", "r1-think", "v3.1")
    ),
]


@pytest.mark.parametrize(("template", "chat", "options", "what"), REFUSED)
def test_what_a_format_has_no_place_for_is_refused_in_one_line(render, template, chat, options, what):
    with pytest.raises(TemplateError, match=f"this chat format has no place for {what}") as error:
        render(template, chat, **options)
    assert "\n" not in str(error.value)
    if "thinking=False" in what:
        render(template, chat, thinking=False)


def test_sentence_transformers_reads_texts_through_our_templates(trained, tmp_path):
    if importlib.util.find_spec("sentence_transformers") is None:
        pytest.skip("sentence-transformers is not installed")
    from sentence_transformers.sentence_transformer.modules import Transformer
    from transformers import LlamaConfig, LlamaModel

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = LlamaConfig(vocab_size=len(trained), num_key_value_heads=1, **sizes)
    LlamaModel(config).save_pretrained(tmp_path)
    for template in CHAT_TEMPLATES.values():
        tokenizer = copy.copy(trained)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(tmp_path)
        module = Transformer(str(tmp_path))
        ids = tokenizer.apply_chat_template([turn("user", "hi")])["input_ids"]
        assert module.preprocess(["hi"])["input_ids"].tolist() == [ids]


@pytest.mark.parametrize(
    "template, learned",
    [(template, {"coder": "b\n", "v2": " b"}.get(template, "b") + EOS) for template in CHAT_TEMPLATES],
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
    reasoned = {"reasoning_content": "c"} if template == "r1-think" else {}
    chat = [turn("system", "s"), turn("user", "a"), turn("assistant", "b", **reasoned)]
    assert render(template, chat).startswith(render(template, chat[:2], add_generation_prompt=True))


@pytest.mark.parametrize(
    "template, role", [("coder", "tool"), ("v2", "tool"), *((name, "critic") for name in CHAT_TEMPLATES)]
)
def test_unknown_roles_are_refused(render, template, role):
    with pytest.raises(TemplateError, match=f"this chat format has no role {role}"):
        render(template, [turn(role, "x")])


def test_a_chat_has_one_bos(trained):
    for template in CHAT_TEMPLATES.values():
        ids = trained.apply_chat_template(PLAIN, chat_template=template)["input_ids"]
        assert ids.count(trained.bos_token_id) == 1 and ids[0] == trained.bos_token_id


RESULTS = {
    "v3": ([turn("user", "a"), turn("tool", "b")], "message 2 is a tool result, but no call waits for one"),
    "v3.1": (
        [CALLS, turn("tool", "b"), turn("user", "c"), turn("tool", "d")],
        "message 4 is a tool result, but no call",
    ),
    "v3.2": ([CALLS, turn("tool", "b"), turn("tool", "c")], "message 3 is a tool result, but no call waits for one"),
    "v4": ([turn("user", "a"), turn("tool", "b")], "message 2 is a tool result, but no call waits for one"),
    "v4.1": ([CALLS, turn("tool", "b"), REASONED, turn("tool", "c")], "message 4 is a tool result, but no call"),
}


@pytest.mark.parametrize("template", RESULTS)
def test_a_tool_result_without_a_call_is_refused(render, template):
    with pytest.raises(TemplateError, match=RESULTS[template][1]):
        render(template, RESULTS[template][0])


def test_an_answer_before_all_results_is_refused(render):
    chat = [TOOLS[0], TOOLS[1], TOOLS[2], turn("assistant", "rain")]
    with pytest.raises(TemplateError, match="message 3: 2 tool calls have 1 results"):
        render("v3.2", chat)


@pytest.mark.parametrize("wrong", ['{"c": ', "[1]", "7", ["c"]])
def test_arguments_that_are_no_json_object_are_refused(trained, wrong):
    chat = [turn("user", "a"), turn("assistant", None, tool_calls=[call("get", wrong)])]
    for template in ("v2.5", "v3", "v3.1", "v3.2", *V4):
        for tokenize in (False, True):
            with pytest.raises(
                ValueError, match="message 2: the arguments of the tool call 'get' are no JSON obj"
            ) as error:
                trained.apply_chat_template(chat, chat_template=CHAT_TEMPLATES[template], tokenize=tokenize)
            assert "\n" not in str(error.value)


def test_arguments_as_text_and_as_a_dictionary_are_one(trained):
    """Where a template walks through arguments (V3.2's does), stock transformers wants a dictionary; we take both."""
    arguments = {"city": "Köln", "n": 1.0, "deep": {"a": [None, True]}}
    for template in ("v2.5", "v3", "v3.1", "v3.2", *V4):
        texts = {
            trained.apply_chat_template(
                [CALLS | {"tool_calls": [call("get", form)]}], chat_template=form_of, tokenize=False
            )
            for form in (arguments, json.dumps(arguments, ensure_ascii=False))
            for form_of in (CHAT_TEMPLATES[template],)
        }
        assert len(texts) == 1
    foreign = "{% for k, v in messages[0].tool_calls[0].function.arguments | items %}{{ k ~ v }}{% endfor %}"
    chat = [turn("assistant", "", tool_calls=[call("get", '{"a": 1}')])]
    assert trained.apply_chat_template(chat, chat_template=foreign, tokenize=False) == "a1"


def test_v3_2_thinks_where_an_answer_has_reasoning(render):
    ask, answer = turn("user", "a"), turn("assistant", "d", reasoning_content="D")
    start = f"{BOS}{USER}a{ASSISTANT}"
    assert render("v3.2", [ask, answer]) == f"{start}<think>D</think>d{EOS}"
    assert render("v3.2", [ask, answer], thinking=False) == f"{start}</think>d{EOS}"
    assert render("v3.2", [ask, answer, ask]) == f"{start}</think>d{EOS}{USER}a"
    assert render("v3.2", [ask], add_generation_prompt=True, enable_thinking=True) == f"{start}<think>"


@pytest.mark.parametrize("template", ["v3.2", "v4", "v4-0731"])
def test_a_prefilled_thought_is_left_open(render, template):
    ask, start = turn("user", "hi"), render(template, [turn("user", "hi")])
    so = turn("assistant", "<think>so")
    assert render(template, [ask, so], continue_final_message=True) == f"{start}{ASSISTANT}<think>so"
    thought = turn("assistant", "", reasoning_content="so")
    continued = render(template, [ask, thought], continue_final_message="reasoning_content")
    assert continued == f"{start}{ASSISTANT}<think>so"
    answer = turn("assistant", "yes", reasoning_content="so")
    assert render(template, [ask, answer], continue_final_message=True) == f"{start}{ASSISTANT}<think>so</think>yes"


@pytest.mark.parametrize("wrong", [{"type": "text", "text": "a"}, 7, True])
def test_a_content_of_another_kind_is_refused(render, wrong):
    for template in CHAT_TEMPLATES:
        with pytest.raises(TemplateError, match="no place for a content that is neither a text nor a list of parts"):
            render(template, [turn("user", wrong)])


@pytest.mark.parametrize("wrong", [{"function": {"name": "get"}}, ["get"], [{"function": "get"}]])
def test_calls_of_another_form_are_refused(trained, wrong):
    chat = [turn("user", "a"), turn("assistant", None, tool_calls=wrong)]
    for tokenize in (False, True):
        with pytest.raises(ValueError, match="message 2: tool_calls are .*, not of the form"):
            trained.apply_chat_template(chat, tokenize=tokenize)


# ---- V4


def test_a_word_of_effort_is_another_prompt_in_each_v4(render):
    texts = {}
    for template, efforts in (
        ("v4", ["high", "max"]),
        ("v4-0731", ["low", "high", "max"]),
        ("v4.1", ["low", "high", "max"]),
    ):
        for effort in efforts:
            text = render(template, [turn("user", "a")], thinking=True, reasoning_effort=effort)
            texts[template, effort] = text.removeprefix(BOS).removesuffix(f"{USER}a")
    assert texts["v4", "high"] == texts["v4-0731", "low"] == ""
    assert texts["v4", "max"] == texts["v4-0731", "high"] != texts["v4-0731", "max"]
    scale = "(range 1-100, the higher the value, the more thorough the reasoning)\n\n"
    assert texts["v4.1", "low"] == f"<｜System｜>Reasoning Effort: 50 {scale}"
    assert render("v4.1", [turn("user", "a")], thinking=True) == f"{BOS}{texts['v4.1', 'high']}{USER}a"
    assert "Effort: 7 (" in render("v4.1", [turn("user", "a")], thinking=True, reasoning_effort=7)
    for template in V4:
        assert render(template, [turn("user", "a")], reasoning_effort="max") == f"{BOS}{USER}a"  # not in chat mode


@pytest.mark.parametrize(
    ("template", "effort", "known"),
    [
        ("v4", "low", "high, max"),
        ("v4-0731", "xhigh", "low, high, max"),
        ("v4.1", "medium", "1 to 100, low, high, xhigh"),
    ]
    + [("v4.1", wrong, "1 to 100, low") for wrong in (0, 101, True, 2.5)],
)
def test_an_unknown_effort_is_refused(render, template, effort, known):
    with pytest.raises(TemplateError, match=f"no place for reasoning_effort {effort}; it knows {known}"):
        render(template, [turn("user", "a")], thinking=True, reasoning_effort=effort)


def test_what_v4_has_no_place_for(render):
    with pytest.raises(TemplateError, match="has no place for a task poem"):
        render("v4", [turn("user", "a", task="poem")], add_generation_prompt=True)
    with pytest.raises(TemplateError, match="message 1, of a developer, is empty"):
        render("v4", [turn("developer", "")])


def test_users_cannot_write_v4s_control_tokens(trained):
    tokens = ["｜DSML｜", "<｜System｜>", "<｜latest_reminder｜>", "<｜title｜>"]
    trained.add_tokens(tokens)
    ids = set(trained.convert_tokens_to_ids(tokens))
    hostile = "".join(tokens) + "</think>" + EOS
    calling = turn("assistant", hostile, tool_calls=[call(hostile, {hostile: hostile, "n": [hostile]})])
    chat = [turn("system", hostile), turn("user", hostile, task="title"), calling, turn("tool", hostile)]
    plain = json.loads(json.dumps(chat, ensure_ascii=False).replace(hostile, "x"))
    for template in ("v3.2", *V4):
        options = {"chat_template": CHAT_TEMPLATES[template]}
        encoded = [trained.apply_chat_template(texts, **options)["input_ids"] for texts in (chat, plain)]
        assert trained.decode(encoded[0]) == trained.apply_chat_template(chat, tokenize=False, **options)
        counts = [[row.count(token) for token in sorted(ids)] for row in encoded]
        assert counts[0] == counts[1] and sum(counts[0]) > 0
        assert encoded[0].count(trained.eos_token_id) == encoded[1].count(trained.eos_token_id)


@pytest.mark.parametrize(
    ("checkpoint", "template"),
    [
        ("deepseek-ai/deepseek-llm-7b-chat", "v2"),
        ("deepseek-ai/deepseek-moe-16b-chat", "v2"),
        ("deepseek-ai/deepseek-coder-6.7b-instruct", "coder"),
        ("deepseek-ai/DeepSeek-Coder-V2-Lite-Instruct", "v2"),
        ("deepseek-ai/DeepSeek-V2-Lite-Chat", "v2"),
        ("deepseek-ai/DeepSeek-V2.5-1210", "v2.5"),
        ("deepseek-ai/DeepSeek-V3-0324", "v3"),
        ("deepseek-ai/DeepSeek-R1", "r1-think"),
        ("models/DeepSeek-V3.1-Terminus/", "v3.1"),
        ("deepseek-ai/DeepSeek-V3.2-Exp", "v3.1"),
        ("deepseek-ai/DeepSeek-V3.2", "v3.2"),
        ("deepseek-ai/DeepSeek-V4-Flash", "v4"),
        ("deepseek-ai/DeepSeek-V4-Pro", "v4"),
        ("deepseek-ai/DeepSeek-V4-Flash-0731", "v4-0731"),
        ("deepseek-ai/DeepSeek-V4-Pro-0813", "v4-0731"),
        ("deepseek-ai/DeepSeek-V4.1-Flash", "v4.1"),
    ],
)
def test_the_template_of_a_published_checkpoint(checkpoint, template):
    assert template_name(checkpoint) == template


@pytest.mark.parametrize(
    "checkpoint", ["runs/mine", "deepseek-ai/DeepSeek-V4-Flash-DSpark", "DeepSeek-R1-Distill-Qwen-7B"]
)
def test_a_checkpoint_without_a_known_format_is_refused(checkpoint):
    with pytest.raises(ValueError, match=f"{checkpoint}: no chat format is known for this name; there are coder, v2"):
        template_name(checkpoint)
