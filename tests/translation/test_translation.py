"""The translation task: reading data in every form, refusing bad data in one line, features, prompts."""

import gzip
import json
import os

import datasets
import pytest
from datasets import Dataset

from finetune_deepseek.__main__ import guarded
from finetune_deepseek.commands.translate import translate
from finetune_deepseek.data.sources import find_files
from finetune_deepseek.training.optimization import IGNORED_LABEL
from finetune_deepseek.translation.arguments import TranslateArguments, TranslationArguments
from finetune_deepseek.translation.task import Translation
from finetune_deepseek.translation.translator import open_translator, prompts_of, translate_lines
from tests.small_runs import PAIRS, TINY, flags, write_jsonl
from tokenization_deepseek import train_tokenizer


def task(**settings):
    return Translation(TranslationArguments(**({"target_lang": "de"} | settings)), seed=0)


def load(**settings):
    return task(**settings).load_splits()


def pairs(rows):
    return [(row["source"], row["target"]) for row in rows]


@pytest.fixture
def tokenizer():
    return train_tokenizer(["one two birds three", "eins zwei Vögel drei"] * 3, 300)


@pytest.mark.parametrize(
    "name", ["rows.jsonl", "rows.json", "rows.jsonl.gz", "array.json", "rows.csv", "rows.parquet"]
)
@pytest.mark.parametrize("streaming", [False, True])
def test_every_file_form_gives_the_same_rows(name, streaming, tmp_path, monkeypatch):
    # 5 s per opened parquet stream
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)
    path = tmp_path / name
    nested = [{"translation": {"en": source, "de": target}} for source, target in PAIRS]
    flat = Dataset.from_list([{"en": source, "de": target} for source, target in PAIRS])
    if name == "rows.jsonl.gz":
        plain = write_jsonl(tmp_path / "plain", PAIRS)
        path.write_bytes(gzip.compress(plain.read_bytes()))
    elif name == "array.json":
        path.write_text(json.dumps(nested), encoding="utf-8")
    elif name == "rows.csv":
        flat.to_csv(path)
    elif name == "rows.parquet":
        flat.to_parquet(path)
    else:
        write_jsonl(path, PAIRS)
    splits = load(train_file=str(path), test_file=str(path), streaming=streaming)
    assert sorted(pairs(splits["train"])) == sorted(PAIRS)
    assert pairs(splits["test"]) == PAIRS
    assert splits["test"][1]["prompt"] == "de: two birds\n"


def test_folder_finds_one_file_per_split(tmp_path):
    for name in ("train.jsonl", "valid_2020.json", "test.jsonl.gz", "test.de.gz", "README.md"):
        (tmp_path / name).write_text("")
    found = {split: os.path.basename(path) for split, path in find_files(str(tmp_path)).items()}
    assert found == {"train": "train.jsonl", "validation": "valid_2020.json", "test": "test.jsonl.gz"}
    (tmp_path / "test_2.csv").write_text("")
    with pytest.raises(ValueError, match=r"several files for test \(test.jsonl.gz, test_2.csv\); use --test_file"):
        find_files(str(tmp_path))


def test_sample_limits(tmp_path):
    path = str(write_jsonl(tmp_path / "rows.jsonl", PAIRS))
    for streaming in (False, True):
        splits = load(train_file=path, test_file=path, streaming=streaming, max_train_samples=2, max_predict_samples=1)
        assert len(list(splits["train"])) == 2
        assert pairs(splits["test"]) == PAIRS[:1]


def test_rows_without_text_are_left_out_and_counted(tmp_path, capsys):
    path = write_jsonl(tmp_path / "rows.jsonl", [*PAIRS, ("four", ""), ("", "fünf")])
    with open(path, "a") as file:
        file.write('{"translation": {"en": "six"}}\n')
    assert pairs(load(train_file=str(path))["train"]) == PAIRS
    assert "left out 3 of 6 rows without text in one of the languages" in capsys.readouterr().out
    assert sorted(pairs(load(train_file=str(path), streaming=True)["train"])) == sorted(PAIRS)
    assert "a stream, so its faults aren't counted; rows without text or too long are left" in capsys.readouterr().out


BAD_FILES = {
    "missing.jsonl": (None, r"missing.jsonl: no such file"),
    "rows.xml": ("<a/>", r"rows.xml: unknown ending; use .json, .jsonl, .csv, .parquet"),
    "empty.jsonl": ("", r"empty.jsonl: the file is empty"),
    "empty.csv": ("en,de\n", r"empty.csv: no rows"),
    "blank.json": ("[]", r"blank.json: no rows"),
    "broken.jsonl": ('{"translation": {"en": "a", "de": "b"}}\n{"translation": {"en": "a" "de": "b"}}\n',
                     r"broken.jsonl, line 2: broken JSON: Expecting ',' delimiter \(column 28\)"),
    "broken.json": ('[{"translation": {"en": "a", "de": "b"}},\n\n{"translation": }]',
                    r"broken.json, line 3: broken JSON: Expecting value"),
    "cut.jsonl": ('{"translation": {"en": "a", "de": "b"}}\n{"transl', r"cut.jsonl, line 2: broken JSON"),
    "list.jsonl": ('{"translation": {"en": "a", "de": "b"}}\n["a", "b"]\n', r"list.jsonl, line 2: expected an object"),
    "columns.jsonl": ('{"english": "a", "deutsch": "b"}\n',
                      r"columns.jsonl: no column 'translation' and no column 'en'; it has english, deutsch"),
    "columns.csv": ("en,dutch\na,b\n", r"columns.csv: no column 'translation' and no column 'de'; it has en, dutch. "
                    r"Rename a column, or set --target_lang"),
    "language.jsonl": ('{"translation": {"en": "a", "fr": "b"}}\n',
                       r"language.jsonl: 'translation' has no language 'de'; it has en, fr. Set --target_lang"),
    "text.jsonl": ('{"translation": "a"}\n',
                   r"text.jsonl, row 1: 'translation' must hold \{language: text\}, found 'a'"),
    "nothing.jsonl": ('{"translation": {"en": "a", "de": ""}}\n',
                      r"nothing.jsonl: no row has text in both 'en' and 'de'"),
    "ragged.csv": ("en,de\na,b\nc,d,e\n", r"ragged.csv, row 2: 3 cells in a table of 2 columns"),
    "no.parquet": ("PAR", r"no.parquet: "),
    "no.jsonl.gz": ("no gzip", r"no.jsonl.gz: can't be unpacked"),
}  # fmt: skip


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_one_line(name, streaming, tmp_path):
    text, message = BAD_FILES[name]
    if text is not None:
        (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message) as error:
        load(train_file=str(tmp_path / name), streaming=streaming)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["mixed.jsonl", "mixed.json", "mixed.csv", "mixed.jsonl.gz"])
def test_mixed_encodings_are_one_line_that_names_the_line(name, streaming, tmp_path):
    lines = ["en,de"] if name == "mixed.csv" else []
    for source, target in PAIRS:
        lines.append(
            f"{source},{target}"
            if name == "mixed.csv"
            else json.dumps({"translation": {"en": source, "de": target}}, ensure_ascii=False)
        )
    content = b"".join(line.encode("utf-8" if "three" in line else "latin-1") + b"\n" for line in lines)
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    bad = 3 if name == "mixed.csv" else 2  # the row with an umlaut
    with pytest.raises(ValueError, match=f"{name}, line {bad}: can't be read as UTF-8 text .byte 0xf6") as error:
        load(train_file=str(tmp_path / name), streaming=streaming)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv"])
def test_other_encodings_of_a_whole_file(name, tmp_path):
    rows = ["en,de", "a,b"] if name == "rows.csv" else ['{"translation": {"en": "a", "de": "b"}}']
    (tmp_path / name).write_text("\n".join(rows), encoding="utf-8-sig")
    assert pairs(load(train_file=str(tmp_path / name))["train"]) == [("a", "b")]
    (tmp_path / name).write_text("\n".join(rows), encoding="utf-16")
    with pytest.raises(ValueError, match=f"{name}, line 1: can't be read as UTF-8 text"):
        load(train_file=str(tmp_path / name))


@pytest.mark.parametrize("streaming", [False, True])
def test_csv_cells_are_text(streaming, tmp_path):
    cells = [("NA", "null"), ("007", "1.50"), ("None", "nan"), ("true", "N/A")]
    (tmp_path / "rows.csv").write_text("en,de\n" + "".join(f"{s},{t}\n" for s, t in cells))
    assert sorted(pairs(load(train_file=str(tmp_path / "rows.csv"), streaming=streaming)["train"])) == sorted(cells)


def test_truncated_gzip_is_one_line(tmp_path):
    whole = gzip.compress(write_jsonl(tmp_path / "plain", PAIRS * 50).read_bytes())
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cut.jsonl.gz: ") as error:
        load(train_file=str(tmp_path / "cut.jsonl.gz"))
    assert "\n" not in str(error.value)


def test_default_corpus_knows_its_languages():
    with pytest.raises(ValueError, match="--source_lang de: the default corpus translates from en"):
        load(source_lang="de", target_lang="zh")
    with pytest.raises(ValueError, match="target_lang='fr'"):
        load(target_lang="fr")
    with pytest.raises(ValueError, match="no such folder"):
        load(data_dir="/nonexistent")


def test_the_command_reports_bad_data_and_leaves_nothing(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"translation": {"en": "a", "de": "b"}}\n{"translation": \n')
    argv = ["translation", *flags(TINY | {"train_file": path, "output_dir": tmp_path / "out"})]
    assert guarded(argv) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len([line for line in error if "broken JSON" in line]) == 1
    assert error[-1].startswith(f"deepseek-hf: error: {path}, line 2: broken JSON")
    assert not any("Traceback" in line for line in error)
    assert not (tmp_path / "out").exists()


def test_a_split_that_is_asked_for_must_be_there(finetune, tmp_path):
    path = str(write_jsonl(tmp_path / "rows.jsonl", PAIRS))
    with pytest.raises(ValueError, match="--do_predict: there is no test data, only train; add --test_file"):
        finetune(train_file=path, output_dir=tmp_path / "out", do_train=True, do_predict=True)


def test_lengths_are_fitted_to_the_model(finetune, tmp_path, capsys):
    path = str(write_jsonl(tmp_path / "rows.jsonl", [("word " * 100, "Wort " * 100)]))
    with pytest.raises(ValueError, match="Every training row is over --max_source_length or --max_target_length"):
        finetune(train_file=path, output_dir=tmp_path / "o", max_source_length=400, max_target_length=400)
    lines = capsys.readouterr().out.splitlines()
    for flag in ("--max_source_length", "--max_target_length"):
        assert f"{flag} 400 becomes 64: the model has 128 positions (max_position_embeddings)" in lines


def test_a_run_with_default_lengths_can_be_asked(finetune, data, tmp_path):
    """128 and 128 tokens on 128 positions: what is saved fits, and a longer line is translated to the model's end."""
    folder = str(tmp_path / "out")
    finetune(**data, output_dir=folder, do_train=True, max_steps=1, max_target_length=None)
    settings = json.loads((tmp_path / "out" / "deepseek_hf.json").read_text())["settings"]
    assert settings["max_source_length"] + settings["max_target_length"] <= 128
    prompts, how = prompts_of(folder, TranslateArguments()), TranslateArguments()
    model, tokenizer = open_translator(folder, how, "cpu")
    seen, generate = [], model.generate

    def watched(generation_config, **inputs):
        generation_config.eos_token_id = model.generation_config.eos_token_id = None  # it goes on as long as it may
        output = generate(generation_config=generation_config, **inputs)
        seen.append((*inputs["input_ids"].shape, output.shape[1]))
        return output

    model.generate = watched
    long = "q x " * (95 // (len(tokenizer("q x " * 10)["input_ids"]) // 10))
    translate_lines(["one", long, "two"], model, tokenizer, prompts, prompts.generation_config(tokenizer, 1))
    (rows, width, end), (alone, prompt, last) = seen
    assert (rows, end - width) == (2, 64) and (alone, last) == (1, 128) and prompt > 90
    with pytest.raises(ValueError, match="line 1: .* prompt tokens leave no room for a translation"):
        translate_lines([long * 2], model, tokenizer, prompts, prompts.generation_config(tokenizer, 1))


def test_loss_is_on_the_target_and_its_end_only(tokenizer):
    rows = Dataset.from_list([{"source": "one", "target": "eins", "source_lang": "en", "target_lang": "de"}])
    (train,) = task().features(rows, tokenizer, is_training=True)
    (scored,) = task().features(rows, tokenizer, is_training=False)
    prompt = tokenizer("de: one\n")["input_ids"]
    target = [*tokenizer("eins", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert prompt[0] == tokenizer.bos_token_id
    assert train["input_ids"] == prompt + target
    assert train["labels"] == [IGNORED_LABEL] * len(prompt) + target
    assert train["length"] == len(prompt + target)
    assert scored == train | {"prompt_ids": prompt}


def test_long_rows_are_left_out_of_training_but_never_of_a_score(tokenizer, capsys):
    texts = [("one", "eins"), ("two birds three", "eins"), ("one", "zwei Vögel drei")]
    rows = Dataset.from_list([{"source": s, "target": t, "source_lang": "en", "target_lang": "de"} for s, t in texts])
    limited = task(prompt_template="{source}", max_source_length=4, max_target_length=4)
    assert len(limited.features(rows, tokenizer, is_training=True)) == 1
    assert "left out 2 of 3 training rows over --max_source_length 4" in capsys.readouterr().out
    scored = limited.features(rows, tokenizer, is_training=False)
    assert len(scored) == 3
    assert max(len(ids) for ids in scored["prompt_ids"]) == 4
    with pytest.raises(ValueError, match="Every training row is over"):
        task(max_source_length=1).features(rows, tokenizer, is_training=True)


def test_tokenizer_sees_further_languages(tmp_path):
    path = tmp_path / "three.jsonl"
    path.write_text('{"translation": {"en": "one", "de": "eins", "zh": "一"}}\n', encoding="utf-8")
    three = task(train_file=str(path), tokenizer_langs=["zh"])
    assert list(three.tokenizer_texts(three.load_splits())) == ["de: one\n", "eins", "一", "zh:"]
    other = task(train_file=str(path), tokenizer_langs=["fr"])
    with pytest.raises(ValueError, match="--tokenizer_langs fr: the data has en, de, zh"):
        list(other.tokenizer_texts(other.load_splits()))


def test_prompt_template():
    assert task(prompt_template=r"{source_lang}>{target_lang}\n{source} =").prompt(" a ", "en", "de") == "en>de\na ="


def test_moses_text_in_and_out(finetune, tmp_path):
    pairs_in_case = [("One, two.", 'Eins "zwei"!'), ("Three-Four", "Drei-Vier")]
    path = str(write_jsonl(tmp_path / "rows.jsonl", pairs_in_case))
    prepared = [("one , two .", "eins &quot; zwei &quot; !"), ("three-four", "drei-vier")]
    moses = task(train_file=path, preprocess="moses_lower")
    rows = moses.load_splits()["train"]
    assert pairs(rows) == prepared
    assert rows[0]["prompt"] == "de: one , two .\n"
    settings = {"train_file": path, "test_file": path, "max_steps": 40, "preprocess": "moses_lower"}
    results = finetune(output_dir=tmp_path / "out", **settings)
    assert results["test_exact_match"] == 1.0
    assert "test_bleu" not in results and results["test_bleu_tokenized"] == results["baseline_bleu_tokenized"]
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    settings = json.loads((tmp_path / "out" / "deepseek_hf.json").read_text())["settings"]
    assert settings["preprocess"] == "moses_lower"
    assert "tokenised BLEU" in card and "tokenizer -l de by sacremoses" in card
    lines, output = tmp_path / "in.txt", tmp_path / "out.txt"
    lines.write_text("One, two.\n")
    translate([str(tmp_path / "out"), f"--input={lines}", f"--output={output}"])
    assert output.read_text() == prepared[0][1] + "\n"

    beside = task(tokenized_bleu=True).score(
        ["eins , zwei"], [{"source_lang": "en", "target_lang": "de", "target": "Eins, zwei"}]
    )
    assert {"bleu", "bleu_tokenized"} <= set(beside) and beside["exact_match"] == 0
    for settings in ({"tokenized_bleu": True}, {"preprocess": "moses_lower"}):
        with pytest.raises(ValueError, match="languages with spaces between words, not 'zh'"):
            task(target_lang="zh", **settings)


@pytest.mark.slow
@pytest.mark.parametrize(("folder", "tokenize"), [("multi30k_en_de", "13a"), ("tatoeba_en_zh", "zh")])
def test_shared_data_runs(folder, tokenize, finetune, tmp_path):
    root = os.environ.get("DEEPSEEK_HF_DATA")
    if not root or not os.path.isdir(os.path.join(root, folder)):
        pytest.skip("DEEPSEEK_HF_DATA names no folder with this data")
    results = finetune(
        data_dir=os.path.join(root, folder),
        target_lang=folder[-2:],
        output_dir=tmp_path / "out",
        vocab_size=4000,
        config_overrides="hidden_size=128,max_position_embeddings=512",
        per_device_train_batch_size=32,
        learning_rate=0.003,
        max_steps=150,
        max_eval_samples=100,
        max_predict_samples=100,
    )
    assert results["eval_loss"] < 6.5  # ln(4000) = 8.3 before training
    assert results["test_samples"] == 100
    assert f"tok:{tokenize}" in results["test_bleu_signature"]
    assert results["train_samples"] > 25_000
