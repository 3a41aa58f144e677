"""What an embedding model learns from: a query's passage among the others of the batch, at several sizes at once.

Letters: Q queries, P passages (those of the queries first, hard negatives may follow), D width.
"""

from collections.abc import Sequence

import torch
from torch.nn import functional as F


def truncated(embeddings: torch.Tensor, size: int | None) -> torch.Tensor:
    """The first `size` numbers of each embedding (None: all), scaled to length 1 again: [..., D] -> [..., size].

    The length is taken in float32.
    """
    return F.normalize(embeddings[..., :size].float(), dim=-1).to(embeddings.dtype)


def in_batch_loss(
    queries: torch.Tensor, passages: torch.Tensor, targets: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Mean cross entropy of each query's own passage among all passages of the batch (InfoNCE with in-batch negatives;
    Karpukhin et al., arXiv 2004.04906, section 3.2), their scores being products divided by the temperature.

    Args:
        queries: [Q, D], of length 1.
        passages: [P, D], of length 1. A passage that belongs to several queries stands here once: a second copy would
            be a negative of its own query.
        targets: [Q], which passage is the query's.
    """
    scores = F.linear(queries, passages).float() / temperature  # [Q, P]
    return F.cross_entropy(scores, targets)


def matryoshka_loss(
    queries: torch.Tensor,
    passages: torch.Tensor,
    targets: torch.Tensor,
    temperature: float,
    sizes: Sequence[int] | None = None,
) -> torch.Tensor:
    """The sum of `in_batch_loss` over embeddings cut to each size and scaled to length 1 again (Kusupati et al., arXiv
    2205.13147, equation 1 with equal weights). Without sizes, over whole embeddings only. Arguments as there."""
    losses = [
        in_batch_loss(truncated(queries, size), truncated(passages, size), targets, temperature)
        for size in sizes or (None,)
    ]
    return torch.stack(losses).sum()
