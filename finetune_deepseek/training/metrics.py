"""Metrics as `evaluate.Metric` classes that need no network: BLEU, chrF2, exact match, answers and classification.

`evaluate.load("sacrebleu")` fetches a script from the Hub. These classes are made directly (`SacreBleu("zh")`), wrap
sacrebleu and scikit-learn, and combine as evaluate's own do: `evaluate.combine([SacreBleu("zh"), ExactMatch()])`.
"""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
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

from ..data.moses import moses_lower, signature

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


class _AnswerMetric(_InMemoryMetric):
    features = Features({"predictions": Value("string"), "references": List(Value("string"))})


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


class TokenizedBleu(_TextMetric):
    """Corpus BLEU of lower-cased text tokenised as Moses does: `bleu_tokenized` (0 to 100) and its signature.

    For comparison with published numbers on such text; it isn't comparable with `SacreBleu`.

    Args:
        target_lang: language of the texts.
        is_prepared: the texts are such text already; otherwise both sides are made so here.
    """

    description = "Corpus BLEU of lower-cased, normalised and tokenised text, by sacrebleu."

    def __init__(self, target_lang: str = "en", is_prepared: bool = False, **kwargs: Any) -> None:
        self.bleu = sacrebleu.BLEU(tokenize="none", force=True)  # force: no warning that the text looks tokenised
        self.prepare = moses_lower(target_lang)
        self.is_prepared = is_prepared
        self.moses = signature(target_lang)
        super().__init__(**kwargs)

    def _compute(self, *, predictions: list[str], references: list[str]) -> dict[str, Any]:
        if not self.is_prepared:
            predictions, references = list(map(self.prepare, predictions)), list(map(self.prepare, references))
        score = self.bleu.corpus_score(predictions, [references]).score
        name = f"{self.bleu.get_signature()}; {self.moses}"
        return {"bleu_tokenized": score, "bleu_tokenized_signature": name}


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


ARTICLES = re.compile(r"\b(a|an|the)\b")
ASCII_PUNCTUATION = str.maketrans("", "", string.punctuation)
# What CMRC's script deletes. It lists the six dots of an ellipsis too, but compares single characters with them.
CMRC_PUNCTUATION = str.maketrans("", "", r"-:_*^/\~`+=，。：？！“”；’《》·、「」（）－～『』")
# A Chinese character, else a number, a word or a sign.
CMRC_SEGMENT = re.compile(r"[\u4e00-\u9fa5]|\d+(?:[.,]\d+)*(?!\w)|[^\W\u4e00-\u9fa5]+|[^\w\s]")


def normalize_answer(text: str) -> str:
    """As SQuAD: lower case, without ASCII punctuation and articles, one space between words."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(ASCII_PUNCTUATION)).split())


def squad_f1(prediction: str, reference: str, version_2: bool = False) -> float:
    """F1 (0 to 1) of two bags of words; in version 2 of SQuAD it is 1 where both are empty."""
    found, wanted = normalize_answer(prediction).split(), normalize_answer(reference).split()
    if version_2 and not (found and wanted):
        return float(found == wanted)
    return _f1(sum((Counter(found) & Counter(wanted)).values()), len(found), len(wanted))


def _f1(common: int, found: int, wanted: int) -> float:
    return 2 * common / (found + wanted) if common else 0.0


def cmrc_segments(text: str) -> list[str]:
    """Chinese characters one by one and other words as a whole, in lower case without CMRC's punctuation.

    The official script cuts the other words by nltk, which keeps contractions and abbreviations together that are cut
    here.
    """
    return CMRC_SEGMENT.findall(text.lower().translate(CMRC_PUNCTUATION))


def longest_common_run(left: Sequence[str], right: Sequence[str]) -> int:
    """Elements of the longest stretch that stands in both without a gap."""
    longest, before = 0, [0] * (len(right) + 1)
    for mine in left:
        row = [0] * (len(right) + 1)
        for number, other in enumerate(right):
            if mine == other:
                row[number + 1] = before[number] + 1
                longest = max(longest, row[number + 1])
        before = row
    return longest


def cmrc_f1(prediction: str, reference: str) -> float:
    """F1 (0 to 1) of the longest common run of segments."""
    found, wanted = cmrc_segments(prediction), cmrc_segments(reference)
    return _f1(longest_common_run(found, wanted), len(found), len(wanted))


class SquadScores(_AnswerMetric):
    """Answers as SQuAD scores them: `exact_match` and `f1` (0 to 100), each the best over a question's references.

    With `version_2` a question without references wants the empty answer, references that normalise to nothing don't
    count, and the scores of both sorts of question stand in `has_answer_...` and `no_answer_...`, where there are any.

    Rajpurkar et al., arXiv 1606.05250, section 6.1, and arXiv 1806.03822, section 4.
    """

    description = "Exact match and F1 of answers, as SQuAD."
    signature = "SQuAD {version}, words in lower case without punctuation and articles, best of the references"

    def __init__(self, version_2: bool = False, **kwargs: Any) -> None:
        self.version_2 = version_2
        super().__init__(**kwargs)

    def one(self, prediction: str, references: Sequence[str]) -> tuple[float, float]:
        """Exact match and F1 (0 to 1) of one answer."""
        if self.version_2:
            references = [text for text in references if normalize_answer(text)] or [""]
        exact = any(normalize_answer(prediction) == normalize_answer(text) for text in references)
        return float(exact), max(squad_f1(prediction, text, self.version_2) for text in references)

    def _compute(self, *, predictions: list[str], references: list[list[str]]) -> dict[str, Any]:
        pairs = [self.one(*pair) for pair in zip(predictions, references, strict=True)]
        groups = {"": pairs}
        if self.version_2:
            both = list(zip(pairs, references, strict=True))
            groups["has_answer_"] = [pair for pair, texts in both if texts]
            groups["no_answer_"] = [pair for pair, texts in both if not texts]
        scores: dict[str, Any] = {}
        for prefix, group in groups.items():
            for number, name in enumerate(("exact_match", "f1")):
                if group:
                    scores[prefix + name] = 100 * sum(pair[number] for pair in group) / len(group)
        return scores | {"f1_signature": self.signature.format(version=2 if self.version_2 else 1.1)}


class CmrcScores(SquadScores):
    """The same for Chinese, as CMRC 2018 scores: exact match without punctuation, F1 over the longest common run.

    Cui et al., arXiv 1810.07366, section 4, and the script with the data.
    """

    description = "Exact match and F1 of Chinese answers, as CMRC 2018."
    signature = "CMRC 2018, by character without punctuation, longest common run, best of the references"

    def one(self, prediction: str, references: Sequence[str]) -> tuple[float, float]:
        if not (prediction and references):
            return (float(not prediction and not references),) * 2
        bare: Callable[[str], str] = lambda text: text.lower().strip().translate(CMRC_PUNCTUATION)  # noqa: E731
        exact = any(bare(prediction) == bare(text) for text in references)
        return float(exact), max(cmrc_f1(prediction, text) for text in references)


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


def translation_metrics(
    target_lang: str, tokenized_bleu: bool = False, is_prepared: bool = False
) -> evaluate.CombinedEvaluations:
    """BLEU, chrF2 and exact match in one, with BLEU's tokenizer for the target language.

    Args:
        target_lang: language of the texts.
        tokenized_bleu: add `TokenizedBleu`.
        is_prepared: the texts are as Moses prepares them, so there is no other BLEU than the tokenised one.
    """
    bleu = [] if is_prepared else [SacreBleu(target_lang)]
    tokenized = [TokenizedBleu(target_lang, is_prepared)] if tokenized_bleu or is_prepared else []
    return evaluate.combine([*bleu, *tokenized, ChrF2(), ExactMatch()])
