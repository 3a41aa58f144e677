"""One model of several languages: pairs from rows and files, tags, scores by pair, translation by the card."""

import io
import json
import sys

import pytest
from huggingface_hub import ModelCard

from finetune_deepseek import __main__ as command
from finetune_deepseek.commands.finetune import score
from finetune_deepseek.training.saved import Saved
from finetune_deepseek.translation.arguments import TranslationArguments
from finetune_deepseek.translation.task import Translation
from tests.small_runs import TINY, flags
from tokenization_deepseek import train_tokenizer

GERMAN = [("one", "eins"), ("two birds", "zwei Vögel")]
CHINESE = [("one", "一"), ("three", "三")]


def write(path, rows):
    path.parent.mkdir(exist_ok=True)
    lines = [json.dumps({"translation": row}, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


@pytest.fixture
def folders(tmp_path):
    """A folder of English-German and one of English-Chinese pairs."""
    for name, language, pairs in (("en_de", "de", GERMAN), ("en_zh", "zh", CHINESE)):
        for split in ("train", "validation", "test"):
            write(tmp_path / name / f"{split}.jsonl", [{"en": s, language: t} for s, t in pairs])
    return [str(tmp_path / "en_de"), str(tmp_path / "en_zh")]


def task(**settings):
    return Translation(TranslationArguments(**settings), seed=0)


def rows_of(task, split="train"):
    return [
        (row["source_lang"], row["target_lang"], row["source"], row["target"]) for row in task.load_splits()[split]
    ]


def test_folders_of_different_languages_are_joined(folders, capsys):
    both = task(data_dir=folders, target_lang=["de", "zh"])
    expected = [("en", "de", *pair) for pair in GERMAN] + [("en", "zh", *pair) for pair in CHINESE]
    assert rows_of(both) == expected
    assert "train: 2 en-de, 2 en-zh" in capsys.readouterr().out
    assert [row["prompt"] for row in both.load_splits()["train"]] == [
        *("de: one\n", "de: two birds\n", "zh: one\n", "zh: three\n")
    ]
    streamed = task(data_dir=folders, target_lang=["de", "zh"], streaming=True)
    assert sorted(rows_of(streamed)) == sorted(expected)
    assert rows_of(task(data_dir=folders, target_lang=["de", "zh"], max_train_samples=1)) == [expected[0], expected[2]]


def test_a_row_gives_a_pair_per_language_that_it_has(tmp_path, capsys):
    rows = [
        {"en": "one", "de": "eins", "zh": "一"},
        {"en": "two", "zh": "二"},  # no fault: not every row has every language
        {"en": "three", "de": " ", "zh": "三"},  # a German side that is empty
        {"de": "vier", "zh": "四"},  # nothing to translate from
        {"en": "five"},  # nothing to translate to
    ]
    path = write(tmp_path / "rows.jsonl", rows)
    one_way = task(train_file=path, target_lang=["de", "zh"])
    forth = [
        ("en", "de", "one", "eins"),
        ("en", "zh", "one", "一"),
        ("en", "zh", "two", "二"),
        ("en", "zh", "three", "三"),
    ]
    assert rows_of(one_way) == forth
    assert "left out 3 of 7 rows without text in one of the languages" in capsys.readouterr().out
    assert one_way.empty_sides["train"] == 3
    both_ways = task(train_file=path, target_lang=["de", "zh"], both_directions=True)
    back = [(target_lang, source_lang, target, source) for source_lang, target_lang, source, target in forth]
    assert sorted(rows_of(both_ways)) == sorted(forth + back)
    assert both_ways.empty_sides["train"] == 3
    columns = tmp_path / "rows.csv"
    columns.write_text("en,de,zh\none,eins,一\n", encoding="utf-8")
    assert rows_of(task(train_file=str(columns), target_lang=["zh", "de"])) == [forth[1], forth[0]]


def test_embedded_corpus_in_two_languages():
    small = {"max_train_samples": 20, "max_eval_samples": 5, "max_predict_samples": 5}
    splits = task(target_lang=["zh", "de"], **small).load_splits()
    assert splits["test"]["target_lang"] == ["zh"] * 5 + ["de"] * 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_lang": ["de", "fr"]}, "--target_lang fr: .*train.jsonl.* has only de beside 'en'; add data"),
        ({"target_lang": ["de", "zh", "de"]}, "--target_lang de zh de: name each language once"),
        ({"target_lang": ["de", "en"]}, "--source_lang and --target_lang are both 'en'"),
        (
            {"target_lang": ["de", "zh"], "prompt_template": "{source}\n"},
            r"needs \{target_lang\}, which says where to",
        ),
        ({"target_lang": ["de"], "both_directions": True, "prompt_template": "{source}"}, r"needs \{target_lang\}"),
    ],
)
def test_languages_that_do_not_fit_are_one_line(settings, message, folders):
    with pytest.raises(ValueError, match=message) as error:
        task(data_dir=folders[:1], **settings).load_splits()
    assert "\n" not in str(error.value)


def test_faults_are_counted_within_a_pair(tmp_path):
    rows = [
        {"en": "one", "de": "eins", "zh": "一"},  # the same source for two languages is no fault
        {"en": "two", "de": "zwei"},
        {"en": "two", "de": "zwei"},
        {"en": "six", "de": "eins"},  # a fault only from German
        {"en": "ten", "zh": ""},
    ]
    path = write(tmp_path / "rows.jsonl", rows)
    tokenizer = train_tokenizer([str(rows)], 300, "v3")
    for both_directions in (False, True):
        checked = task(train_file=path, target_lang=["de", "zh"], both_directions=both_directions)
        splits = checked.load_splits()
        report = checked.check_splits(splits, tokenizer)["train"]
        found = {name: value["count"] for name, value in report.items() if name != "rows" and value["count"]}
        assert report["rows"] == len(splits["train"]) == (10 if both_directions else 5)
        expected = {"duplicate_pairs": 2, "duplicate_sources": 1} if both_directions else {"duplicate_pairs": 1}
        assert found == expected | {"empty_sides": 1}


def test_scores_are_by_pair_and_their_mean():
    both = task(target_lang=["de", "zh"])
    rows = [{"source_lang": "en", "target_lang": t, "target": "x"} for t in ("de", "zh", "de", "zh", "zh", "zh")]
    scores = both.score(["x", "x", "y", "y", "y", "y"], rows)
    assert (scores["exact_match_en-de"], scores["exact_match_en-zh"], scores["exact_match"]) == (0.5, 0.25, 0.375)
    assert scores["bleu"] == (scores["bleu_en-de"] + scores["bleu_en-zh"]) / 2
    assert "tok:13a" in scores["bleu_en-de_signature"] and "tok:zh" in scores["bleu_en-zh_signature"]
    assert scores["bleu_signature"] == "mean over en-de, en-zh"
    only = both.score(["x"], rows[:1])
    assert only["exact_match"] == only["exact_match_en-de"] == 1 and "exact_match_en-zh" not in only


@pytest.fixture
def model(folders, tmp_path):
    """A model of all four directions that knows its rows by heart."""
    settings = TINY | {"data_dir": folders, "target_lang": ["de", "zh"], "both_directions": True, "max_steps": 100}
    settings |= {"per_device_train_batch_size": 8, "output_dir": tmp_path / "model"}
    assert command.guarded(["translation", *flags(settings)]) == 0
    return tmp_path / "model"


def test_one_model_translates_in_every_direction_of_its_card(model, folders, tmp_path, monkeypatch, capfd):
    results = json.loads((model / "all_results.json").read_text())
    directions = ("en-de", "en-zh", "de-en", "zh-en")
    assert [results[f"test_exact_match_{pair}"] for pair in directions] == [1.0] * 4
    assert results["test_exact_match"] == results["baseline_exact_match"] == 1.0
    card = ModelCard.load(model / "README.md")
    assert card.data.language == ["en", "de", "zh"]
    assert "en to de and en to zh and de to en and zh to en translation" in card.text
    assert "| exact match zh-en | 1 | 1 |" in card.text
    settings = Saved.open(None, str(model)).settings_for("translation", TranslationArguments)
    assert (settings["target_lang"], settings["both_directions"]) == (["de", "zh"], True)

    def translate(text, *argv):
        monkeypatch.setattr(sys, "argv", ["deepseek-hf", "translate", str(model), *argv])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        capfd.readouterr()
        code = command.main()
        out, err = capfd.readouterr()
        return out if code == 0 else err.splitlines()[-1]

    assert translate("two birds\n", "--target_lang", "de") == "zwei Vögel\n"
    assert translate("one\nthree\n", "--target_lang", "zh") == "一\n三\n"
    assert translate("zwei Vögel\n", "--source_lang", "de") == "two birds\n"
    assert translate("三\n", "--source_lang", "zh", "--target_lang", "en") == "three\n"
    assert translate("one\n").endswith(
        "is for en to de, en to zh, de to en, zh to en; choose by --source_lang and --target_lang."
    )
    assert f"--source_lang de --target_lang zh: {model} is for " in translate(
        "eins\n", "--source_lang", "de", "--target_lang", "zh"
    )
    assert f"--target_lang fr: {model} is for " in translate("one\n", "--target_lang", "fr")

    # evaluate takes the languages from the card; a flag may choose among them.
    argv = [
        "translation",
        str(model),
        f"--data_dir={folders[1]}",
        "--use_cpu=True",
        f"--output_dir={tmp_path / 'out'}",
    ]
    score("predict", "do_predict", [*argv, "--target_lang=zh", "--both_directions=False"])
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert (results["test_exact_match"], results["test_samples"]) == (1.0, 2)
