"""Ranks, scores, intervals and tests, against plain loops; the baselines against hand counts."""

import numpy as np
import pytest

from finetune_deepseek.recommendation.baselines import ItemKNN, Popularity, Transitions, baseline_ranks
from finetune_deepseek.recommendation.scores import (
    bootstrap_interval,
    comparison,
    paired_p_value,
    per_user,
    ranking_scores,
)

# item 1 is followed by 2 twice and by 3 once
TRAIN = [[1, 2, 3], [1, 2], [1, 3], [4, 1]]


def test_scores():
    scores = ranking_scores(np.array([1, 3, 11, 30]))
    assert scores["hr@5"] == scores["hr@10"] == 0.5 and scores["hr@20"] == 0.75
    assert scores["ndcg@10"] == pytest.approx((1 + 1 / 2) / 4)
    assert scores["ndcg@20"] == pytest.approx((1 + 1 / 2 + 1 / np.log2(12)) / 4)
    assert scores["mrr"] == pytest.approx((1 + 1 / 3 + 1 / 11 + 1 / 30) / 4)
    assert list(scores) == ["hr@5", "ndcg@5", "hr@10", "ndcg@10", "hr@20", "ndcg@20", "mrr"]


def test_the_interval_has_the_standard_errors_width():
    values = (np.arange(1000) < 70).astype(float)
    low, high = bootstrap_interval(values)
    error = np.sqrt(0.07 * 0.93 / 1000)
    assert low == pytest.approx(0.07 - 1.96 * error, abs=0.002) and high == pytest.approx(
        0.07 + 1.96 * error, abs=0.002
    )
    assert bootstrap_interval(np.ones(5)) == (1.0, 1.0)


def test_the_paired_test_tells_a_difference_from_chance():
    rng = np.random.default_rng(0)
    ours = (rng.random(400) < 0.5).astype(float)
    assert paired_p_value(ours, ours) == 1
    assert paired_p_value(ours, rng.permutation(ours)) > 0.05
    better = np.maximum(ours, rng.random(400) < 0.2)
    assert paired_p_value(better, ours) < 0.001
    # Four users better and none worse: 2 of 16 signs are as extreme.
    few = np.zeros(50)
    few[:4] = 1
    assert paired_p_value(few, np.zeros(50)) == pytest.approx(2 / 16, abs=0.02)


def test_comparison_names_and_signs():
    ours, theirs = np.array([1, 2, 50, 3]), np.array([40, 2, 50, 60])
    results = comparison(ours, {"popularity": theirs})
    assert results["popularity_hr@10"] == 0.25 and results["above_popularity_hr@10"] == 0.5
    assert results["above_popularity_hr@10_low"] <= 0.5 <= results["above_popularity_hr@10_high"]
    assert results["above_popularity_ndcg@10"] == pytest.approx(
        (per_user(ours)["ndcg@10"] - per_user(theirs)["ndcg@10"]).mean()
    )


def test_popularity_and_transitions_count():
    assert Popularity(TRAIN, 5).scores([[1]]).tolist() == [[0, 4, 2, 2, 1]]
    ties = np.array([0, 0.8, 0.4, 0.4, 0.2])  # popularity, below one count
    np.testing.assert_allclose(
        Transitions(TRAIN, 5).scores([[9, 1], [3], [4]]),
        [[0, 0, 2, 1, 0] + ties, ties, [0, 1, 0, 0, 0] + ties],
        rtol=1e-6,
    )


def test_item_knn_is_the_cosine_of_co_occurrence():
    seen = np.zeros((4, 5))
    for user, items in enumerate(TRAIN):
        seen[user, items] = 1
    norms = np.maximum(np.linalg.norm(seen, axis=0), 1)
    cosine = seen.T @ seen / np.outer(norms, norms)
    np.fill_diagonal(cosine, 0)
    np.testing.assert_allclose(ItemKNN(TRAIN, 5).scores([[2, 3], [4]]), [cosine[2] + cosine[3], cosine[4]], rtol=1e-6)


def test_item_knn_keeps_the_nearest_in_blocks(monkeypatch):
    import finetune_deepseek.recommendation.baselines as module

    rng = np.random.default_rng(0)
    train = [rng.choice(np.arange(1, 40), 8, replace=False).tolist() for _ in range(60)]
    monkeypatch.setattr(module, "NEIGHBOURS", 5)
    whole = ItemKNN(train, 40).similarity.toarray()
    monkeypatch.setattr(module, "BLOCK_CELLS", 40 * 7)
    np.testing.assert_allclose(ItemKNN(train, 40).similarity.toarray(), whole)
    assert (whole > 0).sum(0).max() == 5


def test_baselines_are_ranked_like_the_model(monkeypatch):
    ranks = baseline_ranks(TRAIN, [[1], [4, 1], [3]], [2, 4, 1], 5)
    # popularity of 1..4 is 4, 2, 2, 1: item 2 ties with 3; 4 is seen but the target, behind 2 and 3; 1 is first
    assert ranks["popularity"].tolist() == [2, 3, 1]
    assert ranks["transitions"].tolist() == [1, 3, 1]
    monkeypatch.setattr("finetune_deepseek.recommendation.baselines.BLOCK_CELLS", 5)
    assert {k: v.tolist() for k, v in baseline_ranks(TRAIN, [[1], [4, 1], [3]], [2, 4, 1], 5).items()} == {
        k: v.tolist() for k, v in ranks.items()
    }
