"""Losses that the language model adds to its own.

Letters: B batch, S tokens, V vocabulary, d depth of a prediction layer (1 predicts the token after next).
"""

import torch
from torch.nn import functional as F

from .mtp import shift_left

IGNORED = -100


def labels_ahead(
    labels: torch.Tensor, depth: int, attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None
) -> torch.Tensor:
    """What position i of prediction layer `depth` learns: the label of token i + depth + 1.

    Labels [a, b, c, d] at depth 1 -> [c, d, -100, -100]. Left out are positions that are padding, and targets beyond
    the row or in another packed document.

    Args:
        labels: [B, S], not shifted, -100 where there is nothing to learn.
        attention_mask: [B, S] with 0 at padding on either side; masks of other shapes say nothing here.
        position_ids: [B or 1, S]; restarts mark documents.

    Returns:
        [B, S].
    """
    places = depth + 1
    ahead = shift_left(labels, places, IGNORED)
    if position_ids is not None:
        same_document = shift_left(position_ids, places, -1) == position_ids + places
        ahead = ahead.masked_fill(~same_document, IGNORED)
    if attention_mask is not None and attention_mask.ndim == 2:
        ahead = ahead.masked_fill(attention_mask[:, -labels.shape[1] :] == 0, IGNORED)
    return ahead


def cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
) -> torch.Tensor:
    """Mean over the labels that count, or their sum divided by `num_items_in_batch`; 0 if none counts.

    Args:
        logits: [B, S, V]; labels: [B, S], already aligned with them.
    """
    labels = labels.to(logits.device)
    total = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    if num_items_in_batch is None:
        num_items_in_batch = (labels != IGNORED).sum().clamp(min=1)
    elif isinstance(num_items_in_batch, torch.Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch
