"""Tables of what training histories say by counting, for `DeepSeekItemCounts`, and how much they should weigh."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy import sparse

from modeling_deepseek.item_counts import NO_ITEM

from .baselines import ItemKNN, Transitions
from .scores import ranking_scores

KEPT = 100  # entries of an item
# Tried on validation for item-kNN, whose best score is 1, and for the logarithm of transitions.
WEIGHTS = [(near, after) for near in (0.0, 0.5, 1.0, 2.0, 4.0) for after in (0.0, 0.25, 0.5, 1.0, 2.0)]


def largest(matrix: sparse.csr_matrix, kept: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns and values [V, kept] of the largest entries of each row, `NO_ITEM` and 0 where there are fewer."""
    columns = np.full((matrix.shape[0], kept), NO_ITEM, dtype=np.int32)
    values = np.zeros((matrix.shape[0], kept), dtype=np.float32)
    for row in np.flatnonzero(np.diff(matrix.indptr)):
        place = slice(matrix.indptr[row], matrix.indptr[row + 1])
        order = np.argsort(-matrix.data[place], kind="stable")[:kept]
        columns[row, : len(order)] = matrix.indices[place][order]
        values[row, : len(order)] = matrix.data[place][order]
    return torch.from_numpy(columns), torch.from_numpy(values)


def count_items(histories: Sequence[Sequence[int]], num_items: int, kept: int) -> tuple[torch.Tensor, ...]:
    """The arguments of `DeepSeekItemCounts.fill`, from item numbers by user."""
    near = ItemKNN(histories, num_items).similarity.T.tocsr()  # of each item to its nearest
    after = Transitions(histories, num_items).counts.tocsr()
    after.sum_duplicates()
    after.data = np.log1p(after.data)
    return *largest(near, kept), *largest(after, kept)


def best_count_weights(ranks: np.ndarray) -> tuple[tuple[float, float], dict[str, Any]]:
    """The `WEIGHTS` with the best HR@10 of validation, of equal ones those with the best NDCG@10, and these scores.

    Args:
        ranks: [users, weights].
    """
    scores = [ranking_scores(column) for column in ranks.T]
    best = max(range(len(WEIGHTS)), key=lambda n: (scores[n]["hr@10"], scores[n]["ndcg@10"]))
    return WEIGHTS[best], scores[best]
