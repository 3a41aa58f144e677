"""The metrics equal sacrebleu and scikit-learn, combine, stay off the disk and the network, and refuse bad input."""

import gzip
import json
import os
import socket
from pathlib import Path

import evaluate
import numpy as np
import pytest
import sacrebleu
from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score

from finetune_deepseek.training.scoring.labels import Accuracy, MacroF1
from finetune_deepseek.translation.metrics import (
    ChrF2,
    ExactMatch,
    SacreBleu,
    TokenizedBleu,
    translation_metrics,
)
from finetune_deepseek.translation.moses import moses_lower

ENGLISH = (["the cat sat on a mat", "a dog barked!", ""], ["the cat sat on the mat", "a dog barked!", "silence"])
CHINESE = (["2026年1月5日星期一", "5公里以外"], ["2026年1月5日星期二", "5公里以外"])
CLASSES = ([0, 1, 2, 2, 0, 1, 1], [0, 2, 2, 2, 1, 1, 3])


def score(metric, predictions, references):
    return metric.compute(predictions=predictions, references=references)


@pytest.mark.parametrize(("language", "texts", "tokenizer"), [("de", ENGLISH, "13a"), ("zh", CHINESE, "zh")])
def test_bleu_and_chrf_equal_sacrebleu(language, texts, tokenizer):
    predictions, references = texts
    bleu = score(SacreBleu(language), *texts)
    assert bleu["bleu"] == sacrebleu.corpus_bleu(predictions, [references], tokenize=tokenizer).score > 0
    assert f"|tok:{tokenizer}|" in bleu["bleu_signature"]
    assert bleu["bleu_signature"].endswith(f"version:{sacrebleu.__version__}")
    chrf = score(ChrF2(), *texts)
    assert chrf["chrf2"] == sacrebleu.corpus_chrf(predictions, [references]).score > 0
    assert "nc:6|nw:0" in chrf["chrf2_signature"]


@pytest.mark.parametrize("name", ["zh", "zho_Hans", "cmn", "Chinese"])
def test_chinese_needs_its_tokenizer(name):
    """13a sees each Chinese phrase as one word, so a single wrong character would cost the whole phrase."""
    assert score(SacreBleu(name), *CHINESE)["bleu"] > 50 > score(SacreBleu("en"), *CHINESE)["bleu"]


@pytest.mark.parametrize("language", ["zho_Hans", "ja", "ko", "th", "lo", "km", "my", "en"])
def test_every_tokenizer_runs_without_extra_packages(language):
    assert score(SacreBleu(language), ["a b c d e"], ["a b c d e"])["bleu"] == pytest.approx(100)


def test_exact_match_counts_what_it_says():
    pairs = [
        ("5公里", "5公里"),
        (" 5 km\n", "5 km"),
        ("Tu\u0308rkei", "T\u00fcrkei"),
        ("5 KM", "5 km"),
        ("5  km", "5 km"),
    ]
    assert score(ExactMatch(), *zip(*pairs, strict=True)) == {"exact_match": 3 / 5}


def test_classification_equals_scikit_learn():
    predictions, references = CLASSES
    assert score(Accuracy(), *CLASSES) == {"accuracy": accuracy_score(references, predictions)}
    options = {"average": "macro", "zero_division": 0}
    assert score(MacroF1(), *CLASSES) == {
        "macro_precision": precision_score(references, predictions, **options),
        "macro_recall": recall_score(references, predictions, **options),
        "macro_f1": f1_score(references, predictions, **options),
    }


def test_arrays_are_taken_as_lists():
    assert score(Accuracy(), *map(np.array, CLASSES)) == score(Accuracy(), *CLASSES)


def test_combined_metrics_give_the_parts_results():
    combined = score(translation_metrics("zh"), *CHINESE)
    parts = {**score(SacreBleu("zh"), *CHINESE), **score(ChrF2(), *CHINESE), **score(ExactMatch(), *CHINESE)}
    assert combined == parts
    assert set(score(evaluate.combine([Accuracy(), MacroF1()]), *CLASSES)) == {
        "accuracy",
        "macro_precision",
        "macro_recall",
        "macro_f1",
    }


def test_batches_and_single_rows_add_up():
    metric = SacreBleu("en")
    metric.add_batch(predictions=ENGLISH[0][:2], references=ENGLISH[1][:2])
    metric.add(prediction=ENGLISH[0][2], reference=ENGLISH[1][2])
    assert metric.compute() == score(SacreBleu("en"), *ENGLISH)


@pytest.mark.parametrize("metric_class", [SacreBleu, ChrF2, ExactMatch, Accuracy, MacroF1])
@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ([], [], "got 0 predictions and 0 references"),
        (["a", "b"], ["a"], "got 2 predictions and 1 references"),
        (["a"], None, "got 1 predictions and 0 references"),
        (None, None, "has nothing to score"),
    ],
)
def test_bad_input_gets_one_line_and_leaves_no_trace(metric_class, predictions, references, message):
    metric = metric_class()
    good = CLASSES if metric_class in (Accuracy, MacroF1) else ENGLISH
    with pytest.raises(ValueError, match=message) as error:
        score(metric, predictions, references)
    assert str(error.value).startswith(metric_class.__name__) and "\n" not in str(error.value)
    assert score(metric, *good) == score(metric_class(), *good)


def test_nothing_is_written_and_nothing_fetched(tmp_path, monkeypatch):
    """A cache folder that can't be made (its parent is a file) and a network that can't be used change nothing."""

    def refuse(*arguments, **options):
        raise AssertionError("a metric opened a connection")

    blocker = tmp_path / "file"
    blocker.touch()
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", str(blocker / "metrics"))
    monkeypatch.setattr(socket.socket, "connect", refuse)
    with pytest.raises(OSError):
        (blocker / "metrics").mkdir()
    assert score(translation_metrics("de"), ["5 km"], ["5 km"])["exact_match"] == 1
    assert score(Accuracy(), *CLASSES)["accuracy"] > 0
    assert not list(work.iterdir())


def test_tokenized_bleu_is_that_of_prepared_text():
    references = ['Der "Schnell-Zug" fährt, oder?', "Ein großes Haus.", "Das war's &  mehr…"]
    predictions = ["der „schnell-zug“ fährt oder ?", "ein GROSSES haus .", "das war's & mehr..."]
    prepared = [
        "der &quot; schnell-zug &quot; fährt , oder ?",
        "ein großes haus .",
        "das war &apos; s &amp; mehr ...",
    ]
    found = score(TokenizedBleu("de"), predictions, references)
    lines = ["der &quot; schnell-zug &quot; fährt oder ?", "ein grosses haus .", prepared[2]]
    expected = sacrebleu.BLEU(tokenize="none", force=True).corpus_score(lines, [prepared])
    assert found["bleu_tokenized"] == expected.score
    assert 0 < expected.score < 100
    assert expected.ref_len == sum(len(line.split()) for line in prepared)
    assert "tok:none" in found["bleu_tokenized_signature"]
    assert "lowercase, normalize-punctuation, tokenizer -l de by sacremoses" in found["bleu_tokenized_signature"]
    assert score(TokenizedBleu("de", is_prepared=True), lines, prepared)["bleu_tokenized"] == expected.score


@pytest.mark.parametrize(("language", "tokens"), [("de", 12103), ("en", 12968)])
def test_prepared_references_are_the_published_files(language, tokens):
    folder = Path(os.environ.get("DEEPSEEK_HF_DATA", "")) / "multi30k_en_de"
    if not (folder / "test_2016_flickr.jsonl.gz").is_file():
        pytest.skip("DEEPSEEK_HF_DATA names no folder with multi30k_en_de")
    with gzip.open(folder / "test_2016_flickr.jsonl.gz", "rt", encoding="utf-8") as file:
        ours = [moses_lower(language)(json.loads(line)["translation"][language]) for line in file]
    with gzip.open(folder / f"test_2016_flickr.lc.norm.tok.{language}.gz", "rt", encoding="utf-8") as file:
        published = file.read().splitlines()
    assert ours == published and len(ours) == 1000
    assert sum(len(line.split()) for line in ours) == tokens


def test_moses_is_for_languages_with_spaces():
    with pytest.raises(ValueError, match="languages with spaces between words, not 'zh-CN'"):
        moses_lower("zh-CN")
    assert moses_lower("de_AT")("Ja.") == "ja ."
