"""Recommendation: the items of a user's history in, a score for every item to come next out.

Data are interactions (user, item, time), files of ready histories and targets, MovieLens-100K out of RecBole, or the
embedded simulated users (items/histories.py). The catalogue is a tokenizer with one token per item, in an order made
by hashing: item numbers say nothing about when an item first appeared. Scores are counted by full ranking: every item
but those of the history, ties against the target (report.py).
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from modeling_deepseek import AutoModelForRecommendation

from ..data.sources import Rows
from ..data.table import Columns, read_columns
from ..training.arguments import ModelArguments
from ..training.batches import RowDraws
from ..training.optimization import IGNORED_LABEL
from ..training.saved import Saved
from ..training.scoring.eval_loss import Predicted
from ..training.scoring.ranks import highest, ranks
from ..training.task import CausalCollator, Scores, Task, lower, prefixed
from .arguments import RecommendationArguments
from .baselines import baselines_of
from .count_tables import KEPT, WEIGHTS, best_count_weights, count_items
from .items.catalogue import PADDING, PADDING_TOKEN, TextCatalogue, item_tokenizer, read_items
from .items.dropout import item_dropout
from .items.feature_columns import FEATURES, FeatureColumns
from .items.histories import Histories, Notes, NumberedHistories, items_of
from .items.interactions import ML_100K_USERS, ml_100k_columns
from .items.svd import add_item_svd
from .report import (
    FEATURE_CARD_CODE,
    MODEL_CARD_CODE,
    TEXT_CARD_CODE,
    RankingReport,
    full_ranking,
    ranked_items,
)
from .sasrec import register_sasrec, sasrec_config

SHOWN_ITEMS = 20  # recommendations that are kept per scored user


class RecommendationCollator(CausalCollator):
    """Pads histories on the right; for evaluation also the items that were seen. Training histories lose items first,
    at a rate of up to `highest_rate`."""

    def __init__(self, pad_token_id: int, highest_rate: float = 0.0, seed: int = 0) -> None:
        super().__init__(pad_token_id)
        self.highest_rate, self.draws = highest_rate, RowDraws(seed)

    def set_epoch(self, epoch: int) -> None:
        self.draws.set_epoch(epoch)

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = {}
        if self.highest_rate and "target" not in features[0]:
            features = [item_dropout(f, self.highest_rate, self.draws.of(f["number"])) for f in features]
        batch["input_ids"], batch["attention_mask"] = self._pad([f["input_ids"] for f in features])
        if "target" in features[0]:
            batch["seen"], _ = self._pad([f["seen"] for f in features])
            batch["target"] = torch.tensor([f["target"] for f in features])
        else:
            labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED_LABEL)
            labels[:, 0] = IGNORED_LABEL  # nothing stands before it
            batch["labels"] = labels
        if "user_features" in features[0]:
            batch["user_features"] = torch.tensor([f["user_features"] for f in features])
        if "context_features" in features[0]:
            contexts = [torch.tensor(f["context_features"]) for f in features]
            batch["context_features"] = torch.nn.utils.rnn.pad_sequence(contexts, batch_first=True)
        if "row" in features[0]:
            batch["row"] = torch.tensor([f["row"] for f in features])
        return batch


class Recommendation(Task):
    """See the module. Rows are `user`, `source` (the history as item ids), `target`, and `contexts` if there are."""

    name = "recommendation"
    next_command = "deepseek-hf recommend {folder} --history FILE"
    arguments_class = RecommendationArguments
    auto_class = AutoModelForRecommendation
    tokenizer_class: Any = PreTrainedTokenizerFast
    peft_task_type = "FEATURE_EXTRACTION"

    def __init__(self, arguments: RecommendationArguments, seed: int) -> None:
        register_sasrec()
        self.arguments = arguments
        self.seed = seed
        self.notes = Notes()
        self.side = FeatureColumns(arguments)
        self.source = Histories(arguments, seed, self.notes, self.side.context_columns)
        self.ranking = RankingReport(arguments)
        self.numbers: dict[str, int] = {}  # item id -> number, known with the tokenizer
        self.catalogue: TextCatalogue | None = None  # where items are texts
        self.is_new = True
        self.histories: list[list[str]] = []  # of training, for --init_items and --item_counts
        self.model: Any = None  # one whose counts have no weights yet
        self.tried = np.empty((0, 0))  # ranks of the latest predictions by each of WEIGHTS
        if arguments.items_file:
            self.tokenizer_class = None  # the model's own, of words

    # -- rows --

    def load_splits(self) -> dict[str, Rows]:
        arguments, splits = self.arguments, self.source.read()
        self.ranking.check_users(splits.get("test"))
        if arguments.items_file:
            self._read_texts(arguments.items_file, splits)
        if arguments.user_feature_columns:
            users = {user for rows in splits.values() for user in rows["user"]}
            self.notes.say(*self.side.read_users(*self._user_table(), users))
        return splits

    def _user_table(self) -> tuple[Columns, str, str]:
        """Columns of the users, which of them says who it is, and where they stand."""
        path = self.arguments.users_file
        if path is None:
            return ml_100k_columns(ML_100K_USERS), "user_id", "ml-100k"
        return read_columns(path), self.arguments.user_column, path

    def _read_texts(self, path: str, splits: dict[str, Rows]) -> None:
        texts, notes = read_items(path, self.arguments.item_column, self.arguments.text_columns)
        if PADDING_TOKEN in texts:
            raise ValueError(f"An item is named {PADDING_TOKEN}, which stands for no item; rename it.")
        self.notes.say(*notes)
        bare = sorted(set(items_of(splits)) - texts.keys())
        if bare:
            where = Path(path).name
            self.notes.say(
                f"{len(bare):,} items of the interactions have no row in {where}; all of them get one vector"
            )
        self.catalogue = TextCatalogue(texts | dict.fromkeys(bare, ""))

    # -- catalogue and model --

    def tokenizer_texts(self, splits: dict[str, Rows]) -> Iterator[str]:
        yield from items_of(splits) if self.catalogue is None else self.catalogue.texts.values()

    def new_tokenizer(self, arguments: ModelArguments, splits: dict[str, Rows]) -> PreTrainedTokenizerBase:
        """Of all items, or of the words of their texts."""
        if self.catalogue is not None:
            return super().new_tokenizer(arguments, splits)
        return item_tokenizer(set(self.tokenizer_texts(splits)), self.seed)

    def settings(self) -> dict[str, Any]:
        """Those of the flags, and of the histories."""
        return super().settings() | self.source.settings()

    def check_saved(self, saved: Saved, is_trained: bool) -> None:
        """Also refuses a model of words where the items are ids."""
        super().check_saved(saved, is_trained)
        if self.catalogue is not None:
            self.catalogue.folder = (saved.base or saved).folder
        if self.tokenizer_class is not None:
            saved.check_task(self.name, self.auto_class.__name__.removeprefix("AutoModelFor"))

    def config_fields(self, splits: dict[str, Rows], saved: dict[str, Any]) -> dict[str, Any]:
        self.is_new = not saved
        if (self.arguments.init_items == "svd" or self.arguments.item_counts) and "train" in splits:
            self.histories = splits["train"]["source"]
        if self.arguments.item_counts and saved:
            raise ValueError("--item_counts: a saved model keeps its own; leave it out.")
        if saved.get("num_items") and self.catalogue is None:
            raise ValueError("The items of this model are texts: name them by --items_file.")
        fields: dict[str, Any] = {} if saved else {"max_position_embeddings": self.arguments.max_length}
        if self.catalogue is not None:
            fields |= self.catalogue.config_fields(saved, self.arguments.max_text_length)
        if self.arguments.item_counts:
            fields["num_item_neighbors"] = KEPT
        columns, notes = self.side.config_fields(splits.get("train"), saved)
        self.notes.say(*notes)
        return fields | columns

    def prepare_model(self, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        if self.catalogue is not None:
            self.notes.say(self.catalogue.prepare(model, tokenizer))
        if not self.histories or not self.is_new:
            return
        numbers = self.item_numbers(tokenizer)
        numbered = [[numbers[item] for item in history] for history in self.histories]
        if self.arguments.item_counts:
            model.item_counts.fill(*count_items(numbered, len(numbers), model.config.num_item_neighbors))
            self.model = model
        if self.arguments.init_items == "svd":
            weight, texts = model.get_input_embeddings().weight, None
            if self.catalogue is not None:
                if not model.config.item_id_embeddings:
                    raise ValueError(
                        "--init_items svd: items of texts have vectors of their own only with --config_overrides "
                        "item_id_embeddings=true; add it."
                    )
                weight, texts = model.item_texts.identities.weight, model.item_texts.tokens.cpu()
            add_item_svd(weight, numbered, model.config.initializer_range, self.seed, texts)
            found = "histories" if texts is None else "histories and the items' words"
            self.notes.say(f"item vectors begin with those of an SVD of the training {found}")

    def save_beside(self, folder: Path) -> None:
        if self.catalogue is not None:
            self.catalogue.save(folder)

    def model_config(self, config: Any) -> Any:
        return sasrec_config(config) if self.arguments.sasrec else config

    # -- features --

    def item_numbers(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
        return tokenizer.get_vocab() if self.catalogue is None else self.catalogue.numbers

    def fit_lengths(self, positions: int, tokenizer: PreTrainedTokenizerBase) -> None:
        lower(self.arguments, positions, max_length=positions)

    def features(self, rows: Rows, tokenizer: PreTrainedTokenizerBase, is_training: bool) -> Rows:
        """Item numbers; training histories in windows of --max_length + 1, which overlap by one item, so that every
        item but a history's first is learned once in each epoch. For evaluation also `seen` and `target`. Features go
        by the model's numbers, a context with the item before it.

        Raises:
            ValueError: if nothing can be learned, or no history holds an item of the catalogue.
        """
        self.numbers, side, say = self.item_numbers(tokenizer), self.side, self.notes.say
        numbered = NumberedHistories(rows, self.numbers, self.arguments.max_length, is_training)
        own = {}
        if side.user_numbers:
            users = [(side.of_user(user), row) for user, row in zip(rows["user"], numbered, strict=True)]
            own["user_features"] = [numbers for numbers, row in users for _ in row.windows]
        if side.context_numbers:
            own["context_features"] = list(self._contexts(rows, numbered))
        say(*numbered.notes_on_histories(), *side.notes_on_unknown(), *numbered.notes_on_targets())
        return Dataset.from_dict(numbered.features() | own)

    def _contexts(self, rows: Rows, numbered: NumberedHistories) -> Iterator[list[Any]]:
        """The numbers of the contexts after the items of each window."""
        contexts = rows["contexts"] if "contexts" in rows.column_names else [None] * len(rows)
        for history, given, row in zip(rows["source"], contexts, numbered, strict=True):
            after = self.side.of_contexts(given, row.places, len(history))
            yield from (after[window] for window in row.windows)

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> RecommendationCollator:
        return RecommendationCollator(PADDING, self.arguments.item_dropout, self.seed)

    def loss_function(self, label_smoothing: float) -> Callable[..., torch.Tensor] | None:
        if label_smoothing:
            raise ValueError("--label_smoothing_factor: the losses over items have none; leave it out.")
        return None

    # -- scores and reports --

    def predict_batch(self, model: Any, inputs: dict[str, Any]) -> Predicted:
        """Cross entropies over all items, and [B, 1 + items]: the target's rank and the best unseen items."""
        names = [name for name in ("input_ids", "attention_mask", *FEATURES) if name in inputs]
        scores = model(**{name: inputs[name] for name in names}).logits.float()
        targets, seen = inputs["target"], inputs["seen"]
        scores[:, PADDING] = float("-inf")
        tried = self._tried_ranks(scores, inputs)
        losses = torch.nn.functional.cross_entropy(scores, targets, ignore_index=PADDING, reduction="none")
        found = ranks(scores, targets, seen, PADDING)
        values, items = highest(scores.scatter_(1, seen, float("-inf")), min(SHOWN_ITEMS, scores.shape[1] - 1))
        items = items.masked_fill(values == float("-inf"), PADDING)
        return Predicted(losses, targets != PADDING, torch.cat((found[:, None], *tried, items), dim=1))

    def _tried_ranks(self, scores: torch.Tensor, inputs: dict[str, Any]) -> list[torch.Tensor]:
        """The targets' ranks by each of WEIGHTS, as columns, where they are to be chosen."""
        if self.model is None:
            return []
        near, after = self.model.item_counts.scores(inputs["input_ids"])
        sums = (scores + weights[0] * near + weights[1] * after for weights in WEIGHTS)
        return [ranks(total, inputs["target"], inputs["seen"], PADDING)[:, None] for total in sums]

    def after_evaluation(self) -> Scores:
        """Choose the weights of what is counted, and have the saved model know them."""
        if self.model is None:
            return Scores({})
        weights, scores = best_count_weights(self.tried)
        names = ("item_neighbor_weight", "item_transition_weight")
        chosen = dict(zip(names, weights, strict=True))
        for name, weight in chosen.items():
            setattr(self.model.config, name, weight)
        files = {"config.json": self.model.config.to_json_string()}
        self.model = None
        named = ", ".join(f"{name} {weight:g}" for name, weight in chosen.items())
        self.notes.append(f"of {len(WEIGHTS)} weights of what is counted validation HR@10 chose {named}")
        return Scores(prefixed("eval", scores) | chosen, files=files, text=self.notes[-1])

    def decode(self, outputs: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> list[Any]:
        names = sorted(self.numbers, key=self.numbers.__getitem__)
        if self.model is not None:
            self.tried, outputs = outputs[:, 1 : 1 + len(WEIGHTS)], np.delete(outputs, slice(1, 1 + len(WEIGHTS)), 1)
        return ranked_items(outputs, names)

    def score(self, predictions: list[Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
        return full_ranking(predictions, len(self.numbers) - 1)

    def report(self, predictions: list[Any], rows: list[dict[str, Any]], train: Rows | None) -> Scores:
        """Beside the baselines and other runs."""
        baselines = baselines_of(train, rows, self.numbers) if self.arguments.baselines else {}
        return self.ranking.scores(predictions, rows, baselines)

    def card_data(self) -> dict[str, Any]:
        arguments = self.arguments
        return self.ranking.card(self.notes) | {
            "title": "recommendation",
            "code": self._card_code(),
            "prediction": "the items of the highest scores",
            "preprocessing": f"at most {arguments.max_length} items of a history; items numbered by a hash"
            + f"; item dropout up to {arguments.item_dropout:g}" * bool(arguments.item_dropout),
        }

    def _card_code(self) -> str:
        if example := self.side.example():
            return FEATURE_CARD_CODE + example.replace("{", "{{").replace("}", "}}") + "))"
        if self.arguments.sasrec:
            return ""
        return MODEL_CARD_CODE if self.catalogue is None else TEXT_CARD_CODE
