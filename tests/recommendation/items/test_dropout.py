"""Item dropout: what is left, and what belongs to it."""

from random import Random

import pytest
import torch

from finetune_deepseek.recommendation.arguments import RecommendationArguments
from finetune_deepseek.recommendation.items.dropout import item_dropout
from finetune_deepseek.recommendation.task import RecommendationCollator

FEATURE = {"input_ids": list(range(1, 41)), "length": 39}


def test_items_keep_their_order_and_their_share():
    draw = Random(0)
    kept = [item_dropout(FEATURE, 0.8, draw)["input_ids"] for _ in range(400)]
    assert all(row == sorted(set(row)) and len(row) >= 2 for row in kept)
    assert abs(sum(map(len, kept)) / 400 - 0.6 * 40) < 1.5  # the mean rate is half of the highest
    assert min(map(len, kept)) < 15 and max(map(len, kept)) == 40


def test_contexts_are_those_of_the_item_that_follows():
    feature, draw = FEATURE | {"context_features": [[10 * item] for item in [*range(2, 41), 0]]}, Random(0)
    for _ in range(20):
        changed = item_dropout(feature, 0.9, draw)
        assert changed["context_features"] == [[10 * item] for item in [*changed["input_ids"][1:], 0]]


def test_a_pair_is_never_torn():
    assert all(item_dropout({"input_ids": [4, 9]}, 0.99, Random(n))["input_ids"] == [4, 9] for n in range(20))


def test_each_epoch_leaves_out_others_whoever_reads_the_row():
    rows = [FEATURE | {"number": number} for number in range(6)]
    collate, other = RecommendationCollator(0, 0.9, seed=3), RecommendationCollator(0, 0.9, seed=3)
    first, again = collate(rows)["input_ids"], other(rows[3:])["input_ids"]
    assert first[3:].ne(0).sum() == again.ne(0).sum() and torch.equal(first[3:, : again.shape[1]], again)
    collate.set_epoch(1)
    assert collate(rows)["input_ids"].tolist() != first.tolist()


def test_evaluation_sees_whole_histories():
    feature = FEATURE | {"seen": [1], "target": 7}
    batch = RecommendationCollator(0, 0.9)([feature])
    assert batch["input_ids"].tolist() == [FEATURE["input_ids"]]


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_a_rate_is_below_one(rate):
    with pytest.raises(ValueError, match="--item_dropout"):
        RecommendationArguments(interactions_file="x.csv", item_dropout=rate)
