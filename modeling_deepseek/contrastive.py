"""What an embedding model learns from: a query's passage among the others of the batch, at several sizes at once.

Letters: Q queries, P passages (those of the queries first, hard negatives may follow), D width.
"""

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from .losses import cross_entropy


def truncated(embeddings: torch.Tensor, size: int | None) -> torch.Tensor:
    """The first `size` numbers of each embedding (None: all), scaled to length 1 again: [..., D] -> [..., size].

    The length is taken in float32.
    """
    return F.normalize(embeddings[..., :size].float(), dim=-1).to(embeddings.dtype)


def equal_rows(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Which rows [Q, S] are of the same tokens: [Q, Q] booleans. What a mask [Q, S] hides is not compared."""
    if attention_mask is not None and getattr(attention_mask, "ndim", 0) == 2:
        input_ids = input_ids.masked_fill(attention_mask.to(input_ids.device) == 0, -1)
    return (input_ids.unsqueeze(0) == input_ids.unsqueeze(1)).all(-1)


def right_passages(same_query: torch.Tensor, targets: torch.Tensor, num_passages: int) -> torch.Tensor:
    """Which passages some row of the same query names as its own: [Q, Q], [Q] -> [Q, P] booleans."""
    return (same_query.unsqueeze(-1) & is_own(targets, num_passages)).any(1)


def is_own(targets: torch.Tensor, num_passages: int) -> torch.Tensor:
    """[Q] -> [Q, P] booleans; an unknown target (-100) is none's."""
    return targets.unsqueeze(-1) == torch.arange(num_passages, device=targets.device)


def in_batch_loss(
    queries: torch.Tensor,
    passages: torch.Tensor,
    targets: torch.Tensor,
    temperature: float,
    right: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean cross entropy of each query's own passage among all passages of the batch (InfoNCE with in-batch negatives;
    Karpukhin et al., arXiv 2004.04906, section 3.2), their scores being products divided by the temperature.

    Args:
        queries: [Q, D], of length 1.
        passages: [P, D], of length 1. A passage that belongs to several queries stands here once: a second copy would
            be a negative of its own query.
        targets: [Q], which passage is the query's; -100 leaves a query out.
        right: [Q, P] booleans, which passages answer the query; those beside its target are no negatives of it.
    """
    scores = F.linear(queries, passages).float() / temperature  # [Q, P]
    if right is not None:
        scores = scores.masked_fill(right & ~is_own(targets, scores.shape[1]), float("-inf"))
    return cross_entropy(scores, targets)


def matryoshka_loss(
    queries: torch.Tensor,
    passages: torch.Tensor,
    targets: torch.Tensor,
    temperature: float,
    sizes: Sequence[int] | None = None,
    right: torch.Tensor | None = None,
) -> torch.Tensor:
    """The sum of `in_batch_loss` over embeddings cut to each size and scaled to length 1 again (Kusupati et al., arXiv
    2205.13147, equation 1 with equal weights). Without sizes, over whole embeddings only. Arguments as there."""
    losses = [
        in_batch_loss(truncated(queries, size), truncated(passages, size), targets, temperature, right)
        for size in sizes or (None,)
    ]
    return torch.stack(losses).sum()
