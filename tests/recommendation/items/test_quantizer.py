"""Residual k-means and the digit that tells twins apart."""

import warnings

import numpy as np
import pytest

from finetune_deepseek.recommendation.items import quantizer as residual_quantizer
from finetune_deepseek.recommendation.items.quantizer import distinct_codes, residual_codes


def test_each_digit_names_the_nearest_centre_of_what_is_left():
    """Against plain loops, with the centres as the means of what each code's vectors leave over."""
    vectors = np.random.default_rng(0).normal(size=(60, 5)).astype(np.float32)
    codes, left_over = residual_codes(vectors, num_levels=3, codebook_size=7, seed=1)
    residual = vectors - vectors.mean(0)
    variance = (residual**2).sum()
    for level in range(3):
        assert sorted(set(codes[:, level])) == list(range(7))
        centres = np.stack([residual[codes[:, level] == digit].mean(0) for digit in range(7)])
        for row, digit in zip(residual, codes[:, level], strict=True):
            assert digit == np.argmin([((row - centre) ** 2).sum() for centre in centres])
        residual = residual - centres[codes[:, level]]
        assert left_over[level] == pytest.approx((residual**2).sum() / variance, rel=1e-4)
    assert 1 > left_over[0] > left_over[1] > left_over[2]
    assert (residual_codes(vectors, 3, 7, seed=1)[0] == codes).all()


def test_fewer_different_vectors_than_centres():
    vectors = np.array([[0.0, 1], [0, 1], [1, 0], [2, 2]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        codes, left_over = residual_codes(vectors, num_levels=2, codebook_size=50, seed=0)
    assert codes[0].tolist() == codes[1].tolist() and len(np.unique(codes, axis=0)) == 3
    assert left_over[0] == pytest.approx(0, abs=1e-6)


def test_many_vectors_go_by_batches(monkeypatch):
    monkeypatch.setattr(residual_quantizer, "LARGE", 50)
    vectors = np.random.default_rng(0).normal(size=(50, 3))
    assert residual_codes(vectors, 2, 4, seed=0)[1][1] < 0.8


@pytest.mark.parametrize("vectors", [np.array([[1.0, float("nan")]]), np.zeros(3)])
def test_what_is_no_matrix_is_refused(vectors):
    with pytest.raises(ValueError, match="matrix of finite numbers"):
        residual_codes(vectors, 2, 4, seed=0)


def test_collisions_get_one_more_digit_and_are_counted():
    codes = np.array([[1, 2], [0, 0], [1, 2], [3, 1], [1, 2], [0, 0]])
    distinct, collisions = distinct_codes(codes)
    assert distinct.tolist() == [[1, 2, 0], [0, 0, 0], [1, 2, 1], [3, 1, 0], [1, 2, 2], [0, 0, 1]]
    assert collisions == 5
    same, none = distinct_codes(codes[1:4])
    assert none == 0 and same is codes[1:4] or (same == codes[1:4]).all()
