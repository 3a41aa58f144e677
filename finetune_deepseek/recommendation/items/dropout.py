"""Item dropout: other histories out of few, by leaving out items at random.

What a user did has gaps anyway, and what comes after a gap is still something that the user likes: so each epoch
learns from other pairs of neighbours, nearer and farther ones (as the item crop and mask of CL4SRec, arXiv 2010.14395,
section 3.2, in one; here the shortened history is learned from itself, without a contrastive loss).
"""

from random import Random
from typing import Any

LEAST_ITEMS = 2  # an item and what comes after it


def item_dropout(feature: dict[str, Any], highest_rate: float, draw: Random) -> dict[str, Any]:
    """A training feature without some of its items, each left out at a rate that is drawn between 0 and the highest.

    Its `context_features` are those of the interactions that follow, so of the next item that is left.
    """
    items = feature["input_ids"]
    rate = highest_rate * draw.random()
    kept = [place for place in range(len(items)) if draw.random() >= rate]
    if len(kept) < LEAST_ITEMS:
        return feature
    changed = feature | {"input_ids": [items[place] for place in kept]}
    if "context_features" in feature:
        contexts = feature["context_features"]
        changed["context_features"] = [*(contexts[after - 1] for after in kept[1:]), contexts[-1]]
    return changed
