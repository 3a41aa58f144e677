"""A recommender as it is served: a model with its catalogue, item ids in and out, and what carried a score."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from modeling_deepseek import AutoModelForRecommendation
from modeling_deepseek.item_catalogue import item_numbers
from modeling_deepseek.recommendation_head import feature_reader

from ..data.cells import as_ids
from ..data.files import replaced_folder
from ..retrieval.encoding import token_ids
from ..training.loading import saved_tokenizer, served_model
from ..training.saved import Saved, named_errors
from .items.catalogue import CATALOGUE_FOLDER, PADDING, catalogue_tokenizer
from .items.feature_columns import request_features
from .items.index import ItemIndex
from .sasrec import register_sasrec

SERVED = ("recommendation", "news_recommendation")  # tasks whose models these are


class Recommender:
    """A model with its catalogue: item ids in and out.

    Args:
        model: of an architecture with `recommend`, see `DeepSeekForRecommendation`.
        catalogue: its items as tokens.
        tokenizer: of the words, where items are texts.
        index: `exact`, or `faiss` for an `ItemIndex`, made at the first request and again when the items' vectors
            have changed. With a filter the search is exact always.

    Raises:
        ValueError: if faiss isn't installed, or the model has no item vectors to search or counts beside them.
    """

    def __init__(
        self,
        model: Any,
        catalogue: PreTrainedTokenizerFast,
        tokenizer: PreTrainedTokenizerBase | None = None,
        index: str = "exact",
    ) -> None:
        if index not in ("exact", "faiss"):
            raise ValueError(f"index={index!r}: it is exact or faiss")
        if index == "faiss" and not hasattr(model, "last_states"):
            raise ValueError(f"{type(model).__name__} has no item vectors that faiss could search; use index='exact'")
        if index == "faiss" and hasattr(model, "item_counts"):
            raise ValueError("a model with counted items (--item_counts) is searched exactly; use index='exact'")
        self.search = {"search": ItemIndex()} if index == "faiss" else {}
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.numbers = catalogue.get_vocab()
        self.items = sorted(self.numbers, key=self.numbers.__getitem__)  # a million one by one would take seconds

    def add_items(self, texts: dict[Any, str]) -> None:
        """Encode new items, given as {id: text}, so that they are recommended with the others.

        Raises:
            ValueError: if the model's items have no text, an id is known already, or a text is empty.
        """
        if self.tokenizer is None:
            raise ValueError("the items of this model are ids without text; it can't take new ones")
        items = [text for text in as_ids(texts) if text is not None]
        for item, text in zip(items, texts.values(), strict=True):
            if item in self.numbers:
                raise ValueError(f"item {item!r} is in the catalogue already")
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"new item {item!r} has no text")
        length = self.model.config.item_text_length
        rows, cut = token_ids(self.tokenizer, [text.strip() for text in texts.values()], "", length)
        if cut:
            print(f"{cut:,} of {len(rows):,} new texts were cut to {length} tokens", file=sys.stderr)
        self.numbers = self.numbers | dict(zip(items, self.model.add_items(rows).tolist(), strict=True))
        self.items += items

    def save(self, folder: str | Path) -> None:
        """Save a model whose items are texts, with its catalogue, for `load`.

        Raises:
            ValueError: if its items have no text.
        """
        if self.tokenizer is None:
            raise ValueError("the items of this model are ids without text; nothing about it can have changed")
        with replaced_folder(Path(folder)) as beside:
            self.model.save_pretrained(beside)
            self.tokenizer.save_pretrained(beside)
            catalogue_tokenizer(self.items[1:]).save_pretrained(beside / CATALOGUE_FOLDER)

    def number(self, items: Iterable[Any]) -> tuple[list[int], int]:
        """Numbers of the known items, and how many are unknown."""
        texts = as_ids(items)
        known = [self.numbers[text] for text in texts if text in self.numbers]
        return known, len(texts) - len(known)

    def recommend(
        self,
        history: Sequence[Any] | Sequence[Sequence[Any]],
        k: int = 10,
        exclude_seen: bool = True,
        filter: Iterable[Any] | None = None,
        user_features: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        context_features: Any = None,
    ) -> list[Any]:
        """The k best items as (id, score), best first, for one history of item ids or a list for several.

        Args:
            user_features: {column: value}, for several histories a list of such.
            context_features: {column: value} of the request, or a list of such that says for each item of the history
                what its next interaction's was, the last being the request's; for several histories a list of these.

        Raises:
            ValueError: if a history holds no known item, a feature is none that the model reads, or nothing is left
                to recommend.
        """
        is_one = not history or not isinstance(history[0], (list, tuple))
        histories = [history] if is_one else history
        numbered = []
        for row, items in enumerate(histories):
            known, unknown = self.number(cast(Sequence[Any], items))
            if not known:
                raise ValueError(f"history {row} has {unknown} items, none of which the model knows")
            numbered.append(known)
        if is_one:
            user_features = None if user_features is None else [cast(Mapping[str, Any], user_features)]
            context_features = None if context_features is None else [context_features]
        features = self.features(histories, user_features, context_features)
        options = features | self.search
        found, scores = self.model.recommend(numbered, k, exclude_seen, self.allowed(filter), **options)
        rows = [
            [(self.items[item], score) for item, score in zip(items, best, strict=True) if item != PADDING]
            for items, best in zip(found.tolist(), scores.tolist(), strict=True)
        ]
        return rows[0] if is_one else rows

    def features(self, histories: Sequence[Any], user_features: Any, context_features: Any) -> dict[str, Any]:
        """Numbers of several histories' features; values that the model doesn't know are counted on standard error.

        Raises:
            ValueError: for features that the model doesn't read.
        """
        side = feature_reader(self.model, user_features, context_features)
        if side is None:
            return {}
        texts = [as_ids(history) for history in histories]
        places = [(len(row), [place for place, item in enumerate(row) if item in self.numbers]) for row in texts]
        numbers = (side.user_numbers, side.context_numbers)
        features, notes = request_features(numbers, places, user_features, context_features)
        for note in notes:
            print(note, file=sys.stderr)
        return features

    def allowed(self, items: Iterable[Any] | None) -> list[int] | None:
        """Numbers of a filter's items.

        Raises:
            ValueError: if none of them is in the catalogue.
        """
        if items is None:
            return None
        known, unknown = self.number(items)
        if not known:
            raise ValueError(f"the filter leaves nothing: none of its {unknown} items is in the model's catalogue")
        return known

    def explain(
        self,
        history: Sequence[Any],
        item: str,
        method: str = "integrated_gradients",
        steps: int = 32,
        user_features: Mapping[str, Any] | None = None,
        context_features: Any = None,
    ) -> list[tuple[str, float]]:
        """How much each known item of the history that the model reads carried the score of `item`.

        Args:
            method: `integrated_gradients` (Sundararajan et al., arXiv 1703.01365): the shares add up to the score,
                without what is counted, minus that of a history of average items, up to the error of `steps`.
                `attention`: the last position's attention weights, mean over layers and heads; where the model
                looked, not why.
            user_features, context_features: as for one history in `recommend`; they stay as they are, and what
                attention goes to them is not shown.

        Raises:
            ValueError: for an unknown item, or a model without such weights.
        """
        if not hasattr(self.model, "read_items"):
            raise ValueError(f"{type(self.model).__name__} can't be explained; a DeepSeekForRecommendation can")
        known, _ = self.number(history)
        limit = self.model.config.max_position_embeddings
        lengths, known = [len(known)], known[-limit:]
        if item not in self.numbers or not known:
            raise ValueError(f"nothing to explain: {item!r} or the history is not in the model's catalogue")
        attribute = integrated_gradients if method == "integrated_gradients" else last_attention
        given = [None if part is None else [part] for part in (user_features, context_features)]
        features = self.features([history], *given)
        if features:
            features = self.model.side_features.of_requests(lengths, limit, **features)
        numbers = torch.tensor([known], device=self.model.device)
        shares = attribute(self.model, numbers, self.numbers[item], steps, **features)
        return [(self.items[number], share) for number, share in zip(known, shares.tolist(), strict=True)]


def integrated_gradients(
    model: Any, history: torch.Tensor, item: int, steps: int = 32, **features: torch.Tensor
) -> torch.Tensor:
    """[S] shares of a history's items [1, S] in the score of an item, by the midpoint rule; features stay as given.

    From the catalogue's mean embedding: from zero there is no smooth path, for the norms give every vector its length.
    """
    every = torch.arange(item_numbers(model.config)[0], device=history.device)
    average = model.read_items(every).detach().mean(0)
    embeddings = model.read_items(history).detach()
    total = torch.zeros_like(embeddings)
    mask = torch.ones_like(history)
    for step in range(steps):
        point = average.lerp(embeddings, (step + 0.5) / steps).requires_grad_()
        score = model(inputs_embeds=point, attention_mask=mask, use_cache=False, **features).logits[0, item]
        total += torch.autograd.grad(score, point)[0]
    return ((embeddings - average) * total / steps).sum(-1)[0]


@torch.no_grad()
def last_attention(
    model: Any, history: torch.Tensor, item: int, steps: int = 0, **features: torch.Tensor
) -> torch.Tensor:
    """[S] weights that the last position gives to each of a history [1, S], mean over layers and heads."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")  # the only one that returns weights
    try:
        attentions = model(input_ids=history, output_attentions=True, use_cache=False, **features).attentions
    finally:
        model.set_attn_implementation(before)
    if not attentions:
        raise ValueError(f"{type(model).__name__} gives no attention weights; use integrated_gradients.")
    weights = torch.stack([layer[0, :, -1].mean(0) for layer in attentions]).mean(0)
    side = feature_reader(model)
    return weights if side is None else weights[side.item_places(len(weights))]


def open_recommender(saved: Saved, index: str = "exact") -> Recommender:
    """The recommender that was saved, on the accelerator if there is one; `index` as in `Recommender`.

    Raises:
        ValueError: with one line, if it is none, or for an index that it can't have.
    """
    register_sasrec()
    if saved.task not in SERVED:
        saved.check_task(SERVED[0], "Recommendation")
    model = served_model(saved, AutoModelForRecommendation)
    is_text = getattr(model.config, "num_items", None) is not None
    with named_errors(saved.where):
        if is_text:  # the texts are the base's, whatever an adapter has learned of them
            folder = (saved.base or saved).folder / CATALOGUE_FOLDER
            catalogue, tokenizer = PreTrainedTokenizerFast.from_pretrained(folder), saved_tokenizer(saved)
        else:
            catalogue, tokenizer = saved_tokenizer(saved, PreTrainedTokenizerFast), None
    if torch.accelerator.is_available():
        model = model.to(torch.accelerator.current_accelerator())
    return Recommender(model, cast(Any, catalogue), tokenizer, index)
