"""Checks of the data: on files with planted faults the report counts exactly those."""

import json

import pytest
from datasets import Dataset, IterableDataset

from finetune_deepseek.__main__ import guarded
from finetune_deepseek.data.fault_report import CHECKS, fault_list, report_markdown, report_text
from finetune_deepseek.data.pair_checks import check_pairs
from finetune_deepseek.data.scripts import MOJIBAKE
from tests.small_runs import TINY, flags, write_jsonl

CLEAN = [
    ("It is raining.", "下雨了。"),
    ("I bought an iPhone.", "我买了 iPhone。"),
    ("Café au lait, “please” – 5 €…", "请来一杯café au lait，5€。"),
    ("Who wrote Faust?", "Goethe Johann Wolfgang 写的？"),
    ("Windows 11", "Windows 11 系统"),
]
# Every row here has the one fault that its list names, beside CLEAN in the training split.
PLANTED = {
    "empty_sides": [("", "空"), ("Empty.", "  "), (" ", "")],
    "duplicate_pairs": [CLEAN[0], (CLEAN[0][0], " 下雨了。 ")],
    "duplicate_sources": [("It is raining.", "正在下雨。")],
    "reversed_pairs": [("Windows 11 系统", "Windows 11")],
    "swapped_scripts": [("我很好。", "I am well."), ("他在家。", "他在家里。")],
    "copied_sources": [("OK", "OK"), ("DVD", "DVD"), ("3.14", "3.14")],
    "replacement_characters": [("Caf\ufffd", "咖啡")],
    "mojibake": [("cafÃ© noir", "黑咖啡"), ("Itâ€™s late.", "很晚了。"), ("Good day", "ä½\xa0å¥½"), ("Me", "ÎÒÃÇ")],
    "long_rows": [("word " * 60, "词")],
}


def pairs_of(*splits):
    return {
        name: Dataset.from_list([{"source": s, "target": t} for s, t in pairs])
        for name, pairs in zip(("train", "test"), splits, strict=False)
    }


def counts(checks):
    return {name: found["count"] for name, found in checks.items() if name != "rows" and found["count"]}


@pytest.fixture
def check(tmp_path, capsys):
    """Run the command with `--data_checks` on files of the given pairs; gives exit code, report and outputs."""

    def run(mode, more=(), **splits):
        files = {f"{split}_file": write_jsonl(tmp_path / f"{split}.jsonl", pairs) for split, pairs in splits.items()}
        settings = TINY | files | {"output_dir": tmp_path / "out", "data_checks": mode, "max_steps": 1}
        settings |= {
            "target_lang": "zh",
            "max_source_length": 50,
            "max_target_length": 60,
            "config_overrides": "max_position_embeddings=512",
        }
        for path in files.values():
            path.write_text(path.read_text().replace('"de"', '"zh"'))
        settings["train_file"] = [files["train_file"], *more]
        code = guarded(["translation", *flags(settings)])
        path = tmp_path / "out" / "data_report.json"
        return code, json.loads(path.read_text()) if path.is_file() else None, capsys.readouterr(), tmp_path / "out"

    return run


def test_planted_faults_are_counted_exactly(check):
    train = CLEAN + [pair for pairs in PLANTED.values() for pair in pairs]
    test = [CLEAN[1], ("It is raining.", "有雨。"), ("Nobody knows.", "没人知道。"), CLEAN[2]]
    code, report, printed, folder = check("report", train=train, test=test, validation=[CLEAN[3], ("New.", "新。")])
    assert code == 0
    planted = {name: len(pairs) for name, pairs in PLANTED.items()}
    assert counts(report["train"]) == planted
    assert report["train"]["rows"] == len(train) - planted["empty_sides"]
    assert counts(report["test"]) == {"pairs_in_train": 2, "sources_in_train": 1}
    assert counts(report["validation"]) == {"pairs_in_train": 1}
    assert report["train"]["duplicate_sources"]["examples"] == ["It is raining. => 正在下雨。"]
    card = (folder / "README.md").read_text()
    for name, count in planted.items():
        assert f"| {CHECKS[name]} | {count} | " in card
        assert any(f"{count}  {CHECKS[name]}" in line for line in printed.out.splitlines())
    assert f"| {CHECKS['pairs_in_train']} | - | 1 | 2 |" in card


def test_files_are_checked_together(check, tmp_path):
    other = write_jsonl(tmp_path / "other.jsonl", [CLEAN[1], ("New.", "新。")])
    other.write_text(other.read_text().replace('"de"', '"zh"'))
    code, report, _, _ = check("report", train=CLEAN[:2], test=[("New.", "新。")], more=[other])
    assert code == 0
    assert counts(report["train"]) == {"duplicate_pairs": 1}
    assert counts(report["test"]) == {"pairs_in_train": 1}


def test_a_scored_target_in_training_is_seen():
    """As back-translation of the test split's own text brings it, beside another source."""
    splits = pairs_of([("one", "eins"), ("to", "zwei")], [("two", "zwei"), ("one", "eins"), ("three", "drei")])
    report = check_pairs(splits, "en", "de")
    assert counts(report["test"]) == {"pairs_in_train": 1, "targets_in_train": 1}
    assert "target is in the training split, another source (1)" in fault_list(report)


def test_refuse_ends_with_one_line_before_training(check):
    code, report, printed, folder = check("refuse", train=[*CLEAN, CLEAN[0]], test=[CLEAN[1]])
    assert code == 2
    assert (
        "refuse: train: same pair as an earlier row (1); test: pair is in the training split (1). Mend" in printed.err
    )
    assert counts(report["train"]) == {"duplicate_pairs": 1}
    assert [path.name for path in folder.iterdir()] == ["data_report.json"]


def test_off_leaves_no_report(check):
    code, report, printed, folder = check("off", train=[*CLEAN, CLEAN[0]])
    assert (code, report) == (0, None)
    assert "data checks" not in printed.out and "earlier row" not in (folder / "README.md").read_text()


def test_clean_data_has_no_faults():
    report = check_pairs(pairs_of(CLEAN, [("New.", "新。")]), "en", "zh")
    assert fault_list(report) == ""
    assert report_text(report) == "data checks, train 5 rows, test 1 rows: nothing found"
    written = report_markdown(report)
    assert written.startswith("Checked, and nothing found: same pair as an earlier row;")
    assert CHECKS["copied_sources"] in written and CHECKS["long_rows"] not in written


@pytest.mark.parametrize(
    ("languages", "pair", "is_fault"),
    [
        (("zh-CN", "en"), ("你好", "Hello"), False),
        (("zh", "en"), ("Hello", "你好"), True),
        (("zh", "en"), ("OK", "OK then"), False),
        (("ja", "zh"), ("日本語", "日语"), False),  # Han alone is Japanese too
        (("zh", "ja"), ("ありがとう", "谢谢"), True),
        (("ru", "en"), ("Да", "Да"), True),
        (("en", "ru"), ("The word да", "Слово да"), False),  # quoted, not the most
        (("en", "de"), ("eins", "one"), False),  # one script
        (("ru", "bg"), ("да", "не"), False),
    ],
)
def test_script_of_the_other_side(languages, pair, is_fault):
    report = check_pairs(pairs_of([pair]), *languages)
    assert report["train"]["swapped_scripts"]["count"] == is_fault


@pytest.mark.parametrize(
    "text", ["ÄÖÜ groß „Spaß“ «Été»", "“Il a été…”", "naïve façade", "¿Qué?", "Ångström", "5 °C ± 1"]
)
def test_right_text_is_no_mojibake(text):
    assert not MOJIBAKE.search(text)


@pytest.mark.parametrize("text", ["größer", "¿qué?", "it’s “so”", "привет", "日本語です", "🙂", "naïve", "Ελλάδα"])
@pytest.mark.parametrize("wrong", ["latin-1", "cp1252"])
def test_text_read_in_a_wrong_encoding_is_mojibake(text, wrong):
    assert MOJIBAKE.search(text.encode("utf-8").decode(wrong, errors="ignore"))


def test_a_stream_is_not_checked():
    splits = pairs_of(CLEAN, CLEAN[:1])
    splits["train"] = IterableDataset.from_generator(lambda: iter(splits["train"]))
    report = check_pairs(splits, "en", "zh")
    assert list(report) == ["test"]
    assert counts(report["test"]) == {}
    assert report_markdown({}) == fault_list({}) == ""
