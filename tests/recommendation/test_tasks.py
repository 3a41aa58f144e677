"""The tasks on interactions put histories and a report together; none is another one with parts undone."""

import pytest
from datasets import Dataset

from finetune_deepseek import TASKS
from finetune_deepseek.commands.finetune import task_class, task_flags
from finetune_deepseek.recommendation.items.histories import NumberedHistories


def rows(*histories, target=None) -> Dataset:
    return Dataset.from_list([{"user": str(n), "source": h, "target": target} for n, h in enumerate(histories)])


def test_no_task_is_made_of_another_one():
    classes = {task_class(name) for name in TASKS}
    for made in classes:
        assert classes.intersection(made.__mro__) == {made}


@pytest.mark.parametrize("name", ["generative_recommendation", "prompt_ranking"])
@pytest.mark.parametrize(("flag", "value"), [("init_items", "svd"), ("item_counts", True), ("item_dropout", 0.2)])
def test_flags_without_effect_are_refused(name, flag, value):
    with pytest.raises(ValueError, match=f"--{flag}: a flag of `finetune recommendation`; leave it out."):
        task_flags(name)(**{flag: value})


def test_windows_overlap_by_one_and_the_last_of_a_scored_history_are_read():
    numbers = {item: number for number, item in enumerate("abcdef", start=1)}
    learned = NumberedHistories(rows(list("abxcdef"), ["a"]), numbers, limit=2, is_training=True)
    assert learned.features() == {
        "input_ids": [[4, 5, 6], [2, 3, 4], [1, 2]],
        "length": [2, 2, 1],
        "number": [0, 1, 2],
    }
    assert learned.notes_on_histories() == ["left out 1 items of histories that are not in the model's catalogue"]
    assert learned.notes_on_targets() == []
    scored = NumberedHistories(rows(list("abc"), list("aa"), target="a"), numbers, limit=2, is_training=False)
    found = scored.features()
    assert found["input_ids"] == [[2, 3], [1, 1]] and found["target"] == [1, 1]
    assert found["seen"] == [[2, 3], [0]]  # the repeated target may be recommended again
    lost = NumberedHistories(rows(["a"], target="z"), numbers, limit=2, is_training=False)
    assert lost.notes_on_targets() == ["1 of 1 targets are not in the model's catalogue; they rank last"]


def test_histories_that_teach_or_ask_nothing():
    with pytest.raises(ValueError, match="No training history has two items"):
        NumberedHistories(rows(["a"]), {"a": 1}, limit=2, is_training=True).features()
    with pytest.raises(ValueError, match="User 0: no item of this history is in the model's catalogue"):
        NumberedHistories(rows(["x"]), {"a": 1}, limit=2, is_training=False)
