"""The question answering task: SQuAD's format, windows, spans, both readers, and what a run leaves."""

import gzip
import json
import math
import os
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

from finetune_deepseek import __main__ as command
from finetune_deepseek.commands.parsing.runs import parse_command
from finetune_deepseek.question_answering.answering import Reader
from finetune_deepseek.question_answering.arguments import QuestionAnsweringArguments
from finetune_deepseek.question_answering.extractive import NOWHERE, best_spans
from finetune_deepseek.question_answering.floors import first_sentence, floor_answers, overlap_sentence, sentences
from finetune_deepseek.question_answering.metrics import CmrcScores, SquadScores
from finetune_deepseek.question_answering.squad import FAULTS, Questions, place, simplifier
from finetune_deepseek.question_answering.task import QuestionAnswering
from finetune_deepseek.question_answering.territories import PATTERNS, territory_rows
from finetune_deepseek.question_answering.windows import Encoder, Layout
from finetune_deepseek.training.run import run_stages
from finetune_deepseek.training.saved import Saved
from tests.small_runs import TINY, flags
from tokenization_deepseek import train_tokenizer

DATA = Path(os.environ.get("DEEPSEEK_HF_DATA", ""))
PASSAGES = ["Ann lives in Rome. Bob lives in Oslo.", "Cid has a red fox. Dora has a blue bird."]
ROWS = [
    ("1", PASSAGES[0], "Where does Ann live?", "Rome", 13),
    ("2", PASSAGES[0], "Where does Bob live?", "Oslo", 32),
    ("3", PASSAGES[1], "What does Cid have?", "a red fox", 8),
    ("4", PASSAGES[1], "What does Dora have?", "a blue bird", 28),
]
OURS = {name: value for name, value in TINY.items() if name not in ("target_lang", "max_target_length")}
OURS |= {"per_device_train_batch_size": 8, "max_seq_length": 64, "doc_stride": 8, "data_checks": "off"}
OURS |= {"config_overrides": "initializer_range=0.1"}


def flat(row_id, context, question, text, start):
    texts = [text] if text else []
    return {
        "id": row_id,
        "context": context,
        "question": question,
        "answers": {"text": texts, "answer_start": [start] * len(texts)},
    }


def write(path, rows):
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return str(path)


def read(rows, **options):
    questions = Questions(options.pop("version_2", False), **options)
    columns = {name: [row.get(name) for row in rows] for row in rows for name in row}
    return questions.read(columns, "rows"), {name: len(f) for name, f in questions.faults.items()}


def answer(**settings):
    return run_stages(
        QuestionAnswering, parse_command("question_answering", QuestionAnsweringArguments, flags(settings))
    )


def learn(folder, rows=ROWS, **settings):
    path = write(folder / "rows.jsonl", [flat(*row) for row in rows])
    files = {f"{split}_file": path for split in ("train", "validation", "test")}
    return answer(**(OURS | {"output_dir": folder / "out", "max_steps": 60} | files | settings))


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([text for row in ROWS for text in row[1:3]], 400, "v3")


# -- scores --


@pytest.mark.parametrize(
    ("prediction", "references", "exact", "f1"),
    [
        ("The Broncos!", ["Denver Broncos", "broncos"], 100, 100),
        ("Denver", ["Denver Broncos", "Carolina"], 0, 200 / 3),
        ("a cat sat", ["the cat sat down"], 0, 80),
        ("in 1976", ["1976"], 0, 200 / 3),
        ("cat cat", ["cat"], 0, 200 / 3),  # a word counts as often as it stands in both
        ("no", ["yes"], 0, 0),
        ("well-known", ["wellknown"], 100, 100),
        ("theatre", ["atre"], 0, 0),  # an article is a whole word
        ("the", ["a"], 100, 0),  # equal, but SQuAD 1.1 sees no common word
    ],
)
def test_squad_scores(prediction, references, exact, f1):
    scores = SquadScores().compute(predictions=[prediction], references=[references])
    assert (scores["exact_match"], scores["f1"]) == pytest.approx((exact, f1))


def test_squad_2_scores_both_sorts_of_questions():
    predictions, references = ["Rome", "", "Oslo", ""], [["Rome"], [], [], ["Oslo"]]
    scores = SquadScores(version_2=True).compute(predictions=predictions, references=references)
    assert scores["exact_match"] == scores["f1"] == 50
    assert scores["has_answer_f1"] == scores["no_answer_exact_match"] == 50
    the = SquadScores(version_2=True).compute(predictions=[""], references=[["the", "."]])
    assert the["f1"] == 100  # references of nothing but articles and punctuation want the empty answer


@pytest.mark.parametrize(
    ("prediction", "references", "exact", "f1"),
    [
        ("北京市", ["北京"], 0, 80),
        ("《北京》。", ["北京"], 100, 100),
        ("北方京城", ["北京"], 0, 100 / 3),  # the longest run without a gap is one character
        ("1937年7月", ["1937年"], 0, 200 * 2 / 6),  # numbers are one word: 1937 年 7 月
        ("Windows XP系统", ["windows xp"], 0, 200 / 3),
        ("上海", ["北京", "上海市"], 0, 80),
        ("", ["北京"], 0, 0),
    ],
)
def test_cmrc_scores(prediction, references, exact, f1):
    scores = CmrcScores().compute(predictions=[prediction], references=[references])
    assert (scores["exact_match"], scores["f1"]) == pytest.approx((exact, f1))


# -- rows --


def test_place_finds_the_nearest_occurrence():
    assert place("fox", 4, "fox fox fox") == ("fox", 4)
    assert place("fox", 7, "fox fox fox") == ("fox", 8)
    assert place(" fox ", 3, "fox fox fox") == ("fox", 4)
    assert place("fox", None, "a fox") == ("fox", 2)
    assert place("cat", 0, "fox") == ("cat", None)


def test_nested_and_flat_rows_are_the_same(tmp_path):
    paragraphs = [
        {
            "context": context,
            "qas": [
                {"id": row[0], "question": row[2], "answers": [{"text": row[3], "answer_start": row[4]}]}
                for row in ROWS
                if row[1] == context
            ],
        }
        for context in PASSAGES
    ]
    nested = {"version": "1.1", "data": [{"title": "t", "paragraphs": [part]} for part in paragraphs]}
    expected, _ = read([flat(*row) for row in ROWS])
    for name, text in {
        "one_line.json": json.dumps(nested),
        "pretty.json": json.dumps(nested, indent=1),
    }.items():
        (tmp_path / name).write_text(text)
        arguments = QuestionAnsweringArguments(test_file=str(tmp_path / name), max_predict_samples=3)
        rows = QuestionAnswering(arguments, 0).load_splits()["test"]
        assert list(rows) == list(expected)[:3], name
    assert expected[3]["target"] == "a blue bird" and expected[3]["starts"] == [28]


def test_every_fault_is_counted():
    rows = [
        flat("1", PASSAGES[0], "right?", "Rome", 13),
        flat("1", PASSAGES[0], "same id?", "Rome", 13),
        flat(None, PASSAGES[0], "no id?", "Rome", 13),
        flat("4", PASSAGES[0], "wrong start?", "Oslo", 3),
        flat("5", PASSAGES[0], "outside?", "Paris", 3),
        flat("6", "  ", "empty passage?", "Paris", 0),
        flat("7", PASSAGES[0], "no answer?", "", 0),
        flat("8", PASSAGES[0], None, "Rome", 13),
    ]
    read_rows, faults = read(rows)
    assert faults == {
        "duplicate_ids": 1,
        "missing_ids": 1,
        "repaired_answers": 1,
        "lost_answers": 1,
        "empty_texts": 2,
        "no_answers": 1,
    }
    assert read_rows["id"] == ["1", "1#2", "question-3", "4", "5"]
    assert read_rows["starts"][3:] == [[32], [-1]]
    assert len(read(rows, version_2=True)[0]) == 6


def test_conversion_keeps_answers_in_place():
    table = str.maketrans("漢國", "汉国")
    rows, faults = read([flat("1", "在漢國。", "漢？", "漢國", 1)], simplify=lambda text: text.translate(table))
    assert rows[0] | {"id": ""} == {
        "id": "",
        "source": "汉？",
        "context": "在汉国。",
        "target": "汉国",
        "answers": ["汉国"],
        "starts": [1],
    }
    longer, _ = read([flat("1", "在漢國。", "漢？", "漢國", 1)], simplify=lambda text: text.replace("在", "是在"))
    assert longer[0]["starts"] == [2]
    assert not faults


def test_opencc_converts():
    pytest.importorskip("opencc")
    rows, _ = read([flat("1", "在歐洲，梵語", "？歐洲", "梵語", 4)], simplify=simplifier())
    assert (rows[0]["context"], rows[0]["target"]) == ("在欧洲，梵语", "梵语")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question": "q", "context": "c"}], "no column 'answers'"),
        ([{"data": [{"title": "t"}]}], "not as SQuAD nests it"),
        ([{"id": "1", "question": "q", "context": 3, "answers": None}], "'context' is '3', not a text"),
        ([flat("1", PASSAGES[0], "q", "Rome", 13) | {"answers": ["Rome"]}], "expected {text, answer_start}"),
        ([flat("1", "", "q", "Rome", 13)], "no question with a passage and an answer"),
    ],
)
def test_bad_rows_end_in_one_line(rows, message):
    with pytest.raises(ValueError, match=message) as error:
        read(rows)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"doc_stride": 64}, "--doc_stride 64: it must be below"),
        ({"max_answer_length": 0}, "--max_answer_length 0"),
        ({"null_score_diff_threshold": 1.0}, "add it"),
        ({"attention_direction": "prefix"}, "can't be used with --answer_mode extractive"),
        ({"max_seq_length": 20, "doc_stride": 15}, "leaves"),
        ({"mark_matches": True, "answer_mode": "generative"}, "--mark_matches can't be used with"),
        ({"label_smoothing_factor": 0.1}, "--label_smoothing_factor"),
    ],
)
def test_bad_flags_end_in_one_line(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        learn(tmp_path, **settings)


def test_a_file_in_another_encoding_is_refused_with_its_line(tmp_path):
    good = json.dumps(flat(*ROWS[0]))
    (tmp_path / "rows.jsonl").write_bytes(f"{good}\n".encode() + good.replace("Ann", "Zoë").encode("latin-1"))
    with pytest.raises(ValueError, match="line 2: can't be read as UTF-8"):
        answer(**OURS, output_dir=tmp_path / "out", train_file=tmp_path / "rows.jsonl")


# -- tokens and windows --


def test_tokens_know_their_place(tokenizer):
    encoder = Encoder(tokenizer, characters=True)
    text = "  Ann  met 王小明 (Zoë) 😀."
    passage = encoder.passage(text)
    assert tokenizer.decode(passage.ids) == text
    for word in ("Ann", "met", "王", "小明", "Zoë", "😀"):
        start = text.find(word)
        first, last = passage.tokens_of(start, start + len(word))
        assert passage.offsets[first][0] == start and passage.offsets[last][1] == start + len(word), word
        assert passage.is_whole(start, start + len(word))
    assert not passage.is_whole(text.find("Zoë"), len(text) + 1)


def test_windows_overlap_and_cover_the_passage(tokenizer):
    arguments = QuestionAnsweringArguments(
        train_file="x.json", max_seq_length=20, doc_stride=3, max_question_length=4, question_placement="both"
    )
    layout = Layout(tokenizer, arguments, True)
    passage = layout.encoder.passage("Ann lives in Rome. Bob lives in Oslo. Cid lives in Rome. Dora lives in Oslo.")
    windows = list(layout.windows("Where does Ann live now?", passage))
    question = layout.encoder.ids("Where does Ann live now?")[:4]
    covered = set()
    for window in windows:
        assert len(window.input_ids) <= 20
        assert (
            window.input_ids[window.begin : window.begin + window.length]
            == (passage.ids[window.first : window.first + window.length])
        )
        assert window.input_ids[1:5] == question == window.input_ids[-5:-1]
        assert window.input_ids[-1] == tokenizer.eos_token_id
        covered |= set(range(window.first, window.first + window.length))
    assert covered == set(range(len(passage.ids)))
    assert all(
        before.first + before.length - after.first == 3 for before, after in zip(windows, windows[1:], strict=False)
    )


@pytest.mark.parametrize("placement", ["first", "both"])
def test_tokens_of_the_passage_are_marked_where_the_question_has_them(tokenizer, placement):
    """In another case and behind a space too, but not for a part of a character in common."""
    arguments = QuestionAnsweringArguments(
        train_file="x.json", max_seq_length=34, doc_stride=3, question_placement=placement
    )
    layout = Layout(tokenizer, arguments, True)
    passage = layout.encoder.passage("rome. Where bob lives in 龘, Oslo in Rome.")
    marked, around = set(), set()
    for window in layout.windows("Where is Rome 龙?", passage):
        assert len(window.token_type_ids) == len(window.input_ids)
        end = window.begin + window.length
        around |= {*window.token_type_ids[: window.begin], *window.token_type_ids[end:]}
        for number in range(window.begin, end):
            assert window.token_type_ids[number] in (1, 2)
            if window.token_type_ids[number] == 2:
                marked.add(passage.offsets[window.first + number - window.begin])
    asked = set(layout.encoder.ids("Where is Rome 龙?"))
    names = {token: tokenizer.decode([token]) for token in {*asked, *passage.ids}}
    words = {name.strip().lower() for token, name in names.items() if token in asked and "\ufffd" not in name}
    expected = {
        offset
        for token, offset in zip(passage.ids, passage.offsets, strict=True)
        if token in asked or ("\ufffd" not in names[token] and names[token].strip().lower() in words)
    }
    assert around == {0} and marked == expected and len(expected) > 3


def test_targets_point_at_the_answer_or_at_the_end(tokenizer):
    arguments = QuestionAnsweringArguments(train_file="x.json", max_seq_length=18, doc_stride=2)
    task = QuestionAnswering(arguments, 0)
    rows, _ = read([flat(*row) for row in ROWS] + [flat("5", PASSAGES[0], "outside?", "Paris", 3)])
    features = task.features(rows, tokenizer, is_training=True)
    answers = []
    for feature in features:
        first, last = feature["start_positions"], feature["end_positions"]
        if first == len(feature["input_ids"]) - 1:
            assert last == first
        else:
            answers.append(tokenizer.decode(feature["input_ids"][first : last + 1]).strip())
    assert set(answers) == {row[3] for row in ROWS}
    evaluation = task.features(rows, tokenizer, is_training=False)
    assert len(evaluation) == len(rows)
    assert set(evaluation[4]["start_positions"]) == {NOWHERE}


@pytest.mark.parametrize("longest", [1, 3, 30])
def test_best_spans_are_those_of_a_plain_search(longest):
    torch.manual_seed(0)
    start, end = torch.randn(3, 7), torch.randn(3, 7)
    is_passage = torch.tensor([[0, 1, 1, 1, 1, 1, 0], [0, 0, 0, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1]]).bool()
    scores, firsts, lasts = best_spans(start, end, is_passage, longest, 5)
    for window in range(3):
        places = [number for number in range(7) if is_passage[window, number]]
        every = [
            ((start[window, i] + end[window, j]).item(), i, j) for i in places for j in places if i <= j < i + longest
        ]
        every.sort(reverse=True)
        found = [score for score in scores[window].tolist() if score > -np.inf]
        assert found == pytest.approx([score for score, _, _ in every[:5]])
        spans = list(zip(firsts[window].tolist(), lasts[window].tolist(), strict=True))[: len(found)]
        assert spans == [(i, j) for _, i, j in every[:5]]


def reference_window_losses(logits, batch):
    """Of each window, by plain loops, the mean of -log p of the answer's first and last token."""
    losses = []
    columns = (logits.tolist(), batch["attention_mask"], batch["start_positions"], batch["end_positions"])
    for row, mask, *places in zip(*columns, strict=True):
        log_sum = math.log(sum(math.exp(value) for value, is_text in zip(row, mask, strict=True) if is_text))
        losses.append(sum(log_sum - row[int(place)] for place in places) / 2)
    return losses


def test_a_span_is_found_in_whichever_window_it_stands(tokenizer):
    arguments = QuestionAnsweringArguments(
        train_file="x.json", max_seq_length=24, doc_stride=6, n_best_size=3, version_2_with_negative=True
    )
    task = QuestionAnswering(arguments, 0)
    text = "Cid has a red fox. " * 4 + "Ann lives in Rome. " + "Dora has a blue bird. " * 4
    rows, _ = read([flat("1", text, "Where does Ann live?", "Rome", text.find("Rome")), flat(*ROWS[2])])
    features = task.features(rows, tokenizer, is_training=False)
    assert len(features[0]["input_ids"]) > 3
    wanted = {task.layout.encoder.ids(word)[0]: score for word, score in ((" Rome", 9.0), (" red", 4.0))}

    def model(input_ids, attention_mask):
        logits = torch.zeros(input_ids.shape)
        logits[:, 0] = 20.0  # not in the passage
        for token, score in wanted.items():
            logits[input_ids == token] = score
        return {"start_logits": logits, "end_logits": logits}

    batch = task.collator(tokenizer)([features[number] | {"row": number} for number in (1, 0)])
    predicted = task.predict_batch(model, batch)
    losses = reference_window_losses(model(batch["input_ids"], None)["start_logits"], batch)
    for number in (0, 1):
        own = [loss for loss, owner in zip(losses, batch["owner"].tolist(), strict=True) if owner == number]
        assert predicted.counts[number] == len(own)
        assert predicted.sums[number].item() == pytest.approx(sum(own), rel=1e-5)
    assert predicted.outputs.shape == (2, 2 + 3 * 3)
    task.decode(predicted.outputs.numpy(), tokenizer)
    best = task.reader.nbest["1"][0]
    assert best["score"] == 18 and text.find("Rome") <= best["start"] < text.find("Rome") + 4
    assert task.reader.nbest["3"][0]["score"] == 8
    assert task.reader.null_margins == {"1": -18, "3": -8}


# -- runs --


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reader")
    return folder, learn(folder, data_checks="report", attention_direction="bidirectional")


def test_a_reader_learns_four_questions_by_heart(trained):
    folder, results = trained
    assert results["test_exact_match"] == results["eval_exact_match"] == 100
    assert results["above_floors"] is True
    lines = [json.loads(line) for line in (folder / "out/generated_predictions.jsonl").read_text().splitlines()]
    assert [line["prediction"] for line in lines] == [row[3] for row in ROWS]
    nbest = json.loads((folder / "out/nbest_predictions.json").read_text())
    assert nbest["1"][0]["text"] == "Rome" and nbest["1"][0]["start"] == 13
    assert sum(answer["probability"] for answer in nbest["1"]) == pytest.approx(1)
    assert len({answer["text"] for answer in nbest["1"]}) == len(nbest["1"]) <= 20
    config = json.loads((folder / "out/config.json").read_text())
    assert config["attention_direction"] == "bidirectional"
    card = (folder / "out/README.md").read_text()
    assert "| a random span |" in card and "pipeline_tag: question-answering" in card
    report = json.loads((folder / "out/data_report.json").read_text())
    assert report["test"]["passages_in_train"]["count"] == 4
    assert all(checks.keys() - {"rows"} <= FAULTS.keys() for checks in report.values())
    assert f"| {FAULTS['passages_in_train']} | - |" in card


def test_evaluate_and_predict_give_the_same(trained, monkeypatch, capsys):
    folder, results = trained
    for verb, name in (("evaluate", "eval"), ("predict", "test")):
        split = "validation" if verb == "evaluate" else "test"
        argv = [verb, "question_answering", str(folder / "out"), f"--{split}_file", str(folder / "rows.jsonl")]
        monkeypatch.setattr(sys, "argv", ["", *argv, "--output_dir", str(folder / verb), "--use_cpu", "True"])
        assert command.main() == 0, capsys.readouterr().err
        again = json.loads((folder / verb / "all_results.json").read_text())
        assert again[f"{name}_f1"] == results[f"{name}_f1"]
        assert again[f"{name}_loss"] == pytest.approx(results[f"{name}_loss"], rel=1e-5)


def test_the_saved_model_answers_as_the_card_says(trained):
    folder, _ = trained
    tokenizer = AutoTokenizer.from_pretrained(folder / "out")
    model = AutoModelForQuestionAnswering.from_pretrained(folder / "out")
    inputs = tokenizer(f"{ROWS[1][2]}\n{PASSAGES[0]}{tokenizer.eos_token}", return_tensors="pt")
    outputs = model(**inputs)
    start, end = outputs.start_logits[0, :-1].argmax(), outputs.end_logits[0, :-1].argmax()
    assert tokenizer.decode(inputs["input_ids"][0, start : end + 1]).strip() == "Oslo"


def test_no_answer_is_learned_and_its_threshold_obeyed(tmp_path):
    rows = [*ROWS, ("5", PASSAGES[0], "Who has a fish?", "", 0), ("6", PASSAGES[1], "Who has a cat?", "", 0)]
    results = learn(tmp_path, rows, version_2_with_negative=True, max_steps=80)
    assert results["test_exact_match"] == results["test_no_answer_f1"] == results["test_best_f1"] == 100
    again = {"model_name_or_path": tmp_path / "out", "do_predict": True, "version_2_with_negative": True}
    never = OURS | again | {"config_overrides": None, "preset": None, "test_file": tmp_path / "rows.jsonl"}
    silent = answer(**never, output_dir=tmp_path / "silent", null_score_diff_threshold=-1000)
    assert (silent["test_no_answer_f1"], silent["test_has_answer_f1"]) == (100, 0)
    assert silent["test_best_f1"] == 100


@pytest.mark.parametrize(
    ("placement", "direction"), [("first", "causal"), ("both", "causal"), ("first", "bidirectional")]
)
def test_placement_and_direction_are_kept(tmp_path, monkeypatch, capsys, placement, direction):
    results = learn(tmp_path, max_steps=1, question_placement=placement, attention_direction=direction)
    saved = Saved.open(None, str(tmp_path / "out")).settings
    assert saved["question_placement"] == placement
    model = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "out")
    assert model.config.attention_direction == direction
    if direction == "bidirectional":
        with pytest.raises(ValueError, match="bidirectional attention has no cache"):
            model(torch.tensor([[1, 2, 3]]), use_cache=True)
    argv = ["evaluate", "question_answering", str(tmp_path / "out"), "--validation_file", str(tmp_path / "rows.jsonl")]
    monkeypatch.setattr(sys, "argv", ["", *argv, "--output_dir", str(tmp_path / "again"), "--use_cpu", "True"])
    assert command.main() == 0, capsys.readouterr().err
    again = json.loads((tmp_path / "again/all_results.json").read_text())
    assert again["eval_loss"] == pytest.approx(results["eval_loss"], rel=1e-5)


def test_a_reader_that_is_told_of_matches_keeps_being_told(tmp_path, monkeypatch, capsys):
    results = learn(tmp_path, mark_matches=True)
    assert results["test_exact_match"] == 100
    assert json.loads((tmp_path / "out/config.json").read_text())["type_vocab_size"] == 3
    argv = ["evaluate", "question_answering", str(tmp_path / "out"), "--validation_file", str(tmp_path / "rows.jsonl")]
    monkeypatch.setattr(sys, "argv", ["", *argv, "--output_dir", str(tmp_path / "again"), "--use_cpu", "True"])
    assert command.main() == 0, capsys.readouterr().err
    again = json.loads((tmp_path / "again/all_results.json").read_text())
    assert again["eval_loss"] == pytest.approx(results["eval_loss"], rel=1e-5)
    reader = Reader.load(str(tmp_path / "out"))
    assert reader.task.arguments.mark_matches
    assert [text for text, _ in reader([(row[2], row[1]) for row in ROWS])] == [row[3] for row in ROWS]
    opened = {"preset": None, "config_overrides": None, "vocab_size": None, "model_name_or_path": tmp_path / "out"}
    learn(tmp_path, **opened, max_steps=1, output_dir=tmp_path / "further")
    assert Saved.open(None, str(tmp_path / "further")).settings["mark_matches"] is True
    # Without marks the same weights read something else, so the marks did arrive above.
    blind = Reader.load(str(tmp_path / "out"))
    blind.task.arguments.mark_matches = False
    assert reader([(ROWS[0][2], ROWS[0][1])])[0][1] != pytest.approx(blind([(ROWS[0][2], ROWS[0][1])])[0][1], rel=1e-3)


def test_adapters_learn_the_marks_in_full(tmp_path):
    learn(tmp_path, max_steps=1, output_dir=tmp_path / "base")
    opened = {"preset": None, "config_overrides": None, "vocab_size": None, "model_name_or_path": tmp_path / "base"}
    learn(tmp_path, **opened, mark_matches=True, use_peft=True, lora_target=["attention"], max_steps=2)
    weights = load_file(tmp_path / "out/adapter_model.safetensors")
    assert weights["base_model.model.token_type_embeddings.weight"].shape[0] == 3
    again = learn(tmp_path, **opened | {"model_name_or_path": tmp_path / "out"}, mark_matches=True, do_train=False,
                  do_predict=True, output_dir=tmp_path / "again")  # fmt: skip
    assert np.isfinite(again["test_loss"])


def test_another_models_reader_is_trained_the_same_way(tmp_path):
    """A peer of transformers, from its config: causal, and not saved as anything else."""
    peer = Path(__file__).parents[2] / "benchmarks/peers/llama_reader"
    results = learn(tmp_path, max_steps=1, preset=None, config_overrides=None, config_name=peer)
    saved = json.loads((tmp_path / "out/config.json").read_text())
    assert saved["architectures"] == ["LlamaForQuestionAnswering"] and "attention_direction" not in saved
    assert saved["max_position_embeddings"] == 64 and np.isfinite(results["test_loss"])
    opened = {"preset": None, "config_overrides": None, "vocab_size": None, "model_name_or_path": tmp_path / "out"}
    with pytest.raises(ValueError, match="--attention_direction bidirectional: .* leave out --native"):
        learn(tmp_path, **opened, native=True, attention_direction="bidirectional", output_dir=tmp_path / "native")
    with pytest.raises(ValueError, match="--mark_matches: .* leave out --native"):
        learn(tmp_path, **opened, native=True, mark_matches=True, output_dir=tmp_path / "native")
    with pytest.raises(ValueError, match="--mark_matches: a model of model_type 'llama' reads no marks; leave it out"):
        learn(tmp_path, preset=None, config_overrides=None, config_name=peer, mark_matches=True,
              output_dir=tmp_path / "marked")  # fmt: skip


@pytest.mark.parametrize("placement", ["first", "both"])
def test_a_generative_reader_learns_four_questions_by_heart(tmp_path, placement):
    results = learn(tmp_path, answer_mode="generative", question_placement=placement, max_answer_length=12)
    assert results["test_exact_match"] == 100
    assert not (tmp_path / "out/nbest_predictions.json").exists()
    assert json.loads((tmp_path / "out/config.json").read_text())["attention_direction"] == "prefix"


@pytest.mark.parametrize("direction", [None, "bidirectional"])
def test_adapters_train_the_head_on_a_causal_model(trained, tmp_path, direction):
    """And read it again in the direction of their training, which the base's config doesn't have."""
    base = tmp_path / "base"
    learn(tmp_path, answer_mode="generative", attention_direction="causal", max_steps=1, output_dir=base)
    lora = {"preset": None, "config_overrides": None, "model_name_or_path": base, "use_peft": True, "lora_r": 8}
    results = learn(tmp_path, **lora, vocab_size=None, max_steps=2, lora_target=["attention", "dense"],
                    attention_direction=direction)  # fmt: skip
    saved = Saved.open(None, str(tmp_path / "out"))
    assert saved.config["attention_direction"] == (direction or "causal")
    assert ("attention_direction" in saved.changes) == bool(direction)
    again = answer(
        **OURS | {"preset": None, "config_overrides": None, "vocab_size": None, "test_file": tmp_path / "rows.jsonl"},
        model_name_or_path=tmp_path / "out",
        do_predict=True,
        output_dir=tmp_path / "again",
    )
    assert again["test_loss"] == pytest.approx(results["test_loss"], rel=1e-5)
    assert Reader.load(str(tmp_path / "out")).model.config.attention_direction == (direction or "causal")


# -- floors and the embedded corpus --


def test_floors():
    text = "Ann lives in Rome. Bob lives in Oslo.\n他去北京。她在上海！"
    assert sentences(text) == ["Ann lives in Rome.", "Bob lives in Oslo.", "他去北京。", "她在上海！"]
    assert overlap_sentence("Where does Bob live?", text, None) == "Bob lives in Oslo."
    assert overlap_sentence("谁在上海？", text, None) == "她在上海！"
    assert first_sentence("?", text, None) == "Ann lives in Rome."
    rows = [{"source": "q", "context": text}] * 20
    spans = floor_answers("random_span", rows, 1)
    assert spans == floor_answers("random_span", rows, 1) != floor_answers("random_span", rows, 2)
    assert all(span in text for span in spans)


def test_embedded_questions_are_split_by_territory():
    splits = territory_rows()
    territories = [{row["id"].split("-")[0] for row in rows} for rows in splits.values()]
    assert [len(found) for found in territories[1:]] == [25, 25] and len(territories[0]) > 190
    assert not (territories[0] & territories[1] or territories[0] & territories[2] or territories[1] & territories[2])
    assert {row["id"].split("-")[1] for row in splits["test"]} == set(PATTERNS) and len(PATTERNS) == 11
    for row in splits["test"]:
        text, start = row["answers"]["text"][0], row["answers"]["answer_start"][0]
        assert row["context"].startswith(text, start)
    assert splits == territory_rows()
    assert sum(not row["answers"]["text"] for row in territory_rows(True)["test"]) > 10


# -- published data --


@pytest.mark.parametrize(("name", "questions", "wrong"), [("trial", 1000, 5), ("validation", 3219, 200)])
def test_wrong_answers_of_cmrc_are_found_again_or_counted(name, questions, wrong):
    if not (DATA / "cmrc2018").is_dir():
        pytest.skip("DEEPSEEK_HF_DATA names no folder with cmrc2018")
    with gzip.open(DATA / "cmrc2018" / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    answers = [(row["context"], *pair) for row in rows for pair in zip(*row["answers"].values(), strict=True)]
    assert sum(not context.startswith(text, start) for context, text, start in answers) == wrong
    read_rows, faults = read(rows)
    assert len(read_rows) == questions
    assert sum(-1 in starts for starts in read_rows["starts"]) == (
        faults.get("lost_answers", 0) + faults.get("partly_lost_answers", 0)
    )
    for row in read_rows:
        for text, start in zip(row["answers"], row["starts"], strict=True):
            assert start == -1 or row["context"].startswith(text, start)


def test_spans_of_a_batch_are_those_of_each_row_alone(tokenizer):
    arguments = QuestionAnsweringArguments(max_seq_length=24, doc_stride=4, max_question_length=8, n_best_size=5)
    task = QuestionAnswering(arguments, 0)
    texts = ["Anna met Bob in Rome. " * repeats for repeats in (1, 9, 4)]
    rows = [{"id": str(n), "source": "Who?", "context": t, "answers": [], "starts": []} for n, t in enumerate(texts)]
    features = task.features(Dataset.from_list(rows), tokenizer, is_training=False)

    def model(input_ids, attention_mask, **positions):
        """Of each window its own numbers, in whatever batch it comes."""
        seeds = [
            zlib.crc32(str(ids[:length].tolist()).encode())
            for ids, length in zip(input_ids, attention_mask.sum(1), strict=True)
        ]
        rows = [torch.randn(2, 64, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        start_logits, end_logits = torch.stack(rows, 1)[..., : input_ids.shape[1]]
        return {"start_logits": start_logits, "end_logits": end_logits}

    def outputs(*numbers):
        return task.predict_batch(model, task.collator(tokenizer)([features[n] | {"row": n} for n in numbers])).outputs

    together = outputs(2, 0, 1)
    assert len(features[1]["input_ids"]) > len(features[0]["input_ids"]) == 1
    for row, number in enumerate((2, 0, 1)):
        (alone,) = outputs(number)
        known = torch.isfinite(alone[4::3])
        assert torch.equal(together[row][:2], alone[:2]) and known.any()
        assert torch.equal(together[row][2:].view(-1, 3)[known], alone[2:].view(-1, 3)[known])
