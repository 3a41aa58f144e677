"""The default corpus: split without leakage, free of babel's traps, the same on every machine; and its baseline."""

import re
import time
import zlib
from collections import Counter
from math import log, sqrt

import pytest

from finetune_deepseek.translation.phrases import (
    COMPOSITIONS,
    CURRENCIES,
    ENGLISH,
    LANGUAGES,
    TARGETS,
    TERRITORIES,
    UNITS,
    corpus_description,
    default_corpus,
    names,
    nearest_pair_baseline,
    split_of,
)

NAMES = len(TERRITORIES) + len(LANGUAGES) + len(CURRENCIES) + len(UNITS)


@pytest.fixture(scope="module", params=["zh", "de"])
def corpus(request):
    """The language code and the rows of each split as (kind, English, translation)."""
    language = request.param
    splits = default_corpus(language, train_size=5_000, validation_size=300, test_size=300, seed=3)
    rows = {
        split: [(row["kind"], row["translation"]["en"], row["translation"][language]) for row in splits[split]]
        for split in splits
    }
    return language, rows


def test_sizes_are_those_asked_for(corpus):
    _, rows = corpus
    assert {split: len(rows[split]) for split in rows} == {"train": 5_000, "validation": 300, "test": 300}


def test_no_source_and_no_translation_crosses_splits(corpus):
    _, rows = corpus
    for held_out, others in (("test", ("train", "validation")), ("validation", ("train", "test"))):
        for column in (1, 2):
            elsewhere = {row[column] for split in others for row in rows[split]}
            assert not elsewhere & {row[column] for row in rows[held_out]}


def test_no_english_test_phrase_is_in_the_other_languages_training_split():
    chinese = default_corpus("zh", 5_000, 50, 50, seed=0)
    german = default_corpus("de", 1_000, 50, 300, seed=7)
    trained_on = {pair["en"] for pair in chinese["train"]["translation"]}
    assert not trained_on & {pair["en"] for pair in german["test"]["translation"]}


def test_compositions_are_unique_and_not_copies(corpus):
    _, rows = corpus
    compositions = [row for split in rows for row in rows[split] if row[0] in COMPOSITIONS]
    assert len({row[1] for row in compositions}) == len({row[2] for row in compositions}) == len(compositions)
    assert not [row for row in compositions if row[1] == row[2]]


def test_every_name_is_in_train_and_only_there(corpus):
    _, rows = corpus
    kinds = {"territory": TERRITORIES, "language": LANGUAGES, "currency": CURRENCIES, "unit": UNITS}
    for kind, codes in kinds.items():
        assert len([row for row in rows["train"] if row[0] == kind]) == len(codes)
    assert {row[0] for split in ("validation", "test") for row in rows[split]} <= set(COMPOSITIONS)


def test_names_of_test_lists_occur_in_train(corpus):
    language, rows = corpus
    in_train = {row[1]: row[2] for row in rows["train"] if row[0] in ("territory", "language")}
    lists = [row for row in rows["test"] if row[0] == "list"]
    assert lists
    for _, source, translation in lists:
        for name in re.split(r", and |, or |, | and | or ", source):
            assert in_train[name] in translation


def test_words_of_test_quantities_and_money_occur_in_train(corpus):
    _, rows = corpus

    def words(split):
        return {re.sub(r"[\d.,]", "", row[1]) for row in rows[split] if row[0] in ("quantity", "money")}

    # The singular ("1 foot") is rare; the plural is the rule.
    missing = words("test") - words("train")
    assert all(word.split()[0] in " ".join(words("train")) for word in missing), missing


def test_every_kind_is_in_every_split(corpus):
    _, rows = corpus
    for split in rows:
        assert {row[0] for row in rows[split]} >= set(COMPOSITIONS)


def test_babels_traps_are_absent(corpus):
    language, rows = corpus
    raw_key = re.compile("|".join(map(re.escape, UNITS)))
    spaces = re.compile("[\u00a0\u202f\u2009\u200e\u200f]|^ | $|  ")
    for split in rows:
        for _, source, translation in rows[split]:
            for text in (source, translation):
                assert text and not raw_key.search(text) and not spaces.search(text), text
            # A format without a pattern falls back to English words.
            if language == "zh":
                assert not re.search("[A-Za-z]", translation), translation


def test_compact_numbers_keep_their_value(corpus):
    """Both sides are rounded for show: unless they say the same number, no model could translate them."""
    _, rows = corpus
    scales = {"thousand": 3, "million": 6, "billion": 9, "trillion": 12, "万": 4, "亿": 8, "万亿": 12, "": 0}
    scales |= {"Tausend": 3, "Million": 6, "Millionen": 6, "Milliarde": 9, "Milliarden": 9}
    scales |= {"Billion": 12, "Billionen": 12}

    def value(text):
        number, scale = re.fullmatch(r"([\d.,]+) ?(\D*)", text).groups()
        return round(float(number.replace(",", ".")) * 1000) * 10 ** scales[scale]

    checked = [row for split in rows for row in rows[split] if row[0] == "compact_number"]
    assert len(checked) > 100
    for _, source, translation in checked:
        assert value(source) == value(translation), (source, translation)


def test_known_phrases():
    expected = {
        ("zh", "length-kilometer"): "公里",  # long is missing: the short pattern stands in
        ("de", "length-foot"): "Fuß",
    }
    by_code = dict(zip(UNITS, [name for kind, name in names() if kind == "unit"], strict=True))
    for (language, unit), text in expected.items():
        assert by_code[unit](TARGETS[language]) == text
    assert all(name(locale) for _, name in names() for locale in (ENGLISH, *TARGETS.values()))


def test_a_seed_gives_one_corpus():
    def rows(seed):
        corpus = default_corpus("zh", 500, 20, 20, seed=seed)
        return [corpus[split][:] for split in corpus]

    assert rows(5) == rows(5) != rows(6)


def test_the_corpus_is_the_same_in_every_process():
    """Pinned rows: Python's hash() differs from process to process, CRC-32 and random.Random don't."""
    for split, source in {"train": "1 kilometers", "test": "7 kilometers", "validation": "19 kilometers"}.items():
        assert split_of(source) == split
    first, second = default_corpus("zh", 300, 1, 2, seed=1)["test"]["translation"]
    assert first == {"en": "0.08 British pounds", "zh": "0.08英镑"}
    assert second == {"en": "Nov 4 – 8, 2049", "zh": "2049年11月4日至8日"}


def test_the_corpus_is_the_same_with_every_babel(corpus):
    """A checksum of all rows, equal in babel 2.17, 2.18 and 2.19, of which each has another CLDR."""
    language, rows = corpus
    assert zlib.crc32(repr(rows).encode()) == {"zh": 3409888095, "de": 223207571}[language]


def test_generation_is_fast():
    start = time.perf_counter()
    default_corpus("zh", train_size=4_000, validation_size=100, test_size=100)
    assert time.perf_counter() - start < 10  # 0.6 s alone; the whole corpus has ten times the rows


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target_lang": "fr"}, "target_lang='fr'"),
        ({"train_size": 10}, f"less than the {NAMES} names"),
        ({"train_size": NAMES, "validation_size": 0, "test_size": 10**9}, "too few different phrases"),
    ],
)
def test_bad_arguments_get_one_line(arguments, message, monkeypatch):
    monkeypatch.setattr("finetune_deepseek.translation.phrases.MAX_DRAWS_PER_ROW", 1e-6)
    with pytest.raises(ValueError, match=message) as error:
        default_corpus(**arguments)
    assert "\n" not in str(error.value)


def test_description_counts_the_rows():
    corpus = default_corpus("de", 600, 30, 40, seed=0)
    text = corpus_description(corpus)
    table = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")][1:]
    assert [sum(int(row[column]) for row in table) for column in (1, 2, 3)] == [600, 30, 40]
    assert f"{len(TERRITORIES)} countries" in text
    assert table[5][:1] + table[5][-1:] == ["| time", "5:32 AM → 05:32 |"]


def test_baseline_gives_the_target_of_the_nearest_source():
    sources = ["5 kilometers", "7 US dollars", "March 3, 1999", "7 US dollars"]
    targets = ["5公里", "7美元", "1999年3月3日", "a later equal"]
    questions = ["9 US dollars", "85 kilometers", "March 3, 1998", "xyz"]
    # Nothing is near "xyz": all similarities are zero, and the first of equals is taken.
    assert nearest_pair_baseline(sources, targets, questions) == ["7美元", "5公里", "1999年3月3日", "5公里"]
    assert nearest_pair_baseline(sources, targets, questions, batch_size=1) == [
        "7美元",
        "5公里",
        "1999年3月3日",
        "5公里",
    ]
    assert nearest_pair_baseline(sources, targets, []) == []


def test_baseline_agrees_with_a_plain_computation():
    corpus = default_corpus("zh", 400, 1, 40, seed=2)
    sources = [pair["en"] for pair in corpus["train"]["translation"]]
    questions = [pair["en"] for pair in corpus["test"]["translation"]]

    def grams(text):
        return Counter(text[i : i + n] for n in (2, 3, 4) for i in range(len(text) - n + 1))

    documents = [grams(text) for text in sources]
    frequency = Counter(gram for document in documents for gram in document)

    def vector(document):
        known = {gram: count for gram, count in document.items() if gram in frequency}
        weights = {g: count * (log((1 + len(sources)) / (1 + frequency[g])) + 1) for g, count in known.items()}
        norm = sqrt(sum(w * w for w in weights.values())) or 1.0
        return {g: w / norm for g, w in weights.items()}

    vectors = [vector(document) for document in documents]
    found = nearest_pair_baseline(sources, [str(i) for i in range(len(sources))], questions)
    for question, index in zip(questions, found, strict=True):
        query = vector(grams(question))
        scores = [sum(w * v.get(g, 0.0) for g, w in query.items()) for v in vectors]
        assert scores[int(index)] == pytest.approx(max(scores), abs=1e-5)


def test_baseline_refuses_unequal_columns():
    with pytest.raises(ValueError, match="2 training sources and 1 targets"):
        nearest_pair_baseline(["a", "b"], ["c"], ["d"])
    with pytest.raises(ValueError, match="0 training sources"):
        nearest_pair_baseline([], [], ["d"])
