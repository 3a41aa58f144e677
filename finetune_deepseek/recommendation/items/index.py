"""The best items by faiss: exactly as `top_k` for small catalogues, approximately for large ones (`ItemIndex`).

Letters: B users, S items to leave out, V items with the padding, D width, K items found.
"""

import importlib
import math
from typing import Any

import numpy as np
import torch

# Below, a scan of all vectors takes a few milliseconds, and nothing is lost.
EXACT_ITEMS = 50_000
PROBED = 1 / 8  # share of the lists that are read at first
SAMPLE_PER_LIST = 64  # vectors from which a list's centre is learned


def load_faiss() -> Any:
    """The module.

    Raises:
        ValueError: with what to install, if it isn't there.
    """
    try:
        return importlib.import_module("faiss")
    except ImportError as error:
        raise ValueError('faiss is not installed: pip install "deepseek-hf[faiss]"') from error


def _version(table: torch.Tensor) -> int:
    """How often the tensor was written to, as far as that is counted."""
    return 0 if table.is_inference() else table._version


class ItemIndex:
    """An index of item vectors by inner product, for `DeepSeekForRecommendation.recommend(search=...)`.

    Up to `exact_items` all vectors are compared (IndexFlatIP). Larger catalogues are divided into about sqrt(V) lists
    by k-means, of which the nearest are read (IndexIVFFlat; Jégou et al., 2011, section IV): what is found has its
    true score, but a good item in a list that wasn't read is missed. The index is made at the first search, and again
    when the vectors have changed; call `forget` after writing to weights through `.data`, which can't be seen.

    Raises:
        ValueError: if faiss isn't installed.
    """

    def __init__(self, exact_items: int = EXACT_ITEMS, probed: float = PROBED) -> None:
        self.faiss = load_faiss()
        self.exact_items, self.probed = exact_items, probed
        self.index: Any = None
        self._table: torch.Tensor | None = None
        self._version = 0

    def forget(self) -> None:
        """Have the index made anew at the next search."""
        self.index = self._table = None

    def follow(self, table: torch.Tensor) -> None:
        """Make the index of these vectors [V, D], if it isn't theirs already."""
        known: Any = self._table
        is_unchanged = known is not None and self._version == _version(known)
        # An adapter's vectors are a new tensor each time.
        if is_unchanged and (known is table or (known.shape == table.shape and torch.equal(known, table))):
            return
        vectors = np.ascontiguousarray(table.detach().float().cpu().numpy())
        count, width = vectors.shape
        if count <= self.exact_items:
            index = self.faiss.IndexFlatIP(width)
        else:
            lists = round(math.sqrt(count))
            index = self.faiss.IndexIVFFlat(
                self.faiss.IndexFlatIP(width), width, lists, self.faiss.METRIC_INNER_PRODUCT
            )
            sample = np.random.default_rng(0).choice(count, min(count, SAMPLE_PER_LIST * lists), replace=False)
            index.train(vectors[np.sort(sample)])
        index.add(vectors)
        self.index, self._table, self._version = index, table, _version(table)

    def _nearest(self, states: np.ndarray, count: int, effort: int) -> tuple[np.ndarray, np.ndarray, bool]:
        """Items and scores [B, count], and whether these are from the whole catalogue."""
        if not hasattr(self.index, "nlist"):
            scores, items = self.index.search(states, count)
            return items, scores, True
        probes = min(self.index.nlist, max(1, round(self.probed * self.index.nlist)) * effort)
        parameters = self.faiss.SearchParametersIVF(nprobe=probes)
        scores, items = self.index.search(states, count, params=parameters)
        return items, scores, probes == self.index.nlist

    def __call__(
        self,
        states: torch.Tensor,
        table: torch.Tensor,
        k: int,
        padding_idx: int,
        excluded: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The k best items, best first, as `top_k`: more than k are asked for and those to leave out dropped, with
        twice the number and twice the lists until there are k or the catalogue ends.

        Args:
            states: [B, D].
            table: [V, D].
            excluded: [B, S] items to leave out, filled up with the padding.

        Returns:
            Items [B, K] and scores [B, K], K = min(k, V - 1); where fewer are left, the padding and minus infinity.

        Raises:
            ValueError: if k is less than 1, or nothing is left for some row.
        """
        if k < 1:
            raise ValueError(f"k={k} must be 1 or more")
        self.follow(table)
        total = len(table)
        k = min(k, total - 1)
        queries = np.ascontiguousarray(states.detach().float().cpu().numpy())
        left_out = np.full((len(queries), 1), padding_idx)
        if excluded is not None:
            left_out = np.concatenate((left_out, excluded.cpu().numpy()), axis=1)
        items = np.full((len(queries), k), padding_idx)
        scores = np.full((len(queries), k), -np.inf, dtype=np.float32)
        open_rows, count, effort = np.arange(len(queries)), k + min(left_out.shape[1], 64), 1
        while len(open_rows):
            count = min(count, total)
            found, values, is_whole = self._nearest(queries[open_rows], count, effort)
            still_open = []
            for row, numbers, own in zip(open_rows, found, values, strict=True):
                keep = np.flatnonzero((numbers >= 0) & ~np.isin(numbers, left_out[row]))[:k]
                if len(keep) < k and not (is_whole and count == total):
                    still_open.append(row)
                items[row, : len(keep)], scores[row, : len(keep)] = numbers[keep], own[keep]
            open_rows, count, effort = np.array(still_open, dtype=np.int64), 2 * count, 2 * effort
        empty = np.flatnonzero(scores[:, 0] == -np.inf)
        if len(empty):
            raise ValueError(f"nothing is left to recommend for row {empty[0]}: its history leaves no item")
        return torch.from_numpy(items).to(states.device), torch.from_numpy(scores).to(states.device)
