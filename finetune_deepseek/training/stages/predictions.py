"""Predictions and scores out of a scored split's outputs."""

import hashlib
import json
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import EvalPrediction, PreTrainedTokenizerBase

from ...data.sources import Rows
from ..task import Task, numbers


def data_hash(rows: list[dict[str, Any]]) -> str:
    """The first 12 digits of the rows' SHA-256: names the data behind a score."""
    return hashlib.sha256(json.dumps(rows, ensure_ascii=False, sort_keys=True).encode()).hexdigest()[:12]


def evaluation_features(task: Task, rows: Rows, tokenizer: PreTrainedTokenizerBase, offset: int) -> Dataset:
    """Features of a scored split, longest first (a batch that doesn't fit shows at once), with row numbers."""
    features = task.features(rows, tokenizer, is_training=False)
    assert isinstance(features, Dataset)
    longest_first = np.argsort(-np.array(features["length"]), kind="stable")
    return features.add_column("row", list(range(offset, offset + len(features)))).select(longest_first)


class Scorer:
    """Turns the outputs of a scored split into predictions of its rows and into scores.

    Args:
        examples: the text rows of the scored splits, which features name by number.
    """

    def __init__(self, task: Task, tokenizer: PreTrainedTokenizerBase, examples: list[dict[str, Any]]) -> None:
        self.task, self.tokenizer, self.examples = task, tokenizer, examples

    def predictions(self, output: Any) -> dict[int, Any]:
        """Predictions by row number; a row that several processes predicted counts once."""
        predictions = self.task.decode(output.predictions, self.tokenizer)
        return dict(zip(output.label_ids.tolist(), predictions, strict=True))

    def __call__(self, output: EvalPrediction) -> dict[str, Any]:
        """Trainer's `compute_metrics`."""
        predictions = self.predictions(output)
        rows = [self.examples[number] for number in predictions]
        return numbers(self.task.score(list(predictions.values()), rows))
