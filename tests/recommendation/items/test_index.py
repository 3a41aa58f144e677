"""Search by faiss against exact search."""

import importlib

import numpy as np
import pytest
import torch

from finetune_deepseek.recommendation.baselines import ItemKNN
from finetune_deepseek.recommendation.items import index as item_index
from finetune_deepseek.recommendation.items.catalogue import item_tokenizer
from finetune_deepseek.recommendation.items.index import ItemIndex
from finetune_deepseek.recommendation.recommender import Recommender
from finetune_deepseek.recommendation.sasrec import SASRecConfig, SASRecForRecommendation
from modeling_deepseek import DeepSeekConfig, DeepSeekForRecommendation
from modeling_deepseek.item_ranking import top_k

SHAPE = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
ITEMS = 300


@pytest.fixture(scope="module")
def tables():
    torch.manual_seed(0)
    return torch.randn(7, 16), torch.randn(ITEMS, 16), torch.randint(ITEMS, (7, 90))


def recommender(index="exact", **fields):
    torch.manual_seed(0)
    model = DeepSeekForRecommendation(DeepSeekConfig(**SHAPE, vocab_size=61, pad_token_id=0, **fields))
    return Recommender(model, item_tokenizer({f"item {number}" for number in range(60)}, 0), index=index)


@pytest.mark.parametrize("k", [1, 10, 400])
@pytest.mark.parametrize("index", [ItemIndex(), ItemIndex(exact_items=10, probed=1.0)], ids=["flat", "all lists"])
def test_faiss_finds_what_exact_search_finds(tables, index, k):
    states, table, seen = tables
    for excluded in (None, seen):
        items, scores = top_k(states @ table.T, k, 0, excluded)
        found, values = index(states, table, k, 0, excluded)
        torch.testing.assert_close(values, scores)
        assert torch.equal(found, items)


def test_few_lists_give_true_scores_and_enough_items(tables):
    states, table, seen = tables
    index = ItemIndex(exact_items=10, probed=0.01)  # one list of 17 at first
    items, scores = index(states, table, 20, 0, seen)
    torch.testing.assert_close(scores, (states @ table.T).gather(1, items))
    assert items.all() and (scores.diff() <= 0).all()
    for row, left_out in zip(items.tolist(), seen.tolist(), strict=True):
        assert len(set(row)) == 20 and not set(row) & set(left_out)


def test_of_equal_items_any_is_found_once():
    table = torch.ones(12, 4)
    items, scores = ItemIndex()(torch.ones(1, 4), table, 8, 0, torch.tensor([[3, 5, 0]]))
    assert scores.tolist() == [[4.0] * 8] and len(set(items[0].tolist()) - {0, 3, 5}) == 8


def test_fewer_than_k_left_are_filled_up_and_none_is_one_line():
    table = torch.eye(4)
    items, scores = ItemIndex()(torch.ones(1, 4), table, 3, 0, torch.tensor([[1, 2]]))
    assert items.tolist() == [[3, 0, 0]] and scores.tolist() == [[1.0, -torch.inf, -torch.inf]]
    with pytest.raises(ValueError, match="nothing is left to recommend for row 0"):
        ItemIndex()(torch.ones(1, 4), table, 3, 0, torch.tensor([[1, 2, 3]]))
    with pytest.raises(ValueError, match="k=0 must be 1 or more"):
        ItemIndex()(torch.ones(1, 4), table, 0, 0)


def test_the_index_follows_the_vectors(tables):
    states, table, _ = tables
    table, index = table.clone(), ItemIndex()
    index.follow(table)
    made = index.index
    index.follow(table.clone())  # as of an adapter: another tensor, the same numbers
    assert index.index is made
    table[5] = 100 * states[0]
    assert index(states, table, 1, 0)[0][0].item() == 5
    more = torch.cat((table, 200 * states[:1]))
    assert index(states, more, 1, 0)[0][0].item() == ITEMS


@pytest.mark.parametrize("allowed", [None, ["item 4", "item 9", "item 30"]])
def test_a_recommender_by_faiss_gives_what_the_exact_one_gives(allowed):
    histories = [["item 1", "item 2"], ["item 3"], [f"item {number}" for number in range(5, 30)]]
    for asked in (histories, histories[0]):
        exact = recommender().recommend(asked, 5, filter=allowed)
        found = recommender("faiss").recommend(asked, 5, filter=allowed)
        rows = [(exact, found)] if isinstance(exact[0], tuple) else list(zip(exact, found, strict=True))
        for ours, theirs in rows:
            assert [item for item, _ in ours] == [item for item, _ in theirs]
            np.testing.assert_allclose([s for _, s in ours], [s for _, s in theirs], rtol=1e-5, atol=1e-6)


def test_an_index_of_texts_is_made_anew_with_new_items():
    torch.manual_seed(0)
    config = DeepSeekConfig(**SHAPE, vocab_size=30, pad_token_id=0, num_items=1, item_text_length=4)
    model = DeepSeekForRecommendation(config).eval()
    model.add_items([[number, number + 1] for number in range(1, 9)])
    index = ItemIndex()
    model.recommend([1], 3, search=index)
    model.add_items([[20, 21], [22]])
    items, scores = model.recommend([1, 2], 20, search=index)
    exact = model.recommend([1, 2], 20)
    assert torch.equal(items, exact[0]) and len(items) == 10
    torch.testing.assert_close(scores, exact[1])


def test_without_faiss_one_line_says_what_to_install(monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(item_index.importlib, "import_module", missing)
    with pytest.raises(ValueError, match=r'faiss is not installed: pip install "deepseek-hf\[faiss\]"'):
        recommender("faiss")
    monkeypatch.undo()
    assert importlib.import_module("faiss")


def test_what_has_no_index_is_one_line():
    with pytest.raises(ValueError, match="index='annoy': it is exact or faiss"):
        recommender("annoy")
    with pytest.raises(ValueError, match="SASRecForRecommendation has no item vectors"):
        Recommender(SASRecForRecommendation(SASRecConfig(vocab_size=3)), item_tokenizer({"a", "b"}, 0), index="faiss")


def test_of_equally_near_items_the_first_are_kept():
    """Not whichever a version of numpy happens to leave in front."""
    similarity = ItemKNN([list(range(1, 301))], 301).similarity.toarray()  # [neighbour, item]: all are as near
    for item in (1, 150, 300):
        expected = [other for other in range(1, 301) if other != item][:100]
        assert np.flatnonzero(similarity[:, item]).tolist() == expected


def test_item_knn_in_small_blocks_equals_one_block(monkeypatch):
    rng = np.random.default_rng(0)
    histories = [rng.choice(np.arange(1, 40), size=rng.integers(1, 9), replace=False).tolist() for _ in range(50)]
    whole = ItemKNN(histories, 40).similarity.toarray()
    monkeypatch.setattr("finetune_deepseek.recommendation.baselines.BLOCK_CELLS", 30)
    np.testing.assert_allclose(ItemKNN(histories, 40).similarity.toarray(), whole, rtol=1e-6)
    assert not whole.diagonal().any() and whole.any()


def test_features_of_users_and_contexts_are_read_for_faiss_too():
    fields = {"user_features": {"gender": ["F", "M"]}, "context_features": {"day": ["Mo", "Tu"]}}
    history = ["item 3", "item 5", "item 8"]
    given = {"user_features": {"gender": "M"}, "context_features": {"day": "Tu"}}
    exact = recommender(**fields).recommend(history, k=5, **given)
    found = recommender("faiss", **fields).recommend(history, k=5, **given)
    assert [item for item, _ in found] == [item for item, _ in exact]
    assert exact != recommender(**fields).recommend(history, k=5)
    np.testing.assert_allclose([score for _, score in found], [score for _, score in exact], rtol=1e-4)
