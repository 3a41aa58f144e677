"""Scores of labels, sets of labels and numbers, by scikit-learn."""

from typing import Any

from datasets import Features, List, Value
from sklearn.metrics import accuracy_score, mean_absolute_error, mean_squared_error, precision_recall_fscore_support

from ..training.scoring.metrics import InMemoryMetric


class _ClassMetric(InMemoryMetric):
    features = Features({"predictions": Value("int64"), "references": Value("int64")})


class _LabelSetMetric(InMemoryMetric):
    features = Features({"predictions": List(Value("int64")), "references": List(Value("int64"))})


class _NumberMetric(InMemoryMetric):
    features = Features({"predictions": Value("float32"), "references": Value("float32")})


class Accuracy(_ClassMetric):
    """The share of right class ids: `accuracy` (0 to 1)."""

    description = "Share of right class ids."

    def _compute(self, *, predictions: list[int], references: list[int]) -> dict[str, Any]:
        return {"accuracy": float(accuracy_score(references, predictions))}


class MacroF1(_ClassMetric):
    """`macro_precision`, `macro_recall` and `macro_f1` (0 to 1): the unweighted mean over the classes.

    The classes are those of the predictions and references; one that was never predicted has precision 0.
    """

    description = "Precision, recall and F1, averaged over the classes."

    def _compute(self, *, predictions: list[int], references: list[int]) -> dict[str, Any]:
        precision, recall, f1, _ = precision_recall_fscore_support(
            references, predictions, average="macro", zero_division=0
        )
        return {"macro_precision": float(precision), "macro_recall": float(recall), "macro_f1": float(f1)}


class LabelSetF1(_LabelSetMetric):
    """Scores of label sets, each given as zeros and ones per label (all 0 to 1).

    `subset_accuracy` is the share of sets that are right as a whole; `macro_precision`, `macro_recall` and `macro_f1`
    are means over all labels, where one that occurs nowhere counts as 0.
    """

    description = "Accuracy of whole label sets, and precision, recall and F1 averaged over the labels."

    def _compute(self, *, predictions: list[list[int]], references: list[list[int]]) -> dict[str, Any]:
        precision, recall, f1, _ = precision_recall_fscore_support(
            references, predictions, average="macro", zero_division=0
        )
        return {
            "subset_accuracy": float(accuracy_score(references, predictions)),
            "macro_precision": float(precision),
            "macro_recall": float(recall),
            "macro_f1": float(f1),
        }


class RegressionErrors(_NumberMetric):
    """`mse` and `mae`: the mean squared and the mean absolute error, in the targets' own unit."""

    description = "Mean squared and mean absolute error."

    def _compute(self, *, predictions: list[float], references: list[float]) -> dict[str, Any]:
        return {
            "mse": float(mean_squared_error(references, predictions)),
            "mae": float(mean_absolute_error(references, predictions)),
        }
