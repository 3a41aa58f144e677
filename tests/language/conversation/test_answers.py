"""The answer at the end of a reply, on rows checked by hand."""

import pytest
from scipy.stats import binomtest

from finetune_deepseek.language.conversation.answers import (
    answer_of,
    answer_scores,
    most_frequent,
    same_answer,
    wilson,
)

PATTERN = "#### (.*)"
REFERENCES = ["16 - 3 = 13\n#### 18", "so\n#### 1,080", "#### 3"]


def test_three_replies_by_hand():
    """Right with a thousands separator and a currency in the reference's place, wrong, and without an answer."""
    replies = ["#### 2\nno: #### $18.00", "#### 1080.5", "3"]
    found = answer_scores(replies, REFERENCES, PATTERN)
    assert found["answer_accuracy"] == pytest.approx(1 / 3)
    assert (found["answers_expected"], found["answers_found"]) == (3, 2)
    interval = binomtest(1, 3).proportion_ci(method="wilson")
    assert (found["answer_accuracy_low"], found["answer_accuracy_high"]) == pytest.approx(interval, abs=1e-3)


@pytest.mark.parametrize(
    ("reply", "reference", "same"),
    [
        ("#### 1080", "#### 1,080", True),
        ("#### 18.", "#### $18", True),
        ("#### 0.50", "#### .5", True),
        ("#### 50%", "#### 50", True),
        ("#### -3", "#### 3", False),
        ("#### nan", "#### nan", True),  # a text
        ("#### nan", "#### 0", False),
        ("#### ", "#### 0", False),
        ("#### yes", "#### yes", True),
        ("18", "#### 18", False),
    ],
)
def test_answers_are_compared_as_numbers_where_both_are(reply, reference, same):
    assert same_answer(reply, reference, PATTERN) is same


def test_the_last_answer_counts_and_one_on_another_line_not():
    assert answer_of("#### 1\n#### 2\nmore", PATTERN) == "2"
    assert answer_of("none", PATTERN) is None


def test_references_without_an_answer_do_not_count():
    assert answer_scores(["#### 18", "#### 1"], ["#### 18", "eighteen"], PATTERN)["answers_expected"] == 1
    assert answer_scores(["#### 18"], ["eighteen"], PATTERN) == {}


def test_the_most_frequent_answer_is_one_as_a_number():
    assert most_frequent([*REFERENCES, "#### 1080", "a"], PATTERN) == REFERENCES[1]
    assert most_frequent(REFERENCES, PATTERN) == REFERENCES[0]
    assert most_frequent(["a"], PATTERN) is None


@pytest.mark.parametrize(("hits", "count"), [(0, 7), (7, 7), (13, 100)])
def test_intervals_are_wilsons(hits, count):
    assert wilson(hits, count) == pytest.approx(binomtest(hits, count).proportion_ci(method="wilson"), abs=1e-4)
