"""Metrics as `evaluate.Metric` classes that need no network: BLEU, chrF2, exact match and classification scores.

`evaluate.load("sacrebleu")` fetches a script from the Hub. These classes are made directly (`SacreBleu("zh")`), wrap
sacrebleu and scikit-learn, and combine as evaluate's own do: `evaluate.combine([SacreBleu("zh"), ExactMatch()])`.
"""

import unicodedata
from typing import Any

import evaluate
import sacrebleu
from datasets import Features, List, Value
from sklearn.metrics import (
    accuracy_score,
    mean_absolute_error,
    mean_squared_error,
    precision_recall_fscore_support,
)

# Languages written without spaces, or whose words sacrebleu cuts by an extra package (MeCab for Japanese and Korean):
# they are scored by character, so that a score doesn't depend on what is installed. The signature names the tokenizer.
BLEU_TOKENIZERS = {"zh": "zh", "ja": "char", "ko": "char", "th": "char", "lo": "char", "km": "char", "my": "char"}


def bleu_tokenizer(target_lang: str) -> str:
    """sacrebleu's tokenizer for a language code such as `zh`, `zh-CN` or `pt_BR`; `13a` for all not in the table."""
    return BLEU_TOKENIZERS.get(target_lang.replace("_", "-").split("-")[0].lower(), "13a")


class _InMemoryMetric(evaluate.Metric):
    """An `evaluate.Metric` that writes nothing to disk and refuses bad input with one line, its state untouched."""

    features: Features
    description: str

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(keep_in_memory=True, **kwargs)

    def _build_data_dir(self) -> str:
        return ""  # evaluate would make a folder in its cache, even for a metric that is kept in memory

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.description, citation="", inputs_description="", features=type(self).features
        )

    # The two docstrings below are needed: evaluate appends to them.
    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Add predictions and as many references."""
        counts = [0 if column is None else len(column) for column in (predictions, references)]
        if counts[0] != counts[1] or not counts[0]:
            raise ValueError(
                f"{type(self).__name__} got {counts[0]} predictions and {counts[1]} references; "
                "give one reference per prediction, at least one."
            )
        super().add_batch(predictions=predictions, references=references, **kwargs)

    def compute(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> dict[str, Any] | None:
        """Score what was added, and the predictions and references given here."""
        if predictions is None and references is None and self.writer is None:
            raise ValueError(f"{type(self).__name__} has nothing to score; give predictions and references.")
        return super().compute(predictions=predictions, references=references, **kwargs)


class _TextMetric(_InMemoryMetric):
    features = Features({"predictions": Value("string"), "references": Value("string")})


class _ClassMetric(_InMemoryMetric):
    features = Features({"predictions": Value("int64"), "references": Value("int64")})


class _LabelSetMetric(_InMemoryMetric):
    features = Features({"predictions": List(Value("int64")), "references": List(Value("int64"))})


class _NumberMetric(_InMemoryMetric):
    features = Features({"predictions": Value("float32"), "references": Value("float32")})


class SacreBleu(_TextMetric):
    """Corpus BLEU of detokenized text, one reference each: `bleu` (0 to 100) and `bleu_signature`.

    Post, "A Call for Clarity in Reporting BLEU Scores", 2018.
    """

    description = "Corpus BLEU by sacrebleu."

    def __init__(self, target_lang: str = "en", **kwargs: Any) -> None:
        self.bleu = sacrebleu.BLEU(tokenize=bleu_tokenizer(target_lang))
        super().__init__(**kwargs)

    def _compute(self, *, predictions: list[str], references: list[str]) -> dict[str, Any]:
        score = self.bleu.corpus_score(predictions, [references]).score
        return {"bleu": score, "bleu_signature": str(self.bleu.get_signature())}


class ChrF2(_TextMetric):
    """Corpus chrF2 (character 1- to 6-grams, recall counts twice): `chrf2` (0 to 100) and `chrf2_signature`.

    Popović, "chrF: character n-gram F-score for automatic MT evaluation", 2015.
    """

    description = "Corpus chrF2 by sacrebleu."

    def __init__(self, **kwargs: Any) -> None:
        self.chrf = sacrebleu.CHRF()
        super().__init__(**kwargs)

    def _compute(self, *, predictions: list[str], references: list[str]) -> dict[str, Any]:
        score = self.chrf.corpus_score(predictions, [references]).score
        return {"chrf2": score, "chrf2_signature": str(self.chrf.get_signature())}


class ExactMatch(_TextMetric):
    """The share of predictions equal to their reference: `exact_match` (0 to 1).

    Both are compared in Unicode's NFC form without surrounding white space; case, punctuation and inner spaces count.
    """

    description = "Share of predictions equal to their reference."

    @staticmethod
    def normalize(text: str) -> str:
        return unicodedata.normalize("NFC", text).strip()

    def _compute(self, *, predictions: list[str], references: list[str]) -> dict[str, Any]:
        pairs = zip(predictions, references, strict=True)
        hits = sum(self.normalize(prediction) == self.normalize(reference) for prediction, reference in pairs)
        return {"exact_match": hits / len(references)}


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


def translation_metrics(target_lang: str) -> evaluate.CombinedEvaluations:
    """BLEU, chrF2 and exact match in one, with BLEU's tokenizer for the target language."""
    return evaluate.combine([SacreBleu(target_lang), ChrF2(), ExactMatch()])
