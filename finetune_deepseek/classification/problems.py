"""The kinds of classification: one label, several labels or a number."""

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import evaluate
import numpy as np
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.multiclass import OneVsRestClassifier
from torch.nn import functional as F

from ..training.scoring.labels import (
    CARD_METRICS,
    Accuracy,
    LabelSetF1,
    MacroF1,
    RegressionErrors,
    balanced_weights,
    sort_key,
)

# Letters: B batch, N labels.
# Inverse strength of the baseline's regularisation, chosen among 1, 10, 30, 100 on song_ci_zh's validation split.
BASELINE_C = 30


class Problem(ABC):
    """A problem type: what a target is in the data, in the loss, in the logits and in the scores.

    A *target* is what a row says: a label, a list of labels or a number. *Encoded*, it is a class id, N zeros and
    ones, or the number.
    """

    problem_type: ClassVar[str]
    dtype: ClassVar[torch.dtype]  # of a batch of encoded targets
    baseline: ClassVar[str]
    prediction: ClassVar[str]
    card_metrics: ClassVar[dict[str, tuple[str, str]]]

    def __init__(self, labels: list[str]) -> None:
        self.labels = labels
        self.ids = {label: number for number, label in enumerate(labels)}

    @staticmethod
    @abstractmethod
    def read(value: Any, separator: str | None) -> Any:
        """The target in a cell of the data, None if it is empty.

        Raises:
            ValueError: if it can't be one.
        """

    @staticmethod
    @abstractmethod
    def labels_in(target: Any) -> list[str]: ...

    @abstractmethod
    def encode(self, target: Any) -> Any: ...

    @abstractmethod
    def choose(self, logits: np.ndarray) -> np.ndarray:
        """Encoded predictions from logits [B, N]."""

    @abstractmethod
    def decode(self, encoded: Any) -> Any:
        """The target back from its encoding."""

    @abstractmethod
    def losses(
        self, logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None, smoothing: float
    ) -> torch.Tensor:
        """[B], each row's summed over its labels: logits [B, N], weights [N]."""

    @abstractmethod
    def balanced_weights(self, targets: list[Any]) -> np.ndarray:
        """[N] weights for the loss that make up for unequal classes."""

    @abstractmethod
    def metrics(self) -> Any: ...

    @abstractmethod
    def estimator(self) -> Any:
        """The baseline's linear model, to be fitted on encoded targets."""


class SingleLabel(Problem):
    problem_type = "single_label_classification"
    dtype = torch.long
    baseline = "TF-IDF + logistic regression"
    prediction = "the label of the highest logit"
    card_metrics = CARD_METRICS

    @staticmethod
    def read(value: Any, separator: str | None) -> str | None:
        if isinstance(value, (list, dict)):
            raise ValueError(
                f"{str(value)[:40]!r} is not one label; for several set --problem_type {MultiLabel.problem_type}"
            )
        return None if value is None else str(value).strip() or None

    @staticmethod
    def labels_in(target: str) -> list[str]:
        return [target]

    def encode(self, target: str) -> int:
        return self.ids[target]

    def choose(self, logits: np.ndarray) -> np.ndarray:
        return logits.argmax(-1)

    def decode(self, encoded: Any) -> str:
        return self.labels[int(encoded)]

    def losses(
        self, logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None, smoothing: float
    ) -> torch.Tensor:
        return F.cross_entropy(logits, labels, weights, reduction="none", label_smoothing=smoothing)

    def balanced_weights(self, targets: list[str]) -> np.ndarray:
        return balanced_weights([self.encode(target) for target in targets], len(self.labels))

    def metrics(self) -> Any:
        return evaluate.combine([Accuracy(), MacroF1()])

    def estimator(self) -> Any:
        return OneVsRestClassifier(LogisticRegression(C=BASELINE_C, solver="liblinear"))


class MultiLabel(Problem):
    problem_type = "multi_label_classification"
    dtype = torch.float32
    baseline = SingleLabel.baseline
    prediction = "the labels with a logit above 0"
    card_metrics = {
        "subset_accuracy": ("accuracy", "accuracy of the whole set"),
        "macro_precision": ("precision", "macro precision"),
        "macro_recall": ("recall", "macro recall"),
        "macro_f1": ("f1", "macro F1"),
    }

    @staticmethod
    def read(value: Any, separator: str | None) -> list[str] | None:
        if separator and (value is None or isinstance(value, str)):  # an empty cell means no label
            value = (value or "").split(separator)
        if value is None:
            return None
        if not isinstance(value, list):
            raise ValueError(f"{str(value)[:40]!r} is no list of labels; set --label_separator if it is one text")
        return sorted({label for item in value if (label := str(item).strip())}, key=sort_key)

    @staticmethod
    def labels_in(target: list[str]) -> list[str]:
        return target

    def encode(self, target: list[str]) -> list[int]:
        return [int(label in target) for label in self.labels]

    def choose(self, logits: np.ndarray) -> np.ndarray:
        return (logits > 0).astype(int)

    def decode(self, encoded: Any) -> list[str]:
        return [label for label, is_set in zip(self.labels, encoded, strict=True) if is_set]

    def losses(
        self, logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None, smoothing: float
    ) -> torch.Tensor:
        return F.binary_cross_entropy_with_logits(logits, labels, pos_weight=weights, reduction="none").sum(1)

    def balanced_weights(self, targets: list[list[str]]) -> np.ndarray:
        """Rows without the label / rows with it, for the rows with it."""
        counts = np.sum([self.encode(target) for target in targets], axis=0)
        return np.maximum(len(targets) - counts, 1) / np.maximum(counts, 1)

    def metrics(self) -> Any:
        return LabelSetF1()

    def estimator(self) -> Any:
        return OneVsRestClassifier(LogisticRegression(C=BASELINE_C, solver="liblinear"))


class Regression(Problem):
    problem_type = "regression"
    dtype = torch.float32
    baseline = "TF-IDF + ridge regression"
    prediction = "the logit"
    card_metrics = {"mse": ("mse", "mean squared error"), "mae": ("mae", "mean absolute error")}

    @staticmethod
    def read(value: Any, separator: str | None) -> float | None:
        if value is None or value == "":
            return None
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise ValueError(f"{str(value)[:40]!r} is not a number") from None
        return number if math.isfinite(number) else None

    @staticmethod
    def labels_in(target: float) -> list[str]:
        return []

    def encode(self, target: float) -> float:
        return target

    def choose(self, logits: np.ndarray) -> np.ndarray:
        return logits[:, 0]

    def decode(self, encoded: Any) -> float:
        return float(encoded)

    def losses(
        self, logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None, smoothing: float
    ) -> torch.Tensor:
        return F.mse_loss(logits[:, 0], labels, reduction="none")

    def balanced_weights(self, targets: list[float]) -> np.ndarray:
        raise ValueError("--balance weights: regression has no classes.")

    def metrics(self) -> Any:
        return RegressionErrors()

    def estimator(self) -> Any:
        return Ridge()


PROBLEMS: dict[str, type[Problem]] = {cls.problem_type: cls for cls in (SingleLabel, MultiLabel, Regression)}
