"""What is counted of items beside what is learned: against plain loops, in the scores, saved, where it can't be."""

import math

import pytest
import torch

from configuration_deepseek import preset
from modeling_deepseek import DeepSeekForRecommendation
from modeling_deepseek.item_counts import NO_ITEM
from tests.reference.compare import assert_close

ITEMS, KEPT = 9, 3
HISTORIES = torch.tensor([[3, 1, 4, 0, 0], [2, 6, 5, 8, 7], [8, 0, 0, 0, 0]])


def counting_model(**fields):
    torch.manual_seed(0)
    settings = {"vocab_size": ITEMS, "pad_token_id": 0, "num_item_neighbors": KEPT, "item_neighbor_window": 2}
    model = DeepSeekForRecommendation(preset("tiny_llm", **settings | fields)).eval()
    draw = torch.Generator().manual_seed(1)
    tables = []
    for _ in range(2):
        entries = torch.stack([1 + torch.randperm(ITEMS - 1, generator=draw)[:KEPT] for _ in range(ITEMS)])
        values = torch.rand(ITEMS, KEPT, generator=draw) + 0.1
        entries[5, 1:], values[5, 1:] = NO_ITEM, 0
        tables += [entries, values]
    model.item_counts.fill(*tables)
    return model, tables


def plain(history, tables, window):
    """Scores by neighbours and by transitions of one history, a number at a time."""
    neighbors, similarities, followers, transitions = (table.tolist() for table in tables)
    near, after = [0.0] * ITEMS, [0.0] * ITEMS
    for item in range(ITEMS):
        for other, value in zip(neighbors[item], similarities[item], strict=True):
            near[item] += value * (other in history[-window:])
    for item, value in zip(followers[history[-1]], transitions[history[-1]], strict=True):
        if item != NO_ITEM:
            after[item] += value
    most = max(near)
    return [value / most if most else 0.0 for value in near], after


@pytest.mark.parametrize("window", [1, 2, 50])
@pytest.mark.parametrize("side", ["right", "left"])
def test_counts_are_those_of_a_plain_loop(window, side):
    model, tables = counting_model(item_neighbor_window=window)
    rows = [[item for item in row if item] for row in HISTORIES.tolist()]
    given = HISTORIES if side == "right" else torch.tensor([[0] * (5 - len(row)) + row for row in rows])
    near, after = model.item_counts.scores(given)
    for number, row in enumerate(rows):
        expected = plain(row, tables, window)
        assert near[number].tolist() == pytest.approx(expected[0]), row
        assert after[number].tolist() == pytest.approx(expected[1]), row


def test_scores_are_the_models_and_the_counts():
    model, _ = counting_model()
    with torch.no_grad():
        bare = model(HISTORIES).logits
        model.config.item_neighbor_weight, model.config.item_transition_weight = 2.0, 0.5
        near, after = model.item_counts.scores(HISTORIES)
        expected = bare + 2 * near + 0.5 * after
        found = model(HISTORIES).logits
        assert_close(found[:, 1:], expected[:, 1:])
        assert (found[:, 0] == torch.finfo(found.dtype).min).all()
        candidates = torch.tensor([[4, 7, 0], [1, 2, 3], [5, 6, 8]])
        among = model(HISTORIES, candidates=candidates).logits
        known = candidates != 0
        assert_close(among[known], expected.gather(1, candidates)[known])
        embeddings = model.read_items(HISTORIES)
        assert_close(model(inputs_embeds=embeddings, attention_mask=HISTORIES.ne(0).long()).logits, bare)
        best, scores = model.recommend([3, 1, 4], k=2)
    left = found[0].clone()
    left[[3, 1, 4]] = -math.inf
    assert best.tolist() == left.topk(2).indices.tolist()
    assert_close(scores, left.topk(2).values)


def test_items_that_the_mask_hides_are_not_counted():
    model, _ = counting_model(item_neighbor_weight=2.0, item_transition_weight=0.5)
    row = torch.tensor([[5, 3, 1, 4]])
    with torch.no_grad():
        expected = model(row[:, 1:3], position_ids=torch.tensor([[1, 2]])).logits
        found = model(row, attention_mask=torch.tensor([[0, 1, 1, 0]])).logits
    assert_close(found[:, 1:], expected[:, 1:])


def test_the_loss_is_the_models_alone():
    model, _ = counting_model(item_neighbor_weight=3.0)
    bare = DeepSeekForRecommendation(preset("tiny_llm", vocab_size=ITEMS, pad_token_id=0)).eval()
    missing = bare.load_state_dict(model.state_dict(), strict=False)
    assert not missing.missing_keys
    labels = HISTORIES.masked_fill(HISTORIES == 0, -100)
    for mode in (True, False):
        losses = [each.train(mode)(HISTORIES, labels=labels).loss for each in (model, bare)]
        assert_close(*losses)
    losses[0].backward()
    assert all(not table.requires_grad for table in model.item_counts.buffers())


def test_tables_and_weights_are_saved(tmp_path):
    model, _ = counting_model(item_neighbor_weight=1.5, item_transition_weight=0.25)
    model.save_pretrained(tmp_path)
    again = DeepSeekForRecommendation.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert_close(again(HISTORIES).logits, model(HISTORIES).logits)
    fresh = DeepSeekForRecommendation.from_pretrained(tmp_path, num_item_neighbors=0)
    assert not hasattr(fresh, "item_counts")
    fresh.save_pretrained(tmp_path / "bare")
    empty = DeepSeekForRecommendation.from_pretrained(tmp_path / "bare", num_item_neighbors=2)
    assert empty.item_counts.neighbors.eq(NO_ITEM).all() and not empty.item_counts.similarities.any()


def test_new_items_of_text_have_no_counts():
    torch.manual_seed(0)
    config = preset("tiny_llm", vocab_size=20, num_items=1, item_text_length=3, num_item_neighbors=2,
                    item_neighbor_weight=1.0)  # fmt: skip
    model = DeepSeekForRecommendation(config).eval()
    model.add_items([[1], [2, 3], [4]])
    assert model.item_counts.neighbors.shape == (4, 2)
    assert len(model.recommend([1, 2], k=3)[0]) == 3


def test_what_counts_cant_do_is_refused():
    model, _ = counting_model()
    with pytest.raises(ValueError, match="searched exactly; leave out the search"):
        model.recommend([1], search=lambda *_: None)
    cache = model(HISTORIES, use_cache=True).cache
    with pytest.raises(ValueError, match="can't go on from a cache; give whole histories"):
        model(HISTORIES[:, :1], cache=cache)
    for field, value in (("num_item_neighbors", -1), ("item_neighbor_window", 0), ("item_transition_weight", -0.5)):
        with pytest.raises(ValueError, match=f"{field}={value} must"):
            preset("tiny_llm", **{field: value})
