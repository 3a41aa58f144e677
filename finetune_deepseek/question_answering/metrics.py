"""Scores of answers, as SQuAD and CMRC 2018 count them."""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from datasets import Features, List, Value

from ..training.scoring.metrics import InMemoryMetric


class _AnswerMetric(InMemoryMetric):
    features = Features({"predictions": Value("string"), "references": List(Value("string"))})


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
