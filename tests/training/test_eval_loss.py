"""The loss of a split is that of its rows, however they are batched and divided among processes."""

import json
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss

from finetune_deepseek.classification.task import Classification
from finetune_deepseek.commands.parsing.runs import parse_command
from finetune_deepseek.question_answering.task import QuestionAnswering
from finetune_deepseek.recommendation.task import Recommendation
from finetune_deepseek.retrieval.task import Embedding
from finetune_deepseek.training.run import run_stages
from finetune_deepseek.training.scoring.eval_loss import LossOfSplit
from modeling_deepseek import AutoModelForEmbedding, DeepSeekForSequenceClassification
from tests.small_runs import flags
from tokenization_deepseek import DeepSeekTokenizer

LABELLED = [("good " * n, "good") for n in range(1, 4)] + [("bad " * n, "bad") for n in range(1, 3)]
PAIRS = [("what is red", "a rose"), ("what is up", "the sky and the moon"), ("who is who", "nobody knows"),
         ("red again", "a rose"), ("what is green", "grass")]  # fmt: skip
CONTEXTS = [("Ann lives in Rome.", "Rome"), ("Bob has a very old red car.", "car"), ("It rains.", "rains")]
OURS = {"preset": "tiny_v3", "use_cpu": True, "disable_tqdm": True, "max_steps": 1, "logging_steps": 1,
        "learning_rate": 0.01, "do_train": True, "do_eval": True}  # fmt: skip


def rows_of(task):
    if task is Classification:
        return [{"text": text, "label": label} for text, label in LABELLED]
    if task is Embedding:
        return [{"query": query, "passage": passage} for query, passage in PAIRS]
    return [
        {"id": str(n), "context": text, "question": "what?",
         "answers": {"text": [answer], "answer_start": [text.find(answer)]}}
        for n, (text, answer) in enumerate(CONTEXTS)
    ]  # fmt: skip


def data_of(task, folder):
    if task is Recommendation:
        lines = [f"u{user},i{(user + step) % 9},{step}" for user in range(7) for step in range(4)]
        (folder / "events.csv").write_text("\n".join(["user,item,time", *lines]))
        names = {"user_column": "user", "item_column": "item", "timestamp_column": "time"}
        return {"interactions_file": folder / "events.csv", **names}
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows_of(task)))
    settings = {"vocab_size": 300, "train_file": path, "validation_file": path}
    return settings | ({"max_seq_length": 24, "doc_stride": 4} if task is QuestionAnswering else {})


def finetune(task, folder, **settings):
    argv = flags(OURS | data_of(task, folder) | settings)
    return run_stages(task, parse_command(task.name, task.arguments_class, argv))


def test_rows_count_alike_in_whatever_batches_they_come():
    rng = np.random.default_rng(0)
    shares, labels = rng.dirichlet(np.ones(4), size=7), rng.integers(4, size=7)
    losses = torch.tensor(-np.log(shares[np.arange(7), labels]))
    split = LossOfSplit()
    for batch in losses.split(3):  # 3, 3, 1
        split.add(batch, torch.ones(len(batch), dtype=torch.long))
    assert split.scores() == {"loss": pytest.approx(log_loss(labels, shares, labels=range(4)))}
    split.is_text = True
    assert split.scores()["perplexity"] == pytest.approx(math.exp(losses.mean()))


def test_what_counts_nothing_adds_nothing():
    split = LossOfSplit()
    split.add(torch.tensor([2.0, math.nan]), torch.tensor([4, 0]))
    split.add(torch.tensor([math.nan]), torch.tensor([False]))
    assert split.scores() == {"loss": 0.5}
    assert LossOfSplit().scores() == {}
    split.add(torch.tensor([math.nan]), torch.tensor([1]))  # a loss that is no number is no small one
    assert math.isnan(split.scores()["loss"])


@pytest.mark.parametrize("task", [Classification, QuestionAnswering, Recommendation, Embedding])
def test_the_size_of_batches_changes_no_loss(task, tmp_path):
    found = [
        finetune(task, tmp_path, output_dir=tmp_path / str(size), per_device_eval_batch_size=size)["eval_loss"]
        for size in (2, 64)
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_a_classifiers_loss_is_scikit_learns(tmp_path):
    results = finetune(Classification, tmp_path, output_dir=tmp_path / "out", per_device_eval_batch_size=2)
    model = DeepSeekForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    tokenizer = DeepSeekTokenizer.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        shares = [
            model(**tokenizer(text.strip(), return_tensors="pt")).logits[0].double().softmax(-1).tolist()
            for text, _ in LABELLED
        ]
    expected = log_loss([label for _, label in LABELLED], shares, labels=["bad", "good"])
    assert results["eval_loss"] == pytest.approx(expected, rel=1e-4)


def test_an_embedding_models_loss_is_over_the_passages_of_the_split(tmp_path):
    from finetune_deepseek.encoding import encode

    results = finetune(Embedding, tmp_path, output_dir=tmp_path / "out", per_device_eval_batch_size=2)
    model = AutoModelForEmbedding.from_pretrained(tmp_path / "out").eval()
    tokenizer = DeepSeekTokenizer.from_pretrained(tmp_path / "out")
    passages = sorted({passage for _, passage in PAIRS})
    places = [passages.index(passage) for _, passage in PAIRS]
    products = encode(model, tokenizer, [q for q, _ in PAIRS], "") @ encode(model, tokenizer, passages, "").T
    shares = (products / model.config.contrastive_temperature).double().softmax(-1).numpy()
    assert results["eval_loss"] == pytest.approx(log_loss(places, shares, labels=range(4)), rel=1e-4)


def test_two_processes_find_the_loss_of_one(tmp_path):
    """Five rows among two processes with batches of two: the last turn is filled up with rows that came before."""
    (tmp_path / "one").mkdir()
    alone = finetune(
        Classification, tmp_path, output_dir=tmp_path / "one", max_steps=1, per_device_train_batch_size=4, seed=3
    )
    settings = OURS | data_of(Classification, tmp_path) | {
        "output_dir": tmp_path / "two", "preset": None, "vocab_size": None, "model_name_or_path": tmp_path / "one",
        "do_train": None, "per_device_eval_batch_size": 2, "ddp_backend": "gloo", "max_steps": None,
    }  # fmt: skip
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, "-m", "finetune_deepseek", "finetune", "classification", *flags(settings)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=900, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "two" / "eval_results.json").read_text())
    assert found["eval_loss"] == pytest.approx(alone["eval_loss"], rel=1e-5)


def test_unknown_targets_add_nothing(tmp_path):
    """The first batch has no item of the catalogue for a target, the second has one: once not a number."""
    task = Recommendation(Recommendation.arguments_class(train_file="unread"), 0)
    logits = torch.tensor([[0.0, 2.0, 1.0, -1.0]] * 2)

    def model(**_):
        return SimpleNamespace(logits=logits.clone())

    split = LossOfSplit()
    for targets in ([0, 0], [3, 0]):
        inputs = {"input_ids": torch.tensor([[1], [1]]), "attention_mask": torch.ones(2, 1, dtype=torch.long)}
        predicted = task.predict_batch(
            model, inputs | {"target": torch.tensor(targets), "seen": torch.zeros(2, 1).long()}
        )
        split.add(predicted.sums, predicted.counts)
    items = torch.tensor([2.0, 1.0, -1.0]).double().softmax(0).tolist()
    assert split.scores() == {"loss": pytest.approx(log_loss([3], [items], labels=[1, 2, 3]), rel=1e-5)}
