"""Losses that the language model adds to its own.

Letters: B batch, S tokens, V vocabulary, d depth of a prediction layer (1 predicts the token after next).
"""

from typing import cast

import torch
from torch import nn
from torch.nn import functional as F

from .fused import LinearCrossEntropy, is_plain
from .layers import is_plain_linear, project
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


def num_targets(labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None) -> torch.Tensor | int:
    """What a summed loss is divided by: `num_items_in_batch`, or how many labels count; 1 at least, for a batch
    without targets adds nothing."""
    if num_items_in_batch is None:
        return (labels != IGNORED).sum().clamp(min=1)
    is_tensor = isinstance(num_items_in_batch, torch.Tensor)
    return num_items_in_batch.clamp(min=1).to(labels.device) if is_tensor else max(num_items_in_batch, 1)


def cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
) -> torch.Tensor:
    """Mean over the labels that count, or their sum divided by `num_items_in_batch`; 0 if none counts.

    Args:
        logits: [..., V]; labels: [...], already aligned with them.
    """
    labels = labels.to(logits.device)
    scores = logits.reshape(-1, logits.shape[-1]).float()
    total = F.cross_entropy(scores, labels.flatten(), ignore_index=IGNORED, reduction="sum")
    return total / num_targets(labels, num_items_in_batch)


def needs_no_logits(head: nn.Module, hidden_states: torch.Tensor) -> bool:
    """Whether `head_cross_entropy` goes without logits: in training, with a head that is a plain Linear."""
    if not (is_plain_linear(head) and torch.is_grad_enabled()):
        return False
    weight = cast(torch.Tensor, head.weight)
    return (hidden_states.requires_grad or weight.requires_grad) and is_plain(hidden_states, weight)


def head_cross_entropy(
    head: nn.Module,
    hidden_states: torch.Tensor,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """`cross_entropy` of head(hidden_states), without logits where it can be.

    Args:
        hidden_states: [..., D]; labels: [...], already aligned with them.
    """
    if not needs_no_logits(head, hidden_states):
        return cross_entropy(project(head, hidden_states), labels, num_items_in_batch)
    labels, kind = labels.to(hidden_states.device), hidden_states.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else head.weight.dtype
    rows, weight = hidden_states.flatten(0, -2).to(dtype), head.weight.to(dtype)
    with torch.autocast(kind, enabled=False):
        total = LinearCrossEntropy.apply(rows, weight, labels.flatten())
    return total / num_targets(labels, num_items_in_batch)
