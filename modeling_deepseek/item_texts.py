"""Items that are described by text: tokens of title and categories through the same trunk, pooled, to one vector.

An item needs no click to be ranked: its vector is made of its words. The catalogue keeps the tokens, never the
vectors, so that merging, averaging or quantizing a checkpoint leaves nothing behind that belongs to other weights;
vectors are made at their first use, and again when weights have changed.

Letters: N items asked for, V items with the padding (number 0), T tokens of a text, D width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .item_catalogue import ITEM_PADDING, PickedItems
from .pooling import POOLING_FUNCTIONS
from .weight_state import state_of

NO_TOKEN = -1
TEXTS_AT_ONCE = 256
ITEM_TEXT_ENCODERS = {"trunk": "_pooled_states", "bag_of_words": "_mean_embeddings"}


class DeepSeekItemTexts(nn.Module):
    """The catalogue's texts as tokens, and the way from a text to a vector.

    A text's vector is the pooled state of the trunk, or where `config.item_text_encoder` is "bag_of_words" the mean
    of its tokens' embeddings, projected; with `config.item_id_embeddings` the item's own learned vector is added,
    which is zero at first and stays so for an item without clicks.
    """

    tokens: torch.Tensor  # [V, T]

    def __init__(self, config: Any):
        super().__init__()
        self.pool = POOLING_FUNCTIONS[config.pooling]
        self.encode_texts = getattr(self, ITEM_TEXT_ENCODERS[config.item_text_encoder])
        shape = (config.num_items, config.item_text_length)
        self.register_buffer("tokens", torch.full(shape, NO_TOKEN, dtype=torch.int32))
        self.projection = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        if config.item_id_embeddings:
            self.identities = nn.Embedding(config.num_items, config.hidden_size)
        self._table: torch.Tensor | None = None
        self._made_of: Any = None

    def encode(self, trunk: nn.Module, items: torch.Tensor) -> torch.Tensor:
        """Item numbers [N] -> [N, D]."""
        tokens = self.tokens[items].long()
        is_token = tokens != NO_TOKEN
        is_token[:, 0] = True  # attention over nothing, as of the padding, has no value
        vectors = self.projection(self.encode_texts(trunk, tokens.clamp(min=0), is_token))
        return vectors + self.identities(items) if hasattr(self, "identities") else vectors

    def _pooled_states(self, trunk: nn.Module, tokens: torch.Tensor, is_token: torch.Tensor) -> torch.Tensor:
        """[N, T] -> [N, D]: the trunk reads each text."""
        states = trunk(tokens, attention_mask=is_token.long(), use_cache=False).last_hidden_state
        return self.pool(states, is_token)

    def _mean_embeddings(self, trunk: nn.Module, tokens: torch.Tensor, is_token: torch.Tensor) -> torch.Tensor:
        """[N, T] -> [N, D]: fastText's bag of words (arXiv 1607.01759), without a copy per token."""
        embed = trunk.get_input_embeddings()
        words, places = tokens[is_token].unique(return_inverse=True)  # by the module, for an adapter has its say
        starts = is_token.sum(1).cumsum(0).roll(1)
        starts[0] = 0
        return F.embedding_bag(places, embed(words), starts, mode="mean")

    def table(self, trunk: nn.Module) -> torch.Tensor:
        """[V, D] without gradients, in the weights' precision, whatever mode asks; kept until a weight changes.

        Training mode forgets them, and other changes are seen by the weights' own counters and the adapters' switches.
        These miss what is written through `.data` or by a fused optimizer in evaluation mode: call `forget` after
        such.
        """
        made_of = len(self.tokens), *state_of(trunk, self)
        if self._table is None or made_of != self._made_of:
            self._table, self._made_of = self._encode_all(trunk), made_of
        return self._table

    def _encode_all(self, trunk: nn.Module) -> torch.Tensor:
        was_training = trunk.training
        trunk.eval()
        items = torch.arange(len(self.tokens), device=self.tokens.device)
        try:
            # What is made in inference mode would refuse gradients later, what autocast makes is rounded.
            with torch.inference_mode(False), torch.no_grad(), torch.autocast(items.device.type, enabled=False):
                return torch.cat([self.encode(trunk, part) for part in items.split(TEXTS_AT_ONCE)])
        finally:
            trunk.train(was_training)

    def train(self, mode: bool = True):
        """As torch's; a step may follow."""
        if mode:
            self.forget()
        return super().train(mode)

    def forget(self) -> None:
        """Have the vectors made anew at their next use."""
        self._table = None

    def pick(self, trunk: nn.Module, items: torch.Tensor, negatives: torch.Tensor) -> PickedItems:
        """Vectors with gradients of the items [...] and the negatives [M], each encoded once."""
        self.forget()
        padding = torch.tensor([ITEM_PADDING], device=items.device)
        picked = torch.cat((padding, items.flatten(), negatives)).unique()  # sorted, so the padding comes first
        places = torch.zeros(len(self.tokens), dtype=torch.long, device=items.device)
        places[picked] = torch.arange(len(picked), device=items.device)
        return PickedItems(self.encode(trunk, picked), places, places[negatives])

    @torch.no_grad()
    def append(self, texts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Numbers [N] of new items, given their tokens.

        Raises:
            ValueError: for a text without tokens, or with more than a row has room for.
        """
        known, width = self.tokens.shape
        rows = torch.full((len(texts), width), NO_TOKEN, dtype=torch.int32)
        for number, text in enumerate(texts):
            if not 0 < len(text) <= width:
                raise ValueError(
                    f"the text of new item {number} has {len(text)} tokens; it must have 1 to {width}, which is "
                    "config.item_text_length"
                )
            rows[number, : len(text)] = torch.as_tensor(text, dtype=torch.int32)
        self.tokens = torch.cat((self.tokens, rows.to(self.tokens.device)))
        if hasattr(self, "identities"):
            old = self.identities.weight
            weight = torch.cat((old, old.new_zeros(len(texts), old.shape[1])))
            self.identities = nn.Embedding.from_pretrained(weight, freeze=not old.requires_grad)
        self.forget()
        return torch.arange(known, len(self.tokens))
