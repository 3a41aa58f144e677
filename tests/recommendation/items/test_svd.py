"""Item vectors by SVD: who goes together, what is left at zero, and where they are put."""

import numpy as np
import pytest
import torch

from finetune_deepseek.recommendation.items.svd import add_item_svd, item_svd

GROUPS = ([1, 2, 3, 4], [5, 6, 7, 8])
HISTORIES = [[item for item in group if item != left_out] for group in GROUPS for left_out in group]


def test_items_of_the_same_users_point_the_same_way():
    vectors = item_svd(HISTORIES, 10, 2, seed=0)
    unit = vectors[1:9] / np.linalg.norm(vectors[1:9], axis=1, keepdims=True)
    likeness = unit @ unit.T
    assert likeness[:4, :4].min() > 0.99 and likeness[4:, 4:].min() > 0.99 and abs(likeness[:4, 4:]).max() < 0.01
    assert abs(vectors[[0, 9]]).max() < 1e-6
    assert np.sqrt((vectors**2).mean()) == pytest.approx(1, abs=1e-5)


def test_singular_vectors_are_those_of_the_dense_matrix():
    counts = np.zeros((8, 10))
    for user, history in enumerate(HISTORIES):
        counts[user, history] = 1
    scaled = counts / np.sqrt(np.maximum(counts.sum(1, keepdims=True), 1)) / np.sqrt(np.maximum(counts.sum(0), 1))
    values, right = np.linalg.svd(scaled)[1:]
    expected = (right[:2].T * values[:2]) @ right[:2]  # a sign or a turn of the vectors leaves it as it is
    vectors = item_svd(HISTORIES, 10, 2, seed=0)
    found = vectors @ vectors.T
    np.testing.assert_allclose(found / found.max(), expected / expected.max(), atol=1e-5)


@pytest.mark.parametrize("histories", [[[1, 2]], [[1, 2], [2, 3]]])
def test_what_has_no_rank_stays_zero(histories):
    vectors = item_svd(histories, 4, 16, seed=0)
    assert vectors.shape == (4, 16) and not vectors[:, len(histories) - 1 :].any()


def test_they_are_added_to_the_random_ones():
    weight = torch.full((10, 4), 0.5, dtype=torch.bfloat16)
    add_item_svd(weight, HISTORIES, initializer_range=0.02, seed=0)
    assert weight[9].eq(0.5).all() and weight[1].ne(0.5).any() and (weight - 0.5).abs().max() < 0.5


def test_words_bring_together_items_without_users():
    """Items 9 and 10, which nobody had, stand by those that the same words describe; item 11 has neither."""
    texts = np.full((12, 3), -1, dtype=np.int32)
    texts[1:5, 0], texts[5:9, 0] = 0, 1
    texts[9, :2], texts[10, :2] = (0, 0), (1, 1)
    vectors = item_svd(HISTORIES, 12, 2, seed=0, texts=texts)
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    likeness = unit @ unit.T
    assert likeness[9, 1:5].min() > 0.99 and likeness[10, 5:9].min() > 0.99 and abs(likeness[9, 10]) < 0.01
    assert abs(vectors[[0, 11]]).max() < 1e-6


def test_users_and_words_count_alike():
    counts, texts = np.zeros((8, 10)), np.full((10, 2), -1, dtype=np.int32)
    for user, history in enumerate(HISTORIES):
        counts[user, history] = 1
    texts[1:9] = [[0, 1], [0, 0], [1, 2], [2, -1], [3, 0], [3, 3], [1, 3], [2, 2]]
    words = np.zeros((4, 10))
    for item, tokens in enumerate(texts):
        for token in tokens[tokens >= 0]:
            words[token, item] += 1
    parts = [m / np.sqrt(np.maximum(m.sum(1, keepdims=True), 1)) / np.sqrt(np.maximum(m.sum(0), 1))
             for m in (counts, words)]  # fmt: skip
    values, right = np.linalg.svd(np.vstack([part / np.linalg.norm(part) for part in parts]))[1:]
    expected = (right[:4].T * values[:4]) @ right[:4]
    vectors = item_svd(HISTORIES, 10, 4, seed=0, texts=texts)
    found = vectors @ vectors.T
    np.testing.assert_allclose(found / found.max(), expected / expected.max(), atol=1e-5)
