"""Length limits follow the model's positions, and each other, when a run begins."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from configuration_deepseek import preset
from finetune_deepseek.classification.task import Classification
from finetune_deepseek.commands.parsing.runs import parse_command
from finetune_deepseek.question_answering.answering import Reader
from finetune_deepseek.question_answering.task import QuestionAnswering
from finetune_deepseek.recommendation.generative import GenerativeRecommendation
from finetune_deepseek.recommendation.news import NewsRecommendation
from finetune_deepseek.recommendation.task import Recommendation
from finetune_deepseek.retrieval.task import Embedding
from finetune_deepseek.training.run import run_stages
from finetune_deepseek.training.saved import write
from finetune_deepseek.translation.task import Translation
from modeling_deepseek import DeepSeekForQuestionAnswering
from tests.small_runs import TINY, flags
from tokenization_deepseek import train_tokenizer

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


def test_rows_are_counted_as_long_by_the_limits_that_hold(tmp_path):
    """128 target tokens are the default and become 64, half of the model's positions; of two rows one has more."""
    path = tmp_path / "rows.jsonl"
    rows = [{"en": "a bird", "de": "zwölf " * count} for count in (1, 40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = TINY | {"max_target_length": None, "max_steps": 1, "train_file": path, "output_dir": tmp_path / "out"}
    tokenizer = train_tokenizer(["abcdefghijklmnopqrstuvwxyzö "], vocab_size=276)  # a token for each byte or so
    assert len(tokenizer("zwölf " * 40)["input_ids"]) > 64
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    settings |= {"tokenizer_name": tmp_path / "tokenizer", "vocab_size": None}
    results = run_stages(Translation, parse_command("translation", Translation.arguments_class, flags(settings)))
    report = json.loads((tmp_path / "out" / "data_report.json").read_text())
    assert report["train"]["long_rows"]["count"] == 1 and results["train_samples"] == 2


def test_a_reader_saved_with_longer_windows_than_its_positions_reads(tmp_path, capsys):
    """As folders have them that were saved before lengths were fitted."""
    folder = tmp_path / "reader"
    tokenizer = train_tokenizer(["where is the red fox? the red fox is in the den."], vocab_size=300)
    model = DeepSeekForQuestionAnswering(preset("tiny_v3", vocab_size=300, max_position_embeddings=32))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings = {"answer_mode": "extractive", "max_seq_length": 384, "doc_stride": 128, "max_question_length": 64}
    write(folder, "question_answering", settings)
    passage = "the red fox is in the den. " * 20
    ((answer, confidence),) = Reader.load(str(folder))([("where is the red fox?", passage)])
    assert answer in passage and 0 <= confidence <= 1
    told = capsys.readouterr()
    assert not told.out and "--max_seq_length 384 becomes 32: the model has 32 positions" in told.err


@pytest.mark.parametrize(
    ("task", "given", "positions", "message"),
    [
        (Translation, FILES, 1, "--max_source_length must be 1 or more, and the model's 1 positions .* room for 0"),
        (Embedding, FILES, 1, "--max_query_length must be 2 or more"),
        (GenerativeRecommendation, FILES, 4, "--max_length must be 2 or more, and the model's 4 positions .* for 0"),
        (GenerativeRecommendation, FILES, 1, "--max_length must be 2 or more, and the model's 1 positions .* for 0"),
    ],
)
def test_a_model_that_is_too_small_is_refused(task, given, positions, message):
    tokenizer = SimpleNamespace(codes=np.zeros((2, 3)))
    with pytest.raises(ValueError, match=message):
        task(task.arguments_class(**given), 0).fit_lengths(positions, tokenizer)
