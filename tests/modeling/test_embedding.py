"""The embedding model: pooling and loss against slow plain ones, padding, what is saved, and what is refused."""

import pytest
import torch
from transformers import AutoModel

from configuration_deepseek import preset
from modeling_deepseek import DeepSeekForEmbedding, DeepSeekModel
from modeling_deepseek.contrastive import in_batch_loss, matryoshka_loss, truncated
from modeling_deepseek.pooling import POOLING_FUNCTIONS, LatentAttentionPooling
from tests.modeling.conftest import SEEING_AHEAD, tiny, token_ids
from tests.reference import contrastive as reference
from tests.reference.compare import assert_close, assert_same_gradients, twin

POOLINGS = ["mean", "last_token", "latent"]
LATENT = {"pooling": "latent", "num_pooling_latents": 5, "num_pooling_heads": 4}
PADDING = 2  # of the tiny presets


def fields(pooling):
    return LATENT if pooling == "latent" else {"pooling": pooling}


@pytest.fixture
def states():
    """States [B, S, D], and masks with padding on the right, on the left, and none."""
    torch.manual_seed(0)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1, 1], [1] * 7], dtype=torch.bool)
    return torch.randn(3, 7, 8), mask


@pytest.mark.parametrize("mode", ["mean", "last_token"])
def test_pooling_equals_the_plain_one(states, mode):
    hidden, mask = states
    ours, theirs = hidden.clone().requires_grad_(), twin(hidden)
    pooled = POOLING_FUNCTIONS[mode](ours, mask)
    assert_same_gradients(pooled, reference.pool(theirs, mask, mode), {"states": (ours, theirs)})


@pytest.mark.parametrize("heads", [1, 4])
def test_latent_attention_equals_the_plain_one(states, heads):
    hidden, mask = states
    module = LatentAttentionPooling(8, 5, heads, 1e-6)
    for weight in module.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    ours, theirs = hidden.clone().requires_grad_(), twin(hidden)
    weights = {key: twin(weight) for key, weight in module.named_parameters()}
    pairs = {"states": (ours, theirs)} | {key: (w, weights[key]) for key, w in module.named_parameters()}
    expected = reference.latent_attention(theirs, mask, weights, heads, 1e-6)
    assert_same_gradients(module(ours, mask), expected, pairs)


@pytest.mark.parametrize("sizes", [[8], [2, 5, 8], [3]], ids=str)
def test_the_loss_equals_the_plain_one(sizes):
    torch.manual_seed(1)
    queries, passages, targets = torch.randn(4, 8), torch.randn(7, 8), torch.tensor([2, 0, 1, 2])
    pairs = {name: (t.clone().requires_grad_(), twin(t)) for name, t in (("q", queries), ("p", passages))}
    ours, theirs = ([pair[side] for pair in pairs.values()] for side in (0, 1))
    loss = matryoshka_loss(*ours, targets, 0.3, sizes)
    assert_same_gradients(loss, reference.matryoshka(*theirs, targets, 0.3, sizes), pairs)
    whole = matryoshka_loss(queries, passages, targets, 0.3)
    assert_close(whole, in_batch_loss(truncated(queries, None), truncated(passages, None), targets, 0.3))


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("direction", ["causal", "bidirectional"])
def test_every_generation_gives_the_same_vectors_with_and_without_padding(name, pooling, direction):
    if name not in SEEING_AHEAD and direction != "causal":
        with pytest.raises(ValueError, match="attention_direction='bidirectional' clashes with compress_ratios"):
            tiny(name, DeepSeekForEmbedding, attention_direction=direction)
        return
    model = tiny(name, DeepSeekForEmbedding, attention_direction=direction, **fields(pooling))
    ids = token_ids(2, 6)
    with torch.no_grad():
        plain = model(ids).embeddings
        for side in (0, 1):
            pads = torch.full((2, 3), PADDING)
            padded = torch.cat((pads, ids) if side == 0 else (ids, pads), dim=1)
            assert_close(model(padded, attention_mask=(padded != PADDING).long()).embeddings, plain, tolerance=5e-5)
    torch.testing.assert_close(plain.norm(dim=-1), torch.ones(2))


def test_with_both_directions_the_first_token_sees_the_last():
    ids = token_ids(1, 6)
    changed = ids.clone()
    changed[0, -1] = 90
    for direction, sees in (("causal", False), ("bidirectional", True)):
        model = tiny("tiny_v3", DeepSeekForEmbedding, attention_direction=direction)
        with torch.no_grad():
            first, second = (model.model(x).last_hidden_state[:, 0] for x in (ids, changed))
        assert torch.equal(first, second) is not sees


def test_the_last_token_may_be_the_padding_token():
    """Texts end with the end-of-text token, which many tokenizers pad with too: the mask tells them apart."""
    model = tiny("tiny_llm", DeepSeekForEmbedding, pooling="last_token")
    ids = torch.tensor([[5, 6, PADDING]])
    padded, mask = torch.tensor([[5, 6, PADDING, PADDING]]), torch.tensor([[1, 1, 1, 0]])
    with torch.no_grad():
        alone = model(ids).embeddings
        assert_close(model(padded, attention_mask=mask).embeddings, alone)
        assert not torch.allclose(model(torch.tensor([[5, 6]])).embeddings, alone)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_gradients_reach_every_weight_and_everything_comes_back(name, pooling, tmp_path):
    settings = {"matryoshka_sizes": [8, 32], "query_prefix": "query: ", "passage_prefix": "passage: "}
    model = tiny(name, DeepSeekForEmbedding, **fields(pooling), **settings).train()
    loss = model(token_ids(4, 31), passage_input_ids=token_ids(5, 30, seed=1), labels=torch.arange(4)).loss
    loss.backward()
    untouched = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert untouched == [key for key, _ in model.named_parameters() if ".indexer." in key]
    model.eval().save_pretrained(tmp_path)
    again, info = DeepSeekForEmbedding.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert {field: getattr(again.config, field) for field in settings} == settings
    ids = token_ids(2, 7)
    with torch.no_grad():
        assert torch.equal(again(ids).embeddings, model(ids).embeddings)


def test_new_latents_are_drawn_like_the_other_weights(tmp_path):
    tiny("tiny_v3").save_pretrained(tmp_path)
    model, info = DeepSeekForEmbedding.from_pretrained(tmp_path, output_loading_info=True, **LATENT)
    assert info["missing_keys"] and all(key.startswith("pooling.") for key in info["missing_keys"])
    assert 0.1 < model.pooling.latents.weight.std() < 0.3 and (model.pooling.latent_norm.weight == 1).all()


def test_hard_negatives_and_shared_passages_take_part_in_the_loss():
    model = tiny("tiny_llm", DeepSeekForEmbedding)
    queries, passages = token_ids(3, 5), token_ids(4, 6, seed=1)
    labels = torch.tensor([1, 0, 1])
    with torch.no_grad():
        result = model(queries, passage_input_ids=passages, labels=labels)
        scores = model(queries).embeddings @ model(passages).embeddings.T / model.config.contrastive_temperature
    assert_close(result.passage_embeddings, model(passages).embeddings)
    assert_close(result.loss, torch.nn.functional.cross_entropy(scores, labels))


def test_another_right_passage_of_a_query_is_no_negative():
    """By hand: rows 0 and 2 ask the same, with padding on other sides, and are answered by passages 0 and 2."""
    model = tiny("tiny_llm", DeepSeekForEmbedding)
    queries = torch.tensor([[7, 8, 9, 9], [5, 6, 7, 8], [7, 8, 30, 30]])
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0]])
    passages, labels = token_ids(4, 6, seed=1), torch.tensor([0, 1, 2])
    given = {"attention_mask": mask, "passage_input_ids": passages, "labels": labels}
    with torch.no_grad():
        found = model(queries, **given).loss
        scores = model(queries, mask).embeddings @ model(passages).embeddings.T / model.config.contrastive_temperature
        log = torch.nn.functional.log_softmax
        rows = [log(scores[0, [0, 1, 3]], -1)[0], log(scores[1], -1)[1], log(scores[2, [1, 2, 3]], -1)[1]]
        assert_close(found, -torch.stack(rows).mean())
        right = torch.tensor([[1, 0, 1, 1], [0, 1, 0, 0], [0, 0, 1, 0]]).bool()
        rows = [log(scores[0, :2], -1)[0], log(scores[1], -1)[1], log(scores[2], -1)[2]]
        assert_close(model(queries, **given, right_passages=right).loss, -torch.stack(rows).mean())


def test_training_brings_queries_to_their_passages():
    torch.manual_seed(0)
    model = DeepSeekForEmbedding(preset("tiny_v3", initializer_range=0.1, matryoshka_sizes=[8, 32])).train()
    queries, passages = token_ids(12, 5), token_ids(12, 9, seed=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.005)
    for _ in range(40):
        optimizer.zero_grad()
        model(queries, passage_input_ids=passages, labels=torch.arange(12)).loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        ours, theirs = model(queries).embeddings, model(passages).embeddings
    for size in (8, 32):
        best = (truncated(ours, size) @ truncated(theirs, size).T).argmax(1)
        assert best.tolist() == list(range(12))


def test_the_trunk_of_an_embedding_model_says_what_it_lacks(tmp_path):
    tiny("tiny_llm", DeepSeekForEmbedding).save_pretrained(tmp_path)
    for load in (AutoModel.from_pretrained, DeepSeekModel.from_pretrained):
        with pytest.warns(UserWarning, match="holds a DeepSeekForEmbedding, .* use DeepSeekForEmb") as caught:
            load(tmp_path)
        assert all("\n" not in str(w.message) for w in caught)


def test_what_cant_be_embedded_is_one_line():
    model, ids = tiny("tiny_llm", DeepSeekForEmbedding), token_ids(1, 4)
    for wrong in ({"use_cache": True}, {"cache": model.model(ids, use_cache=True).cache}):
        with pytest.raises(ValueError, match="leave use_cache and cache out"):
            model(ids, **wrong)
    with pytest.raises(ValueError, match="there are no passage_input_ids"):
        model(ids, labels=torch.tensor([0]))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"pooling": "men"}, "pooling has the unknown word 'men'; did you mean 'mean'"),
        ({"contrastive_temperature": 0.0}, "contrastive_temperature=0.0 must be positive"),
        ({"matryoshka_sizes": [8, 33]}, "matryoshka_sizes has 33, which must be between 1 and hidden_size=32"),
        (LATENT | {"num_pooling_heads": 5}, "num_pooling_heads=5 must divide hidden_size=32"),
        (LATENT | {"num_pooling_latents": 0}, "num_pooling_latents=0 must be positive"),
    ],
)
def test_bad_fields_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        preset("tiny_llm", **wrong)
