"""News recommendation: of the news shown to a user, which are clicked; MIND's files as they are (items/mind.py).

A news is its title, encoded by the trunk that also reads the history of clicks, so one that came after training is
ranked like any other (item_texts.py). The model learns to tell one click from others shown with it and not clicked
(Wu et al., "Neural News Recommendation with Multi-Head Self-Attention", EMNLP 2019, section 2.3), drawn anew at each
use. Scores are MIND's: AUC, MRR and nDCG of each impression, mean over impressions.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from modeling_deepseek import AutoModelForRecommendation

from ..data.arguments import SPLITS
from ..data.sources import Rows
from ..training.batches import RowDraws
from ..training.saved import Saved
from ..training.scoring.eval_loss import Predicted
from ..training.task import CausalCollator, Scores, Task, lower
from .arguments import PREDICTION_FILE, NewsArguments
from .items.catalogue import PADDING, TextCatalogue
from .items.histories import Notes
from .items.mind import prediction_text, read_behaviors, read_news
from .report import TEXT_CARD_CODE
from .scores import bootstrap_interval, impression_scores

METRICS = {"auc": "AUC", "mrr": "MRR", "ndcg@5": "nDCG@5", "ndcg@10": "nDCG@10"}


def is_labelled(rows: Iterable[dict[str, Any]]) -> bool:
    return any(row["clicked"] for row in rows)


class NewsCollator(CausalCollator):
    """Pads histories and candidates; for training one click comes first, then non-clicks drawn from its impression."""

    def __init__(self, num_non_clicks: int, seed: int) -> None:
        super().__init__(PADDING)
        self.num_non_clicks = num_non_clicks
        self.draws = RowDraws(seed)

    def set_epoch(self, epoch: int) -> None:
        self.draws.set_epoch(epoch)

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = {}
        batch["input_ids"], batch["attention_mask"] = self._pad([f["input_ids"] for f in features])
        if "click" in features[0]:
            drawn = []
            for one in features:
                others, draw = one["candidates"], self.draws.of(one["number"])
                drawn.append([one["click"], *draw.sample(others, min(len(others), self.num_non_clicks))])
            batch["candidates"], _ = self._pad(drawn)
            batch["labels"] = torch.zeros(len(features), dtype=torch.long)
        else:
            batch["candidates"], mask = self._pad([f["candidates"] for f in features])
            batch["count"] = mask.sum(1)
        if "row" in features[0]:
            batch["row"] = torch.tensor([f["row"] for f in features])
        return batch


class NewsRecommendation(Task):
    """See the module. Rows are those of `mind.read_behaviors`."""

    name = "news_recommendation"
    next_command = "deepseek-hf recommend {folder} --history FILE"
    arguments_class = NewsArguments
    auto_class = AutoModelForRecommendation
    peft_task_type = "FEATURE_EXTRACTION"

    def __init__(self, arguments: NewsArguments, seed: int) -> None:
        self.arguments = arguments
        self.seed = seed
        self.notes = Notes()
        self.catalogue = TextCatalogue({})  # the news of all splits
        self.learned: set[str] = set()  # news that training has shown
        self.left_out = 0

    # -- rows --

    def load_splits(self) -> dict[str, Rows]:
        arguments = self.arguments
        folders = {split: folder for split in SPLITS if (folder := getattr(arguments, f"{split}_dir"))}
        limits = (arguments.max_train_samples, arguments.max_eval_samples, arguments.max_predict_samples)
        news: dict[str, dict[str, str]] = {}
        for split, folder in folders.items():
            news[split], notes = read_news(folder, arguments.text_fields)
            self.notes.say(*notes)
            self.catalogue.texts = news[split] | self.catalogue.texts
        splits: dict[str, Rows] = {}
        for split, limit in zip(SPLITS, limits, strict=True):
            if split not in folders:
                continue
            rows, notes = read_behaviors(folders[split], self.catalogue.texts)
            self.notes.say(*notes)
            rows = rows[:limit]
            if split != "test" and not is_labelled(rows):
                raise ValueError(
                    f"--{split}_dir {folders[split]}: impressions without labels can be neither learned from nor "
                    "scored; `predict` takes them by --test_dir."
                )
            splits[split] = Dataset.from_dict({name: [row[name] for row in rows] for name in rows[0]})
            if split == "train":
                self.learned = {one for row in rows for one in (*row["source"], *row["candidates"])}
            elif self.learned and (cold := len(news[split].keys() - self.learned)):
                self.notes.say(
                    f"{split}: {cold:,} of {len(news[split]):,} news are in no training impression or history"
                )
        return splits

    # -- model --

    def tokenizer_texts(self, splits: dict[str, Rows]) -> Iterator[str]:
        yield from self.catalogue.texts.values()

    def config_fields(self, splits: dict[str, Rows], saved: dict[str, Any]) -> dict[str, Any]:
        fields = self.catalogue.config_fields(saved, self.arguments.max_text_length)
        if not saved:
            fields["max_position_embeddings"] = max(self.arguments.max_history, self.arguments.max_text_length)
        return fields

    def check_saved(self, saved: Saved, is_trained: bool) -> None:
        """Also notes whose catalogue goes on."""
        super().check_saved(saved, is_trained)
        self.catalogue.folder = (saved.base or saved).folder

    def prepare_model(self, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        self.notes.say(self.catalogue.prepare(model, tokenizer))

    def save_beside(self, folder: Path) -> None:
        self.catalogue.save(folder)

    # -- features --

    def fit_lengths(self, positions: int, tokenizer: PreTrainedTokenizerBase) -> None:
        lower(self.arguments, positions, max_history=positions)

    def features(self, rows: Rows, tokenizer: PreTrainedTokenizerBase, is_training: bool) -> Rows:
        """Numbers of the history and of the candidates; for training one row per click, with what wasn't clicked.

        Raises:
            ValueError: if nothing can be learned.
        """
        features: dict[str, list[Any]] = {"input_ids": [], "length": [], "candidates": []}
        if is_training:
            features["click"] = []
        useless, numbers = 0, self.catalogue.numbers
        for row in rows:
            history = [numbers[one] for one in row["source"]][-self.arguments.max_history :] or [PADDING]
            shown = [numbers.get(one, PADDING) for one in row["candidates"]]
            clicks: list[int | None] = [None]
            if is_training:
                pairs = list(zip(shown, row["clicked"], strict=True))
                clicks = [one for one, click in pairs if click and one != PADDING]
                shown = [one for one, click in pairs if not click and one != PADDING]
                clicks = clicks if shown else []
                useless += not clicks
            for click in clicks:
                features["input_ids"].append(history)
                features["length"].append(len(history))
                features["candidates"].append(shown)
                if is_training:
                    features["click"].append(click)
        if useless:
            self.notes.say(f"left out {useless:,} training impressions without both clicks and news not clicked")
        if not features["input_ids"]:
            raise ValueError("No impression has both a click and news that weren't clicked; nothing to learn from.")
        if is_training:
            features["number"] = list(range(len(features["click"])))  # by which its draws are its own
        return Dataset.from_dict(features)

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> NewsCollator:
        return NewsCollator(self.arguments.num_non_clicks, self.seed)

    def loss_function(self, label_smoothing: float) -> Callable[..., torch.Tensor] | None:
        if label_smoothing:
            raise ValueError("--label_smoothing_factor: the loss over an impression has none; leave it out.")
        return None

    # -- scores and reports --

    def predict_batch(self, model: Any, inputs: dict[str, Any]) -> Predicted:
        """[B, 1 + C]: how many candidates there are, and their scores."""
        count = inputs.pop("count")
        return Predicted(outputs=torch.cat((count[:, None], model(**inputs).logits.float()), dim=1))

    def decode(self, outputs: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> list[Any]:
        """The scores of the candidates, in the file's order."""
        return [row[1 : 1 + int(row[0])].tolist() for row in outputs]

    def _per_impression(self, predictions: list[Any], rows: list[dict[str, Any]]) -> dict[str, np.ndarray]:
        """The scores of each impression that has both clicks and other news, counting the rest.

        Raises:
            ValueError: if none has.
        """
        found = [
            impression_scores(np.array(scores), np.array(row["clicked"]))
            for scores, row in zip(predictions, rows, strict=True)
            if 0 < sum(row["clicked"]) < len(row["clicked"])
        ]
        self.left_out = len(rows) - len(found)
        if not found:
            raise ValueError("No impression has both a click and news that weren't clicked; nothing can be scored.")
        return {name: np.array([one[name] for one in found]) for name in METRICS}

    def score(self, predictions: list[Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
        if not is_labelled(rows):
            return {}
        values = self._per_impression(predictions, rows)
        return {name: float(value.mean()) for name, value in values.items()} | {
            "impressions_left_out": self.left_out,
            "impression_signature": "mean over impressions with clicks and non-clicks, ties against the clicks "
            "(half in AUC)",
        }

    def baseline(self, train: Rows | None, rows: list[dict[str, Any]]) -> list[Any] | None:
        """How often each candidate was clicked in training."""
        if not isinstance(train, Dataset) or not is_labelled(rows):
            return None
        clicks = Counter(one for target in train["target"] for one in target)
        return [[float(clicks[one]) for one in row["candidates"]] for row in rows]

    def report(self, predictions: list[Any], rows: list[dict[str, Any]], train: Rows | None) -> Scores:
        """Intervals over impressions, and the scores of those whose clicks are all on news unseen in training; and
        `PREDICTION_FILE`."""
        results: dict[str, Any] = {}
        files = {PREDICTION_FILE: prediction_text(rows, predictions)}
        if not is_labelled(rows):
            unscored = f"test: no labels to score by; {PREDICTION_FILE} has the ranks for MIND's competition"
            self.notes.append(unscored)
            return Scores(results, files=files, text=unscored)
        said: list[str] = []
        values = self._per_impression(predictions, rows)
        for name, column in values.items():
            results[f"test_{name}_low"], results[f"test_{name}_high"] = bootstrap_interval(column)
        if self.left_out:
            said.append(f"test: {self.left_out:,} of {len(rows):,} impressions have no click, or nothing else, and "
                        "are left out of the scores")  # fmt: skip
        scored = [row for row in rows if 0 < sum(row["clicked"]) < len(row["clicked"])]
        cold = np.array([not self.learned.intersection(row["target"]) for row in scored])
        if self.learned and cold.any():
            results["test_cold_impressions"] = int(cold.sum())
            results |= {f"test_cold_{name}": float(column[cold].mean()) for name, column in values.items()}
            said.append(f"test: in {cold.sum():,} impressions all clicks are on news unseen in training; their AUC is "
                        f"{results['test_cold_auc']:.4f}")  # fmt: skip
        self.notes += said
        return Scores(results, files=files, text="\n".join(said))

    def card_data(self) -> dict[str, Any]:
        arguments = self.arguments
        folders = [folder for split in SPLITS if (folder := getattr(arguments, f"{split}_dir"))]
        read = f"{', '.join(arguments.text_fields)} of a news, the latest {arguments.max_history} clicks"
        return {
            "language": None,
            "pipeline_tag": "other",
            "datasets": [],
            "metrics": {name: (name, label) for name, label in METRICS.items()},
            "dataset_name": ", ".join(Path(folder).name for folder in folders),
            "baseline": "clicks in training",
            "title": "news recommendation",
            "code": TEXT_CARD_CODE,
            "prompt": "",
            "prediction": "the scores of an impression's candidates",
            "data": "\n".join(f"- {note}" for note in self.notes),
            "preprocessing": read,
        }
