"""Generation by the model's own guesses equals generation without, token by token; its distribution stays."""

import pytest
import torch

from modeling_deepseek.drafting import LayerDrafter, StageDrafter
from tests.modeling.conftest import outputs, tiny, token_ids
from tests.modeling.test_dspark import DRAFTS, model_of
from tests.modeling.test_generation import by_whole_passes
from tests.reference.compare import assert_close
from tests.reference.shared_model import ENGRAM

NEW = 16
GREEDY = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 2, "use_mtp": True}
AHEAD = {"num_nextn_predict_layers": 1}
MODELS = {
    "V3": ("tiny_v3", AHEAD),
    "V3, two layers": ("tiny_v3_mtp", {}),
    "before the norm": ("tiny_v3_mtp", {"mtp_after_norm": False}),
    "three layers": ("tiny_v3_mtp", {"num_nextn_predict_layers": 3}),
    "V3.2": ("tiny_v3.2", AHEAD),
    "multi-head attention": ("tiny_llm", AHEAD),
    "V4, preview": ("tiny_v4", AHEAD),
    "V4, two layers": ("tiny_v4", {"num_nextn_predict_layers": 2}),
    "V4, draft stages": ("tiny_v4", {**DRAFTS, "dspark_target_layer_ids": [0, 2]}),
    "V4.1": ("tiny_v4.1", {**ENGRAM, **DRAFTS, "dspark_target_layer_ids": [1, 4], "dspark_n_routed_experts": 3}),
}


def speculating(name: str, **overrides):
    """The model, with ids of its whole vocabulary as a text may have them."""
    preset, fields = MODELS[name]
    return tiny(preset, **{**fields, "mtp_loss_weight": 0.0, "initializer_range": 0.2, **overrides})


@pytest.mark.parametrize("name", ["V3, two layers", "V4, preview", "V4, draft stages", "V4.1"])
def test_greedy_from_one_token_equals_whole_passes(name):
    model, ids = speculating(name), token_ids(1, 1)
    assert torch.equal(model.generate(ids, **GREEDY | {"max_new_tokens": 8}), by_whole_passes(model, ids, 8))


@torch.no_grad()
def guesses_by_whole_passes(model, ids):
    """What is guessed behind ids [1, T + 1], of which the trunk reads T at once and without a cache: the yardstick."""
    trunk = model.model
    if trunk.draft_stages:
        states = trunk(ids[:, :-1], output_draft_states=True, use_cache=False).draft_states
        first, anchor = trunk.embed_tokens(ids[:, -1:]), torch.tensor([[ids.shape[1] - 2]])
        drafted, last = trunk.draft(trunk.draft_context(states), first, anchor)[:, 0], trunk.draft_stages[-1]
        scores, logits = model.lm_head(last.shared_head(drafted)), []
        for j in range(scores.shape[1]):
            logits.append(scores[:, j] + last.markov_head(ids[:, -1])[0])
            ids = torch.cat((ids, logits[-1].argmax(-1, keepdim=True)), dim=1)
        return torch.stack(logits, dim=1)
    row, logits = ids.shape[1] - 2, []
    for depth in range(model.config.num_nextn_predict_layers):
        states = trunk(ids, output_draft_states=True, use_cache=False).draft_states
        logits.append(model.lm_head(trunk.predict_ahead(states, ids)[depth][:, row]))
        ids = torch.cat((ids, logits[-1].argmax(-1, keepdim=True)), dim=1)
    return torch.stack(logits, dim=1)


@pytest.mark.parametrize("name", MODELS)
def test_guesses_after_right_and_wrong_ones_are_those_of_whole_passes(name, monkeypatch):
    """In turn all guesses are made right, and the first alone; what follows is guessed as if nothing had been."""
    model, ids = speculating(name), token_ids(1, 7, seed=1)
    expected, calls = by_whole_passes(model, ids, NEW), []
    kind = StageDrafter if model.model.draft_stages else LayerDrafter
    guess = kind.guess

    def checked(self, input_ids, new, mask):
        guessed, logits = guess(self, input_ids, new, mask)
        assert_close(logits, guesses_by_whole_passes(model, input_ids), "guesses", tolerance=3e-5)
        right = expected[:, input_ids.shape[1] : input_ids.shape[1] + guessed.shape[1]]
        right = torch.nn.functional.pad(right, (0, guessed.shape[1] - right.shape[1]))
        calls.append(len(calls) % 2)
        return (right if calls[-1] else torch.cat((right[:, :1], (right[:, 1:] + 1) % 97), dim=1)), logits

    monkeypatch.setattr(kind, "guess", checked)
    assert torch.equal(model.generate(ids, assistant_confidence_threshold=0, **GREEDY), expected)
    assert 1 < len(calls) < NEW - 5


def test_a_padded_prompt_and_one_whose_begin_is_cached():
    for name in ("V3", "V4, preview", "V4, draft stages", "V4.1"):
        model, ids = speculating(name), token_ids(1, 9, seed=2)
        expected = by_whole_passes(model, ids, NEW)
        padded, mask = torch.cat((torch.full((1, 4), 2), ids), 1), torch.tensor([[0] * 4 + [1] * 9])
        assert torch.equal(model.generate(padded, attention_mask=mask, **GREEDY)[:, 4:], expected)
        with torch.no_grad():
            cache = model(ids[:, :6], use_cache=True).cache
        assert torch.equal(model.generate(ids, cache=cache, **GREEDY), expected)


def test_ends_where_generation_without_guesses_ends():
    model, ids = speculating("V4, draft stages"), token_ids(1, 9, seed=2)
    expected = by_whole_passes(model, ids, NEW)
    end = expected[0, 15].item()
    got = model.generate(ids, eos_token_id=end, **GREEDY)[0].tolist()
    assert got == expected[0, : expected[0].tolist().index(end, 9) + 1].tolist()
    assert torch.equal(model.generate(ids, **GREEDY | {"max_new_tokens": 2}), expected[:, :11])


def test_what_a_stage_is_not_sure_of_is_not_guessed(monkeypatch):
    model, ids, counts = speculating("V4, draft stages"), token_ids(1, 9, seed=2), []
    expected, guess = by_whole_passes(model, ids, NEW), StageDrafter.guess
    last = model.model.draft_stages[-1]

    def counted(self, *args):
        guessed, logits = guess(self, *args)
        counts.append(guessed.shape[1])
        assert logits.shape == (1, guessed.shape[1], 97)
        return guessed, logits

    monkeypatch.setattr(StageDrafter, "guess", counted)
    odds = iter([[1.0, -1.0, 1.0], [-1.0, 1.0, 1.0]] * NEW)
    rows = iter(())

    def confidence(states, markov):
        nonlocal rows
        value = next(rows, None)
        if value is None:
            rows = iter(next(odds))
            value = next(rows)
        return torch.full(states.shape[:-1], value)

    monkeypatch.setattr(last.confidence_head, "forward", confidence)
    assert torch.equal(model.generate(ids, assistant_confidence_threshold=0.5, **GREEDY), expected)
    assert set(counts[0::2]) == {1} and set(counts[1::2]) == {0}
    counts.clear()
    assert torch.equal(
        model.generate(ids, num_assistant_tokens=2, assistant_confidence_threshold=0, **GREEDY), expected
    )
    assert set(counts) == {2}


@pytest.mark.parametrize("name", ["V3", "V4, draft stages"])
def test_samples_are_drawn_from_the_logits_that_are_handed_on(name, monkeypatch):
    model, ids, calls = speculating(name), token_ids(1, 9, seed=2), []
    choose = LayerDrafter.choose

    def checked(self, so_far, logits):
        token, processed = choose(self, so_far, logits)
        assert (processed > -1e9).sum() == 4 and processed[0, token[0, 0]] > -1e9
        torch.testing.assert_close(processed[processed > -1e9], (logits / 0.7)[processed > -1e9])
        calls.append(so_far.shape[1])
        return token, processed

    monkeypatch.setattr("modeling_deepseek.drafting.SelfDrafter.choose", checked)
    sampled = model.generate(ids, max_new_tokens=8, do_sample=True, temperature=0.7, top_k=4, use_mtp=True)
    assert sampled.shape[1] == 17 and calls[0] == 10


@pytest.mark.slow
@pytest.mark.parametrize("name", ["V3", "V4, draft stages"])
def test_the_distribution_of_samples_stays(name):
    """The third token's frequencies against their probabilities, over all that may stand before it."""
    model, ids = speculating(name, vocab_size=8, dspark_noise_token_id=7), torch.tensor([[3, 4, 5, 3]])
    texts = torch.tensor([[*ids[0].tolist(), a, b] for a in range(8) for b in range(8)])
    probabilities = outputs(model, texts, use_cache=False).softmax(-1)  # [64, 6, 8]
    of_two = probabilities[:, 3].gather(1, texts[:, 4:5]) * probabilities[:, 4].gather(1, texts[:, 5:6])
    wanted = (of_two * probabilities[:, 5]).sum(0)
    torch.manual_seed(0)
    count = 400
    arguments = {"max_new_tokens": 3, "do_sample": True, "use_mtp": True, "pad_token_id": 2, "top_k": 0}
    arguments["assistant_confidence_threshold"] = 0
    seen = torch.stack([model.generate(ids, **arguments)[0, 6] for _ in range(count)]).bincount(minlength=8) / count
    assert ((seen - wanted).abs() < 4 * (wanted * (1 - wanted) / count).sqrt()).all(), (seen, wanted)


def test_what_cannot_be_is_refused_in_one_line():
    with pytest.raises(ValueError, match="use_mtp: this model has no prediction layers to guess by; leave"):
        tiny("tiny_v3").generate(token_ids(1, 4), **GREEDY)
    with pytest.raises(ValueError, match="use_mtp: this model has no prediction layers to guess by; leave"):
        tiny("tiny_v4.1", num_nextn_predict_layers=1).generate(token_ids(1, 4), **GREEDY)
    with pytest.raises(ValueError, match="mtp_loss_weight=0.1 clashes with kv_source_layer_ids"):
        tiny("tiny_v4.1", num_nextn_predict_layers=1, mtp_loss_weight=0.1)  # without draft stages
    model = speculating("V3")
    with pytest.raises(ValueError, match="use_mtp: prediction layers read token ids; give input_ids"):
        model.generate(inputs_embeds=model.get_input_embeddings()(token_ids(1, 4)), **GREEDY)
    with pytest.raises(ValueError, match="only supported for batch_size = 1"):
        model.generate(token_ids(2, 4), **GREEDY)


def test_stages_need_no_ids_of_the_prompt():
    model, ids = speculating("V4, draft stages"), token_ids(1, 6)
    got = model.generate(inputs_embeds=model.get_input_embeddings()(ids), **GREEDY)
    assert torch.equal(got, by_whole_passes(model, ids, NEW)[:, 6:])


def test_the_drafts_of_a_model_of_four_streams_and_hash_layers():
    model, ids = model_of(mtp_loss_weight=0.0), token_ids(1, 8) % 61
    assert torch.equal(model.generate(ids, **GREEDY), by_whole_passes(model, ids, NEW))
