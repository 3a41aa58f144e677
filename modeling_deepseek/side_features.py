"""What is known of a user, and of the circumstances of each interaction, as tokens among the items of a history.

The trunk reads u_1 .. u_F, item_1, context_2, item_2, context_3, ...: in front one token per column of the user
(gender, occupation), and after each item one for the interaction to come (its weekday and device, summed). The next
item is predicted at its context, where the items before and the context are known, or at the item before if the model
has no contexts. A token is the vector of its value plus that of its kind, so that a value that is none or unknown,
number 0, is read as what all of the column have in common.

Letters: B users, S items of a history, F columns of the user, C columns of a context, L tokens, D width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

NO_VALUE = 0


def feature_numbers(*groups: dict[str, list[str]] | None) -> list[dict[str, dict[str, int]]]:
    """Of each group of columns, the columns in the order of their names, and the number of each of their values.

    Numbers go on from 1 through all groups. config.json sorts its keys, so no other order would outlive it.
    """
    numbered: list[dict[str, dict[str, int]]] = []
    taken = NO_VALUE
    for group in groups:
        numbered.append({})
        for name in sorted(group or {}):
            values = (group or {})[name]
            numbered[-1][name] = {value: taken + place for place, value in enumerate(values, start=1)}
            taken += len(values)
    return numbered


class DeepSeekSideFeatures(nn.Module):
    """Vectors of users' and contexts' values, and the layout of the tokens.

    `user_numbers` and `context_numbers` say which column is which, and the numbers of its values:
    `user_numbers["gender"]["F"]`.
    """

    def __init__(self, config: Any):
        super().__init__()
        self.user_numbers, self.context_numbers = feature_numbers(config.user_features, config.context_features)
        count = sum(map(len, (*self.user_numbers.values(), *self.context_numbers.values())))
        kinds = len(self.user_numbers) + bool(self.context_numbers)
        self.values = nn.Embedding(1 + count, config.hidden_size, padding_idx=NO_VALUE)
        self.kinds = nn.Embedding(kinds, config.hidden_size)

    def forward(
        self,
        items: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        user_features: torch.Tensor | None = None,
        context_features: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What the trunk reads.

        Args:
            items: [B, S, D] vectors.
            attention_mask: [B, S] with 0 at padding on either side.
            user_features: [B, F]; context_features: [B, S, C], at each item the context of the interaction after it.
                Absent, all of them are none.

        Returns:
            Vectors [B, L, D], their mask and their positions [B, L], where padding doesn't count.

        Raises:
            ValueError: for another shape.
        """
        batch, length = items.shape[:2]
        if attention_mask is None:
            attention_mask = torch.ones(batch, length, dtype=torch.long, device=items.device)
        if attention_mask.shape != (batch, length):
            raise ValueError(
                f"attention_mask has shape {list(attention_mask.shape)}; a model with user or context features takes "
                f"one that says which items are padding, {[batch, length]}"
            )
        kinds = self.kinds(torch.arange(self.kinds.num_embeddings, device=items.device))
        users = self._given("user_features", user_features, (batch, len(self.user_numbers)), items)
        contexts = self._given("context_features", context_features, (batch, length, len(self.context_numbers)), items)
        tokens, mask = items, attention_mask
        if self.context_numbers:
            tokens = torch.stack((items, self.values(contexts).sum(-2) + kinds[-1]), dim=2).flatten(1, 2)
            mask = mask.repeat_interleave(2, dim=1)
        fields = len(self.user_numbers)
        tokens = torch.cat((self.values(users) + kinds[:fields], tokens), dim=1)
        mask = torch.cat((mask.new_ones(batch, fields), mask), dim=1)
        # Counted without padding, or a user's tokens would be farther from a history that is padded on the left.
        return tokens, mask, (mask.cumsum(1) - 1).clamp(min=0)

    @staticmethod
    def _given(name: str, given: torch.Tensor | None, shape: tuple[int, ...], items: torch.Tensor) -> torch.Tensor:
        if given is None:
            return torch.full(shape, NO_VALUE, device=items.device)
        if given.shape != shape:
            raise ValueError(f"{name} has shape {list(given.shape)}, but this model and batch take {list(shape)}")
        return given.to(items.device)

    def item_places(self, length: int) -> torch.Tensor:
        """[S] places of the items among `length` tokens."""
        return torch.arange(len(self.user_numbers), length, 2 if self.context_numbers else 1)

    def predicting(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[B, L, D] -> [B, S, D]: at each item the state that the next one is predicted from."""
        places = self.item_places(hidden_states.shape[1]) + bool(self.context_numbers)
        return hidden_states[:, places.to(hidden_states.device)]

    def of_requests(
        self, lengths: Sequence[int], limit: int, user_features: Any = None, context_features: Any = None
    ) -> dict[str, torch.Tensor]:
        """What `forward` takes for histories of these lengths, of which the last `limit` items are read.

        Args:
            user_features: [B, F] numbers.
            context_features: of each history the context of the request [C], those before being none; or one per item
                [S or more, C], the request's at the last item.

        Raises:
            ValueError: for another shape, or a number that is no value of its column.
        """
        features: dict[str, torch.Tensor] = {}
        if user_features is not None:
            users = torch.as_tensor(user_features)
            _check_numbers("user_features", users, (len(lengths),), self.user_numbers)
            features["user_features"] = users.long()
        if context_features is not None:
            if len(context_features) != len(lengths):
                raise ValueError(f"context_features has {len(context_features)} entries for {len(lengths)} histories")
            width = min(limit, max(lengths, default=0))
            padded = torch.full((len(lengths), width, len(self.context_numbers)), NO_VALUE)
            for row, (length, given) in enumerate(zip(lengths, context_features, strict=True)):
                contexts = torch.as_tensor(given)
                if contexts.ndim == 1:
                    request, contexts = contexts, contexts.new_full((length, len(contexts)), NO_VALUE)
                    contexts[-1:] = request
                contexts = contexts[:length]
                _check_numbers("context_features", contexts, (length,), self.context_numbers)
                contexts = contexts[-limit:]
                padded[row, : len(contexts)] = contexts
            features["context_features"] = padded
        return features


def _check_numbers(name: str, given: torch.Tensor, shape: tuple[int, ...], columns: dict[str, dict[str, int]]) -> None:
    if given.shape != (*shape, len(columns)):
        raise ValueError(
            f"{name} has shape {list(given.shape)}, expected {[*shape, len(columns)]}: the last are the columns "
            f"{', '.join(columns) or 'of which this model has none'}"
        )
    for place, (column, numbers) in enumerate(columns.items()):
        low, high = min(numbers.values()), max(numbers.values())
        wrong = [n for n in given[..., place].flatten().tolist() if n != NO_VALUE and not low <= n <= high]
        if wrong:
            raise ValueError(
                f"{name}: {wrong[0]} is no value of {column!r}, whose values are numbered {low} to {high}, and "
                f"{NO_VALUE} is none"
            )
