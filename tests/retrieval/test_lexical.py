"""Retrieval by words: terms of both kinds of script, TF-IDF, BM25, fusion, scores; XQuAD-R where it is there."""

import gzip
import json
import math
from pathlib import Path

import numpy as np
import pytest

from finetune_deepseek.retrieval.lexical import (
    BM25,
    best_weights,
    bm25_terms,
    fused_scores,
    part_terms,
    retrieval_scores,
    terms,
    tfidf_scores,
    tfidf_terms,
)
from finetune_deepseek.training.scoring.ranks import ranks_of

XQUAD_R = Path(__file__).parents[3] / "shared" / "data" / "xquad_r"
PASSAGES = ["The red fox runs.", "A bird sits in the tree", "海是蓝色的水", "..."]


def test_terms_are_words_and_characters():
    assert terms("BM25检索, naïve 2nd-rate!") == ["bm25", "检", "索", "naïve", "2nd", "rate"]
    assert tfidf_terms("a b c") == ["a", "b", "c", "a b", "b c"]
    assert bm25_terms("red fox 海水a") == ["red", "fox", "海", "水", "a", "海水"]


def test_bm25_equals_its_formula():
    pytest.importorskip("bm25s", reason="bm25s is not installed")
    passages = ["red fox red", "blue bird", "red tree with a bird"]
    lengths, mean = [3, 2, 5], 10 / 3
    scores = BM25(passages).scores("red bird bird?")
    for number, passage in enumerate(passages):
        expected = 0.0
        for word in ("red", "bird", "bird"):
            count = passage.split().count(word)
            inverse = math.log(1 + (3 - 2 + 0.5) / (2 + 0.5))
            expected += inverse * count / (count + 1.5 * (1 - 0.75 + 0.75 * lengths[number] / mean))
        assert scores[number] == pytest.approx(expected, rel=1e-5)


def test_both_find_words_of_both_scripts():
    pytest.importorskip("bm25s", reason="bm25s is not installed")
    bm25 = BM25(PASSAGES)
    assert tfidf_scores(["FOX?", "蓝色"], PASSAGES).argmax(1).tolist() == [0, 2]
    assert [int(bm25.scores(query).argmax()) for query in ("FOX?", "蓝色")] == [0, 2]
    for nothing in ("", "?!", "zebra"):
        assert bm25.scores(nothing).tolist() == [0] * 4
    assert BM25(["...", "!"]).scores("fox").tolist() == [0, 0]


def test_parts_of_words_find_other_forms():
    assert part_terms("Ox! 大海的") == [" ox", "ox ", " ox ", "大", "海", "的", "大海", "海的", "大海的"]
    parts = BM25(PASSAGES, part_terms)
    assert [int(parts.scores(query).argmax()) for query in ("foxes", "birdz", "海的")] == [0, 1, 2]
    scores = parts.scores("foxes")
    assert scores[0] > 0 and scores[2] == 0 and parts.scores("").tolist() == [0] * 4


def test_fusion_is_the_weighted_mean_of_scores_by_the_best_one():
    fused = fused_scores([np.array([[4.0, 2.0, -1.0]]), np.array([[0.0, 9.0, 0.0]])], (1, 3))
    assert fused[0] == pytest.approx([0.25, 0.125 + 0.75, 0])
    assert fused_scores([np.array([-5.0, 0.0])], (1,)).tolist() == [0, 0]


def test_weights_are_those_with_the_best_mrr():
    good, bad = np.array([[3.0, 1.0], [1.0, 2.0]]), np.array([[0.0, 1.0], [1.0, 0.0]])
    targets = np.array([0, 1])
    assert best_weights([good, bad], targets) == (1, 0) and best_weights([bad, good], targets) == (0.3, 0.7)
    halves = [np.array([[1.0, 0.9, 0.0]]), np.array([[0.0, 0.9, 1.0]])]  # only both together find the middle one
    assert best_weights(halves, np.array([1])) == (0.8, 0.2)


def test_vectors_get_no_more_weight_than_is_proven():
    """Of a hundred queries the vectors find three others and lose two, which is chance, or find eighteen."""
    targets = np.zeros(100, dtype=int)
    words, vectors = np.tile([1.0, 0.5], (100, 1)), np.tile([1.0, 0.0], (100, 1))
    words[-2:], vectors[-2:] = [1.0, 0.9], [0.0, 1.0]
    for others, weights in ((3, (1.0, 0.0)), (18, (0.6, 0.4))):
        words[:others] = [0.5, 1.0]
        assert best_weights([words, vectors], targets)[1] > 0
        assert best_weights([words, vectors], targets, is_sparing=True) == weights


def test_scores_are_of_the_worst_rank_among_equals():
    ranks = ranks_of(np.array([[1.0, 1.0, 0.0], [0.0, 2.0, 1.0]]), np.array([0, 1]))
    assert ranks.tolist() == [2, 1]
    assert retrieval_scores(np.array([1, 2, 20])) == pytest.approx({"r@1": 1 / 3, "r@10": 2 / 3, "mrr": 1.55 / 3})


@pytest.mark.skipif(not XQUAD_R.is_dir(), reason="XQuAD-R is not beside the repository")
@pytest.mark.parametrize(("language", "floor"), [("en", 0.945), ("zh", 0.955)])
def test_bm25_finds_the_paragraphs_of_xquad_r(language, floor):
    pytest.importorskip("bm25s", reason="bm25s is not installed")
    corpus, queries = (
        list(map(json.loads, gzip.decompress((XQUAD_R / f"{language}.{name}.jsonl.gz").read_bytes()).splitlines()))
        for name in ("corpus", "queries")
    )
    paragraphs: dict[str, str] = {}
    for row in corpus:
        paragraphs[row["paragraph_id"]] = f"{paragraphs.get(row['paragraph_id'], '')} {row['text']}"
    places = {name: place for place, name in enumerate(paragraphs)}
    targets = np.array([places[row["paragraph_id"]] for row in queries])
    bm25 = BM25(list(paragraphs.values()))
    scores = np.stack([bm25.scores(row["question"]) for row in queries])
    assert len(paragraphs) == 240 and len(queries) == 1190
    assert retrieval_scores(ranks_of(scores, targets))["mrr"] > floor
