"""Item vectors to begin with: items that the same users had, or that the same words describe, point the same way.

Few users teach a recommender slowly which items go together, though counting tells it at once. The vectors are the
right singular ones of the users x items matrix, each row and column divided by the root of its sum, times the root of
the singular values (PureSVD, Cremonesi et al., 2010, with the norms of spectral co-clustering). Where items have
texts, the words x items matrix stands below it, so treated and of the same norm.
"""

from collections.abc import Sequence

import numpy as np
import torch
from scipy import sparse
from sklearn.decomposition import TruncatedSVD

SCALE = 3.0  # root mean square of the vectors, times that of the random ones; tried on LastFM's validation


def _balanced(rows: np.ndarray, columns: np.ndarray, shape: tuple[int, int]) -> sparse.csr_matrix:
    """How often each row has each column, divided by the roots of the sums of both."""
    counts = sparse.csr_matrix((np.ones(len(columns), dtype=np.float32), (rows, columns)), shape)
    norms = [np.maximum(np.asarray(counts.sum(axis)).ravel(), 1) ** -0.5 for axis in (1, 0)]
    return sparse.diags(norms[0]) @ counts @ sparse.diags(norms[1])


def item_svd(
    histories: Sequence[Sequence[int]], num_items: int, width: int, seed: int, texts: np.ndarray | None = None
) -> np.ndarray:
    """[V, width] in float32, of root mean square 1; zero for items without users and words, and beyond the rank.

    Args:
        histories: item numbers by user.
        num_items: V, with the padding.
        texts: tokens of each item [V, T], negative where there is none.
    """
    users = np.repeat(np.arange(len(histories)), [len(history) for history in histories])
    items = np.concatenate([np.asarray(history, dtype=np.int64) for history in histories])
    scaled = _balanced(users, items, (len(histories), num_items))
    if texts is not None and (is_word := texts >= 0).any():
        described = np.nonzero(is_word)[0]
        words = _balanced(texts[is_word], described, (int(texts.max()) + 1, num_items))
        scaled = sparse.vstack((scaled, words * (sparse.linalg.norm(scaled) / sparse.linalg.norm(words))))
    size = min(width, *(length - 1 for length in scaled.shape))
    if size < 1:
        return np.zeros((num_items, width), dtype=np.float32)
    factors = TruncatedSVD(size, random_state=seed).fit(scaled)
    vectors = np.zeros((num_items, width), dtype=np.float32)
    vectors[:, :size] = factors.components_.T * np.sqrt(factors.singular_values_)
    return vectors / max(float(np.sqrt((vectors**2).mean())), 1e-12)


@torch.no_grad()
def add_item_svd(
    weight: torch.Tensor,
    histories: Sequence[Sequence[int]],
    initializer_range: float,
    seed: int,
    texts: torch.Tensor | None = None,
) -> None:
    """Add the vectors to those of a new model [V, D], in place."""
    num_items, width = weight.shape
    vectors = torch.from_numpy(item_svd(histories, num_items, width, seed, None if texts is None else texts.numpy()))
    weight.add_((SCALE * initializer_range * vectors).to(weight))
