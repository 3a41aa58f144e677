"""Generative recommendation: items are written as the digits of semantic IDs, and a language model of those digits
writes the next one (TIGER, Rajput et al., arXiv 2305.05065).

Item vectors are quantized to codes (items/quantizer.py); the vocabulary is a padding, a start and one token per
level and digit. A history is a start and its items' digits; beam search through the trie of all codes (items/trie.py)
writes only items that there are and that the user hasn't seen. Data, baselines and scores are those of every task
on interactions; items outside of the beam rank behind those in it.
"""

from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerBase

from ..data.sources import Rows
from ..training.arguments import ModelArguments
from ..training.optimization import IGNORED_LABEL
from ..training.saved import Saved
from ..training.scoring.eval_loss import Predicted
from ..training.scoring.ranks import ranks
from ..training.task import CausalCollator, Scores, Task, lower
from .arguments import GenerativeRecommendationArguments
from .baselines import baselines_of
from .item_vectors import neighbour_vectors, read_item_vectors
from .items.catalogue import PADDING, PADDING_TOKEN
from .items.histories import Histories, Notes, NumberedHistories, items_of
from .items.quantizer import distinct_codes, residual_codes
from .items.semantic_ids import SemanticIdTokenizer, choosable_items
from .items.titles import read_titles, with_titles
from .items.trie import CodeTrie, beam_items
from .report import CARD_CODE, RankingReport, full_ranking, ranked_items
from .sasrec import register_sasrec


class SemanticIdCollator(CausalCollator):
    """Histories on the right for training; for evaluation on the left, with the target's digits and the seen items."""

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        if "target" not in features[0]:
            return super().__call__(features)
        batch = {
            "target": torch.tensor([f["target"] for f in features]),
            "row": torch.tensor([f["row"] for f in features]),
        }
        batch["target_ids"] = torch.tensor([f["target_ids"] for f in features])
        batch["input_ids"], batch["attention_mask"] = self._pad([f["input_ids"] for f in features], left=True)
        batch["seen"], _ = self._pad([f["seen"] for f in features])
        return batch


class GenerativeRecommendation(Task):
    """See the module. Rows are those of `Histories`."""

    name = "generative_recommendation"
    next_command = "deepseek-hf recommend {folder} --history FILE"
    arguments_class = GenerativeRecommendationArguments
    arguments: GenerativeRecommendationArguments
    auto_class: Any = AutoModelForCausalLM
    tokenizer_class = SemanticIdTokenizer
    peft_task_type = "CAUSAL_LM"

    trie: CodeTrie
    tokenizer: SemanticIdTokenizer

    def __init__(self, arguments: GenerativeRecommendationArguments, seed: int) -> None:
        register_sasrec()  # whose vectors --item_vectors may name
        self.arguments, self.seed, self.notes = arguments, seed, Notes()
        self.source, self.ranking = Histories(arguments, seed, self.notes), RankingReport(arguments)

    def load_splits(self) -> dict[str, Rows]:
        splits = self.source.read()
        self.ranking.check_users(splits.get("test"))
        return splits

    def tokenizer_texts(self, splits: dict[str, Rows]) -> Iterator[str]:
        return items_of(splits)

    def new_tokenizer(self, arguments: ModelArguments, splits: dict[str, Rows]) -> PreTrainedTokenizerBase:
        """Quantizes the items' vectors: those of the splits, and what else has a vector.

        Raises:
            ValueError: if fewer than two items have a vector, or an item is named like the padding.
        """
        named = sorted(set(items_of(splits)))
        items, vectors = self._vectors(named, splits)
        if len(items) < 2 or PADDING_TOKEN in items:
            raise ValueError(
                f"{len(items)} items have a vector; two or more are needed, none of them named {PADDING_TOKEN}."
            )
        if missing := len(set(named) - set(items)):
            self.notes.say(
                f"{missing:,} of {len(named):,} items have no vector and so no code; they can't be recommended"
            )
        codes, left_over = residual_codes(vectors, self.arguments.num_levels, self.arguments.codebook_size, self.seed)
        codes, collisions = distinct_codes(codes)
        self.notes.say(
            f"codes of {' x '.join(str(top + 1) for top in codes.max(0))} digits for {len(items):,} items; variance "
            f"left over by level: {', '.join(f'{share:.1%}' for share in left_over)}",
            f"{collisions:,} items share a code with another"
            + ", so a last digit tells them apart" * bool(collisions),
        )
        return SemanticIdTokenizer.of_codes(items, codes)

    def _vectors(self, named: list[str], splits: dict[str, Rows]) -> tuple[list[str], np.ndarray]:
        arguments = self.arguments
        if arguments.item_vectors is None:
            if "train" not in splits:
                raise ValueError("There is neither training data nor --item_vectors to make codes of.")
            return named, neighbour_vectors(splits["train"]["source"], named, self.seed)
        titles: dict[str, str] = {}
        if arguments.titles_file:
            titles = read_titles(arguments.titles_file, arguments.item_column, arguments.title_column)
        texts, untitled = with_titles([*named, *(item for item in titles if item not in set(named))], titles)
        if untitled and titles:
            self.notes.say(f"{untitled:,} items have no title; their ids stand in")
        return read_item_vectors(arguments.item_vectors, arguments.item_ids_file, texts)

    def settings(self) -> dict[str, Any]:
        """Those of the flags, and of the histories."""
        return super().settings() | self.source.settings()

    def check_saved(self, saved: Saved, is_trained: bool) -> None:
        """Refuses what has no vocabulary of semantic IDs, a trunk too."""
        super().check_saved(saved, is_trained)
        saved.check_task(self.name, "CausalLM")
        if saved.task != self.name:
            raise ValueError(f"{saved.where}: it has no semantic IDs; name a model of {self.name}, or a --preset.")

    def config_fields(self, splits: dict[str, Rows], saved: dict[str, Any]) -> dict[str, Any]:
        longest = (self.arguments.max_length + 1) * (self.arguments.num_levels + 1) + 1
        return {} if saved else {"max_position_embeddings": longest}

    def fit_lengths(self, positions: int, tokenizer: PreTrainedTokenizerBase) -> None:
        """A start, and the digits of a history and of the item that is written."""
        digits = cast(SemanticIdTokenizer, tokenizer).codes.shape[1]
        lower(self.arguments, positions, max_length=(positions - 1) // digits - 1)

    def features(self, rows: Rows, tokenizer: PreTrainedTokenizerBase, is_training: bool) -> Rows:
        """Histories as digits, in windows as `NumberedHistories` cuts them; for evaluation also `seen`, `target` and
        the target's digits.

        Raises:
            ValueError: as `NumberedHistories` and its features.
        """
        assert isinstance(tokenizer, SemanticIdTokenizer)
        self.tokenizer, self.trie = tokenizer, CodeTrie(tokenizer.codes)
        numbered = NumberedHistories(rows, tokenizer.numbers, self.arguments.max_length, is_training)
        self.notes.say(*numbered.notes_on_histories(), *numbered.notes_on_targets())
        windows = numbered.features()
        features: dict[str, list[Any]] = {name: windows[name] for name in ("seen", "target") if not is_training}
        features["input_ids"] = [tokenizer.history(window) for window in windows["input_ids"]]
        features["length"] = [len(tokens) for tokens in features["input_ids"]]
        if is_training:
            unlearned = 1 + self.trie.depth  # nothing stands before the first item
            features["labels"] = [[IGNORED_LABEL] * unlearned + ids[unlearned:] for ids in features["input_ids"]]
        else:
            unknown = [IGNORED_LABEL] * self.trie.depth
            features["target_ids"] = [
                tokenizer.item_tokens[target - 1] if target != PADDING else unknown for target in features["target"]
            ]
        return Dataset.from_dict(features)

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> CausalCollator:
        return SemanticIdCollator(PADDING)

    def generation_config(self, tokenizer: PreTrainedTokenizerBase, num_beams: int) -> GenerationConfig | None:
        if num_beams > 1:
            raise ValueError("--generation_num_beams: items are searched by --num_beams; set that.")
        return None

    def predict_batch(self, model: Any, inputs: dict[str, Any]) -> Predicted:
        """Cross entropies of the target's digits, and [B, 1 + M]: the target's rank and the items of the beam."""
        input_ids, mask, target_ids = (inputs[name] for name in ("input_ids", "attention_mask", "target_ids"))
        ids = torch.cat((input_ids, target_ids.clamp(min=PADDING)), dim=1)
        logits = model(
            input_ids=ids,
            attention_mask=torch.cat((mask, torch.ones_like(target_ids)), dim=1),
            logits_to_keep=self.trie.depth + 1,
            use_cache=False,
        ).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(
            logits.float().transpose(1, 2), target_ids, ignore_index=IGNORED_LABEL, reduction="none"
        )
        num_items = len(self.tokenizer.items)
        places, scores = beam_items(
            getattr(model, "module", model),  # a wrapper of several processes can't generate
            self.trie.to(input_ids.device),
            self.tokenizer.first_tokens,
            input_ids,
            mask,
            choosable_items(inputs["seen"], num_items),
            self.arguments.num_beams,
        )
        items = places + 1  # numbers, of which the padding is 0
        everything = scores.new_full((len(items), num_items + 1), float("-inf")).scatter_(1, items, scores)
        found = ranks(everything, inputs["target"], inputs["seen"], PADDING)
        counts = (target_ids != IGNORED_LABEL).sum(1)
        return Predicted(losses.sum(1), counts, torch.cat((found[:, None], items), dim=1))

    def decode(self, outputs: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> list[Any]:
        return ranked_items(outputs, [PADDING_TOKEN, *self.tokenizer.items])

    def score(self, predictions: list[Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
        scores = full_ranking(predictions, len(self.tokenizer.items))
        beam = f", by a beam of {self.arguments.num_beams}, items outside of it behind all others"
        return scores | {"ranking_signature": scores["ranking_signature"] + beam}

    def report(self, predictions: list[Any], rows: list[dict[str, Any]], train: Rows | None) -> Scores:
        """Beside the baselines and other runs."""
        baselines = baselines_of(train, rows, self.tokenizer.numbers) if self.arguments.baselines else {}
        return self.ranking.scores(predictions, rows, baselines)

    def card_data(self) -> dict[str, Any]:
        return self.ranking.card(self.notes) | {
            "title": "generative recommendation with semantic IDs",
            "code": CARD_CODE,
            "prediction": f"the items of a beam search with {self.arguments.num_beams} beams in the trie of all codes",
            "preprocessing": f"at most {self.arguments.max_length} items of a history, each written as "
            f"{self.trie.depth} digits",
        }
