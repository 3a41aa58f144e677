"""What is trained, through the task's own path: for every template exactly what was asked for."""

import itertools

import pytest

from finetune_deepseek.language.conversation.arguments import ConversationArguments
from finetune_deepseek.language.conversation.checks import Faulty, checked
from finetune_deepseek.language.conversation.masks import Encoder
from finetune_deepseek.language.conversation.templates import argument_form, ends_of_answers, trained_template
from tokenization_deepseek import CHAT_TEMPLATES

from .conftest import HOSTILE, call, turn
from .test_bad_input import encoded

CHAT = [
    turn("system", "be brief"),
    turn("user", f"你好 {HOSTILE}"),
    turn("assistant", "世界，你好！"),
    turn("user", "Assistant: one plus one?"),
    turn("assistant", f"b {HOSTILE}"),
    turn("user", "\nx"),
    turn("assistant", "two"),
]
ANSWERS = [m["content"] for m in CHAT if m["role"] == "assistant"]
THOUGHTS = [
    turn("user", "one"),
    turn("assistant", "fox", reasoning_content="red"),
    turn("user", "two"),
    turn("assistant", "<think>\nblue\n</think>\n\nbird"),
]
THINKING = [name for name in CHAT_TEMPLATES if name not in ("coder", "v2", "v2.5")]
# keeps reasoning wherever it is, as some families do
KEEPING = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}{{ 'A:' }}{% generation %}"
    "{% if m['reasoning_content'] %}{{ '<think>' + m['reasoning_content'] + '</think>' }}{% endif %}"
    "{{ m['content'] + eos_token }}{% endgeneration %}{% else %}{{ 'U:' + m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'A:' }}{% endif %}"
)


def encoder(tokenizer, template, **settings):
    trained_template(tokenizer, template)
    return Encoder(tokenizer, ConversationArguments(train_file="unread", **settings))


def asked_of(template):
    """`CHAT`, whose last answer thinks where the generation prompt opens the thought."""
    return [*CHAT[:-1], CHAT[-1] | {"reasoning_content": "hm"}] if template == "r1-think" else CHAT


def runs(tokenizer, made) -> list[str]:
    """The text of each run of trained tokens."""
    found = itertools.groupby(zip(made.input_ids, made.labels, strict=True), key=lambda pair: pair[1] >= 0)
    pieces = [list(pairs) for is_trained, pairs in found if is_trained]
    assert all(token == label for piece in pieces for token, label in piece)
    return [tokenizer.decode([token for token, _ in piece]) for piece in pieces]


def bare(tokenizer, texts):
    return [text.replace(tokenizer.eos_token, "").strip() for text in texts]


@pytest.mark.parametrize("template", CHAT_TEMPLATES)
def test_labels_are_exactly_the_assistants_turns(tmp_path, tokenizer, template):
    """Of a conversation whose texts hold control tokens, which stay texts."""
    made = encoded(tmp_path, [CHAT], tokenizer, chat_template=template).encoded["train"][0]
    labelled = [list(group) for trained, group in itertools.groupby(made["labels"], lambda x: x >= 0)
                if trained]  # fmt: skip
    texts = [tokenizer.decode(ids) for ids in labelled]
    end = tokenizer.eos_token
    assert all(text.endswith(end) and text.count(end) == 1 + HOSTILE.count(end) * ("b " in text) for text in texts)
    assert [text.removesuffix(end).strip() for text in texts] == ANSWERS
    assert all(ids[-1] == tokenizer.eos_token_id for ids in labelled)


@pytest.mark.parametrize("template", CHAT_TEMPLATES)
def test_the_last_answer_or_all_turns(tokenizer, template):
    last = encoder(tokenizer, template, train_on="last")(CHAT, [])
    assert bare(tokenizer, runs(tokenizer, last)) == ["two"]
    everything = encoder(tokenizer, template, train_on="all", train_prompt_tokens=True)(CHAT, [])
    assert everything.labels == [-100, *everything.input_ids[1:]]
    plain = encoder(tokenizer, template)(CHAT, [])
    without = encoder(tokenizer, template, train_on="all")(CHAT, [])
    headers = encoder(tokenizer, template, train_prompt_tokens=True)(CHAT, [])
    for token, answer, all_but_headers, with_headers in zip(
        plain.input_ids[1:], plain.labels[1:], without.labels[1:], headers.labels[1:], strict=True
    ):
        is_header = with_headers >= 0 and answer < 0
        assert (all_but_headers < 0) == is_header and with_headers in (token, -100)
    assert headers.num_trained > plain.num_trained


@pytest.mark.parametrize("template", CHAT_TEMPLATES)
def test_headers_are_what_the_generation_prompt_supplies(tokenizer, template):
    made = encoder(tokenizer, template, train_prompt_tokens=True, train_on="last")(asked_of(template), [])
    (text,) = runs(tokenizer, made)
    prompt, begun = (
        tokenizer.apply_chat_template(CHAT[:-1], tokenize=False, add_generation_prompt=add) for add in (True, False)
    )
    header = prompt.removeprefix(begun)
    assert header and text.startswith(header)
    assert bare(tokenizer, [text.removeprefix(header)])[0].split("\n")[-1] == "two"


@pytest.mark.parametrize("template", CHAT_TEMPLATES)
def test_a_reply_follows_what_the_template_asks_with(tokenizer, template):
    made = encoder(tokenizer, template)(asked_of(template), [])
    asked = tokenizer.apply_chat_template(CHAT[:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert made.input_ids[: made.reply[0]] == asked
    assert bare(tokenizer, [tokenizer.decode(made.input_ids[slice(*made.reply)])])[0].split("\n")[-1] == "two"


@pytest.mark.parametrize("template", THINKING)
def test_reasoning_is_cut_from_history_kept_or_dropped(tokenizer, template):
    def of(thinking):
        made = encoder(tokenizer, template, thinking=thinking)(checked(THOUGHTS), [])
        texts = bare(tokenizer, runs(tokenizer, made))
        return made, ["".join(text.replace("<think>", "").replace("</think>", "/").split()) for text in texts]

    cut, texts = of("template")
    assert texts == ["fox", "blue/bird"]
    assert of("last")[0] == cut  # of which the template leaves nothing in earlier turns
    kept, texts = of("keep")
    assert texts == ["red/fox", "blue/bird"]
    for place, answered in ((2, "red"), (4, "blue")):
        own = encoder(tokenizer, template)(checked(THOUGHTS[:place]), [])
        answer = own.input_ids[slice(*own.reply)]
        assert answered in tokenizer.decode(answer)
        assert any(kept.input_ids[n : n + len(answer)] == answer for n in range(len(kept.input_ids)))
    dropped, texts = of("drop")
    assert texts == ["fox", "bird"]
    assert not any(word in tokenizer.decode(dropped.input_ids) for word in ("red", "blue"))


def test_reasoning_of_earlier_answers_can_be_left_untrained(tmp_path, tokenizer):
    (tmp_path / "keeping.jinja").write_text(KEEPING)
    path = str(tmp_path / "keeping.jinja")
    chat = checked(THOUGHTS)
    end = tokenizer.eos_token
    whole = encoder(tokenizer, path)(chat, [])
    assert runs(tokenizer, whole) == [f"<think>red</think>fox{end}", f"<think>blue</think>bird{end}"]
    assert encoder(tokenizer, path, thinking="keep")(chat, []) == whole
    last = encoder(tokenizer, path, thinking="last")(chat, [])
    assert last.input_ids == whole.input_ids
    assert runs(tokenizer, last) == [f"fox{end}", f"<think>blue</think>bird{end}"]


def test_a_template_without_a_word_for_reasoning_keeps_it_in_the_content(tokenizer):
    """`<think>` in a content would vanish if it became `reasoning_content` there."""
    tokenizer.chat_template = KEEPING.replace("reasoning_content", "nothing")
    made = encoder(tokenizer, None)(checked(THOUGHTS[2:]), [])
    assert runs(tokenizer, made) == [f"<think>\nblue\n</think>\n\nbird{tokenizer.eos_token}"]


@pytest.mark.parametrize("given", ['{"key": 1}', {"key": 1}])
@pytest.mark.parametrize(
    ("written", "form"),
    [("c.function.arguments | tojson", dict), ("c['function']['arguments'] + ''", str), (None, None)],
)
def test_arguments_are_given_as_the_template_takes_them(tokenizer, written, form, given):
    template = CHAT_TEMPLATES["v3.1"]
    if written:
        calls = "{% for c in m['tool_calls'] or [] %}{{ " + written + " }}{% endfor %}"
        template = KEEPING.replace("{{ m['content'] + eos_token }}", "{{ m['content'] }}" + calls + "{{ eos_token }}")
    tokenizer.chat_template = template
    assert argument_form(tokenizer) is form
    made = encoder(tokenizer, None)(checked([turn("user", "x"), turn("assistant", "", tool_calls=[call(given)])]), [])
    assert '{"key": 1}' in runs(tokenizer, made)[0]


@pytest.mark.parametrize("template", ["v3", "v3.1", "v3.2"])
def test_tools_calls_and_results_in_a_conversation(tokenizer, template):
    tools = [{"type": "function", "function": {"name": "get", "description": "d", "parameters": {}}}]
    chat = checked([turn("user", "weather?"), turn("assistant", "", tool_calls=[call('{"c": "北京"}')]),
                    turn("tool", "rain"), turn("assistant", "wet")])  # fmt: skip
    made = encoder(tokenizer, template)(chat, tools if template != "v3" else [])
    called, answered = runs(tokenizer, made)
    assert "get" in called and "北京" in called and "rain" not in called
    assert bare(tokenizer, [answered]) == ["wet"]


def test_long_conversations_lose_their_oldest_turns_and_never_a_part_of_one(tmp_path, tokenizer):
    whole = encoder(tokenizer, "v3")(CHAT, [])
    from_second = encoder(tokenizer, "v3")([CHAT[0], *CHAT[3:]], [])
    from_last = encoder(tokenizer, "v3")([CHAT[0], *CHAT[5:]], [])
    for limit, expected, cut in (
        (len(whole.input_ids), whole, 0),
        (len(whole.input_ids) - 1, from_second, 2),
        (len(from_second.input_ids), from_second, 2),
        (len(from_second.input_ids) - 1, from_last, 4),
        (len(from_last.input_ids), from_last, 4),
    ):
        made = encoder(tokenizer, "v3", max_seq_length=limit)(CHAT, [])
        assert made == expected._replace(cut=cut)
    with pytest.raises(Faulty) as error:
        encoder(tokenizer, "v3", max_seq_length=len(from_last.input_ids) - 1)(CHAT, [])
    assert error.value.fault == "too_long"
    rows = [CHAT, CHAT[5:], [turn("user", "blue " * 99), turn("assistant", "bird")]]
    found = encoded(tmp_path, rows, tokenizer, max_seq_length=len(from_last.input_ids)).found["train"]
    assert found.report()["cut"]["places"] == ["rows.jsonl, row 1"]
    assert found.report()["too_long"]["places"] == ["rows.jsonl, row 3"]
    assert found.line("train").endswith(
        "1 longer than the model, at its last turns alone (left out); 1 longer than the model (oldest turns cut)"
    )


def test_a_cut_leaves_no_result_without_its_call(tokenizer):
    chat = checked([turn("user", "a " * 30), turn("assistant", "", tool_calls=[call()]), turn("tool", "b"),
                    turn("assistant", "c"), turn("user", "d"), turn("assistant", "e"), turn("user", "f")])  # fmt: skip
    limit = len(encoder(tokenizer, "v3.1")(chat, []).input_ids) - 1
    made = encoder(tokenizer, "v3.1", max_seq_length=limit)(chat, [])
    assert made == encoder(tokenizer, "v3.1")(chat[4:], [])._replace(cut=4)


def test_replies_end_where_the_template_ends_an_answer(tokenizer):
    assert ends_of_answers(tokenizer) == [tokenizer.eos_token_id]
    tokenizer.chat_template = KEEPING.replace("eos_token", "'<｜User｜>'")
    user = tokenizer.convert_tokens_to_ids("<｜User｜>")
    assert ends_of_answers(tokenizer) == sorted([tokenizer.eos_token_id, user])
    tokenizer.chat_template = KEEPING.replace(" + eos_token", "")
    assert ends_of_answers(tokenizer) == [tokenizer.eos_token_id]
