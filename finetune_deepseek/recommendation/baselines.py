"""Recommenders that need no training: popularity, first-order transitions, item-kNN. Printed beside every score.

Each is made of training histories (item numbers, 0 being the padding) and gives scores [B, V] for histories.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from scipy import sparse

from ..data.sources import Rows
from ..training.scoring.ranks import ranks

Histories = Sequence[Sequence[int]]
NEIGHBOURS = 100
BLOCK_CELLS = 20_000_000  # scores, or pairs of items of one history, that are held at once


def _matrix(rows: np.ndarray, columns: np.ndarray, shape: tuple[int, int]) -> sparse.csr_matrix:
    return sparse.csr_matrix((np.ones(len(rows), dtype=np.float32), (rows, columns)), shape=shape)


def _one_hot(histories: Histories, num_items: int) -> sparse.csr_matrix:
    """[B, V]: 1 where the history has the item."""
    rows = np.repeat(np.arange(len(histories)), [len(history) for history in histories])
    matrix = _matrix(
        rows, np.concatenate([np.asarray(h, dtype=np.int64) for h in histories]), (len(histories), num_items)
    )
    matrix.data[:] = 1
    matrix.sum_duplicates()
    matrix.data[:] = np.minimum(matrix.data, 1)
    return matrix


class Popularity:
    """How often the item is in the training histories."""

    def __init__(self, train: Histories, num_items: int) -> None:
        self.counts = np.bincount(np.concatenate([np.asarray(h, dtype=np.int64) for h in train]), minlength=num_items)

    def scores(self, histories: Histories) -> np.ndarray:
        return np.broadcast_to(self.counts.astype(np.float32), (len(histories), len(self.counts)))


class Transitions:
    """How often the item came right after the history's last one; what came equally often is ordered by popularity."""

    def __init__(self, train: Histories, num_items: int) -> None:
        before = np.concatenate([np.asarray(h[:-1], dtype=np.int64) for h in train])
        after = np.concatenate([np.asarray(h[1:], dtype=np.int64) for h in train])
        self.counts = _matrix(before, after, (num_items, num_items))
        popularity = Popularity(train, num_items).counts
        self.tie_break = (popularity / (popularity.max() + 1)).astype(np.float32)  # below one count

    def scores(self, histories: Histories) -> np.ndarray:
        return self.counts[[history[-1] for history in histories]].toarray() + self.tie_break


class ItemKNN:
    """The sum over the history of the cosine of co-occurrence, each item having its 100 nearest neighbours (Deshpande
    and Karypis, 2004)."""

    def __init__(self, train: Histories, num_items: int) -> None:
        seen = _one_hot(train, num_items)
        norms = np.sqrt(np.maximum(np.asarray(seen.sum(0)).ravel(), 1))
        scaled = (seen @ sparse.diags(1 / norms)).tocsc()
        blocks = []
        for start, end in self._blocks(seen):
            block = (scaled[:, start:end].T @ scaled).tocoo()
            others = block.col != block.row + start
            entries = (block.data[others], (block.row[others], block.col[others]))
            blocks.append(self._nearest(sparse.csr_matrix(entries, shape=block.shape)))
        self.similarity = sparse.vstack(blocks).tocsr().T.tocsr()  # of each neighbour to the items that have it

    @staticmethod
    def _blocks(seen: sparse.csr_matrix) -> list[tuple[int, int]]:
        """Runs of items that stand beside BLOCK_CELLS others in all. By the catalogue's square a million items would
        need 50,000 runs."""
        beside = np.cumsum(seen.T @ np.asarray(seen.sum(1)).ravel().astype(np.int64))
        edges = [0]
        while edges[-1] < seen.shape[1]:
            before = beside[edges[-1] - 1] if edges[-1] else 0
            edges.append(max(edges[-1] + 1, int(np.searchsorted(beside, before + BLOCK_CELLS, side="right"))))
        return list(zip(edges[:-1], edges[1:], strict=True))

    @staticmethod
    def _nearest(block: sparse.csr_matrix) -> sparse.csr_matrix:
        block.sort_indices()
        for row in np.flatnonzero(np.diff(block.indptr) > NEIGHBOURS):
            values = block.data[block.indptr[row] : block.indptr[row + 1]]
            values[np.argsort(-values, kind="stable")[NEIGHBOURS:]] = 0
        block.eliminate_zeros()
        return block

    def scores(self, histories: Histories) -> np.ndarray:
        return (_one_hot(histories, self.similarity.shape[0]) @ self.similarity).toarray()


BASELINES: dict[str, Any] = {"popularity": Popularity, "transitions": Transitions, "item_knn": ItemKNN}


def baselines_of(train: Rows | None, rows: list[dict[str, Any]], numbers: Mapping[str, int]) -> dict[str, np.ndarray]:
    """The ranks of the rows' targets by each baseline, which learns from training rows; none without such.

    Args:
        numbers: of the items, from 1.
    """
    if not isinstance(train, Dataset):
        return {}

    def numbered(histories: Iterable[list[str]]) -> list[list[int]]:
        return [[numbers[item] for item in history if item in numbers] for history in histories]

    histories = [history for history in numbered(train["source"]) if history]
    targets = [numbers.get(row["target"], 0) for row in rows]
    return baseline_ranks(histories, numbered(row["source"] for row in rows), targets, len(numbers))


def baseline_ranks(
    train: Histories, histories: Histories, targets: Sequence[int], num_items: int
) -> dict[str, np.ndarray]:
    """The targets' ranks by each baseline, counted like the model's."""
    size = max(1, BLOCK_CELLS // num_items)
    found = {}
    for name, baseline_class in BASELINES.items():
        baseline, parts = baseline_class(train, num_items), []
        for start in range(0, len(histories), size):
            block = histories[start : start + size]
            width = max(map(len, block))
            seen = torch.tensor([[*history, *[0] * (width - len(history))] for history in block])
            scores = torch.from_numpy(np.array(baseline.scores(block)))
            parts.append(ranks(scores, torch.tensor(targets[start : start + size]), seen, padding=0).numpy())
        found[name] = np.concatenate(parts)
    return found
