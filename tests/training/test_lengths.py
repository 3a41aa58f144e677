"""Length limits follow the model's positions, and each other, when a run begins."""

import json

import pytest

from finetune_deepseek.classification.task import Classification
from finetune_deepseek.commands.parsing.runs import parse_command
from finetune_deepseek.question_answering.task import QuestionAnswering
from finetune_deepseek.recommendation.news import NewsRecommendation
from finetune_deepseek.recommendation.task import Recommendation
from finetune_deepseek.retrieval.task import Embedding
from finetune_deepseek.training.run import run_stages
from finetune_deepseek.translation.task import Translation
from tests.small_runs import TINY, flags

FILES = {"train_file": "unread.json"}


@pytest.mark.parametrize(
    ("task", "given", "fitted"),
    [
        (Translation, FILES, {"max_source_length": 50, "max_target_length": 50}),
        (Translation, FILES | {"max_target_length": 20}, {"max_source_length": 80, "max_target_length": 20}),
        (Classification, FILES, {"max_length": 100}),
        (Classification, FILES | {"max_length": 9}, {"max_length": 9}),
        (Embedding, FILES, {"max_query_length": 64, "max_passage_length": 100}),
        (QuestionAnswering, FILES, {"max_seq_length": 100, "doc_stride": 33, "max_question_length": 16}),
        (Recommendation, FILES | {"max_length": 300}, {"max_length": 100}),
        (NewsRecommendation, {"train_dir": "unread", "max_history": 300}, {"max_history": 100}),
    ],
)
def test_limits_are_lowered_to_the_model_aloud(task, given, fitted, capsys):
    made = task(task.arguments_class(**given), 0)
    before = {name: getattr(made.arguments, name) for name in fitted}
    capsys.readouterr()
    made.fit_lengths(100, None)
    assert {name: getattr(made.arguments, name) for name in fitted} == fitted
    changed = {name for name in fitted if fitted[name] != before[name]}
    expected = {f"--{name} {before[name]} becomes {fitted[name]}: the model has 100 positions" for name in changed}
    assert {line.partition(" (")[0] for line in capsys.readouterr().out.splitlines()} == expected


@pytest.mark.parametrize(("window", "stride", "question"), [(384, 128, 64), (64, 21, 16), (24, 8, 6)])
def test_windows_share_what_they_have_room_for(window, stride, question):
    """64 tokens against a stride of 128 was refused, though nobody had named one."""
    arguments = QuestionAnswering.arguments_class(**FILES, max_seq_length=window)
    assert (arguments.doc_stride, arguments.max_question_length) == (stride, question)
    with pytest.raises(ValueError, match="--doc_stride 128: it must be below --max_seq_length 64"):
        QuestionAnswering.arguments_class(**FILES, max_seq_length=64, doc_stride=128)


def test_a_long_text_is_cut_to_the_model(tmp_path, capsys):
    """256 tokens are the default, and this model has 128 positions: its longest row was refused."""
    path = tmp_path / "rows.jsonl"
    rows = [{"text": f"{label} {number} " * 90, "label": label} for number, label in enumerate("abab")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = TINY | {"target_lang": None, "max_target_length": None, "max_steps": 1, "train_file": path}
    argv = flags(settings | {"output_dir": tmp_path / "out"})
    results = run_stages(Classification, parse_command("classification", Classification.arguments_class, argv))
    assert results["train_samples"] == 4
    assert "cut 4 of 4 texts to --max_length 128 tokens" in capsys.readouterr().out
