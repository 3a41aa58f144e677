"""BLEU, chrF2 and exact match of translations, each with the signature that says how it was counted."""

import unicodedata
from typing import Any

import evaluate
import sacrebleu
from datasets import Features, Value

from ..data.languages import bleu_tokenizer
from ..training.scoring.metrics import InMemoryMetric
from .moses import moses_lower, signature


class _TextMetric(InMemoryMetric):
    features = Features({"predictions": Value("string"), "references": Value("string")})


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
