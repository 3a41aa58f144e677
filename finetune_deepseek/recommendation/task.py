"""Recommendation: the items of a user's history in, a score for every item to come next out.

Data are interactions (user, item, time) that are split here, files of ready histories and targets, MovieLens-100K out
of RecBole, or the embedded simulated users. The catalogue is a tokenizer with one token per item, in an order made by
hashing: item numbers say nothing about when an item first appeared. Scores are counted by full ranking: every item but
those of the history, ties against the target.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from modeling_deepseek import AutoModelForRecommendation

from ..data.arguments import SPLITS
from ..data.sources import DatasetColumns, Rows, open_hub
from ..data.table import Columns, read_columns
from ..training.arguments import ModelArguments
from ..training.batches import RowDraws
from ..training.optimization import IGNORED_LABEL
from ..training.saved import Saved
from ..training.scoring.eval_loss import Predicted
from ..training.scoring.ranks import highest, ranks
from ..training.task import CausalCollator, Scores, Task, lower, prefixed
from .arguments import RANKS_FILE, RecommendationArguments
from .baselines import baseline_ranks
from .count_tables import KEPT, WEIGHTS, best_count_weights, count_items
from .items.catalogue import PADDING, PADDING_TOKEN, TextCatalogue, item_tokenizer, read_items
from .items.dropout import item_dropout
from .items.feature_columns import FEATURES, FeatureColumns, empty_values
from .items.interactions import (
    ML_100K_USERS,
    SplitRows,
    as_dataset,
    by_time,
    clean,
    find_split_files,
    in_order,
    leave_one_out,
    ml_100k,
    ml_100k_columns,
    read_interactions,
    simulated,
    split_file_rows,
)
from .items.svd import add_item_svd
from .report import CARD_CODE, FEATURE_CARD_CODE, TEXT_CARD_CODE, read_ranks, run_names, scores_table
from .sasrec import register_sasrec, sasrec_config
from .scores import bootstrap_interval, comparison, per_user, ranking_scores

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
    candidates_column = ""  # of the scored files, where only some items are ranked

    def __init__(self, arguments: RecommendationArguments, seed: int) -> None:
        register_sasrec()
        self.arguments = arguments
        self.seed = seed
        self.notes: list[str] = []  # on the data, for the screen and the card
        self.table = ""
        self.numbers: dict[str, int] = {}  # item id -> number, known with the tokenizer
        self.catalogue: TextCatalogue | None = None  # where items are texts
        self.side = FeatureColumns(arguments)
        self.is_new = True
        self.histories: list[list[str]] = []  # of training, for --init_items and --item_counts
        self.model: Any = None  # one whose counts have no weights yet
        self.tried = np.empty((0, 0))  # ranks of the latest predictions by each of WEIGHTS
        if arguments.items_file:
            self.tokenizer_class = None  # the model's own, of words
        self.others: dict[str, pd.Series] = {}
        for folder, name in run_names(arguments.compare_with or []).items():
            self.others[name] = read_ranks(folder)

    def _note(self, *lines: str) -> None:
        self.notes += lines
        for line in lines:
            print(line)

    # -- rows --

    def load_splits(self) -> dict[str, Rows]:
        arguments = self.arguments
        if arguments.data_dir or arguments.train_file or arguments.validation_file or arguments.test_file:
            splits = self._read_split_files()
        else:
            splits = self._split_interactions()
        limits = (arguments.max_train_samples, arguments.max_eval_samples, arguments.max_predict_samples)
        limited = {name: splits[name][:limit] for name, limit in zip(SPLITS, limits, strict=True) if splits.get(name)}
        known = {item for row in limited.get("train", []) for item in row["source"]}
        for name in ("validation", "test"):
            if known and name in limited and (new := sum(row["target"] not in known for row in limited[name])):
                self._note(f"{name}: {new:,} of {len(limited[name]):,} targets are in no training history; they count")
        for name, column in self.others.items():
            if {row["user"] for row in limited.get("test", [])} - set(column.index):
                raise ValueError(f"--compare_with {name}: that run has scored other users; give both the same data.")
        datasets: dict[str, Rows] = {name: as_dataset(rows) for name, rows in limited.items()}
        if arguments.items_file:
            self._read_texts(arguments.items_file, datasets)
        if arguments.user_feature_columns:
            users = {user for rows in datasets.values() for user in rows["user"]}
            self._note(*self.side.read_users(*self._user_table(), users))
        return datasets

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
        self._note(*notes)
        bare = sorted(set(self._items(splits)) - texts.keys())
        if bare:
            where = Path(path).name
            self._note(f"{len(bare):,} items of the interactions have no row in {where}; all of them get one vector")
        self.catalogue = TextCatalogue(texts | dict.fromkeys(bare, ""))

    def _read_split_files(self) -> SplitRows:
        arguments = self.arguments
        files = find_split_files(arguments.data_dir) if arguments.data_dir else {
            split: path for split in SPLITS if (path := getattr(arguments, f"{split}_file"))
        }  # fmt: skip
        names = (arguments.user_column, arguments.history_column, arguments.target_column)
        splits = {}
        for split, path in files.items():
            candidates = self.candidates_column if split != "train" else ""
            splits[split], notes = split_file_rows(read_columns(path), names, split, path, candidates)
            if not splits[split]:
                raise ValueError(f"{path}: no row has a history{' and a target' * (split != 'train')}.")
            self._note(*notes)
        return splits

    def _split_interactions(self) -> SplitRows:
        arguments = self.arguments
        frame, notes = clean(self._read_interactions(), arguments.keep_repeats, arguments.k_core)
        self._note(*notes)
        if columns := self.side.context_columns:
            self._note(*empty_values(frame["context"], columns, "interactions"))
        frame, notes = in_order(frame, arguments.tie_rule, self._tie_seed)
        self._note(*notes)
        self._note(
            f"{frame['user'].nunique():,} users, {frame['item'].nunique():,} items, {len(frame):,} interactions"
        )
        splits, notes = (
            leave_one_out(frame) if arguments.split == "leave_one_out" else by_time(frame, arguments.time_share)
        )
        self._note(*notes)
        if not splits["test"]:
            raise ValueError(
                "No user has enough interactions to be scored; three each are needed, or another --split."
            )
        return splits

    def _read_interactions(self) -> pd.DataFrame:
        arguments, contexts = self.arguments, self.side.context_columns
        if arguments.is_embedded:
            if contexts:
                raise ValueError("--context_columns: simulated users have none; name --interactions_file.")
            self._note("simulated users over CLDR's territories: they show the code path, not how people behave")
            return simulated()
        names = (arguments.user_column, arguments.item_column, arguments.timestamp_column)
        if arguments.interactions_file:
            path = arguments.interactions_file
            return read_interactions(read_columns(path), names, path, contexts)
        name = cast(str, arguments.dataset_name)
        if name == "ml-100k":
            return ml_100k(contexts=contexts)
        columns = DatasetColumns(open_hub(name, arguments.dataset_config_name, split="train"))
        return read_interactions(columns, names, f"{name}, split train", contexts)

    # -- catalogue and model --

    def tokenizer_texts(self, splits: dict[str, Rows]) -> Iterator[str]:
        yield from self._items(splits) if self.catalogue is None else self.catalogue.texts.values()

    def _items(self, splits: dict[str, Rows]) -> Iterator[str]:
        for rows in splits.values():
            for history in rows["source"]:
                yield from history
            yield from (target for target in rows["target"] if target is not None)

    def new_tokenizer(self, arguments: ModelArguments, splits: dict[str, Rows]) -> PreTrainedTokenizerBase:
        """The items of all splits: one that is new in a scored split is ranked too, as it would be in use."""
        if self.catalogue is not None:
            return super().new_tokenizer(arguments, splits)
        return item_tokenizer(set(self.tokenizer_texts(splits)), self.seed)

    @property
    def _tie_seed(self) -> int:
        return self.seed if self.arguments.tie_seed is None else self.arguments.tie_seed

    def settings(self) -> dict[str, Any]:
        """Those of the flags, and by which seed equal times were ordered, if they were at random."""
        settings = super().settings()
        return settings | ({"tie_seed": self._tie_seed} if settings.get("tie_rule") == "random" else {})

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
        self._note(*notes)
        return fields | columns

    def prepare_model(self, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        if self.catalogue is not None:
            self._note(self.catalogue.prepare(model, tokenizer))
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
            self._note(f"item vectors begin with those of an SVD of the training {found}")

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
        self.numbers = self.item_numbers(tokenizer)
        limit, unknown = self.arguments.max_length, 0
        features: dict[str, list[Any]] = {"input_ids": [], "length": []}
        if not is_training:
            features |= {"seen": [], "target": []}
        side = self.side
        features |= {
            name: [] for name, n in zip(FEATURES, (side.user_numbers, side.context_numbers), strict=True) if n
        }
        contexts = rows["contexts"] if "contexts" in rows.column_names else [None] * len(rows)
        columns = (rows["user"], rows["source"], rows["target"], contexts)
        for user, history, next_item, given in zip(*columns, strict=True):
            known = [place for place, item in enumerate(history) if item in self.numbers]
            numbers = [self.numbers[history[place]] for place in known]
            unknown += len(history) - len(numbers)
            if is_training:
                windows = [slice(max(0, end - limit - 1), end) for end in range(len(numbers), 1, -limit)]
            else:
                if not numbers:
                    raise ValueError(f"User {user}: no item of this history is in the model's catalogue.")
                windows = [slice(-limit, None)]
                target = self.numbers.get(next_item, PADDING)
                # A repeated target stays among what can be recommended.
                features["seen"].append([number for number in numbers if number != target] or [PADDING])
                features["target"].append(target)
            features["input_ids"] += [numbers[window] for window in windows]
            if side.user_numbers:
                features["user_features"] += [side.of_user(user)] * len(windows)
            if side.context_numbers:
                after = side.of_contexts(given, known, len(history))
                features["context_features"] += [after[window] for window in windows]
        features["length"] = [len(window) - is_training for window in features["input_ids"]]
        features["number"] = list(range(len(features["length"])))  # by which a row's draws are its own
        if unknown:
            self._note(f"left out {unknown:,} items of histories that are not in the model's catalogue")
        self._note(*side.notes_on_unknown())
        if not is_training and (missing := features["target"].count(PADDING)):
            self._note(f"{missing:,} of {len(rows):,} targets are not in the model's catalogue; they rank last")
        if not features["input_ids"]:
            raise ValueError("No training history has two items, so there is nothing to learn.")
        return Dataset.from_dict(features)

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
        tokens = np.array(sorted(self.numbers, key=self.numbers.__getitem__), dtype=object)
        if self.model is not None:
            self.tried, outputs = outputs[:, 1 : 1 + len(WEIGHTS)], np.delete(outputs, slice(1, 1 + len(WEIGHTS)), 1)
        return [
            {"rank": int(row[0]), "items": tokens[row[1:][row[1:] > PADDING]].tolist()} for row in outputs.astype(int)
        ]

    def score(self, predictions: list[Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
        return ranking_scores(np.array([prediction["rank"] for prediction in predictions])) | {
            "ranking_signature": f"full ranking of {len(self.numbers) - 1:,} items, history excluded, ties against us"
        }

    def _baselines(self, train: Rows | None, rows: list[dict[str, Any]]) -> dict[str, np.ndarray]:
        """Ranks of the same targets by each baseline, if there are training rows."""
        if not self.arguments.baselines or not isinstance(train, Dataset):
            return {}

        def numbered(histories: Any) -> list[list[int]]:
            return [[self.numbers[item] for item in history if item in self.numbers] for history in histories]

        histories = [history for history in numbered(train["source"]) if history]
        targets = [self.numbers.get(row["target"], PADDING) for row in rows]
        return baseline_ranks(histories, numbered(row["source"] for row in rows), targets, len(self.numbers))

    def report(self, predictions: list[Any], rows: list[dict[str, Any]], train: Rows | None) -> Scores:
        """Intervals over users, the baselines and other runs with paired tests; ranks per user go into a file."""
        ranks = np.array([prediction["rank"] for prediction in predictions])
        users = [row["user"] for row in rows]
        others = self._baselines(train, rows)
        for name, column in self.others.items():
            others[name] = column[users].to_numpy()
        results: dict[str, Any] = {}
        for name in ("hr@10", "ndcg@10"):
            results[f"test_{name}_low"], results[f"test_{name}_high"] = bootstrap_interval(per_user(ranks)[name])
        results |= comparison(ranks, others)
        if "popularity" in others:
            results |= prefixed("baseline", ranking_scores(others["popularity"]))  # the card's second column
        frame = pd.DataFrame({"user": users, "target": [row["target"] for row in rows], "rank": ranks} | others)
        self.table = scores_table(ranks, others, results)
        return Scores(results, files={RANKS_FILE: frame.to_csv(index=False, lineterminator="\n")}, text=self.table)

    def card_data(self) -> dict[str, Any]:
        arguments = self.arguments
        paths = (arguments.interactions_file, arguments.data_dir, arguments.train_file, arguments.test_file)
        local = ", ".join(Path(path).name for path in paths if path)
        source = "CLDR territories, simulated users" if arguments.is_embedded else arguments.dataset_name or local
        return {
            "language": None,
            "pipeline_tag": "other",
            "datasets": [arguments.dataset_name] if arguments.dataset_name and "/" in arguments.dataset_name else [],
            "metrics": {name: (name, name.upper()) for name in ranking_scores(np.ones(1))},
            "dataset_name": source,
            "baseline": "popularity",
            "title": "recommendation",
            "code": self._card_code(),
            "prompt": "",
            "prediction": "the items of the highest scores",
            "data": "\n".join(f"- {note}" for note in self.notes) + f"\n\n{self.table}",
            "preprocessing": f"at most {arguments.max_length} items of a history; items numbered by a hash"
            + f"; item dropout up to {arguments.item_dropout:g}" * bool(arguments.item_dropout),
        }

    def _card_code(self) -> str:
        if example := self.side.example():
            return FEATURE_CARD_CODE + example.replace("{", "{{").replace("}", "}}") + "))"
        if self.arguments.sasrec:
            return ""
        return CARD_CODE if self.catalogue is None else TEXT_CARD_CODE
