"""The one way to rank: ties and what is no number count against the target, and are never among the best.

Scores are compared in float32 or better. Letters: B rows, V candidates, K best.
"""

import numpy as np
import torch


def ranks(
    scores: torch.Tensor,
    targets: torch.Tensor,
    left_out: torch.Tensor | None = None,
    padding: int | None = None,
    last: torch.Tensor | None = None,
) -> torch.Tensor:
    """[B] ranks of the targets from 1: one more than the other candidates that they aren't strictly above.

    Args:
        scores: [B, V].
        targets: [B], places among the candidates; a negative one, or the padding, stands for a target that isn't
            among them.
        left_out: [B, S] places that aren't ranked, except for the target itself; may repeat.
        padding: a place that stands for no candidate.
        last: [B], the rank of a target that isn't there or whose score is no number; without it behind all candidates.
    """
    if scores.dtype.itemsize < 4:
        scores = scores.float()
    places = targets.clamp(min=0)[:, None]
    own = scores.gather(1, places)
    ahead = ~(scores < own)
    if left_out is not None:
        ahead.scatter_(1, left_out, False)
    is_lost = (targets < 0) | own[:, 0].isnan()
    behind_all = scores.shape[1] + 1
    if padding is not None:
        ahead[:, padding] = False
        is_lost, behind_all = is_lost | (targets == padding), behind_all - 1
    ahead.scatter_(1, places, False)
    return torch.where(is_lost, behind_all if last is None else last, 1 + ahead.sum(1))


def ranks_of(scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """`ranks` of arrays: [B, V], [B] -> [B]."""
    return ranks(torch.from_numpy(np.ascontiguousarray(scores)), torch.from_numpy(targets)).numpy()


def right_ranks(scores: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The ranks from 1 of all that is right, the best first: [V], [V] booleans -> [R].

    Of equal scores the wrong ones are ahead; what has no number is behind all, as in `ranks`.
    """
    order = np.lexsort((right, -comparable(scores, right)))
    found = 1 + np.flatnonzero(right[order])
    found[len(found) - int(np.isnan(scores[right]).sum()) :] = len(scores) + 1
    return found


def best_first(scores: np.ndarray) -> np.ndarray:
    """The places of scores [..., V], the best first; equal ones stay in order, what is no number counts as minus
    infinity."""
    return np.argsort(-np.where(np.isnan(scores), -np.inf, scores), axis=-1, kind="stable")


def highest(scores: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The highest scores, best first, and their places, both [..., K]; what is no number counts as minus infinity.

    torch's own topk and argsort put it first.
    """
    if scores.dtype.itemsize < 4:
        scores = scores.float()
    values, places = scores.masked_fill(scores.isnan(), float("-inf")).topk(min(count, scores.shape[-1]))
    return values, places


def comparable(scores: np.ndarray, is_relevant: np.ndarray) -> np.ndarray:
    """Scores in which what is no number counts against those who ask for the relevant: below all for these, above all
    for the others."""
    return np.where(np.isnan(scores), np.where(is_relevant, -np.inf, np.inf), scores)
