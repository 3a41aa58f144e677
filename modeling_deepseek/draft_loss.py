"""What draft stages learn (DSpark, arXiv 2607.05147): the trunk's own distribution, and how often it takes a draft.

    loss = sum_j w_j (0.1 CE + 0.9 |p - q|_1 + BCE(confidence, 1 - |p - q|_1 / 2)) / sum_j w_j,    w_j = exp(-j / 4)

p is what draft j says of a token, given the text's tokens before it, q what the trunk says of it; 1 - |p - q|_1 / 2 is
how often a token drawn from p is taken. Nothing but the draft stages learns from it: trunk, embedding and head are
as they are. Each row has a block behind every b-th token, in training with a start drawn for each row, so that drafts
are about as many as tokens. The constants are those that DeepSeek published for other models of this kind.

Letters: B batch, S tokens, A blocks of a row, b tokens of a block, N drafts that have a target, D width, V vocabulary.
"""

from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from .losses import IGNORED, labels_ahead, num_targets

TOKEN_SHARE, DISTANCE_SHARE, CONFIDENCE_SHARE = 0.1, 0.9, 1.0
DECAY = 4.0  # drafts


def anchors_of(shape: tuple[int, int], size: int, is_drawn: bool, device: torch.device) -> torch.Tensor:
    """[B, A]: the columns that blocks follow, `size` apart."""
    batch, length = shape
    starts = torch.zeros(batch, 1, dtype=torch.long, device=device)
    if is_drawn:
        starts = torch.randint(size, (batch, 1), device=device)
    return (starts + torch.arange(0, length, size, device=device)).clamp(max=length - 1)


def targets_of(labels: torch.Tensor, anchors: torch.Tensor, size: int, **masks: torch.Tensor | None) -> torch.Tensor:
    """[B, A, b]: the label of token j + 2 behind each anchor; none behind one that has none.

    Args:
        masks: attention_mask and position_ids, as `labels_ahead` takes them.
    """
    ahead = [labels_ahead(labels, depth, **masks).gather(1, anchors) for depth in range(1, size + 1)]
    targets = torch.stack(ahead, dim=-1)
    return targets.masked_fill((targets == IGNORED).cumsum(-1) > 0, IGNORED)


def unmoved(head: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """head(hidden_states), from which the head learns nothing."""
    return functional_call(head, {name: weight.detach() for name, weight in head.named_parameters()}, hidden_states)


def draft_loss(
    model: Any,
    head: nn.Module,
    outputs: Any,
    labels: torch.Tensor,
    input_ids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    num_items_in_batch: torch.Tensor | int | None = None,
    **kwargs,
) -> torch.Tensor:
    """Weighted mean over all drafts; 0 where there is none.

    Args:
        model: `DeepSeekModel`; outputs: its own, with `draft_states`; other inputs as it had them.
        labels: [B, S], not shifted.
        num_items_in_batch: labels in all batches of a step; the mean is then weighed by this batch's share of them.

    Raises:
        ValueError: without input_ids.
    """
    if input_ids is None:
        raise ValueError("draft stages learn from token ids: give input_ids, not inputs_embeds, or mtp_loss_weight=0")
    size = model.config.dspark_block_size
    anchors = anchors_of(labels.shape, size, model.training, labels.device)
    targets = targets_of(labels, anchors, size, attention_mask=attention_mask, position_ids=position_ids)
    behind = anchors.unsqueeze(-1) + 1 + torch.arange(size, device=anchors.device)
    behind = behind.clamp(max=labels.shape[1] - 1)  # [B, A, b], the tokens before the targets
    previous = input_ids.gather(1, behind.flatten(1)).view_as(behind)
    states = model.draft(
        model.draft_context(outputs.draft_states),
        model.embed_tokens(previous[..., 0]),
        anchors,
        attention_mask,
        position_ids,
    )
    is_target = targets != IGNORED
    rows = torch.arange(len(labels), device=labels.device).view(-1, 1, 1).expand_as(behind)
    with torch.no_grad():
        trunk = outputs.last_hidden_state[rows[is_target], behind[is_target]]
        wanted = head(trunk).float().softmax(-1)  # [N, V]
    losses = losses_of_drafts(
        model.draft_stages[-1], head, states[is_target], previous[is_target], targets[is_target], wanted
    )
    weights = torch.exp(-torch.arange(size, device=labels.device) / DECAY).expand_as(behind)[is_target]
    loss = (weights * losses).sum() / weights.sum().clamp(min=torch.finfo(weights.dtype).tiny)
    if num_items_in_batch is None:
        return loss
    return loss * num_targets(labels[:, 1:]) / num_targets(labels, num_items_in_batch)


def losses_of_drafts(
    last: Any,
    head: nn.Module,
    states: torch.Tensor,
    previous: torch.Tensor,
    targets: torch.Tensor,
    wanted: torch.Tensor,
) -> torch.Tensor:
    """[N], the loss of each draft.

    Args:
        last: the last draft stage; states: [N, D], before its norm.
        previous, targets: [N], the token before each draft, and its own.
        wanted: [N, V], the trunk's probabilities.
    """
    bias, markov_states = last.markov_head(previous)
    drafted = (unmoved(head, last.shared_head(states)).float() + bias).log_softmax(-1)  # [N, V]
    distance = (drafted.exp() - wanted).abs().sum(-1)
    taken = (1 - distance.detach() / 2).clamp(0, 1)
    confidence = last.confidence_head(states, markov_states)
    return (
        TOKEN_SHARE * F.nll_loss(drafted, targets, reduction="none")
        + DISTANCE_SHARE * distance
        + CONFIDENCE_SHARE * F.binary_cross_entropy_with_logits(confidence, taken, reduction="none")
    )
