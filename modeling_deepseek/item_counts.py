"""What can be counted beside what is learned: items that the same users had, and what came right after the last one.

Few interactions teach a recommender slowly what counting knows at once, and counting sees only pairs; the sum of both
scores is better than either. The tables are made of training histories and not trained.

Letters: B users, S items of a history, V items with the padding, K entries of an item.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

NO_ITEM = -1


class DeepSeekItemCounts(nn.Module):
    """Item-kNN (Deshpande and Karypis, 2004) over a history's last items, and first-order transitions.

    `neighbors` [V, K] are the items most like each item, and `similarities` how like they are; `followers` [V, K] are
    those that came most often right after it, and `transitions` log(1 + how often). `NO_ITEM` fills up the rows.
    """

    neighbors: torch.Tensor
    similarities: torch.Tensor
    followers: torch.Tensor
    transitions: torch.Tensor

    def __init__(self, num_items: int, padding: int, config: Any):
        super().__init__()
        self.padding, self.config = padding, config
        shape = (num_items, config.num_item_neighbors)
        for name in ("neighbors", "followers"):
            self.register_buffer(name, torch.full(shape, NO_ITEM, dtype=torch.int32))
        for name in ("similarities", "transitions"):
            self.register_buffer(name, torch.zeros(shape))

    def scores(self, history: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Histories [B, S], padded on either side -> by neighbours, the best being 1, and by transitions, [B, V] each.

        A neighbour's score is the sum of its similarities to the last `config.item_neighbor_window` items.
        """
        batch, length = history.shape
        is_item = history != self.padding
        places = torch.arange(length, device=history.device).expand(batch, length)
        last = places.masked_fill(~is_item, -1).max(1, keepdim=True).values
        is_recent = is_item & (places > last - self.config.item_neighbor_window)
        num_items = len(self.neighbors)
        recent = self.similarities.new_zeros(num_items + 1, batch)  # the last row for what is no item
        users = torch.arange(batch, device=history.device)[:, None].expand(batch, length)
        recent[history.masked_fill(~is_recent, num_items), users] = 1.0
        recent[num_items] = 0.0
        neighbors = self.neighbors.long() % (num_items + 1)
        by_neighbors = F.embedding_bag(neighbors, recent, mode="sum", per_sample_weights=self.similarities).T
        by_neighbors = by_neighbors / by_neighbors.amax(1, keepdim=True).clamp(min=1e-9)
        final = history.gather(1, last.clamp(min=0))[:, 0]
        by_transitions = self.transitions.new_zeros(batch, num_items + 1)
        by_transitions.scatter_(1, self.followers[final].long() % (num_items + 1), self.transitions[final])
        return by_neighbors, by_transitions[:, :num_items]

    def forward(self, history: torch.Tensor) -> torch.Tensor:
        """What is added to the scores of histories [B, S]: [B, V]."""
        by_neighbors, by_transitions = self.scores(history)
        config = self.config
        return config.item_neighbor_weight * by_neighbors + config.item_transition_weight * by_transitions

    @torch.no_grad()
    def fill(
        self, neighbors: torch.Tensor, similarities: torch.Tensor, followers: torch.Tensor, transitions: torch.Tensor
    ) -> None:
        """Take over tables [V, K]."""
        self.neighbors.copy_(neighbors)
        self.similarities.copy_(similarities)
        self.followers.copy_(followers)
        self.transitions.copy_(transitions)

    def append(self, count: int) -> None:
        """Make room for new items, of which nothing is counted."""
        for name, value in (("neighbors", NO_ITEM), ("similarities", 0), ("followers", NO_ITEM), ("transitions", 0)):
            table = getattr(self, name)
            setattr(self, name, torch.cat((table, table.new_full((count, table.shape[1]), value))))
