"""The head that recommends: a history of items in, a score for every item to come next out.

Letters: B users, S items of a history, C candidates, D width, V items with the padding.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.utils.generic import can_return_tuple

from .cache import takes_cache
from .configuration_deepseek import DeepSeekConfig
from .item_catalogue import (
    ITEM_PADDING,
    PickedItems,
    item_numbers,
    scores_of_all,
    scores_of_candidates,
    vocabulary_vectors,
)
from .item_counts import NO_ITEM, DeepSeekItemCounts
from .item_losses import FULL_SOFTMAX_ITEMS, draw_negatives, item_loss
from .item_ranking import allowed_items, pad_histories, top_k
from .item_texts import NO_TOKEN, DeepSeekItemTexts
from .losses import IGNORED, cross_entropy, num_targets
from .modeling_deepseek import DeepSeekModel
from .outputs import DeepSeekSequenceOutput
from .pooling import last_token, which_are_tokens
from .pretrained import DeepSeekPreTrainedModel
from .side_features import DeepSeekSideFeatures


def loss_name(config: Any) -> str:
    """The loss that is asked for, or the whole softmax as far as it is cheap."""
    if config.item_loss is not None:
        return config.item_loss
    # For the trunk each item of the softmax is a text to be read.
    is_read = getattr(config, "num_items", None) is not None and config.item_text_encoder == "trunk"
    limit = config.num_item_negatives + 1 if is_read else FULL_SOFTMAX_ITEMS
    return "softmax" if item_numbers(config)[0] <= limit else "sampled_softmax"


def feature_reader(model: Any, *features: Any) -> DeepSeekSideFeatures | None:
    """What reads a model's user and context features, None where it has none.

    Raises:
        ValueError: if there is none, but features are given.
    """
    reader = getattr(model, "side_features", None)
    if reader is None and any(part is not None for part in features):
        raise ValueError(
            "this model reads no user or context features; make one with config.user_features or "
            "config.context_features, or leave them out"
        )
    return reader


class DeepSeekForRecommendation(DeepSeekPreTrainedModel):
    """A history of items in, a score for every item to come next out.

    The vocabulary is the catalogue: `config.vocab_size` rows, of which `config.pad_token_id` (0 if it isn't set) is
    no item but padding. A score is the product of the last hidden state with the item's embedding (Kang and McAuley,
    arXiv 1808.09781, equation 6), or with `item_head` where `config.tie_item_embeddings` is false.

    With `config.num_items` the vocabulary are words instead, and items are texts of them, number 0 being the padding:
    an item's embedding is made of its text by the same trunk (item_texts.py), so that items which `add_items` brings
    are ranked without a click. An empty history is then one padding, which the mask lets through.

    With `config.user_features` or `config.context_features` what is known of the user stands before the history, and
    the context of each interaction before its item (side_features.py).

    With `config.num_item_neighbors` what is counted of items is added to the scores, not to the loss (item_counts.py).
    """

    # Trainer would count each history's first item, which nothing stands before, among those that are learned.
    accepts_loss_kwargs = False

    def __init__(self, config: DeepSeekConfig):
        if config.pad_token_id is None:
            config.pad_token_id = 0
        reads_ids = config.engram_layer_ids or any(spec.feed_forward == "hash_moe" for spec in config.specs)
        if reads_ids:
            raise ValueError(
                "DeepSeekForRecommendation reads vectors of items, but hash layers (num_hash_layers) and Engram "
                "(engram_layer_ids) read token ids; set num_hash_layers=0 and leave engram_layer_ids out"
            )
        super().__init__(config)
        self.model = DeepSeekModel(config)
        if config.num_items is not None:
            self.item_texts = DeepSeekItemTexts(config)
        if config.user_features or config.context_features:
            self.side_features = DeepSeekSideFeatures(config)
        if config.num_item_neighbors:
            self.item_counts = DeepSeekItemCounts(*item_numbers(config), config)
        if not config.tie_item_embeddings:
            self.item_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, DeepSeekItemTexts):
            init.constant_(module.tokens, NO_TOKEN)
            if hasattr(module, "identities"):
                init.zeros_(module.identities.weight)
        elif isinstance(module, DeepSeekItemCounts):
            for table, value in ((module.neighbors, NO_ITEM), (module.followers, NO_ITEM)):
                init.constant_(table, value)
            for table in (module.similarities, module.transitions):
                init.zeros_(table)

    def item_embeddings(self) -> torch.Tensor:
        """[V, D], by which items are scored."""
        if self.config.num_items is not None:
            return self.item_texts.table(self.model)
        return vocabulary_vectors(self.model.embed_tokens, self.get_output_embeddings())

    def read_items(self, input_ids: torch.Tensor) -> torch.Tensor:
        """What the trunk reads in place of item numbers: [B, S] -> [B, S, D]."""
        return self.pick_items().read(input_ids)

    @torch.inference_mode(False)  # what is made in that mode could not be trained later
    def add_items(self, texts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Append items to a catalogue of texts (`config.num_items`), given as tokens. Not amid a training: the
        optimizer would go on with the former rows.

        Returns:
            Their numbers [N].

        Raises:
            ValueError: if the items of this model aren't texts, or a text is empty or too long.
        """
        if self.config.num_items is None:
            raise ValueError("the items of this model are ids without text; make it with config.num_items")
        numbers = self.item_texts.append(texts)
        self.config.num_items += len(numbers)
        if hasattr(self, "item_counts"):
            self.item_counts.append(len(numbers))
        return numbers

    def get_output_embeddings(self) -> nn.Module | None:
        return getattr(self, "item_head", None)

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        self.item_head = new_embeddings

    @takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        candidates: torch.Tensor | None = None,
        user_features: torch.Tensor | None = None,
        context_features: torch.Tensor | None = None,
        **kwargs,
    ) -> DeepSeekSequenceOutput:
        """Arguments as in `DeepSeekModel.forward`, the input_ids [B, S] being item numbers, oldest first, and

        labels: [B, S], usually the input_ids, -100 or the padding where there is nothing to learn; shifted here, so
            that every item is learned from those before it. The loss is `config.item_loss`.
        num_items_in_batch: divide the summed loss by this instead of the number of labels.
        candidates: [B, C] item numbers, filled up with the padding: score these alone. The labels [B] then say which
            of its candidates each row went on with, and the loss is the cross entropy among them.
        user_features: [B, F] numbers of values, 0 where there is none or it is unknown; absent, all are 0.
        context_features: [B, S, C], the same for the interaction that follows each item, the last being the one asked
            for. What is recorded of the layers counts these tokens too, and a cache can't be gone on with.
        inputs_embeds: in place of the input_ids; then nothing that is counted of the items is added to the scores.

        Returns:
            `logits` [B, V] or [B, C]: the scores of all items after the last one of each row, the lowest number for
            the padding. None while training without candidates: a large catalogue's scores would cost more than its
            sampled loss.

        Raises:
            ValueError: for a batch in which nothing tells where a sequence ends; for features of a model without such,
                or of another shape; with features for a cache that isn't empty, or position_ids; with counted items
                for a cache that isn't empty.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        side = feature_reader(self, user_features, context_features)
        self._refuse_half_histories(cache, position_ids)
        if attention_mask is None:
            attention_mask = self._item_mask(input_ids, cache)
        picked = self.pick_items(input_ids, candidates, is_learning=self.training and labels is not None)
        if inputs_embeds is None:
            inputs_embeds = picked.read(input_ids)
        mask = attention_mask
        if side is not None:
            inputs_embeds, mask, position_ids = side(inputs_embeds, attention_mask, user_features, context_features)
        outputs = self.model(
            attention_mask=mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        if side is not None:
            hidden_states = side.predicting(hidden_states)
        loss = logits = None
        if labels is not None and candidates is None:
            loss = self.next_item_loss(hidden_states, labels, num_items_in_batch, picked)
        if labels is None or candidates is not None or not self.training:
            logits = self.score(hidden_states, picked, input_ids, attention_mask, candidates)
        if labels is not None and candidates is not None:
            loss = cross_entropy(logits, labels, num_items_in_batch)
        return DeepSeekSequenceOutput(  # type: ignore[call-arg]  # the word of 5.24
            loss=loss,
            logits=logits,
            cache=outputs.cache,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _refuse_half_histories(self, cache: Cache | None, position_ids: torch.Tensor | None) -> None:
        has_past = cache is not None and cache.get_seq_length() > 0
        if has_past and hasattr(self, "item_counts"):
            raise ValueError("a model with counted items can't go on from a cache; give whole histories")
        if hasattr(self, "side_features") and (has_past or position_ids is not None):
            raise ValueError(
                "a model with user or context features counts positions itself and can't go on from a cache; give "
                "whole histories, without position_ids"
            )

    def _item_mask(self, input_ids: torch.Tensor | None, cache: Cache | None) -> torch.Tensor | None:
        """[B, S]; None where it would have to cover cached items too, or there are no numbers to tell padding by."""
        if input_ids is None or (cache is not None and cache.get_seq_length()):
            return None
        return torch.ne(input_ids, item_numbers(self.config)[1]).long()

    def score(
        self,
        hidden_states: torch.Tensor,
        picked: PickedItems,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        candidates: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Scores of all items [B, V], or of candidates [B, C], after the last item of each row: states [B, S, D]."""
        padding = item_numbers(self.config)[1]
        is_item = which_are_tokens(hidden_states, input_ids, attention_mask, padding)
        last = last_token(hidden_states, is_item)
        counted = None
        if hasattr(self, "item_counts") and input_ids is not None:
            counted = self.item_counts(input_ids.masked_fill(~is_item, padding))
        if candidates is None:
            return scores_of_all(last, picked.vectors, padding, counted)
        return scores_of_candidates(last, candidates, picked, padding, counted)

    def pick_items(
        self,
        input_ids: torch.Tensor | None = None,
        candidates: torch.Tensor | None = None,
        is_learning: bool = False,
    ) -> PickedItems:
        """The items that a batch of histories [B, S] needs: all as they are kept, or of texts that are to learn its
        own, its candidates and the negatives, with gradients."""
        config = self.config
        if config.num_items is None:
            return PickedItems(self.item_embeddings(), embed=self.model.embed_tokens)
        if not is_learning or input_ids is None:
            return PickedItems(self.item_embeddings())
        if candidates is not None:
            both = torch.cat((input_ids.flatten(), candidates.flatten()))
            return self.item_texts.pick(self.model, both, both[:0])
        if loss_name(config) == "softmax":
            negatives = torch.arange(1, config.num_items, device=input_ids.device)
        else:
            negatives = draw_negatives(config.num_item_negatives, config.num_items - 1, ITEM_PADDING, input_ids.device)
        return self.item_texts.pick(self.model, input_ids, negatives)

    def next_item_loss(
        self,
        hidden_states: torch.Tensor,
        labels: torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None = None,
        picked: PickedItems | None = None,
    ) -> torch.Tensor:
        """Mean loss of the item after each position: hidden states [B, S, D], labels [B, S] (not shifted); of all
        items, or among those picked."""
        config = self.config
        num_items, padding = item_numbers(config)
        targets = labels[:, 1:].to(hidden_states.device)
        known = (targets != -100) & (targets != padding)
        picked = picked or PickedItems(self.item_embeddings())
        total = item_loss(
            loss_name(config),
            hidden_states[:, :-1][known],
            picked.place(targets[known]),
            picked.vectors,
            padding,
            config.num_item_negatives,
            config.gbce_calibration,
            picked.negatives,
            num_items - 1,
        )
        return total / num_targets(targets.masked_fill(~known, IGNORED), num_items_in_batch)

    def last_states(self, input_ids: torch.Tensor, **kwargs) -> torch.Tensor:
        """Histories [B, S], padded on the right -> [B, D], whose products with the item_embeddings are the scores,
        without what is counted."""
        first = input_ids[:, :1]  # one candidate in place of the whole catalogue
        outputs = self(input_ids=input_ids, candidates=first, output_hidden_states=True, use_cache=False, **kwargs)
        states = outputs.hidden_states[-1]
        if hasattr(self, "side_features"):
            states = self.side_features.predicting(states)
        return last_token(states, torch.ne(input_ids, item_numbers(self.config)[1]))

    @torch.no_grad()
    def recommend(
        self,
        history: Sequence[int] | Sequence[Sequence[int]] | torch.Tensor,
        k: int = 10,
        exclude_seen: bool = True,
        filter: torch.Tensor | Sequence[int] | None = None,
        user_features: Any = None,
        context_features: Any = None,
        search: Callable[..., tuple[torch.Tensor, torch.Tensor]] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The k best next items, by exact search over the whole catalogue unless another search is given.

        Args:
            history: item numbers of one user, oldest first, or of several; or [B, S] padded on the right. The last
                `config.max_position_embeddings` of them are read.
            exclude_seen: leave out all items of the history.
            filter: the only items to choose from: their numbers, or booleans [V] or [B, V].
            user_features: numbers [F] for one user, [B, F] for several; see `forward`.
            context_features: of the request, [C] or [B, C]; or of what followed each item of the history and, at the
                last, of the request: [S, C] for one user, for several a list of such or [B, S, C].
            search: takes the `last_states` [B, D], the item_embeddings [V, D], k, the padding and the items to leave
                out (as `top_k` does), and returns what `top_k` does. With a filter the search is exact nevertheless.

        Returns:
            Items and scores, best first: [K] for one user, [B, K] for several; K = min(k, number of items). Where
            fewer are left, the rest is padding with a score of minus infinity.

        Raises:
            ValueError: for an empty history, a number that is no item or no value of its column, features of a model
                without such, another search for a model with counted items, or if nothing is left to choose from.
        """
        if search is not None and hasattr(self, "item_counts"):
            raise ValueError("a model with counted items is searched exactly; leave out the search")
        side = feature_reader(self, user_features, context_features)
        num_items, padding = item_numbers(self.config)
        rows: Any
        if torch.is_tensor(history):
            rows = [[item for item in row if item != padding] for row in torch.atleast_2d(history).tolist()]
            is_one = history.ndim == 1
        else:
            is_one = not len(history) or not hasattr(history[0], "__len__")
            rows = [history] if is_one else history
        seen = pad_histories(rows, num_items, padding).to(self.device)
        recent = [row[-self.config.max_position_embeddings :] for row in rows]
        input_ids = pad_histories(recent, num_items, padding).to(self.device)
        features: dict[str, torch.Tensor] = {}
        if side is not None:
            given = [[part] if is_one and part is not None else part for part in (user_features, context_features)]
            features = side.of_requests([*map(len, rows)], self.config.max_position_embeddings, *given)
        allowed = None if filter is None else allowed_items(filter, num_items, padding)
        was_training = self.training
        excluded = seen if exclude_seen else None
        try:
            if search is not None and allowed is None:
                states = self.eval().last_states(input_ids, **features)
                items, best = search(states, self.item_embeddings(), k, padding, excluded)
            else:
                scores = self.eval()(input_ids=input_ids, use_cache=False, **features).logits
                items, best = top_k(scores, k, padding, excluded, allowed, overwrite=True)
        finally:
            self.train(was_training)
        return (items[0], best[0]) if is_one else (items, best)
