"""Labels, sets of labels and numbers: their order, the weights of unequal classes, and scores by scikit-learn."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from datasets import Features, List, Value
from sklearn.metrics import accuracy_score, mean_absolute_error, mean_squared_error, precision_recall_fscore_support

from .metrics import InMemoryMetric

CARD_METRICS = {
    "accuracy": ("accuracy", "accuracy"),
    "macro_precision": ("precision", "macro precision"),
    "macro_recall": ("recall", "macro recall"),
    "macro_f1": ("f1", "macro F1"),
}  # of one label: {result name: (the Hub's metric, label)}
LABELS_SHOWN = 5


def sort_key(label: str) -> tuple[int, int, str]:
    """Whole numbers by size, before all other labels by their text."""
    return (0, int(label), label) if label.removeprefix("-").isdecimal() else (1, 0, label)


def refuse_unknown(found: Iterable[str], labels: Sequence[str], where: str) -> None:
    """Refuse labels that a model hasn't.

    Raises:
        ValueError: naming one of them, and some that it has.
    """
    if unknown := sorted(set(found) - set(labels), key=sort_key):
        shown = ", ".join(labels[:LABELS_SHOWN]) + " ..." * (len(labels) > LABELS_SHOWN)
        raise ValueError(
            f"{where}: {len(unknown)} label(s) that the model can't know, such as {unknown[0]!r}; it has {shown}. "
            f"{_advice(unknown[0], labels)}"
        )


def _advice(unknown: str, labels: Sequence[str]) -> str:
    """What to do about a label that is none of these."""
    whole = unknown.removesuffix(".0")
    if {whole, f"{whole}.0"}.isdisjoint(labels):
        return "Leave those rows out, or train on such rows."
    return (
        "A column of whole numbers with an empty cell becomes one of fractions in pandas: write "
        f"{whole} in both files."
    )


def balanced_weights(ids: list[int], count: int) -> np.ndarray:
    """[count] rows of an average class / rows of the class: 1 on average over the rows."""
    return len(ids) / (count * np.maximum(np.bincount(ids, minlength=count), 1))


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
