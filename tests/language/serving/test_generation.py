"""Completions: the same alone and in any batch, ended where they should be, drawn as the scores say."""

import random

import pytest
import torch
from transformers import GenerationConfig

from finetune_deepseek.language.serving.arguments import GenerateArguments
from finetune_deepseek.language.serving.generation import Generator
from finetune_deepseek.language.serving.sampling import STEPS, Draw, Sampling
from finetune_deepseek.training.batches import batches_with_room
from tests.language.serving.conftest import TINY, endless, tiny
from tests.modeling.test_dspark import DRAFTS

PROMPTS = [[0, 40, 50, 60, 70, 80, 90], [0, 41], [0, 200, 42, 43], [0], [0, 44, 45, 46, 47], [0, 41]]


def sampling(defaults=None, **flags):
    return Sampling.of(GenerateArguments(**flags), defaults or GenerationConfig())


def completed(lm, prompts=PROMPTS, batch_size=32, **flags):
    return list(Generator(lm, sampling(**{"max_new_tokens": 9} | flags), batch_size).completions(prompts))


def texts(completions):
    return [[completion.text for completion in found] for found in completions]


def alone(lm, ids, **options):
    """The ids that transformers' own loop writes behind one prompt without padding."""
    options = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 2} | options
    return lm.model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), **options)[:, len(ids) :]


@pytest.mark.parametrize("name", TINY)
def test_a_batch_of_unequal_lengths_writes_what_each_prompt_does_alone(name, tokenizer):
    lm = endless(tiny(name, tokenizer), tokenizer)
    expected = [[tokenizer.decode(alone(lm, ids)[0], skip_special_tokens=True)] for ids in PROMPTS]
    assert texts(completed(lm)) == expected
    assert texts(completed(lm, batch_size=2)) == expected and len({text for (text,) in expected}) > 3
    assert {found.finish_reason for (found,) in completed(lm)} == {"length"}
    assert {found.tokens for (found,) in completed(lm)} == {9}


GUESSING = {
    "tiny_v3_mtp": {},
    "tiny_v4.1": {**DRAFTS, "dspark_target_layer_ids": [1, 4], "mtp_loss_weight": 0.0, "eos_token_id": None},
}


@pytest.mark.parametrize("name", GUESSING)
def test_guessed_tokens_are_those_without_guesses_drawn_ones_too(name, tokenizer):
    lm = endless(tiny(name, tokenizer, **GUESSING[name]), tokenizer)
    stop = completed(lm, PROMPTS[:1])[0][0].text[3:5]
    for flags in ({}, {"temperature": 0.8, "num_return_sequences": 2}, {"repetition_penalty": 3.0}, {"stop": [stop]}):
        expected, calls = completed(lm, PROMPTS[:3], **flags), []
        hook = lm.model.model.layers[-1].register_forward_hook(lambda *_, calls=calls: calls.append(1))
        assert completed(lm, PROMPTS[:3], batch_size=1, use_mtp=True, **flags) == expected
        hook.remove()
        assert calls


def test_what_is_drawn_depends_on_seed_place_and_number_alone(lm):
    drawn = {"temperature": 1.0, "num_return_sequences": 3}
    whole = texts(completed(lm, **drawn))
    assert all(texts(completed(lm, batch_size=size, **drawn)) == whole for size in (1, 4, 7))
    assert [found[:1] for found in whole] == texts(completed(lm, temperature=1.0))
    assert len({text for found in whole for text in found}) == 3 * len(PROMPTS)  # a prompt's repetition draws anew
    assert texts(completed(lm, **drawn, seed=1)) != whole


class Numbers(random.Random):
    """Gives out what it is told to."""

    def __init__(self, numbers):
        super().__init__()
        self.numbers = list(numbers)

    def randrange(self, *_):
        return int(self.numbers.pop(0) * STEPS)


def test_draw_takes_the_token_whose_share_a_number_falls_into():
    scores = torch.tensor([[0.2, 0.0, 0.5, 0.3]]).log()
    numbers = [0.0, 0.19, 0.21, 0.69, 0.71, 1 - 1 / STEPS]
    draw, texts = Draw([Numbers(numbers)]), [torch.zeros(1, 4 + place) for place in range(len(numbers))]
    assert [int(draw(text, scores).argmax()) for text in texts] == [0, 0, 2, 2, 3, 3]
    assert [int(draw(text, scores).argmax()) for text in texts] == [0, 0, 2, 2, 3, 3]  # a place has its number
    last = torch.tensor([[0.0, 1.0, 0.0]]).log()  # nothing that was ruled out, at either end
    assert [int(Draw([Numbers([n])])(texts[0], last).argmax()) for n in (0.0, 1 - 1 / STEPS)] == [1, 1]


def test_drawn_tokens_are_as_frequent_as_transformers_makes_them(lm):
    flags = {"temperature": 1.5, "top_k": 5, "max_new_tokens": 1}
    count = 2000
    (found,) = completed(lm, [PROMPTS[0]], 500, num_return_sequences=count, **flags)
    logits = lm.model(torch.tensor([PROMPTS[0]])).logits[0, -1] / 1.5
    expected = dict.fromkeys((completion.text for completion in found), 0.0)
    for share, token in zip(logits.topk(5).values.softmax(-1).tolist(), logits.topk(5).indices, strict=True):
        expected[lm.tokenizer.decode([token], skip_special_tokens=True)] += share
    assert len(expected) > 2 and sum(expected.values()) == pytest.approx(1)
    for text, share in expected.items():
        seen = sum(completion.text == text for completion in found) / count
        assert abs(seen - share) < 4 * (share * (1 - share) / count) ** 0.5, (text, seen, share)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [({"top_k": 1}, None), ({"top_p": 1e-6}, None), ({"min_p": 1.0}, None), ({"temperature": 0.0}, None),
     ({"do_sample": True, "top_k": 0, "top_p": 1.0, "min_p": 0.0}, "drawn")],
)  # fmt: skip
def test_flags_that_leave_one_token_are_greedy(lm, flags, expected):
    assert (texts(completed(lm, **flags)) == texts(completed(lm))) == (expected is None)


def test_settings_are_the_flags_then_the_models():
    own = GenerationConfig(do_sample=True, temperature=0.3, top_p=0.9, repetition_penalty=1.1)
    found = sampling(own)
    assert (found.do_sample, found.temperature, found.top_p, found.top_k) == (True, 0.3, 0.9, None)
    assert sampling(own, temperature=2.0).temperature == 2 and sampling(own).repetition_penalty == 1.1
    assert not sampling(own, do_sample=False).do_sample and sampling(own, do_sample=False).temperature is None
    assert not sampling(own, num_beams=2).do_sample and not sampling(own, temperature=0.0).do_sample
    assert sampling(top_p=0.5).do_sample and not sampling().do_sample
    assert sampling(own).shown == "drawn, temperature 0.3, top_p 0.9, seed 0, repetition_penalty 1.1"


def test_a_repetition_penalty_is_transformers(lm):
    found = completed(lm, PROMPTS[:2], repetition_penalty=5.0)
    expected = [alone(lm, ids, repetition_penalty=5.0)[0] for ids in PROMPTS[:2]]
    assert texts(found) == [[lm.tokenizer.decode(ids, skip_special_tokens=True)] for ids in expected]
    assert texts(found) != texts(completed(lm, PROMPTS[:2]))


def test_beams_are_transformers_best_first(lm):
    flags = {"num_beams": 4, "num_return_sequences": 3}
    for ids, found in zip(PROMPTS, completed(lm, **flags, batch_size=4), strict=True):
        expected = lm.tokenizer.batch_decode(alone(lm, ids, **flags), skip_special_tokens=True)
        assert [completion.text for completion in found] == expected


@pytest.mark.parametrize("side", [[], 3, [7, 3]])
def test_a_text_ends_behind_a_token_that_ends_it(lm, side):
    written = alone(lm, PROMPTS[0])[0].tolist()
    place = 4
    end = written[place]
    assert end not in written[:place]
    lm.model.generation_config.eos_token_id = [end] if side == [] else end if side == 3 else [1, end]
    found = completed(lm)[0][0]
    assert found == (lm.tokenizer.decode(written[: place + 1], skip_special_tokens=True), "stop", place + 1)


def test_a_text_ends_before_a_stop_text(lm):
    (plain,), (other,) = completed(lm, PROMPTS[:2])
    stop = plain.text[3:5]
    assert stop not in plain.text[:4]
    found = completed(lm, PROMPTS[:2], stop=["never there", stop])[0][0]
    assert (found.text, found.finish_reason) == (plain.text[:3], "stop") and found.tokens < plain.tokens
    ids = alone(lm, PROMPTS[0])[0].tolist()
    counted = next(n for n in range(1, 10) if stop in lm.tokenizer.decode(ids[:n], skip_special_tokens=True))
    assert found.tokens == counted
    assert completed(lm, PROMPTS[1:2], stop=["never there"])[0] == [other]


def test_a_stop_text_in_the_prompt_stops_nothing(lm):
    ids = lm.tokenizer("a\n").input_ids
    (plain,) = completed(lm, [ids])[0]
    assert completed(lm, [ids], stop=["\n" + plain.text[:1], "a\n"])[0] == [plain]


def test_the_model_stops_at_the_stop_text(lm):
    (plain,) = completed(lm, PROMPTS[:1], max_new_tokens=60)[0]
    calls = []
    lm.model.register_forward_hook(lambda *_: calls.append(1))
    (found,) = completed(lm, PROMPTS[:1], max_new_tokens=60, stop=[plain.text[3:5]])[0]
    assert len(calls) == found.tokens < 30


def test_a_prompt_near_the_end_of_the_positions_writes_up_to_it_and_cuts_no_other(lm):
    long = [0] + [40 + n % 50 for n in range(124)]  # of 128 positions
    found = completed(lm, [long, *PROMPTS])
    assert (found[0][0].tokens, found[0][0].finish_reason) == (3, "length")
    assert found[1:] == completed(lm)


def test_a_prompt_that_leaves_no_room_is_named(lm):
    generator = Generator(lm, sampling())
    with pytest.raises(
        ValueError, match=r"^row 2: 128 tokens leave no room in the model's 128 positions \(and 1 other"
    ):
        generator.check_lengths([[0], [0] * 128, [0] * 300], ["row 1", "row 2", "row 3"])
    generator.check_lengths([[0] * 127], ["row 1"])


def test_scores_that_are_no_numbers_are_an_error_with_the_prompt(lm):
    with torch.no_grad():
        lm.model.get_input_embeddings().weight[200] = torch.nan  # of prompt 3 alone
    for flags in ({}, {"temperature": 1.0}, {"num_beams": 2}, {"num_return_sequences": 2, "top_k": 3}):
        with pytest.raises(
            ValueError, match=r"^prompt 3: the model gives scores that are no .* weights are damaged\.$"
        ):
            completed(lm, **flags)
    lm.model.half()
    with pytest.raises(ValueError, match=r"damaged, or too large for float16 \(try --dtype float32\)\.$"):
        completed(lm, PROMPTS[2:3])


@pytest.mark.parametrize("start", range(len(PROMPTS) + 1))
def test_going_on_has_the_same_batches(lm, start, monkeypatch):
    seen = []
    monkeypatch.setattr("finetune_deepseek.language.serving.generation.BATCHES", 2)
    generator = Generator(lm, sampling(max_new_tokens=3), 2)
    batch = Generator._batch
    monkeypatch.setattr(Generator, "_batch", lambda self, jobs, room: seen.append([j.place for j in jobs])
                        or batch(self, jobs, room))  # fmt: skip
    assert generator.window == 4
    found = list(generator.completions(PROMPTS, start))
    assert len(found) == len(PROMPTS) - start
    assert seen == ([[0, 2], [1, 3], [4, 5]] if start < 4 else [[4, 5]] if start < 6 else [])
    assert found == list(Generator(lm, sampling(max_new_tokens=3), 2).completions(PROMPTS))[start:]


def test_a_batch_that_memory_does_not_hold_names_the_flag(lm, monkeypatch):
    def full(**_):
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(lm.model, "generate", full)
    with pytest.raises(ValueError, match="^--batch_size 32: the device's memory doesn't hold 6 texts of 7 tokens"):
        completed(lm)


RETURNS = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "output_hidden_states": True}
RETURNS |= {"output_attentions": True, "num_return_sequences": 3}


def test_what_a_model_would_return_beside_its_ids_changes_nothing(lm):
    plain, beams = completed(lm, PROMPTS[:2]), completed(lm, PROMPTS[:2], num_beams=2)
    for name, value in RETURNS.items():
        setattr(lm.model.generation_config, name, value)
    assert texts(completed(lm, PROMPTS[:2])) == texts(plain)
    assert texts(completed(lm, PROMPTS[:2], num_beams=2)) == texts(beams)


def test_a_models_own_stop_texts_end_its_texts(lm):
    ((whole,),) = texts(completed(lm, PROMPTS[:1]))
    lm.model.generation_config.stop_strings = whole[3:6]
    own = sampling(lm.defaults, max_new_tokens=9)
    (((cut, reason, _),),) = Generator(lm, own).completions(PROMPTS[:1])
    assert (cut, reason) == (whole[: whole.index(whole[3:6])], "stop")
    assert sampling(lm.defaults, stop=["x"]).stop == ("x", whole[3:6])


def test_batches_leave_room_for_what_is_written():
    assert list(batches_with_room([3, 9, 1, 8], 2, 4, 12)) == [([3, 0], 4), ([2], 4), ([1], 3)]
    assert list(batches_with_room([3, 9], 2, 4, None)) == [([1, 0], 4)]
