"""The best items for a user: which are left out, exact search, and what a history of item numbers may be.

Letters: B users, S longest history, V items with the padding.
"""

from collections.abc import Sequence

import torch


def pad_histories(histories: Sequence[Sequence[int]], num_items: int, padding_idx: int) -> torch.Tensor:
    """[B, S], padded on the right.

    Raises:
        ValueError: for an empty history, or a number that is no item.
    """
    width = max(map(len, histories), default=0)
    padded = torch.full((len(histories), width), padding_idx)
    for row, history in enumerate(histories):
        if not len(history):
            raise ValueError(f"history {row} is empty: a recommendation needs at least one item")
        wrong = [item for item in history if not 0 <= item < num_items or item == padding_idx]
        if wrong:
            raise ValueError(
                f"history {row} has the item number {wrong[0]}, but items are numbered 0 to {num_items - 1} and "
                f"{padding_idx} is the padding"
            )
        padded[row, : len(history)] = torch.as_tensor(history)
    return padded


def allowed_items(allowed: torch.Tensor | Sequence[int], num_items: int, padding_idx: int) -> torch.Tensor:
    """The items that a filter lets through as booleans, [V] or [B, V], from item numbers or from booleans.

    Raises:
        ValueError: for numbers that are no items, a mask of another width, or a filter that leaves nothing.
    """
    mask = torch.as_tensor(allowed)
    if mask.dtype != torch.bool:
        numbers = mask.reshape(-1).long()
        if len(numbers) and not 0 <= int(numbers.min()) <= int(numbers.max()) < num_items:
            raise ValueError(f"the filter names items outside of 0 to {num_items - 1}")
        mask = torch.zeros(num_items, dtype=torch.bool)
        mask[numbers.to(mask.device)] = True
    if mask.shape[-1] != num_items:
        raise ValueError(f"the filter has {mask.shape[-1]} entries, the model {num_items} items")
    mask = mask.clone()
    mask[..., padding_idx] = False
    if not bool(mask.any(-1).all()):
        raise ValueError("the filter leaves no item to recommend; widen it")
    return mask


def top_k(
    scores: torch.Tensor,
    k: int,
    padding_idx: int,
    excluded: torch.Tensor | None = None,
    allowed: torch.Tensor | None = None,
    overwrite: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k best items by exact search, best first.

    Args:
        scores: [B, V].
        excluded: [B, S] items to leave out, filled up with the padding.
        allowed: [V] or [B, V] booleans.
        overwrite: the scores are nobody else's, and a large catalogue's need no copy.

    Returns:
        Items [B, K] and their scores [B, K], K = min(k, V - 1). A row in which fewer are left is filled up with the
        padding, scored minus infinity.

    Raises:
        ValueError: if k is less than 1, or nothing is left for some row.
    """
    if k < 1:
        raise ValueError(f"k={k} must be 1 or more")
    scores = scores.float() if overwrite or scores.dtype != torch.float32 else scores.clone()
    scores.masked_fill_(scores.isnan(), float("-inf"))  # topk would put them first
    scores[:, padding_idx] = float("-inf")
    if excluded is not None:
        scores.scatter_(1, excluded, float("-inf"))
    if allowed is not None:
        scores.masked_fill_(~allowed.to(scores.device), float("-inf"))
    best, items = scores.topk(min(k, scores.shape[1] - 1))
    empty = best[:, 0] == float("-inf")
    if empty.any():
        raise ValueError(
            f"nothing is left to recommend for row {int(empty.nonzero()[0])}: its history and the filter leave no item"
        )
    return items.masked_fill(best == float("-inf"), padding_idx), best
