"""Augmentation: each operation does what its rate says, on the source of training rows only."""

import json
import random
from collections import Counter

import pytest
from datasets import Dataset, IterableDataset

from finetune_deepseek.translation.arguments import TranslationArguments
from finetune_deepseek.translation.augmentation import (
    OPERATIONS,
    AugmentationArguments,
    Augmenter,
    Words,
    augment,
    read_synonyms,
)
from finetune_deepseek.translation.task import Translation
from tokenization_deepseek import train_tokenizer

SENTENCE = "one two three four five six seven eight nine ten"
SYNONYMS = {"big": ["large", "huge"], "two": ["2"], "高兴": ["开心"]}
NONE = dict.fromkeys(OPERATIONS, 0.0)


def changed(text, language="en", synonyms=None, seed=0, **rates):
    words = Words(language, synonyms or {})
    return augment(text, words, NONE | rates, random.Random(seed))


@pytest.mark.parametrize("language", ["en", "zh"])
def test_rates_are_shares_of_words(language):
    space = " " if language == "en" else ""
    text = space.join("甲乙丙丁戊己庚辛" * 250)
    words = Words(language, {})
    deleted = words.split(changed(text, language, delete=0.2))
    assert 0.77 * 2000 < len(deleted) < 0.83 * 2000
    inserted = words.split(changed(text, language, insert=0.2))
    assert 1.17 * 2000 < len(inserted) < 1.23 * 2000
    assert not Counter(text) - Counter(changed(text, language, insert=0.2) + space)  # nothing is lost
    swapped = changed(text, language, swap=0.1)
    assert Counter(swapped) == Counter(text)
    moved = sum(a != b for a, b in zip(words.split(text), words.split(swapped), strict=True))
    assert 0.12 * 2000 < moved < 0.2 * 2000  # each swap moves two words, an eighth of them to an equal one
    assert changed(text, language) == text


def test_a_text_never_becomes_empty():
    assert changed("word", delete=0.99) == "word"
    assert changed("字", "zh", delete=0.99) == "字"


def test_synonyms_keep_punctuation_and_capital():
    always = {"synonym": 0.999}
    assert changed('"Big, and two!"', synonyms=SYNONYMS | {"big": ["large"]}, **always) == '"Large, and 2!"'
    assert changed("biggest", synonyms=SYNONYMS, **always) == "biggest"
    drawn = {changed("big", synonyms=SYNONYMS, seed=seed, **always) for seed in range(20)}
    assert drawn == {"large", "huge"}


def test_chinese_words_of_the_dictionary_stay_whole():
    words = Words("zh-CN", SYNONYMS)
    assert words.split("他很高兴用 iPhone15。") == [*"他很", "高兴", "用", " ", "iPhone15", "。"]
    assert changed("他很高兴。", "zh", SYNONYMS, synonym=0.999) == "他很开心。"
    assert changed("高兴", "zh", SYNONYMS, insert=0.999) == "高兴开心"


def test_rates_are_written_with_spaces_or_commas():
    words = ["swap=0.1,insert=.25", "delete=0.05"]
    assert AugmentationArguments(augment=words).augmentation_rates == {
        **{"synonym": 0.0, "insert": 0.25, "delete": 0.05, "swap": 0.1}
    }


def test_copies_depend_on_seed_and_text_alone():
    arguments = AugmentationArguments(augment=["swap=0.4"], augment_copies=4)
    copies = Augmenter(arguments, "en", seed=1)(SENTENCE)
    assert len(copies) == 4 == len(set(copies)) and SENTENCE not in copies
    again = Augmenter(arguments, "en", seed=1)
    again("another text first")
    assert again(SENTENCE) == copies
    assert Augmenter(arguments, "en", seed=2)(SENTENCE) != copies
    assert Augmenter(arguments, "en", seed=1)("alone") == []  # nothing to swap: no copy that repeats its row


@pytest.mark.parametrize("name", ["words.tsv", "words.json"])
def test_dictionary_files(name, tmp_path):
    path = tmp_path / name
    tsv = "".join("\t".join([word, *others]) + "\n" for word, others in SYNONYMS.items())
    path.write_text(tsv if name.endswith("tsv") else json.dumps(SYNONYMS), encoding="utf-8")
    assert read_synonyms(str(path)) == SYNONYMS


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("missing.tsv", None, "can't be read"),
        ("words.txt", "a\tb", "unknown ending; use .tsv or .json"),
        ("words.tsv", "a\tb\nc\n", "words.tsv, line 2: expected a word, a tab and its synonyms"),
        ("words.tsv", "\n", "no words"),
        ("words.json", '{"a": ["b"]\n"c"}', "words.json, line 2: broken JSON"),
        ("words.json", '{"a": "b"}', "expected a list of synonyms for 'a', found 'b'"),
        ("words.json", "[]", r"expected \{word: \[synonyms\]\}"),
    ],
)
def test_bad_dictionaries_are_one_line(name, text, message, tmp_path):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        read_synonyms(str(tmp_path / name))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"augment": ["swap=0.1"], "augment_copies": 0}, "--augment_copies 0: it must be 1 or more"),
        ({"augment": ["swop=0.1"]}, "--augment swop=0.1: write operation=rate; operations are synonym, insert"),
        ({"augment": ["swap"]}, "--augment swap: the rate must be above 0 and below 1, such as swap=0.1"),
        ({"augment": ["swap=1.5"]}, "--augment swap=1.5: the rate"),
        ({"augment": ["synonym=0.1"]}, "--augment synonym needs --synonyms_file"),
        ({"augment": ["swap=0.1"], "synonyms_file": "x.tsv"}, "--synonyms_file has no effect without"),
    ],
)
def test_flags_that_do_not_fit_are_one_line(settings, message):
    with pytest.raises(ValueError, match=message):
        TranslationArguments(**settings)


@pytest.mark.parametrize("streaming", [False, True])
def test_only_sources_of_training_rows_are_changed(streaming, capsys):
    arguments = TranslationArguments(target_lang="de", augment=["swap=0.3"], augment_copies=2)
    task = Translation(arguments, seed=0)
    target = "eins zwei drei vier fünf"
    languages = {"source_lang": "en", "target_lang": "de"}
    prompt = task.prompt(SENTENCE, **languages)
    rows = Dataset.from_list([{"prompt": prompt, "source": SENTENCE, "target": target, **languages}])
    tokenizer = train_tokenizer([SENTENCE, target], 400)
    given = IterableDataset.from_generator(lambda: iter(rows)) if streaming else rows
    texts = [
        tokenizer.decode(row["input_ids"], skip_special_tokens=True).split("\n")
        for row in task.features(given, tokenizer, is_training=True)
    ]
    assert [text[1] for text in texts] == [target] * 3
    sources = [text[0].removeprefix("de: ") for text in texts]
    assert sources[0] == SENTENCE and len(set(sources)) == 3
    assert {tuple(sorted(source.split())) for source in sources} == {tuple(sorted(SENTENCE.split()))}
    assert ("augmented 1 training rows by 2: up to 2 changed copies" in capsys.readouterr().out) == (not streaming)
    assert len(task.features(rows, tokenizer, is_training=False)) == 1
    assert "up to 2 changed copies of each source (swap 0.3)" in task.card_data()["preprocessing"]
