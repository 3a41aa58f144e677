"""Items that are described by text: vectors and scores against slow plain ones, new items, and what is refused."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F

from configuration_deepseek import preset
from modeling_deepseek import DeepSeekForCausalLM, DeepSeekForRecommendation
from tests.modeling.conftest import tiny
from tests.reference import item_losses as reference
from tests.reference.compare import assert_close, assert_same_gradients

TEXTS = [[5, 9, 30], [41], [7, 7, 8, 20, 90], [60, 61], [9, 30], [77, 3, 12, 50], [33, 34, 35]]  # items 1 to 7
HISTORY = [3, 1, 6]


def text_model(name="tiny_llm", **fields):
    model = tiny(name, DeepSeekForRecommendation, num_items=1, item_text_length=6, **fields)
    assert model.add_items(TEXTS).tolist() == [1, 2, 3, 4, 5, 6, 7]
    return model


def plain_vector(model, tokens):
    """One text alone through the trunk, without padding."""
    states = model.model(torch.tensor([tokens])).last_hidden_state[0]
    pooled = states[-1] if model.config.pooling == "last_token" else sum(states) / len(states)
    return model.item_texts.projection.weight @ pooled


def plain_scores(model, history, texts, candidates):
    inputs = torch.stack([plain_vector(model, texts[item - 1]) for item in history])
    last = model.model(inputs_embeds=inputs[None]).last_hidden_state[0, -1]
    return torch.stack([torch.dot(last, plain_vector(model, texts[item - 1])) for item in candidates])


@pytest.mark.parametrize("pooling", ["mean", "last_token"])
def test_scores_equal_the_plain_ones_of_a_cold_item_too(name, pooling):
    model, new = text_model(name, pooling=pooling), [[88, 89], [4, 5, 6, 7, 8, 9]]
    with torch.no_grad():
        before = model(torch.tensor([HISTORY])).logits
        assert model.add_items(new).tolist() == [8, 9] and model.config.num_items == 10
        logits = model(torch.tensor([HISTORY])).logits
        assert_close(logits[0, 1:], plain_scores(model, HISTORY, TEXTS + new, range(1, 10)), tolerance=1e-4)
        assert_close(logits[:, :8], before)
        with_new = model(torch.tensor([[*HISTORY, 9]])).logits
        assert_close(with_new[0, 1:], plain_scores(model, [*HISTORY, 9], TEXTS + new, range(1, 10)), tolerance=1e-4)
    items, scores = model.recommend(HISTORY, k=9)
    expected = [item for item in logits[0].argsort(descending=True).tolist() if item not in (0, *HISTORY)]
    assert items.tolist()[:6] == expected and {8, 9} <= set(expected)
    assert torch.isinf(scores[6:]).all()


def test_a_bag_of_words_is_the_mean_of_its_words():
    model, texts = text_model(item_text_encoder="bag_of_words"), [[0], *TEXTS]
    words, rows = model.model.embed_tokens.weight, torch.tensor([[3, 1, 6, 2], [5, 5, 7, 0]])

    def plain(row):
        vectors = torch.stack([sum(words[word] for word in text) / len(text) for text in texts])
        vectors = vectors @ model.item_texts.projection.weight.T
        states = model.model(inputs_embeds=vectors[row][None]).last_hidden_state[0, :-1]
        scores = (states[: len(row) - 1] @ vectors.T)[:, 1:]
        return torch.nn.functional.cross_entropy(scores, torch.tensor(row[1:]) - 1, reduction="sum")

    expected = (plain([3, 1, 6, 2]) + plain([5, 5, 7])) / 5
    loss = model.train()(rows, labels=rows.masked_fill(rows == 0, -100)).loss
    assert_close(loss, expected)
    assert_same_gradients(loss, expected, {name: (weight, weight) for name, weight in model.named_parameters()})


def test_an_item_is_its_text_and_what_is_learned_of_it_where_asked(tmp_path):
    model = text_model(item_id_embeddings=True)
    plain = model.item_embeddings().clone()
    assert not model.item_texts.identities.weight.any()
    with torch.no_grad():
        model.item_texts.identities.weight[1:] += 1
        assert_close(model.item_embeddings()[1:], plain[1:] + 1)
        model.add_items([TEXTS[0]])
        assert_close(model.item_embeddings()[8], plain[1])  # as if nobody had clicked it, which is so
    model.save_pretrained(tmp_path)
    again = DeepSeekForRecommendation.from_pretrained(tmp_path)
    assert torch.equal(again.item_embeddings(), model.item_embeddings())


def test_saved_items_are_there_again(tmp_path, name):
    model = text_model(name)
    model.save_pretrained(tmp_path)
    again = DeepSeekForRecommendation.from_pretrained(tmp_path)
    assert torch.equal(again.item_texts.tokens, model.item_texts.tokens) and again.config.num_items == 8
    for ours, theirs in zip(model.recommend(HISTORY, k=4), again.recommend(HISTORY, k=4), strict=True):
        assert_close(theirs, ours)
    half = DeepSeekForRecommendation.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.item_texts.tokens.dtype == torch.int32 and half.recommend(HISTORY, k=4)[0].shape == (4,)


def test_a_language_model_becomes_a_recommender_of_texts(tmp_path):
    tiny("tiny_v3", DeepSeekForCausalLM).save_pretrained(tmp_path)
    model = DeepSeekForRecommendation.from_pretrained(tmp_path, num_items=3, item_id_embeddings=True)
    assert (model.item_texts.tokens == -1).all() and not model.item_texts.identities.weight.any()
    assert model.item_texts.projection.weight.std() > 0.001
    assert model.add_items([[5, 6]]).tolist() == [3]


def test_vectors_follow_the_weights():
    model = text_model()
    first = model.item_embeddings()
    assert model.item_embeddings() is first
    rows = torch.tensor([[1, 2, 3, 4]])
    for is_fused in (False, True):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=is_fused)
        before = model.item_embeddings()
        model.train()(rows, labels=rows).loss.backward()
        optimizer.step()
        assert (model.eval().item_embeddings() - before).abs().max() > 1e-4
    before = model.item_embeddings()
    with torch.no_grad():
        model.item_texts.projection.weight.mul_(2)
    assert_close(model.item_embeddings(), 2 * before)
    before = model.item_embeddings()
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    with torch.no_grad():
        after = adapted(input_ids=rows).logits
        assert (model.item_embeddings() - before).abs().max() > 1e-3
        merged = adapted.merge_and_unload()
        assert_close(merged(rows).logits, after)


MODES = {
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "no gradients": torch.no_grad,
}


@pytest.mark.parametrize("mode", MODES)
def test_vectors_outlive_the_mode_that_made_them(mode):
    model, rows = text_model(), torch.tensor([[1, 2, 3, 4]])
    expected = text_model().item_embeddings()
    with MODES[mode]():
        model(rows)
    kept = model.item_embeddings()
    assert torch.equal(kept, expected) and not kept.is_inference()
    model(rows, labels=rows).loss.backward()
    assert model.model.norm.weight.grad.abs().max() > 0


def test_items_that_came_in_inference_mode_are_trained_later():
    model = text_model(item_id_embeddings=True)
    with torch.inference_mode():
        assert model.add_items([[5, 6]]).tolist() == [8]
    rows, before = torch.tensor([[1, 2, 8]]), model.item_texts.identities.weight.detach().clone()
    model.train()(rows, labels=rows).loss.backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    assert (model.item_texts.identities.weight - before)[8].abs().max() > 0


def test_vectors_follow_the_adapters_switches():
    model = text_model()
    plain = model.item_embeddings()
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    with_it = model.item_embeddings()
    with adapted.disable_adapter():
        assert_close(model.item_embeddings(), plain)
    assert torch.equal(model.item_embeddings(), with_it) and (with_it - plain).abs().max() > 1e-3


def test_training_mode_forgets_the_vectors():
    """A fused optimizer and `.data` leave no trace on a weight."""
    model = text_model()
    before = model.item_embeddings()
    model.train()
    model.item_texts.projection.weight.data.mul_(2)
    assert_close(model.eval().item_embeddings(), 2 * before)


@pytest.mark.parametrize("loss", ["softmax", "sampled_softmax", "gbce"])
def test_training_reaches_every_weight_by_plain_gradients(loss, monkeypatch):
    """Vectors of the batch's items and of the negatives are encoded once, and learn in both of their roles."""
    small = {"initializer_range": 0.1}  # the plain gBCE loses digits where probabilities near 1 are taken from 1
    pair = [
        text_model(item_loss=loss, num_item_negatives=5, item_id_embeddings=True, **small).train() for _ in range(2)
    ]
    drawn = torch.tensor([2, 7, 7, 4, 1])
    monkeypatch.setattr("modeling_deepseek.recommendation_head.draw_negatives", lambda *args: drawn)
    rows = torch.tensor([[3, 1, 6, 2], [5, 4, 0, 0]])
    labels = rows.masked_fill(rows == 0, -100)
    ours, theirs = pair
    output = ours(rows, labels=labels)
    assert output.logits is None
    vectors = torch.stack([torch.zeros(32), *(plain_vector(theirs, tokens) for tokens in TEXTS)])
    vectors = vectors + theirs.item_texts.identities.weight
    hidden = torch.cat(
        [theirs.model(inputs_embeds=vectors[row][None]).last_hidden_state[0, :-1] for row in ([3, 1, 6, 2], [5, 4])]
    )
    targets = torch.tensor([1, 6, 2, 4])
    if loss == "softmax":
        expected = reference.softmax(hidden, targets, vectors, 0)
    elif loss == "sampled_softmax":
        expected = reference.sampled_softmax(hidden, targets, vectors, drawn, [5 / 7] * 5)
    else:
        expected = reference.gbce(hidden, targets, vectors, drawn, 7, ours.config.gbce_calibration)
    pairs = {key: (weight, dict(theirs.named_parameters())[key]) for key, weight in ours.named_parameters()}
    assert_same_gradients(output.loss, expected / 4, pairs, tolerance=1e-3 if loss == "gbce" else 1e-4)


def test_the_loss_is_whole_while_all_texts_can_be_read():
    from modeling_deepseek.recommendation_head import loss_name

    assert loss_name(preset("tiny_llm", num_items=513)) == "softmax"
    assert loss_name(preset("tiny_llm", num_items=514)) == "sampled_softmax"


@pytest.mark.parametrize("is_text", [True, False])
def test_candidates_are_scored_alone_and_learned_from(is_text):
    model = text_model() if is_text else tiny("tiny_llm", DeepSeekForRecommendation, pad_token_id=0)
    rows = torch.tensor([[3, 1, 6, 2], [5, 4, 0, 0]])
    candidates, clicks = torch.tensor([[7, 4, 1], [2, 6, 0]]), torch.tensor([1, 0])
    with torch.no_grad():
        every = model(rows).logits
        output = model(rows, candidates=candidates, labels=clicks)
        assert_close(output.logits[:, :2], every.gather(1, candidates)[:, :2])
        assert_close(output.logits[0], every[0, candidates[0]])
        assert output.logits[1, 2] == torch.finfo(torch.float32).min
        expected = [F.cross_entropy(every[0, [7, 4, 1]], clicks[0]), F.cross_entropy(every[1, [2, 6]], clicks[1])]
        assert_close(output.loss, sum(expected) / 2)
        learned = model.train()(rows, candidates=candidates, labels=clicks, num_items_in_batch=4)
    assert_close(learned.loss, output.loss / 2)
    assert_close(learned.logits, output.logits)


def test_an_empty_history_is_one_padding():
    model = text_model()
    with torch.no_grad():
        rows, mask = torch.tensor([[0, 0], [3, 1]]), torch.tensor([[1, 0], [1, 1]])
        logits = model(rows, attention_mask=mask).logits
        assert logits.isfinite().all()
        assert_close(logits[:1], model(torch.tensor([[0]]), attention_mask=torch.ones(1, 1)).logits)
        assert_close(logits[1:], model(torch.tensor([[3, 1]])).logits)


def test_the_cache_goes_on_with_a_history():
    model = text_model("tiny_v3")
    with torch.no_grad():
        whole = model(torch.tensor([[3, 1, 6]])).logits
        first = model(torch.tensor([[3, 1]]), use_cache=True)
        assert_close(model(torch.tensor([[6]]), cache=first.cache).logits, whole)


def test_new_items_are_learned_into_a_cycle():
    torch.manual_seed(0)
    fields = {"num_items": 1, "initializer_range": 0.1, "hidden_size": 16, "item_text_length": 2}
    model = DeepSeekForRecommendation(preset("tiny_llm", vocab_size=40, pad_token_id=0, **fields))
    model.add_items([[10 + n, 20 + n // 2] for n in range(10)])
    optimizer = torch.optim.Adam(model.train().parameters(), lr=0.01)
    rows = torch.stack([torch.arange(start, start + 8) % 10 + 1 for start in range(10)])
    for _ in range(40):
        optimizer.zero_grad()
        model(rows, labels=rows).loss.backward()
        optimizer.step()
    assert model.recommend([3, 4, 5], k=1)[0].tolist() == [6] and model.training
    model.add_items([[15, 22]])  # the words of item 6, so it goes where that goes
    assert model.recommend([3, 4, 5], k=2)[0].tolist() == [6, 11]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([[5], []], "the text of new item 1 has 0 tokens; it must have 1 to 6, which is config.item_text_length"),
        ([[5] * 7], "the text of new item 0 has 7 tokens"),
    ],
)
def test_texts_that_cant_be_read_are_refused(texts, message):
    model = text_model()
    with pytest.raises(ValueError, match=message):
        model.add_items(texts)
    assert model.config.num_items == 8 and len(model.item_texts.tokens) == 8


def test_items_without_text_take_no_new_ones():
    with pytest.raises(ValueError, match="are ids without text; make it with config.num_items"):
        tiny("tiny_llm", DeepSeekForRecommendation).add_items([[5]])


def test_an_empty_catalogue_recommends_nothing():
    model = tiny("tiny_llm", DeepSeekForRecommendation, num_items=1)
    with pytest.raises(ValueError, match="history 0 has the item number 1, but items are numbered 0 to 0"):
        model.recommend([1])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_items": 0}, "num_items=0 must be positive"),
        ({"num_items": 3, "item_text_length": 0}, "item_text_length=0 must be positive"),
        ({"num_items": 3, "tie_item_embeddings": False}, "num_items=3 clashes with tie_item_embeddings=False"),
        ({"num_items": 3, "pooling": "latent", "num_pooling_heads": 2}, "num_items=3 clashes with pooling='latent'"),
    ],
)
def test_bad_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        preset("tiny_llm", **fields)
