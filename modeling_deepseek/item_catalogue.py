"""A recommender's items: how many, their vectors as one batch needs them, and scores by them.

Letters: B users, S items of a history, C candidates, D width, V items with the padding, N of them that are picked.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

ITEM_PADDING = 0  # where items are texts; where they are the vocabulary, the padding's number is its pad_token_id
ITEMS_AT_ONCE = 8192


def item_numbers(config: Any) -> tuple[int, int]:
    """How many items there are, the padding included, and its number."""
    if getattr(config, "num_items", None) is not None:
        return config.num_items, ITEM_PADDING
    return config.vocab_size, config.pad_token_id


def vocabulary_vectors(table: nn.Module, head: nn.Module | None) -> torch.Tensor:
    """[V, D], by which the vocabulary is scored: the rows of its embedding, or of a head of its own.

    A layer that an adapter stands around is called, so that the adapter has its say.
    """
    weight: torch.Tensor = table.weight  # type: ignore[assignment]
    if head is None:
        return weight if type(table) is nn.Embedding else table(torch.arange(len(weight), device=weight.device))
    if type(head) is nn.Linear:
        return head.weight
    return head(torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)).T


class PickedItems(NamedTuple):
    """The items that a batch needs.

    `vectors` [N, D] score them, `places` [V] say where each item's is (None: at its number), `negatives` [M] are the
    places of those drawn. The trunk reads what `embed` gives for an item (None: its vector).
    """

    vectors: torch.Tensor
    places: torch.Tensor | None = None
    negatives: torch.Tensor | None = None
    embed: Callable[[torch.Tensor], torch.Tensor] | None = None

    def place(self, items: torch.Tensor) -> torch.Tensor:
        return items if self.places is None else self.places[items]

    def of(self, items: torch.Tensor) -> torch.Tensor:
        """Item numbers [...] -> the vectors [..., D] that score them."""
        return F.embedding(self.place(items), self.vectors)

    def read(self, items: torch.Tensor) -> torch.Tensor:
        """Item numbers [...] -> what the trunk reads, [..., D]."""
        return self.of(items) if self.embed is None else self.embed(items)


def item_scores(states: torch.Tensor, item_embeddings: torch.Tensor) -> torch.Tensor:
    """[B, D], [V, D] -> [B, V] in float32, for in bfloat16 many of a large catalogue tie."""
    with torch.autocast(states.device.type, enabled=False):
        states = states.float()
        if item_embeddings.dtype == torch.float32:
            return F.linear(states, item_embeddings)
        parts = item_embeddings.split(ITEMS_AT_ONCE)  # a float32 copy of all would be large
        return torch.cat([F.linear(states, part.float()) for part in parts], dim=1)


def scores_of_all(
    states: torch.Tensor, item_embeddings: torch.Tensor, padding: int, counted: torch.Tensor | None
) -> torch.Tensor:
    """[B, D], [V, D] and what is counted [B, V] -> [B, V], the lowest number for the padding."""
    scores = item_scores(states, item_embeddings)
    if counted is not None:
        scores += counted
    column = torch.tensor([padding], device=scores.device)
    return scores.index_fill_(1, column, torch.finfo(scores.dtype).min)  # in place: it is large


def scores_of_candidates(
    states: torch.Tensor, candidates: torch.Tensor, picked: PickedItems, padding: int, counted: torch.Tensor | None
) -> torch.Tensor:
    """[B, D], [B, C] and what is counted of all [B, V] -> [B, C] in float32, the lowest number for the padding."""
    with torch.autocast(states.device.type, enabled=False):
        scores = torch.einsum("bd,bcd->bc", states.float(), picked.of(candidates).float())
    if counted is not None:
        scores = scores + counted.gather(1, candidates)
    return scores.masked_fill(candidates == padding, torch.finfo(scores.dtype).min)
