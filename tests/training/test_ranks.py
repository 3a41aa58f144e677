"""Ranks against plain loops and scikit-learn; ties and what is no number count against the target."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import label_ranking_average_precision_score, roc_auc_score

from finetune_deepseek.question_answering.answering import answer_questions
from finetune_deepseek.question_answering.extractive import best_spans
from finetune_deepseek.recommendation.scores import impression_scores
from finetune_deepseek.retrieval.lexical import fused_scores, retrieval_scores
from finetune_deepseek.retrieval.passage_index import FoundPassage
from finetune_deepseek.training.scoring.ranks import best_first, highest, ranks, ranks_of
from modeling_deepseek.item_ranking import top_k

NAN = float("nan")


def slow_rank(scores, target, left_out, first=0):
    """1 + the number of other candidates that aren't left out and that the target isn't strictly above."""
    rank = 1
    for place in range(first, len(scores)):
        if place != target and place not in left_out and not scores[target] > scores[place]:
            rank += 1
    return rank


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_ranks_equal_plain_counting(dtype):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 6, (50, 12), generator=generator).to(dtype)  # many ties
    targets = torch.randint(1, 12, (50,), generator=generator)
    seen = torch.randint(0, 12, (50, 4), generator=generator)
    rows = list(zip(scores, targets.tolist(), map(set, seen.tolist()), strict=True))
    expected = [slow_rank(row, target, left_out, first=1) for row, target, left_out in rows]
    assert ranks(scores, targets, seen, padding=0).tolist() == expected
    assert ranks(scores, targets).tolist() == [slow_rank(row, target, ()) for row, target, _ in rows]
    assert len(set(expected)) > 5


def test_ranks_at_the_edges():
    equal, seen = torch.zeros(1, 6), torch.tensor([[1, 0]])
    assert ranks(equal, torch.tensor([3]), seen, 0).tolist() == [4]  # a model that says nothing is last
    assert ranks(equal, torch.tensor([0]), seen, 0).tolist() == [6]  # not in the catalogue: behind all
    assert ranks(torch.arange(6.0)[None], torch.tensor([5]), torch.tensor([[5, 1]]), 0).tolist() == [1]
    assert ranks(equal, torch.tensor([-1])).tolist() == [7]
    assert ranks(equal, torch.tensor([-1]), last=torch.tensor([3])).tolist() == [3]
    lowest = torch.tensor([[-math.inf, -math.inf, 0.0]])
    assert ranks(lowest, torch.tensor([1])).tolist() == [3] and ranks(lowest, torch.tensor([1]), padding=0)[0] == 2


def test_what_is_no_number_is_never_right():
    scores = torch.tensor([[NAN, 1.0, 2.0], [NAN, 1.0, 2.0], [NAN, NAN, NAN]])
    assert ranks(scores, torch.tensor([0, 2, 1])).tolist() == [4, 2, 4]
    found = retrieval_scores(ranks_of(np.full((4, 3), np.nan), np.zeros(4, dtype=int)))
    assert found["r@1"] == 0 and found["mrr"] == 0.25  # once 1.0 and infinity


def test_mrr_is_scikit_learns():
    rng = np.random.default_rng(0)
    scores, targets = rng.normal(size=(40, 9)), rng.integers(9, size=40)
    expected = label_ranking_average_precision_score(np.eye(9)[targets], scores)
    assert retrieval_scores(ranks_of(scores, targets))["mrr"] == pytest.approx(expected)


def test_the_highest_are_numbers():
    values, places = highest(torch.tensor([[1.0, NAN, 3.0, 2.0]]), 9)
    assert places[0, :3].tolist() == [2, 3, 0] and values[0].tolist() == [3, 2, 1, -math.inf]
    logits = torch.tensor([[NAN, 0.0, 1.0, 0.5]])
    _, first, last = best_spans(logits, logits, torch.ones(1, 4, dtype=torch.bool), longest=1, number=2)
    assert first.tolist() == last.tolist() == [[2, 3]]


def test_an_impressions_auc_is_scikit_learns_and_no_number_is_worst():
    rng = np.random.default_rng(1)
    clicked, scores = np.array([1, 0, 0, 1, 0, 0]), rng.integers(4, size=6).astype(float)
    assert impression_scores(scores, clicked)["auc"] == pytest.approx(roc_auc_score(clicked, scores))
    for broken in ([NAN, 1, 2], [5, NAN, NAN]):
        assert impression_scores(np.array(broken), np.array([1, 0, 0])) == {
            "auc": 0, "mrr": pytest.approx(1 / 3), "ndcg@5": pytest.approx(0.5), "ndcg@10": pytest.approx(0.5),
        }  # fmt: skip


def test_one_broken_vector_leaves_the_other_passages_in_order():
    words, vectors = np.array([0.5, 1.0, 0.0]), np.array([0.9, NAN, 0.3])
    fused = fused_scores([words, vectors], [0.5, 0.5])
    assert fused == pytest.approx([0.25 + 0.5, 0.5, 0.5 * 0.3 / 0.9])


def test_a_reranker_without_numbers_comes_last():
    passages = [FoundPassage(text, "", 1.0, 0.5) for text in ("a", "b", "c")]
    index = SimpleNamespace(search=lambda *_: passages)
    reranker = SimpleNamespace(scores=lambda *_: [NAN, 0.2, 0.9])
    read = []

    def reader(pairs):
        read.extend(text for _, text in pairs)
        return [(text, 1.0) for _, text in pairs]

    assert answer_questions(["what?"], index, reader, reranker=reranker)[0].answer == "c"  # type: ignore[arg-type]
    assert read == ["c", "b", "a"]
    broken = SimpleNamespace(scores=lambda *_: [NAN] * 3)
    assert answer_questions(["what?"], index, reader, reranker=broken)[0].answer is None  # type: ignore[arg-type]


def test_a_recommender_never_gives_what_has_no_score():
    items, _ = top_k(torch.tensor([[0.0, NAN, 2.0, 3.0]]), 2, padding_idx=0)
    assert items.tolist() == [[3, 2]]


def test_the_best_come_first_and_what_is_no_number_last():
    scores = np.array([[1.0, np.nan, 3.0, 3.0], [np.nan, -np.inf, -1.0, np.nan]])
    assert best_first(scores).tolist() == [[2, 3, 0, 1], [2, 0, 1, 3]]
