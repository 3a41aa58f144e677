"""The classification task: three kinds of problem on a few rows, and the machinery under them."""

import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from huggingface_hub import ModelCard
from peft import AutoPeftModelForSequenceClassification
from safetensors.torch import load_file
from sklearn.metrics import f1_score, mean_squared_error
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, pipeline

import finetune_deepseek
from finetune_deepseek.classification.arguments import ClassificationArguments
from finetune_deepseek.classification.problems import PROBLEMS, MultiLabel, Regression, SingleLabel
from finetune_deepseek.classification.task import Classification, ClassificationCollator
from finetune_deepseek.commands.parsing.runs import parse_command
from finetune_deepseek.data.sources import DatasetColumns
from finetune_deepseek.data.words import pair_text
from finetune_deepseek.training.arguments import ModelArguments
from finetune_deepseek.training.batches import RowSampler, TokenBatchSampler
from finetune_deepseek.training.loading import load_model
from finetune_deepseek.training.run import run_stages
from finetune_deepseek.training.saved import Saved
from finetune_deepseek.training.scoring.labels import LabelSetF1, RegressionErrors
from modeling_deepseek import DeepSeekForCausalLM
from tests.small_runs import TINY, flags

EXAMPLE = Path(finetune_deepseek.__file__).parent / "examples" / "classification.yaml"
SINGLE = [("a red fox", "b"), ("two blue birds", "a"), ("red and red", "b"), ("sky blue", "a"), ("green", "c")]
MULTI = [("red fox", ["x", "z"]), ("blue bird", ["y"]), ("grey", []), ("red and blue", ["x", "y", "z"])]
NUMBERS = [("one", 1.0), ("two", 2.0), ("three", 3.0), ("minus one", -1.0)]
OURS = {name: value for name, value in TINY.items() if name not in ("target_lang", "max_target_length")}
OURS["per_device_train_batch_size"] = 8  # all rows at once


def write(path, rows, text="text", label="label"):
    lines = [json.dumps({text: source, label: target}, ensure_ascii=False) for source, target in rows]
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


def classify(argv=(), **settings):
    return run_stages(
        Classification, parse_command("classification", ClassificationArguments, [*argv, *flags(settings)])
    )


def learn(folder, rows, name="rows.jsonl", **settings):
    path = write(folder / name, rows)
    files = {f"{split}_file": path for split in ("train", "validation", "test")}
    return classify(**(OURS | {"output_dir": folder / "out", "max_steps": 25} | files | settings))


def predictions(folder):
    lines = (folder / "generated_predictions.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def task(rows, is_training=True, saved=None, where="train", **settings):
    """A task with its rows read and its labels known."""
    made = Classification(ClassificationArguments(train_file="unread", **settings), seed=0)
    made.where = {where: where}
    splits = {where: made._read_rows({"text": [t for t, _ in rows], "label": [y for _, y in rows]}, where)}
    return made, splits, made.config_fields(splits, saved or {})


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A single-label model that knows its five rows."""
    folder = tmp_path_factory.mktemp("single")
    return folder, learn(folder, SINGLE)


def test_one_label_is_learned(learned):
    folder, results = learned
    assert results["test_accuracy"] == results["test_macro_f1"] == results["eval_macro_recall"] == 1
    assert results["baseline_accuracy"] == 1  # the test rows are the training rows here
    assert predictions(folder / "out") == [{"source": x, "target": y, "prediction": y} for x, y in SINGLE]


def test_labels_are_sorted_and_saved(learned):
    config = AutoConfig.from_pretrained(learned[0] / "out")
    assert config.id2label == {0: "a", 1: "b", 2: "c"} and config.label2id == {"a": 0, "b": 1, "c": 2}
    assert config.problem_type == "single_label_classification"


def test_saved_model_works_in_a_pipeline(learned):
    pipe = pipeline("text-classification", model=str(learned[0] / "out"), device="cpu")
    assert [found["label"] for found in pipe([text for text, _ in SINGLE])] == [label for _, label in SINGLE]


def test_card(learned):
    folder, results = learned
    card = ModelCard.load(folder / "out" / "README.md")
    assert card.data.pipeline_tag == "text-classification"
    assert {r.metric_type: r.metric_value for r in card.data.eval_results}["f1"] == 1.0
    assert "TF-IDF + logistic regression" in card.text and "the label of the highest logit" in card.text
    assert "AutoModelForSequenceClassification" in card.text and "generate" not in card.text


def test_predict_alone_keeps_the_models_labels(learned, tmp_path):
    """A test file that lacks a class must not shift the ids."""
    path = write(tmp_path / "some.jsonl", [row for row in SINGLE if row[1] != "a"])
    settings = OURS | {"preset": None, "vocab_size": None, "model_name_or_path": learned[0] / "out"}
    results = classify(**settings, output_dir=tmp_path / "out", test_file=path)
    assert results["test_accuracy"] == 1 and "baseline_accuracy" not in results
    other = write(tmp_path / "other.jsonl", [("red", "d"), ("blue", "a")])
    with pytest.raises(
        ValueError, match=r"other.jsonl: 1 label\(s\) that the model can't know, such as 'd'; it has a, b"
    ):
        classify(**settings, output_dir=tmp_path / "out", test_file=other)
    with pytest.raises(ValueError, match="trained for single_label_classification, not regression"):
        classify(**settings, output_dir=tmp_path / "out", test_file=write(tmp_path / "n.jsonl", NUMBERS))


def test_several_labels_are_learned(tmp_path):
    results = learn(tmp_path, MULTI, balance="weights")
    assert results["test_subset_accuracy"] == results["test_macro_f1"] == 1
    assert [line["prediction"] for line in predictions(tmp_path / "out")] == [labels for _, labels in MULTI]
    assert "baseline_macro_f1" in results
    assert AutoConfig.from_pretrained(tmp_path / "out").problem_type == "multi_label_classification"


def test_numbers_are_learned(tmp_path):
    results = learn(tmp_path, NUMBERS, max_steps=40)
    found = [line["prediction"] for line in predictions(tmp_path / "out")]
    assert found == pytest.approx([number for _, number in NUMBERS], abs=0.3)
    assert results["test_mse"] == pytest.approx(mean_squared_error([n for _, n in NUMBERS], found), rel=1e-4)
    assert results["test_mse"] == pytest.approx(results["test_loss"], rel=1e-4)
    assert results["baseline_mse"] > 0
    assert AutoConfig.from_pretrained(tmp_path / "out").num_labels == 1


def test_lora_trains_and_saves_the_head(learned, tmp_path):
    base = tmp_path / "base"
    config = AutoConfig.from_pretrained(learned[0] / "out")
    config.problem_type, config.num_labels = None, 2  # as in a language model, whose head for classes is yet to come
    DeepSeekForCausalLM.from_pretrained(learned[0] / "out", config=config).save_pretrained(base)
    AutoTokenizer.from_pretrained(learned[0] / "out").save_pretrained(base)
    settings = {"preset": None, "vocab_size": None, "use_peft": True, "learning_rate": 0.01}
    results = learn(tmp_path, SINGLE, model_name_or_path=base, lora_target=["all"], max_steps=40, **settings)
    assert results["test_accuracy"] == 1
    assert results["parameters_total"] == learned[1]["parameters_total"]  # the head counts once
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert [name for name in saved if "lora_" not in name] == ["base_model.model.score.weight"]

    model = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "out", num_labels=3).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    labels = Saved.open(None, str(tmp_path / "out")).changes["id2label"]
    with torch.no_grad():
        logits = [model(**tokenizer(text, return_tensors="pt")).logits for text, _ in SINGLE]
    assert [labels[str(int(found.argmax()))] for found in logits] == [label for _, label in SINGLE]
    by_number = {int(number): label for number, label in labels.items()}
    assert f"id2label={by_number!r}, " in (tmp_path / "out" / "README.md").read_text()

    again = {"preset": None, "vocab_size": None, "model_name_or_path": tmp_path / "out"}
    test_file = write(tmp_path / "some.jsonl", SINGLE[1:2])
    assert classify(**(OURS | again), output_dir=tmp_path / "again", test_file=test_file)["test_accuracy"] == 1


def test_a_checkpoint_that_pads_otherwise_gets_the_tokenizers_padding(learned, tmp_path):
    """Else the head would read its scores off a padding token."""
    model = AutoModelForSequenceClassification.from_pretrained(learned[0] / "out")
    tokenizer = AutoTokenizer.from_pretrained(learned[0] / "out")
    model.config.pad_token_id = tokenizer.pad_token_id + 1
    model.save_pretrained(tmp_path)
    made, _, fields = task(SINGLE)
    loaded = load_model(ModelArguments(model_name_or_path=str(tmp_path)), made, tokenizer, fields, is_trained=False)
    assert loaded.config.pad_token_id == tokenizer.pad_token_id
    short, long = (tokenizer(text)["input_ids"] for text in ("a red fox", "two blue birds in the sky"))
    batch = made.collator(tokenizer)([{"input_ids": ids, "labels": 0} for ids in (short, long)])
    with torch.no_grad():
        together = loaded(**batch).logits[0]
        alone = loaded(torch.tensor([short])).logits[0]
    assert torch.allclose(together, alone, atol=1e-5)


# -- loss and order --


def test_class_weights_change_the_loss_even_in_a_batch_of_one_class():
    made, _, _ = task([("x", "a")] * 3 + [("y", "b")], balance="weights")
    assert made.weights.tolist() == pytest.approx([4 / (2 * 3), 4 / (2 * 1)])
    logits, labels = torch.tensor([[0.5, -1.0]]), torch.tensor([1])
    plain = F.cross_entropy(logits, labels)
    assert made.loss_function(0.0)({"logits": logits}, labels).item() == pytest.approx(2 * plain.item())
    unweighted, _, _ = task([("x", "a")] * 3 + [("y", "b")])
    assert unweighted.loss_function(0.0)({"logits": logits}, labels).item() == pytest.approx(plain.item())


def test_weights_of_several_labels_lift_the_rare_ones():
    made, _, _ = task([("x", ["a"]), ("y", ["a", "b"]), ("z", ["a"]), ("w", [])], balance="weights")
    assert made.weights.tolist() == pytest.approx([1 / 3, 3])
    logits, labels = torch.tensor([[0.5, -1.0]]), torch.tensor([[0.0, 1.0]])
    expected = (F.softplus(logits[0, 0]) + 3 * F.softplus(-logits[0, 1])) / 2
    assert made.loss_function(0.0)({"logits": logits}, labels).item() == pytest.approx(expected.item())


@pytest.mark.parametrize("rows", [SINGLE, MULTI, NUMBERS])
def test_accumulated_batches_give_the_loss_of_one(rows, tmp_path):
    """The loss is divided by all items of the step, not by each batch's own."""
    order = {"max_steps": 2, "train_sampling_strategy": "sequential", "do_train": True, "warmup_steps": 0}
    one = learn(tmp_path, rows, **order, per_device_train_batch_size=4, output_dir=tmp_path / "one")
    two = learn(
        tmp_path,
        rows,
        **order,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        output_dir=tmp_path / "2",
    )
    assert two["train_loss"] == pytest.approx(one["train_loss"], rel=1e-4)


def test_a_number_of_minus_100_counts_like_others(tmp_path):
    """Trainer would not count the two rows of four among those that the loss is the mean of."""
    rows = [("one", -100.0), ("two", -100.0), ("three", 3.0), ("minus one", -1.0)]
    result = learn(tmp_path, rows, max_steps=1, do_train=True, do_eval=True, learning_rate=1e-6)
    mean = sum(target**2 for _, target in rows) / 4  # a fresh head's answers are near 0
    assert result["train_loss"] == pytest.approx(mean, rel=0.01) == result["eval_loss"]


@pytest.mark.parametrize("tokens", [None, 60])
def test_balanced_classes_are_drawn_equally_often(tokens):
    labels = [0] * 900 + [1] * 90 + [2] * 10
    made = Classification(ClassificationArguments(train_file="unread", balance="sampler"), seed=0)
    features = Dataset.from_dict({"labels": labels, "length": [number % 30 + 1 for number in range(1000)]})
    weights = made.row_weights(features)
    assert Classification(ClassificationArguments(train_file="unread"), 0).row_weights(features) is None
    if tokens:
        sampler = TokenBatchSampler([[(1, length)] for length in features["length"]], tokens, 3, weights=weights)
    else:
        sampler = RowSampler(1000, 3, weights=weights)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        drawn = list(sampler)
        assert len(drawn) == len(sampler) and drawn == list(sampler)  # a resumed epoch is the same
        rows = [row for batch in drawn for row in batch] if tokens else drawn
        assert all(0.28 < count / len(rows) < 0.39 for count in Counter(labels[row] for row in rows).values())
        assert not tokens or all(len(batch) * max(features["length"][r] for r in batch) <= tokens for batch in drawn)
    sampler.set_epoch(0)
    assert list(sampler) != drawn


@pytest.mark.parametrize("by_tokens", [False, True])
def test_trainer_draws_the_rare_class_as_often(by_tokens, tmp_path, monkeypatch):
    """One row of "rare" among twenty: every second label of training is its."""
    seen, collate = [], ClassificationCollator.__call__

    def watch(self, features):
        seen.extend(feature["labels"] for feature in features if "row" not in feature)
        return collate(self, features)

    monkeypatch.setattr(ClassificationCollator, "__call__", watch)
    rows = [(f"text number {number}", "common" if number else "rare") for number in range(20)]
    size = {"tokens_per_batch": 40} if by_tokens else {"per_device_train_batch_size": 4}
    learn(tmp_path, rows, balance="sampler", max_steps=-1, num_train_epochs=6, do_train=True, **size)
    assert 0.35 < seen.count(1) / len(seen) < 0.65


def test_label_smoothing():
    made, _, _ = task(SINGLE)
    logits, labels = torch.tensor([[0.5, -1.0, 0.1]]), torch.tensor([1])
    expected = F.cross_entropy(logits, labels, label_smoothing=0.1)
    assert made.loss_function(0.1)({"logits": logits}, labels).item() == pytest.approx(expected.item())
    with pytest.raises(ValueError, match="--label_smoothing_factor is for one label per row"):
        task(MULTI)[0].loss_function(0.1)


# -- scores --


def test_label_set_scores_equal_scikit_learn():
    found, right = [[1, 0, 1], [0, 1, 0], [0, 0, 0]], [[1, 0, 1], [1, 1, 0], [0, 0, 1]]
    scores = LabelSetF1().compute(predictions=found, references=right)
    assert scores["subset_accuracy"] == pytest.approx(1 / 3)
    assert scores["macro_f1"] == pytest.approx(f1_score(right, found, average="macro"))
    assert scores["macro_precision"] == 1 and scores["macro_recall"] == pytest.approx(2 / 3)


def test_regression_scores():
    assert RegressionErrors().compute(predictions=[1.0, 4.0], references=[2.0, 2.0]) == {"mse": 2.5, "mae": 1.5}


@pytest.mark.parametrize(
    ("problem", "target"),
    [(SingleLabel(["a", "b"]), "b"), (MultiLabel(["a", "b", "c"]), ["a", "c"]), (Regression(["n"]), -1.5)],
)
def test_decode_undoes_encode(problem, target):
    assert problem.decode(problem.encode(target)) == target


def test_choice_by_logits():
    logits = np.array([[0.1, -2.0, 3.0]])
    assert SingleLabel(["a", "b", "c"]).choose(logits).tolist() == [2]
    assert MultiLabel(["a", "b", "c"]).choose(logits).tolist() == [[1, 0, 1]]
    assert Regression(["n"]).choose(logits[:, :1]).tolist() == [0.1]


# -- data --


@pytest.mark.parametrize(
    ("rows", "settings", "kind", "labels"),
    [
        ([("x", 10), ("y", 9)], {}, "single_label_classification", ["9", "10"]),
        ([("x", True), ("y", False)], {}, "single_label_classification", ["False", "True"]),
        ([("x", 1.5), ("y", 2.5)], {}, "regression", ["label"]),
        ([("x", 1), ("y", 2)], {"problem_type": "regression"}, "regression", ["label"]),
        ([("x", [3, 1]), ("y", [])], {}, "multi_label_classification", ["1", "3"]),
        (
            [("x", "b; a"), ("y", "c"), ("z", "")],
            {"label_separator": ";"},
            "multi_label_classification",
            ["a", "b", "c"],
        ),
    ],
)
def test_problem_and_labels_follow_the_data(rows, settings, kind, labels):
    _, splits, fields = task(rows, **settings)
    assert fields["problem_type"] == kind and list(fields["id2label"].values()) == labels
    assert len(splits["train"]) == len(rows)


def test_class_names_of_a_data_set_are_used():
    made = Classification(ClassificationArguments(dataset_name="x"), seed=0)
    names = ClassLabel(names=["sport", "art"])
    rows = Dataset.from_dict(
        {"text": ["a", "b", "c"], "label": [0, 1, -1]}, features=Features({"text": Value("string"), "label": names})
    )
    assert made._read_rows(DatasetColumns(rows), "x")["target"] == ["sport", "art"]
    made = Classification(ClassificationArguments(dataset_name="x"), seed=0)
    rows = Dataset.from_dict(
        {"text": ["a"], "label": [[0, 1]]}, features=Features({"text": Value("string"), "label": List(names)})
    )
    assert made._read_rows(DatasetColumns(rows), "x")["target"] == [["art", "sport"]]


def test_csv_and_parquet(tmp_path):
    (tmp_path / "train.csv").write_text("who,what\nb,two words\na,one\n")
    Dataset.from_dict({"what": ["word"], "who": ["a"]}).to_parquet(tmp_path / "test.parquet")
    arguments = ClassificationArguments(data_dir=str(tmp_path), text_column="what", label_column="who")
    splits = Classification(arguments, seed=0).load_splits()
    assert list(splits["train"]) == [{"source": "two words", "target": "b"}, {"source": "one", "target": "a"}]
    assert list(splits["test"]) == [{"source": "word", "target": "a"}]


def test_most_frequent_labels_are_those_of_training(tmp_path, capsys):
    train = [("x", "a")] * 3 + [("y", "b")] * 2 + [("z", "c")]
    write(tmp_path / "train.jsonl", train)
    write(tmp_path / "test.jsonl", [("z", "c"), ("z", "c"), ("x", "a"), ("w", "d")])
    splits = Classification(ClassificationArguments(data_dir=str(tmp_path), most_frequent_labels=2), 0).load_splits()
    assert splits["train"]["target"] == ["a"] * 3 + ["b"] * 2 and splits["test"]["target"] == ["a"]
    assert "test: 1 of 4 rows have the 2 most frequent labels" in capsys.readouterr().out


def test_rows_left_out_and_cut_are_counted_aloud(tmp_path, capsys):
    path = write(tmp_path / "rows.jsonl", [("long text " * 9, "a"), ("", "b"), ("x", None), ("y", "b"), (None, "a")])
    classify(**OURS, train_file=path, output_dir=tmp_path / "out", max_steps=1, max_length=8)
    out = capsys.readouterr().out
    assert "rows.jsonl: left out 3 of 5 rows without text or label" in out
    assert "cut 1 of 2 texts to --max_length 8 tokens" in out


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        (
            [("x", "a")],
            {"text_column": "txt"},
            r"no column 'txt'; it has text, label. Set --text_column \(did you mean",
        ),
        ([("x", "a")], {"label_column": "author"}, "no column 'author'; it has text, label. Set --label_column."),
        ([("x", "a"), ("y", "a")], {}, r"1 label\(s\) in 'label'"),
        ([("x", None), ("y", None)], {}, "no row has both a 'text' and a 'label'"),
        ([(1, "a")], {}, "train, row 1: 'text' is '1', not a text"),
        ([("x", "1"), ("y", "b")], {"problem_type": "regression"}, "train, row 2, 'label': 'b' is not a number"),
        (
            [("x", ["a"])],
            {"problem_type": "single_label_classification"},
            r"row 1, 'label': \"\['a'\]\" is not one label",
        ),
        (
            [("x", "a")],
            {"problem_type": "multi_label_classification"},
            "'a' is no list of labels; set --label_separator",
        ),
        ([("x", 0.5)], {"balance": "sampler"}, "--balance sampler: regression has no classes"),
        ([("x", ["a"])], {"balance": "sampler"}, "--balance sampler: a row with several labels is in no one class"),
    ],
)
def test_bad_data_is_one_line(rows, settings, message):
    with pytest.raises(ValueError, match=message) as error:
        task(rows, **settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "Name data by --dataset_name"),
        ({"dataset_name": "x", "train_file": "y"}, "three ways to name data; use one"),
        ({"train_file": "x", "max_length": 0}, "--max_length 0"),
        ({"train_file": "x", "most_frequent_labels": 1}, "--most_frequent_labels 1"),
        ({"train_file": "x", "label_separator": ";", "problem_type": "regression"}, "--problem_type is regression"),
    ],
)
def test_bad_flags_are_one_line(settings, message):
    with pytest.raises(ValueError, match=message):
        ClassificationArguments(**settings)


def test_rows_as_they_are_are_not_drawn():
    argv = ["--train_file=x", "--output_dir=x", "--preset=tiny_v3", "--balance=sampler"]
    with pytest.raises(ValueError, match="--balance sampler has no effect with --train_sampling_strategy sequential"):
        parse_command("classification", ClassificationArguments, [*argv, "--train_sampling_strategy=sequential"])
    parse_command("classification", ClassificationArguments, argv)


def test_labels_must_come_from_somewhere():
    with pytest.raises(ValueError, match="no labels yet and there are no training rows"):
        task(SINGLE, where="test")


def test_problem_names_are_those_of_transformers():
    assert set(PROBLEMS) == {"single_label_classification", "multi_label_classification", "regression"}


# -- the example --

SMALL = {"use_cpu": True, "disable_tqdm": True}


def test_example_runs_small(tmp_path):
    rows = [("花 月", "苏轼"), ("春 风", "辛弃疾"), ("江 水", "苏轼")]
    for split in ("train", "validation", "test"):
        write(tmp_path / f"{split}.jsonl", rows, label="author")
    small = {"max_steps": 1, "vocab_size": 300, "config_overrides": "num_hidden_layers=1,hidden_size=32"}
    results = classify([str(EXAMPLE)], data_dir=tmp_path, output_dir=tmp_path / "out", **SMALL, **small)
    assert {"test_macro_f1", "baseline_macro_f1"} <= set(results)
    assert results["test_samples"] == 3


@pytest.mark.slow
def test_authors_of_song_ci(tmp_path):
    """The example on the poems: far better than always naming the most frequent author (about a fifth)."""
    data = os.environ.get("DEEPSEEK_HF_DATA")
    if not data:
        pytest.skip("DEEPSEEK_HF_DATA names no folder with song_ci_zh")
    results = classify([str(EXAMPLE)], data_dir=Path(data) / "song_ci_zh", output_dir=tmp_path, **SMALL)
    assert results["test_samples"] == 312 and results["train_samples"] == 5735
    assert results["baseline_accuracy"] > 0.55
    assert results["test_accuracy"] > 0.3 and results["test_macro_f1"] > 0.25


def test_two_texts_are_read_as_a_reranker_reads_them(tmp_path, capsys):
    rows = [(" Where? ", "In Rome.", 1), ("在哪里？", "海是蓝色的。", 0), ("Who?", "", 1), (None, "x", 0)]
    lines = [json.dumps({"question": a, "passage": b, "label": c}) for a, b, c in rows]
    (tmp_path / "train.jsonl").write_text("\n".join(lines), encoding="utf-8")
    columns = {"data_dir": str(tmp_path), "text_column": "question", "text_pair_column": "passage"}
    (read,) = Classification(ClassificationArguments(**columns), seed=0).load_splits().values()
    assert read["source"] == [pair_text("Where?", "In Rome."), pair_text("在哪里？", "海是蓝色的。")]
    assert read["source"][0] == "Where?\nIn Rome."
    assert "left out 2 of 4 rows without text or label" in capsys.readouterr().out
    columns["text_pair_column"] = "pasage"
    with pytest.raises(ValueError, match=r"no column 'pasage'.*Set --text_pair_column \(did you mean 'passage'\?\)"):
        Classification(ClassificationArguments(**columns), seed=0).load_splits()


@pytest.mark.parametrize(("kept", "found"), [("1", "1.0"), ("1.0", "1")])
def test_labels_that_pandas_made_fractions_are_named(kept, found):
    """Beside an empty cell it does so; the two files are then of different labels."""
    saved = {"problem_type": "single_label_classification", "id2label": {"0": "a", "1": kept}}
    with pytest.raises(ValueError, match="becomes one of fractions in pandas: write 1 in both files.$"):
        task([("x", "a"), ("y", found)], saved=saved)
