"""A conversation: the kept cache changes nothing, reasoning is told from answers, and what doesn't fit is said."""

import os
import random
import signal

import pytest
import torch

from finetune_deepseek.language.serving.arguments import ChatArguments
from finetune_deepseek.language.serving.conversation import Conversation, Ear, common, parser_of
from finetune_deepseek.language.serving.streaming import HALF, Stopper, TextStream, held_back
from finetune_deepseek.language.serving.terminal import stoppable
from tests.language.serving.conftest import TINY, endless, tiny
from tokenization_deepseek import CHAT_TEMPLATES

EOS = "<｜end▁of▁sentence｜>"
SAID = ["hello", "how are you today", "天气", "seven"]


def talk(lm, template, keeps_cache=True, **flags):
    lm.tokenizer.chat_template = CHAT_TEMPLATES[template]
    return Conversation(lm, ChatArguments(**{"max_new_tokens": 6} | flags), keeps_cache)


def answers(conversation, said=SAID):
    return [conversation.answer(text) for text in said]


def messages(turns):
    return [turn.message for turn in turns]


@pytest.mark.parametrize("template", ["coder", "v2", "v3", "v3.1"])
@pytest.mark.parametrize("name", TINY)
def test_answers_on_the_kept_cache_are_those_of_a_whole_reading(name, template, tokenizer):
    lm = endless(tiny(name, tokenizer, max_position_embeddings=512), tokenizer)
    kept, whole = answers(talk(lm, template)), answers(talk(lm, template, keeps_cache=False))
    assert messages(kept) == messages(whole) and len({turn.message["content"] for turn in kept}) > 2
    assert kept[0].read == whole[0].read
    assert all(one.read < other.read for one, other in zip(kept[1:], whole[1:], strict=True))
    assert kept[-1].read < whole[-1].read - 20


def test_guessed_answers_are_those_without_guesses(tokenizer):
    """Several tokens may come at once, and an answer may end among them."""
    lm = endless(tiny("tiny_v3_mtp", tokenizer, max_position_embeddings=512), tokenizer)
    stop = talk(lm, "v3").answer(SAID[0]).message["content"][2:4]
    for flags in ({}, {"temperature": 0.8}, {"stop": [stop]}):
        plain, guessed = (talk(lm, "v3", use_mtp=is_on, max_new_tokens=8, **flags) for is_on in (False, True))
        assert answers(guessed) == answers(plain)
    heard, ear = [], Ear(lambda token: heard.append(token) or token == 9, 2)
    for ids in ([5, 6, 7], [5, 6, 7, 8, 9, 10], [5, 6, 7, 8, 9, 10, 11]):
        is_done = ear(torch.tensor([ids]), None)
    assert heard == [7, 8, 9] and is_done.tolist() == [True]


@pytest.mark.parametrize("name", ["tiny_llm", "tiny_v3", "tiny_v3.2"])
def test_reasoning_that_the_format_leaves_out_is_cut_out_of_the_cache(name, tokenizer, script):
    lm = endless(tiny(name, tokenizer, max_position_embeddings=512), tokenizer)
    lm.model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(EOS)
    found, read = [], []
    for keeps_cache in (True, False):
        script([f"hm, let me see, one two three</think>four{EOS}", f"hm</think>five{EOS}"])
        conversation = talk(lm, "v3.1", keeps_cache, thinking=True, max_new_tokens=30)
        first, second, third = answers(conversation, SAID[:3])
        thought = {"role": "assistant", "content": "four", "reasoning_content": "hm, let me see, one two three"}
        assert first.message == thought and second.message["content"] == "five"
        assert (first.finish_reason, third.finish_reason) == ("stop", "length")
        found.append((third.message, conversation.format.encode(conversation.messages, "x")))
        assert conversation.read == conversation.lm.tokenizer.apply_chat_template(
            conversation.messages[:5], add_generation_prompt=True, thinking=True
        )["input_ids"] + conversation.read[-29:]  # fmt: skip
        read.append(second.read + third.read)
    assert found[0] == found[1] and read[0] < read[1] - 15


def test_other_system_messages_and_resets_cut_the_cache(lm):
    kept, whole = talk(lm, "v3"), talk(lm, "v3", keeps_cache=False)
    for conversation in (kept, whole):
        conversation.answer("hello")
        conversation.change(system="Be brief.")
        conversation.answer("hello")
        conversation.reset()
        conversation.answer("hello")
    assert kept.messages == whole.messages and kept.whole[0] == {"role": "system", "content": "Be brief."}
    assert len(kept.read) == len(whole.read)


def test_a_model_that_reads_prompts_in_both_directions_reads_all_anew(tokenizer):
    lm = endless(tiny("tiny_v3", tokenizer, attention_direction="prefix"), tokenizer)
    turns = answers(talk(lm, "v3"), SAID[:2])
    assert messages(turns) == messages(answers(talk(lm, "v3", keeps_cache=False), SAID[:2]))
    assert turns[1].read > turns[0].read + 6


def test_what_is_drawn_follows_from_seed_and_turn(lm):
    drawn = {"temperature": 1.0, "seed": 5}
    first = messages(answers(talk(lm, "v3", **drawn), SAID[:2]))
    assert first == messages(answers(talk(lm, "v3", **drawn), SAID[:2]))
    assert first != messages(answers(talk(lm, "v3", temperature=1.0, seed=6), SAID[:2]))
    conversation = talk(lm, "v3", **drawn)
    again = answers(conversation, SAID[:1])
    conversation.reset()
    assert messages(again) != messages(answers(conversation, SAID[:1]))  # the second turn, though a beginning


def test_what_is_shown_is_the_message(lm, script):
    lm.model.generation_config.eos_token_id = lm.tokenizer.convert_tokens_to_ids(EOS)
    script([f"<think>\n天气 hm\n</think>\n\n今天 \\ud83d 🐈.{EOS}"])
    events = []
    turn = talk(lm, "r1", max_new_tokens=80).answer("天气", events.extend)
    assert turn.message == {"role": "assistant", "content": "今天 \\ud83d 🐈.", "reasoning_content": "天气 hm"}
    shown = {"reasoning_content": "", "content": ""}
    for event in events:
        if event["type"] == "region_chunk":
            shown[event["field"]] += event["text"]
            assert HALF not in event["text"]
    assert shown == {name: turn.message[name] for name in shown}


def test_a_stop_text_ends_an_answer_and_is_not_shown(lm, script):
    script(["one two three four five six"])
    events = []
    turn = talk(lm, "v3", stop=["three"], max_new_tokens=40).answer("x", events.extend)
    assert (turn.message["content"], turn.finish_reason) == ("one two ", "stop") and turn.tokens < 30
    assert "".join(event.get("text", "") for event in events) == "one two "


def test_tool_calls_are_in_the_message_and_those_that_cannot_be_read_are_text(lm, script):
    lm.model.generation_config.eos_token_id = lm.tokenizer.convert_tokens_to_ids(EOS)
    begin, sep = "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>", "<｜tool▁sep｜>"
    end = "<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
    script([f"{begin}get{sep}{{}}{end}{EOS}", f"so {begin}get{sep}nothing{end}{EOS}"])
    calls, text = messages(answers(talk(lm, "v3.1", max_new_tokens=60), SAID[:2]))
    assert calls["tool_calls"][0]["function"] == {"name": "get", "arguments": {}}
    assert text["content"].startswith("so ") and "nothing" in text["content"] and "invalid_tool_calls" not in text


def test_a_model_of_others_has_its_thoughts_in_tags(lm):
    lm.tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
    for prompt, text in (("x", "<think>\nhm</think>\n\nyes"), ("x<think>\n", "hm</think>\n\nyes")):
        parser, mark = parser_of(lm.tokenizer, lm.tokenizer(prompt).input_ids)
        parser.feed(text)
        assert (parser.finalize()[0], mark) == (
            {"role": "assistant", "content": "yes", "reasoning_content": "hm"}, ""
        )  # fmt: skip


def test_the_oldest_turns_are_left_out_when_the_positions_are_full(lm):
    conversation = talk(lm, "v3", system="one two three", max_new_tokens=20)
    turns = answers(conversation, SAID * 3)
    left = [turn.left_out for turn in turns]
    assert left[0] == 0 and sum(left) >= 8 and all(turn.tokens == 20 for turn in turns)
    assert len(conversation.messages) == 24 and conversation.first == 2 * sum(left)
    ids = conversation.format.encode([conversation.whole[0], *conversation.messages[conversation.first : -1]], "x")
    assert conversation.read[: len(ids)] == ids and len(conversation.read) == len(ids) + 19 < 128
    alone = lm.model.generate(torch.tensor([ids]), max_new_tokens=20, do_sample=False, pad_token_id=2)
    assert conversation.messages[-1]["content"] == lm.tokenizer.decode(alone[0, len(ids) :])


def test_a_message_that_does_not_fit_is_refused_and_changes_nothing(lm):
    conversation = talk(lm, "v3")
    conversation.answer("hello")
    before = list(conversation.messages)
    with pytest.raises(ValueError, match=r"^the message: \d+ tokens .* leave no room in the model's 128 positions"):
        conversation.answer("hello " * 200)
    assert conversation.messages == before and conversation.first == 0
    assert conversation.answer("seven").message == answers(talk(lm, "v3"), ["hello", "seven"])[1].message


def test_scores_that_are_no_numbers_end_the_answer_in_one_line(lm):
    with torch.no_grad():
        lm.model.lm_head.weight[7] = torch.nan
    conversation = talk(lm, "v3")
    with pytest.raises(ValueError, match="^the answer: the model gives scores that are no numbers"):
        conversation.answer("hello")
    assert conversation.messages == []


def test_an_interruption_keeps_what_was_written(lm):
    plain = talk(lm, "v3", max_new_tokens=20).answer("hello").message["content"]
    conversation = talk(lm, "v3", max_new_tokens=20)
    presses, before = [signal.SIGINT], signal.getsignal(signal.SIGINT)
    with stoppable() as is_stopped:
        turn = conversation.answer(
            "hello", lambda events: events and presses and os.kill(os.getpid(), presses.pop()), is_stopped
        )
    assert turn.finish_reason == "interrupted" and 0 < turn.tokens < 20
    assert turn.message["content"] and plain.startswith(turn.message["content"])
    assert signal.getsignal(signal.SIGINT) is before
    whole = talk(lm, "v3", keeps_cache=False, max_new_tokens=20)
    whole.messages = [*conversation.messages]
    assert conversation.answer("how").message == whole.answer("how").message


def test_a_second_interruption_takes_the_message_back(lm):
    conversation = talk(lm, "v3")
    conversation.answer("hello")
    count = len(conversation.messages)

    def twice(events):
        for _ in events and (1, 2):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt), stoppable() as is_stopped:
        conversation.answer("how", twice, is_stopped)
    assert len(conversation.messages) == count and conversation.cache is None
    assert conversation.answer("how").message == answers(talk(lm, "v3"), ["hello", "how"])[1].message


def test_common_beginnings():
    assert [common([1, 2, 3], other) for other in ([], [1], [1, 2, 3, 4], [1, 3], [2])] == [0, 1, 3, 1, 0]


# -- streaming --


def test_pieces_are_whole_characters_and_together_the_text(trained):
    chosen = random.Random(0)
    alphabet = ["a", " ", "天", "🐈", "é", "\n", "hello", "<think>", "e\u0301", "👩\u200d👩"]
    for _ in range(200):
        text = "".join(chosen.choices(alphabet, k=8))
        stream = TextStream(trained)
        pieces = [stream.put(token) for token in trained(text, add_special_tokens=False).input_ids]
        assert "".join(pieces) + stream.end() == text and not any(HALF in piece for piece in pieces)


def test_bytes_that_are_no_text_come_as_the_whole_decoding_has_them(trained):
    chosen = random.Random(0)
    for _ in range(200):
        ids = [chosen.randrange(20, len(trained)) for _ in range(12)]
        stream = TextStream(trained)
        assert "".join([*map(stream.put, ids), stream.end()]) == trained.decode(ids)


@pytest.mark.parametrize(
    ("stops", "pieces", "shown"),
    [
        (["end"], ["a e", "n", "d b", "c"], ["a ", "", "", ""]),
        (["end"], ["a e", "nx", "e"], ["a ", "enx", ""]),
        (["\n\n", "x"], ["a\n", "b\n", "\nc"], ["a", "\nb", ""]),
        (["aab"], ["aa", "ab"], ["", "a"]),
        ([], ["a", "b"], ["a", "b"]),
    ],
)
def test_a_text_is_shown_up_to_a_stop_text_and_what_may_begin_one_waits(stops, pieces, shown):
    stopper = Stopper(stops)
    assert [stopper.put(piece) for piece in pieces] == shown
    whole = "".join(pieces)
    ends = [whole.find(stop) for stop in stops if stop in whole]
    assert "".join(shown) + stopper.end() == (whole[: min(ends)] if ends else whole)
    assert stopper.has_stopped == bool(ends)


def test_what_is_held_back():
    assert [held_back(text, ["abc", "x"]) for text in ("ab", "zab", "abc", "a", "", "ba", "x")] == [
        2,
        2,
        0,
        1,
        0,
        1,
        0,
    ]
