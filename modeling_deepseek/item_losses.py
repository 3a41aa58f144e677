"""What a recommender learns from: full softmax, sampled softmax with log-q correction, gBCE.

Letters: N positions with a next item, D width, V rows of item embeddings, M negatives, shared by all positions.
Every loss is a sum over positions, in float32, the products of states and items too.
"""

import math

import torch
from torch.nn import functional as F

from .item_catalogue import item_scores

# Up to so many items the whole softmax is cheap, and nothing is better.
FULL_SOFTMAX_ITEMS = 50_000


def softmax_loss(
    hidden_states: torch.Tensor, targets: torch.Tensor, item_embeddings: torch.Tensor, padding_idx: int
) -> torch.Tensor:
    """Cross entropy over all items but the padding: [N, D], [N], [V, D] -> []."""
    scores = item_scores(hidden_states, item_embeddings)
    scores[:, padding_idx] = float("-inf")
    return F.cross_entropy(scores, targets, reduction="sum")


def sampled_softmax_loss(
    hidden_states: torch.Tensor,
    targets: torch.Tensor,
    item_embeddings: torch.Tensor,
    negatives: torch.Tensor,
    log_expected_counts: torch.Tensor | float,
) -> torch.Tensor:
    """Cross entropy against a sample of the items, corrected for how it was drawn (log-q correction).

    exp(score) of a negative is divided by the number of times that it is expected in the sample, so the sum over the
    sample estimates the sum over all items but the target (Bengio and Senécal, 2003, importance sampling; Jean et
    al., arXiv 1412.2007, section 3.1). The target always takes part and needs no correction; a negative that is the
    position's own target is left out.

    Args:
        hidden_states: [N, D].
        targets: [N].
        item_embeddings: [V, D].
        negatives: [M] items, drawn with replacement from any distribution q.
        log_expected_counts: log(M q) of each negative, [M] or one number.
    """
    own, others = target_and_negative_vectors(targets, negatives, item_embeddings)
    positive = (hidden_states.float() * own.float()).sum(-1, keepdim=True)
    negative = item_scores(hidden_states, others) - log_expected_counts
    negative = negative.masked_fill(targets[:, None] == negatives, float("-inf"))
    return (torch.cat((positive, negative), dim=1).logsumexp(1) - positive[:, 0]).sum()


def gbce_loss(
    hidden_states: torch.Tensor,
    targets: torch.Tensor,
    item_embeddings: torch.Tensor,
    negatives: torch.Tensor,
    num_items: int,
    calibration: float,
) -> torch.Tensor:
    """Generalised binary cross entropy, against the overconfidence that sampling causes (Petrov and Macdonald, arXiv
    2308.07192, section 5): the probability of the target is raised to the power

        beta = alpha (t (1 - 1 / alpha) + 1 / alpha),   alpha = M / (num_items - 1)

    where t is the calibration: 0 is plain binary cross entropy, 1 is calibrated in full.
    """
    alpha = min(len(negatives) / max(num_items - 1, 1), 1.0)
    beta = alpha * (calibration * (1 - 1 / alpha) + 1 / alpha)
    own, others = target_and_negative_vectors(targets, negatives, item_embeddings)
    positive = F.logsigmoid((hidden_states.float() * own.float()).sum(-1))
    negative = F.logsigmoid(-item_scores(hidden_states, others))
    negative = negative.masked_fill(targets[:, None] == negatives, 0.0)
    return -(beta * positive + negative.sum(1)).sum() / (len(negatives) + 1)


def target_and_negative_vectors(
    targets: torch.Tensor, negatives: torch.Tensor, item_embeddings: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """[N, D] and [M, D], looked up at once: each look-up has a gradient of the whole table [V, D], and filling
    it with zeros takes most of a large catalogue's backward pass."""
    both = F.embedding(torch.cat((targets, negatives)), item_embeddings)
    return both[: len(targets)], both[len(targets) :]


def draw_negatives(count: int, num_items: int, padding_idx: int, device: torch.device) -> torch.Tensor:
    """[count] of num_items items, uniformly and with replacement, the padding's number left out."""
    drawn = torch.randint(num_items, (count,), device=device)
    return drawn + (drawn >= padding_idx)


def item_loss(
    name: str,
    hidden_states: torch.Tensor,
    targets: torch.Tensor,
    item_embeddings: torch.Tensor,
    padding_idx: int,
    num_negatives: int,
    calibration: float,
    negatives: torch.Tensor | None = None,
    num_items: int | None = None,
) -> torch.Tensor:
    """The loss of that name, summed over positions; negatives are drawn uniformly, the padding left out.

    Where the item_embeddings are but a part of the catalogue, `negatives` are those drawn, as rows of that part, and
    `num_items` is how many items there are without the padding.
    """
    if name == "softmax":
        return softmax_loss(hidden_states, targets, item_embeddings, padding_idx)
    num_items = len(item_embeddings) - 1 if num_items is None else num_items
    if negatives is None:
        negatives = draw_negatives(num_negatives, num_items, padding_idx, targets.device)
    if name == "sampled_softmax":
        expected = math.log(num_negatives / num_items)
        return sampled_softmax_loss(hidden_states, targets, item_embeddings, negatives, expected)
    return gbce_loss(hidden_states, targets, item_embeddings, negatives, num_items, calibration)
