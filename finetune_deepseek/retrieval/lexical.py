"""Passages found by their words: BM25, TF-IDF, and the weighted fusion of rankings by words and by vectors.

Words are runs of letters and digits in lower case; Chinese and Japanese, which have no spaces, count by character.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer

from ..training.scoring.ranks import ranks_of

CHARACTERS = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
TERM = re.compile(rf"[{CHARACTERS}]|[^\W{CHARACTERS}]+")
CHARACTER = re.compile(rf"[{CHARACTERS}]")
RUN = re.compile(rf"[{CHARACTERS}]+|[^\W{CHARACTERS}]+")
PARTS, CHARACTER_PARTS = (3, 4, 5), (1, 2, 3)  # lengths of the parts of words, and of runs of characters
# Weights where no retriever has its own, chosen on the validation questions of benchmarks/xquad_r.yaml.
DEFAULT_WEIGHTS = (0.5, 0.4, 0.1)
WORDS_ALONE = (0.5, 0.5)  # without vectors, chosen on the same questions
WEIGHT_STEPS = 10


def terms(text: str) -> list[str]:
    """'BM25 检索' -> ['bm25', '检', '索']."""
    return TERM.findall(text.lower())


def tfidf_terms(text: str) -> list[str]:
    """Words (characters) and pairs of neighbours."""
    found = terms(text)
    return found + [f"{first} {second}" for first, second in zip(found, found[1:], strict=False)]


def bm25_terms(text: str) -> list[str]:
    """Words; for text by character also pairs of neighbouring characters, which are most of its words."""
    found = terms(text)
    pairs = zip(found, found[1:], strict=False)
    return found + [a + b for a, b in pairs if CHARACTER.fullmatch(a) and CHARACTER.fullmatch(b)]


def part_terms(text: str) -> list[str]:
    """Parts of words, of which the first and last bear a space, and runs of up to three characters that aren't spelt:
    "foxes" shares most of its parts with "fox", and a misspelt name with its name."""
    found = []
    for run in RUN.findall(text.lower()):
        word, lengths = (run, CHARACTER_PARTS) if CHARACTER.match(run) else (f" {run} ", PARTS)
        found += [word[start : start + n] for n in lengths for start in range(len(word) - n + 1)]
    return found


def tfidf_scores(queries: Sequence[str], passages: Sequence[str]) -> np.ndarray:
    """Cosines [Q, P] of TF-IDF vectors, with logarithmic term counts."""
    vectorizer = TfidfVectorizer(analyzer=tfidf_terms, sublinear_tf=True)
    vectors = vectorizer.fit_transform(passages)
    return (vectorizer.transform(queries) @ vectors.T).toarray()


def has_bm25() -> bool:
    """Whether bm25s is installed."""
    try:
        import bm25s  # noqa: F401
    except ImportError:
        return False
    return True


class BM25:
    """Okapi BM25 as Lucene counts it (k1 = 1.5, b = 0.75), by bm25s.

    Args:
        passages: texts.
        analyze: the terms of a text, such as `bm25_terms` or `part_terms`.

    Raises:
        ValueError: if bm25s isn't installed.
    """

    def __init__(self, passages: Sequence[str], analyze: Callable[[str], list[str]] = bm25_terms) -> None:
        if not has_bm25():
            raise ValueError('BM25 needs the package bm25s: pip install "deepseek-hf[retrieval]".')
        import bm25s

        self.num_passages = len(passages)
        self.analyze = analyze
        tokens = [analyze(passage) for passage in passages]
        self.counts = Counter(term for words in tokens for term in set(words))  # passages that have a term
        self.index = bm25s.BM25(method="lucene") if any(tokens) else None  # bm25s refuses an empty vocabulary
        if self.index is not None:
            self.index.index(tokens, show_progress=False)

    def scores(self, query: str) -> np.ndarray:
        """[P], 0 for passages that share no word."""
        known = self.analyze(query)
        if self.index is None or not known:
            return np.zeros(self.num_passages, dtype=np.float32)
        return np.asarray(self.index.get_scores(known))

    def share_found(self, query: str, passage: str) -> float:
        """From 0 to 1: the share of the query's terms that are in a passage, weighed by inverse document frequency.

        A term that no passage has weighs most, so that a question about something else finds little.
        """
        asked, known = set(self.analyze(query)), set(self.analyze(passage))
        weights = {
            term: math.log1p((self.num_passages - self.counts[term] + 0.5) / (self.counts[term] + 0.5))
            for term in asked
        }
        return sum(weights[term] for term in asked & known) / sum(weights.values()) if asked else 0.0


def fused_scores(rankings: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    """The weighted mean of scores that are divided by the best one of each query, from 0 to 1.

    Args:
        rankings: scores [..., P] of the same passages, each on its own scale; a negative one counts as 0.
        weights: one for each ranking, not below 0.
    """
    total = sum(weights)
    return np.sum([weight / total * scaled(r) for r, weight in zip(rankings, weights, strict=True)], axis=0)


def scaled(scores: np.ndarray) -> np.ndarray:
    """Scores [..., P] between 0 and 1, that of the best passage, or all 0 if nothing is found, as where a score is no
    number."""
    positive = np.maximum(np.where(np.isnan(scores), 0, scores), 0)
    return positive / np.maximum(positive.max(axis=-1, keepdims=True), np.finfo(np.float32).tiny)


def best_weights(rankings: Sequence[np.ndarray], targets: np.ndarray, is_sparing: bool = False) -> tuple[float, ...]:
    """The weights, in tenths, with the highest MRR of the fused ranking; of several the first in order.

    Args:
        rankings: scores [Q, P] each.
        targets: [Q], the number of each query's passage.
        is_sparing: of the weights that are behind by chance alone, at most one standard error of the difference by
            query, take those with the least of the last ranking (Breiman et al.'s rule of 1984): vectors were trained
            on passages like these, and are worth less elsewhere.
    """
    parts = [scaled(ranking) for ranking in rankings]
    grid = [
        tenths for tenths in product(range(WEIGHT_STEPS, -1, -1), repeat=len(parts)) if sum(tenths) == WEIGHT_STEPS
    ]

    def reciprocal_ranks(tenths: tuple[int, ...]) -> np.ndarray:
        fused = np.sum([weight * part for weight, part in zip(tenths, parts, strict=True)], axis=0)
        return 1 / ranks_of(fused, targets)

    found = {tenths: reciprocal_ranks(tenths) for tenths in grid}
    best = max(grid, key=lambda tenths: found[tenths].mean())
    if is_sparing:
        behind = {tenths: found[best] - ranks for tenths, ranks in found.items()}
        level = [t for t in grid if behind[t].mean() <= behind[t].std() / math.sqrt(len(targets))]
        best = max(level, key=lambda tenths: (-tenths[-1], found[tenths].mean()))
    return tuple(tenth / WEIGHT_STEPS for tenth in best)


def retrieval_scores(ranks: Sequence[Any] | np.ndarray) -> dict[str, float]:
    """Recall at 1 and at 10, which is the share of a query's right passages that are so far in front, and the
    reciprocal rank of the first right one; means over queries, as trec_eval, BEIR and MTEB count them.

    Args:
        ranks: of each query the rank of its right passage, or of all of them.
    """
    of_queries = [np.atleast_1d(found) for found in ranks]
    recalls = {f"r@{k}": float(np.mean([(found <= k).mean() for found in of_queries])) for k in (1, 10)}
    return recalls | {"mrr": float(np.mean([1 / found.min() for found in of_queries]))}


def right_places(queries: Sequence[str], targets: Sequence[int] | np.ndarray, num_passages: int) -> np.ndarray:
    """[Q, P] booleans: the passages that some row of the same query names as its own."""
    right: dict[str, list[int]] = {}
    for query, target in zip(queries, targets, strict=True):
        right.setdefault(query, []).append(int(target))
    found = np.zeros((len(queries), num_passages), dtype=bool)
    for row, query in enumerate(queries):
        found[row, right[query]] = True
    return found
