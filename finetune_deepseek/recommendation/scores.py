"""Scores of rankings: hit rate, NDCG, MRR, those of impressions, and how sure they are. Letters: B users."""

from collections.abc import Iterable

import numpy as np

from ..training.scoring.ranks import comparable

CUTOFFS = (5, 10, 20)
RESAMPLES = 2000


def per_user(ranks: np.ndarray) -> dict[str, np.ndarray]:
    """What each user adds to each score: hr@k, ndcg@k (one relevant item: 1 / log2(rank + 1)) and mrr, each [B]."""
    ranks = np.asarray(ranks, dtype=np.float64)
    scores = {}
    for k in CUTOFFS:
        scores[f"hr@{k}"] = (ranks <= k).astype(np.float64)
        scores[f"ndcg@{k}"] = np.where(ranks <= k, 1 / np.log2(ranks + 1), 0.0)
    return scores | {"mrr": 1 / ranks}


def ranking_scores(ranks: np.ndarray) -> dict[str, float]:
    """The means over users."""
    return {name: float(values.mean()) for name, values in per_user(ranks).items()}


def bootstrap_interval(values: np.ndarray, seed: int = 0, level: float = 0.95) -> tuple[float, float]:
    """The percentile interval of the mean over users drawn again with replacement (Efron, 1979)."""
    rng = np.random.default_rng(seed)
    # Only how often each value is drawn matters, and there are few different values.
    different, counts = np.unique(values, return_counts=True)
    means = rng.multinomial(len(values), counts / len(values), size=RESAMPLES) @ different / len(values)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired_p_value(ours: np.ndarray, theirs: np.ndarray, seed: int = 0) -> float:
    """Two-sided p of a randomisation test for a difference of means: each user's sign flipped at random."""
    differences = ours - theirs
    differences = differences[differences != 0]
    if not len(differences):
        return 1.0
    rng = np.random.default_rng(seed)
    observed, extreme = abs(differences.sum()) - 1e-9, 0
    for _ in range(20):
        signs = rng.integers(0, 2, size=(RESAMPLES // 20, len(differences)), dtype=np.int8) * 2 - 1
        extreme += int((np.abs(signs @ differences) >= observed).sum())
    return (extreme + 1) / (RESAMPLES + 1)


def comparison(
    ours: np.ndarray, theirs: dict[str, np.ndarray], names: Iterable[str] = ("hr@10", "ndcg@10")
) -> dict[str, float]:
    """Scores of others' ranks [B] of the same users, and by how much ours are above, with interval and p.

    Keys are like `popularity_hr@10`, `above_popularity_hr@10` and `..._low`, `..._high`, `..._p`.
    """
    results: dict[str, float] = {}
    own = per_user(ours)
    for other, ranks in theirs.items():
        scores = per_user(ranks)
        results |= {f"{other}_{name}": float(values.mean()) for name, values in scores.items()}
        for name in names:
            key, difference = f"above_{other}_{name}", own[name] - scores[name]
            results[key] = float(difference.mean())
            results[f"{key}_low"], results[f"{key}_high"] = bootstrap_interval(difference)
            results[f"{key}_p"] = paired_p_value(own[name], scores[name])
    return results


def impression_scores(scores: np.ndarray, clicked: np.ndarray) -> dict[str, float]:
    """AUC, MRR and nDCG of one impression's candidates [C], as MIND's evaluation defines them.

    The reciprocal ranks of all clicks are averaged; AUC counts a tie half, elsewhere ties count against the clicks.

    Raises:
        ValueError: if all or none of the candidates were clicked, where AUC has no value.
    """
    is_click = np.asarray(clicked).astype(bool)
    if is_click.all() or not is_click.any():
        raise ValueError("an impression is scored by its clicked and its other news; one kind is missing")
    values = comparable(np.asarray(scores, dtype=np.float64), is_click)
    clicks, others = values[is_click], values[~is_click]
    above = (clicks[:, None] > others).sum() + 0.5 * (clicks[:, None] == others).sum()
    order = np.lexsort((is_click, -values))  # best first, of equal ones the clicks last
    gains = is_click[order].astype(np.float64)
    ranks = np.arange(1, len(gains) + 1)
    ideal, discounts = np.sort(gains)[::-1], 1 / np.log2(ranks + 1)
    found = {"auc": above / (len(clicks) * len(others)), "mrr": (gains / ranks).sum() / gains.sum()}
    for k in (5, 10):
        found[f"ndcg@{k}"] = (gains * discounts)[:k].sum() / (ideal * discounts)[:k].sum()
    return {name: float(value) for name, value in found.items()}
