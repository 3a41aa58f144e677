"""Opening what `finetune` has left: the recommender that fits the model, by scores or by beam search."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM

from modeling_deepseek.item_ranking import allowed_items, pad_histories

from ..training.loading import saved_tokenizer, served_model
from ..training.saved import Saved
from ..training.task import CausalCollator
from .arguments import GenerativeRecommendationArguments, RecommendationArguments
from .generative import GenerativeRecommendation
from .items.catalogue import PADDING, PADDING_TOKEN
from .items.semantic_ids import SemanticIdTokenizer, choosable_items
from .items.trie import CodeTrie, beam_items
from .recommender import Recommender, open_recommender

ARGUMENTS: dict[str, type] = {
    "recommendation": RecommendationArguments,
    GenerativeRecommendation.name: GenerativeRecommendationArguments,
}


class BeamSearch:
    """What `Recommender` asks of a model: `recommend` in item numbers, here by beam search.

    Args:
        max_length: items of a history that are read.
        num_beams: items that the search ends with, or as many as are asked for if that is more.
    """

    def __init__(self, model: Any, tokenizer: SemanticIdTokenizer, max_length: int, num_beams: int) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer
        self.max_length, self.num_beams = max_length, num_beams
        self.trie = CodeTrie(tokenizer.codes).to(model.device)
        self.collator = CausalCollator(PADDING)

    def recommend(
        self, history: Sequence[Sequence[int]], k: int = 10, exclude_seen: bool = True, filter: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Items [B, K] and scores [B, K], best first, as `DeepSeekForRecommendation.recommend` of several users.

        Raises:
            ValueError: for an empty history, a number that is no item, or if nothing is left to choose from.
        """
        num_items, device = len(self.tokenizer.items), self.model.device
        seen = pad_histories(history, num_items + 1, PADDING).to(device)
        choosable = choosable_items(seen if exclude_seen else torch.zeros_like(seen), num_items)
        if filter is not None:
            choosable &= allowed_items(filter, num_items + 1, PADDING).to(device)[..., 1:]
        if not bool(choosable.any(1).all()):
            row = int((~choosable.any(1)).nonzero()[0])
            raise ValueError(f"nothing is left to recommend for row {row}: its history and the filter leave no item")
        prompts = [self.tokenizer.history(row[-self.max_length :]) for row in history]
        input_ids, mask = (part.to(device) for part in self.collator._pad(prompts, left=True))
        places, scores = beam_items(
            self.model, self.trie, self.tokenizer.first_tokens, input_ids, mask, choosable, max(k, self.num_beams)
        )
        return places[:, :k] + 1, scores[:, :k]


class GenerativeRecommender(Recommender):
    """A generative model with its catalogue; scores are logarithms of the codes' probabilities."""

    def __init__(self, model: BeamSearch) -> None:
        self.model, self.tokenizer = model, None  # items aren't texts
        self.search = {}
        self.numbers = model.tokenizer.numbers
        self.items = [PADDING_TOKEN, *model.tokenizer.items]

    def explain(self, history: Sequence[Any], item: str, *args: Any, **kwargs: Any) -> list[tuple[str, float]]:
        """Refused: the score of a code is a product over digits."""
        raise ValueError("--explain: a generative recommender can't say what carried an item; leave it out.")


def load_generative(saved: Saved) -> GenerativeRecommender:
    """The generative recommender that was saved, on the accelerator if there is one.

    Raises:
        ValueError: with one line, if it is none.
    """
    settings = history_settings(saved)
    model, tokenizer = served_model(saved, AutoModelForCausalLM), saved_tokenizer(saved, SemanticIdTokenizer)
    if torch.accelerator.is_available():
        model = model.to(torch.accelerator.current_accelerator())
    defaults = GenerativeRecommendationArguments
    max_length = settings.get("max_length", defaults.max_length)
    return GenerativeRecommender(
        BeamSearch(model, cast(Any, tokenizer), max_length, settings.get("num_beams", defaults.num_beams))
    )


def history_settings(saved: Saved) -> dict[str, Any]:
    """How the model's training made histories, such as `keep_repeats` and `tie_rule`; empty if that isn't known."""
    arguments_class = ARGUMENTS.get(saved.task or "")
    return saved.settings_for(str(saved.task), arguments_class) if arguments_class else {}


def load_saved(saved: Saved, index: str = "exact") -> Recommender:
    """As `load`, for what was opened already."""
    if saved.task != GenerativeRecommendation.name:
        return open_recommender(saved, index)
    if index != "exact":
        raise ValueError(f"{saved.name}: semantic IDs are found by beam search; leave out the index.")
    return load_generative(saved)


def load(name: str, revision: str = "main", index: str = "exact") -> Recommender:
    """The recommender in a folder or on the Hub, on the accelerator if there is one; `index` as in `Recommender`.

    Raises:
        ValueError: with one line, if there is none, or for an index that it can't have.
    """
    return load_saved(Saved.open(None, name, revision), index)
