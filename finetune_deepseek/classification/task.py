"""Classification: a text in; one label, several labels or a number out, by a new head on the last token.

The three kinds are transformers' `problem_type`s, one class each below. Rows come from local files or the Hub. The
labels are those of the training rows, sorted, and stand in the saved config as `id2label`; a model that has them
already keeps them.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset
from sklearn.feature_extraction.text import TfidfVectorizer
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from tokenization_deepseek import encode_text

from ..data.cells import Column, one, typed
from ..data.sources import Rows, joined, named, progress, read_splits
from ..data.words import pair_text
from ..training.scoring.eval_loss import Predicted
from ..training.scoring.labels import refuse_unknown, sort_key
from ..training.task import CausalCollator, Task, lower
from .arguments import ClassificationArguments
from .problems import PROBLEMS, Problem, Regression, SingleLabel

# Letters: B batch, N labels.


def as_number(text: str) -> float | None:
    """The finite number that a label may stand for."""
    try:
        found = float(text)
    except ValueError:
        return None
    return found if math.isfinite(found) else None


class ClassificationCollator(CausalCollator):
    """Pads texts on the right."""

    def __init__(self, pad_token_id: int, dtype: torch.dtype) -> None:
        super().__init__(pad_token_id)
        self.dtype = dtype

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        input_ids, attention_mask = self._pad([f["input_ids"] for f in features])
        labels = torch.tensor([f["labels"] for f in features], dtype=self.dtype)
        batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        if "row" in features[0]:
            batch["row"] = torch.tensor([f["row"] for f in features])
        return batch


class Classification(Task):
    """See the module. Rows are `source`, the text, and `target`, what is to be predicted."""

    name = "classification"
    arguments_class = ClassificationArguments
    auto_class = AutoModelForSequenceClassification
    peft_task_type = "SEQ_CLS"  # PEFT trains the head in full beside the adapters, and saves it with them

    def __init__(self, arguments: ClassificationArguments, seed: int) -> None:
        self.arguments = arguments
        self.seed = seed
        self.where: dict[str, str] = {}  # what to call a split in messages
        self.problem_class: type[Problem]  # known with the data
        self.problem: Problem  # known with the model
        self.weights: np.ndarray | None = None
        self.label_smoothing = 0.0

    # -- rows --

    def load_splits(self) -> dict[str, Rows]:
        splits: dict[str, Rows] = {}
        for split, parts in read_splits(self.arguments).items():
            self.where[split] = named(parts)
            splits[split] = joined([self._read_rows(part.rows, part.where) for part in parts], self.seed)
        if self.arguments.most_frequent_labels:
            self._keep_most_frequent(splits, self.arguments.most_frequent_labels)
        return splits

    def _text_columns(self) -> list[str]:
        pair = self.arguments.text_pair_column
        return [self.arguments.text_column, *([pair] if pair else [])]

    def _read_rows(self, raw: Mapping[str, Sequence[Any]], where: str) -> Dataset:
        """Rows of text and target; rows without one of them are left out, and counted aloud.

        Raises:
            ValueError: if there are no rows, no such columns, or a cell that can't be read.
        """
        text_columns, label_column = self._text_columns(), self.arguments.label_column
        flags = ("text_column", "text_pair_column")
        wanted = [Column(name, "text", flag) for name, flag in zip(text_columns, flags, strict=False)]
        columns = typed(raw, wanted, where)
        values = one(raw, Column(label_column, "labels", "label_column"), where)
        if not values:
            raise ValueError(f"{where}: no rows.")
        if not hasattr(self, "problem_class"):
            self.problem_class = self._choose_problem(values, where)
        rows: dict[str, list[Any]] = {"source": [], "target": []}
        for number, (*texts, value) in enumerate(zip(*columns.values(), values, strict=True), start=1):
            try:
                target = self.problem_class.read(value, self.arguments.label_separator)
            except ValueError as error:
                raise ValueError(f"{where}, row {number}, {label_column!r}: {error}.") from None
            if all(text and text.strip() for text in texts) and target is not None:
                rows["source"].append(pair_text(*texts) if len(texts) == 2 else texts[0].strip())
                rows["target"].append(target)
        count = len(rows["source"])
        if not count:
            missing = " and a ".join(map(repr, [*text_columns, label_column]))
            raise ValueError(f"{where}: no row has {'both ' if len(text_columns) == 1 else ''}a {missing}.")
        if count < len(values):
            print(f"{where}: left out {len(values) - count:,} of {len(values):,} rows without text or label")
        return Dataset.from_dict(rows)

    def _choose_problem(self, values: Sequence[Any], where: str) -> type[Problem]:
        """The class for --problem_type, or for the cells of the label column.

        Raises:
            ValueError: if --balance doesn't go with it, or the cells may be numbers or labels.
        """
        kind = self.arguments.problem_type
        if kind == "auto":
            kind = self._problem_type(values, where)
            print(f"{self.arguments.label_column!r} is read for {kind.replace('_', ' ')} (--problem_type)")
        balance = self.arguments.balance
        if kind == "regression" and (balance != "none" or self.arguments.most_frequent_labels):
            flag = f"--balance {balance}" if balance != "none" else "--most_frequent_labels"
            raise ValueError(f"{flag}: regression has no classes; leave it out, or set another --problem_type.")
        if kind == "multi_label_classification" and balance == "sampler":
            raise ValueError("--balance sampler: a row with several labels is in no one class; use --balance weights.")
        return PROBLEMS[kind]

    def _problem_type(self, values: Sequence[Any], where: str) -> str:
        """Lists are several labels, fractions are numbers, all else is one label. Whole numbers with points, as in
        1.0, are fractions too, unless cells are missing: those made points of integers."""
        present = [value for value in values if value is not None]
        if self.arguments.label_separator or present and all(isinstance(value, list) for value in present):
            return "multi_label_classification"
        texts = set(map(str, present))
        numbers = [as_number(text) for text in texts]
        if None in numbers or not any("." in text or "e" in text for text in texts):
            return "single_label_classification"
        if len(set(numbers)) < len(texts):
            twice = (text for text in texts if numbers.count(as_number(text)) > 1)
            first, second = sorted(twice, key=lambda text: (float(text), text))[:2]
            raise ValueError(
                f"{where}: {self.arguments.label_column!r} has {first} and {second}, two labels or one number; set "
                "--problem_type single_label_classification or regression."
            )
        has_gaps = len(present) < len(values)
        is_whole = all(number == int(number) for number in numbers if number is not None)
        return "single_label_classification" if has_gaps and is_whole else "regression"

    def _count_labels(self, rows: Rows) -> Counter[str]:
        return Counter(label for target in rows["target"] for label in self.problem_class.labels_in(target))

    def _keep_most_frequent(self, splits: dict[str, Rows], number: int) -> None:
        if "train" not in splits:
            raise ValueError("--most_frequent_labels counts training rows; name them too.")
        counts = self._count_labels(splits["train"])
        kept = set(sorted(counts, key=lambda label: (-counts[label], label))[:number])
        for split, rows in splits.items():
            splits[split] = rows.filter(lambda row: kept.issuperset(self.problem_class.labels_in(row["target"])))
            print(f"{split}: {len(splits[split]):,} of {len(rows):,} rows have the {len(kept)} most frequent labels")
            if not len(splits[split]):
                raise ValueError(f"{self.where[split]}: no row has one of the {len(kept)} most frequent labels.")

    def tokenizer_texts(self, splits: dict[str, Rows]) -> Iterator[str]:
        yield from splits["train"]["source"]

    # -- labels --

    def config_fields(self, splits: dict[str, Rows], saved: dict[str, Any]) -> dict[str, Any]:
        """`problem_type`, `id2label` and `label2id`: the model's own if it has been a classifier, else the data's.

        Raises:
            ValueError: if there are no labels, the model is for another problem, or a row has an unknown label.
        """
        kind = self.problem_class.problem_type
        if saved.get("problem_type"):
            if saved["problem_type"] != kind:
                raise ValueError(f"The model was trained for {saved['problem_type']}, not {kind}; set --problem_type.")
            labels = [saved["id2label"][number] for number in sorted(saved["id2label"], key=int)]
        elif self.problem_class is Regression:
            labels = [self.arguments.label_column]
        elif "train" in splits:
            labels = sorted(self._count_labels(splits["train"]), key=sort_key)
            if len(labels) < 2:
                raise ValueError(f"{self.where['train']}: {len(labels)} label(s) in {self.arguments.label_column!r}.")
        else:
            raise ValueError(
                "The model has no labels yet and there are no training rows to take them from; name some."
            )
        if self.problem_class is not Regression:
            for split, rows in splits.items():
                refuse_unknown(self._count_labels(rows), labels, self.where[split])
        self.problem = self.problem_class(labels)
        if self.arguments.balance == "weights" and "train" in splits:
            self.weights = self.problem.balanced_weights(list(splits["train"]["target"]))
        return {"problem_type": kind, "id2label": dict(enumerate(labels)), "label2id": self.problem.ids}

    # -- features --

    def fit_lengths(self, positions: int, tokenizer: PreTrainedTokenizerBase) -> None:
        lower(self.arguments, positions, max_length=positions)

    def features(self, rows: Rows, tokenizer: PreTrainedTokenizerBase, is_training: bool) -> Rows:
        """Token ids, `labels` (see `Problem`) and `length`."""
        limit = self.arguments.max_length

        def encode(batch: dict[str, list]) -> dict[str, list]:
            ids = encode_text(tokenizer, batch["source"])["input_ids"]
            return {
                "input_ids": [row[:limit] for row in ids],
                "labels": [self.problem.encode(target) for target in batch["target"]],
                "length": [min(len(row), limit) for row in ids],
                "is_cut": [len(row) > limit for row in ids],
            }

        features = rows.map(encode, batched=True, remove_columns=["source", "target"], **progress(rows, "tokenize"))
        if cut := sum(features["is_cut"]):
            print(f"cut {cut:,} of {len(rows):,} texts to --max_length {limit} tokens")
        return features.remove_columns("is_cut")

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> ClassificationCollator:
        return ClassificationCollator(cast(int, tokenizer.pad_token_id), self.problem.dtype)

    def row_weights(self, features: Dataset) -> torch.Tensor | None:
        """As many rows as there are, so that each class is equally likely, for --balance sampler."""
        if self.arguments.balance != "sampler":
            return None
        labels = np.array(features["labels"])
        return torch.tensor(1 / np.bincount(labels)[labels], dtype=torch.float32)

    def loss_function(self, label_smoothing: float) -> Callable[..., torch.Tensor]:
        """The mean loss of the rows, for several labels of rows and labels.

        Ours in place of the model's: torch's weighted mean divides by the weights of the batch, so in a batch of one
        class they would do nothing.
        """
        if label_smoothing and self.problem_class is not SingleLabel:
            raise ValueError(f"--label_smoothing_factor is for one label per row, not {self.problem.problem_type}.")
        self.label_smoothing = label_smoothing

        def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None) -> Any:
            total = self._losses(outputs["logits"], labels).sum()
            return total / (labels.numel() if num_items_in_batch is None else num_items_in_batch)

        return loss

    def _losses(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """[B], each row's summed over its labels."""
        weights = None if self.weights is None else torch.tensor(self.weights, dtype=torch.float32)
        if weights is not None:
            weights = weights.to(logits.device)
        return self.problem.losses(logits.float(), labels, weights, self.label_smoothing)

    # -- scores and reports --

    def predict_batch(self, model: Any, inputs: dict[str, Any]) -> Predicted:
        """The rows' losses as training counts them, and their logits [B, N]."""
        labels = inputs["labels"]
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])["logits"].float()
        counts = torch.full((len(labels),), labels[0].numel(), device=labels.device)
        return Predicted(self._losses(logits, labels), counts, logits)

    def decode(self, outputs: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> list[Any]:
        return [self.problem.decode(encoded) for encoded in self.problem.choose(outputs)]

    def score(self, predictions: list[Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
        return self.problem.metrics().compute(
            predictions=[self.problem.encode(prediction) for prediction in predictions],
            references=[self.problem.encode(row["target"]) for row in rows],
        )

    def baseline(self, train: Rows | None, rows: list[dict[str, Any]]) -> list[Any] | None:
        """TF-IDF of character 1- to 3-grams, which need no notion of words, and a linear model."""
        if not self.arguments.tfidf_baseline or not isinstance(train, Dataset):
            return None
        vectorizer = TfidfVectorizer(analyzer="char", ngram_range=(1, 3), sublinear_tf=True)
        inputs = vectorizer.fit_transform(train["source"])
        targets = np.array([self.problem.encode(target) for target in train["target"]])
        estimator = self.problem.estimator().fit(inputs, targets)
        return [
            self.problem.decode(p) for p in estimator.predict(vectorizer.transform([row["source"] for row in rows]))
        ]

    def card_data(self) -> dict[str, Any]:
        arguments, problem = self.arguments, self.problem
        balance = {"none": "", "weights": ", loss weighed by class", "sampler": ", classes drawn equally often"}
        return {
            "language": None,
            "pipeline_tag": "text-classification",
            "datasets": [arguments.dataset_name] if arguments.dataset_name else [],
            "metrics": problem.card_metrics,
            "dataset_name": arguments.data_name,
            "baseline": problem.baseline,
            "title": problem.problem_type.replace("_", " "),
            "head": "SequenceClassification",
            "prompt": "A text.",
            "usage": f"print(model(**inputs).logits)  # for: {', '.join(problem.labels)}",
            "prediction": problem.prediction,
            "data": f"Predicted: {', '.join(problem.labels)}",
            "preprocessing": f"{arguments.label_column!r} from "
            f"{' and '.join(map(repr, self._text_columns()))}, at most "
            f"{arguments.max_length} tokens{balance[arguments.balance]}",
        }
