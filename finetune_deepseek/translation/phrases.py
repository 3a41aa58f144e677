"""The translation command's embedded corpus: short English phrases with their Chinese or German form.

Nothing is downloaded: babel, an installed dependency, carries the Unicode CLDR tables from which every phrase is made
when it is asked for. There are two sorts of rows.

- Names of common countries, languages, currencies and units. All of them are in the training split.
- Compositions: dates, times, quantities, sums of money, lists of names and so on, put together by CLDR's own patterns.
  They are split so that a test composition shares neither its English nor its translation with another split.

So the corpus asks whether a model composes what it knows. It is not natural language: CLDR has no sentences.
"""

import random
import re
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import date, datetime, timedelta
from decimal import Decimal
from typing import Literal

import numpy as np
from babel import Locale
from babel.dates import (
    format_date,
    format_interval,
    format_skeleton,
    format_time,
    format_timedelta,
    get_datetime_format,
)
from babel.lists import format_list
from babel.numbers import format_compact_decimal, format_currency, get_currency_name
from babel.units import format_unit, get_unit_name
from datasets import Dataset, DatasetDict
from sklearn.feature_extraction.text import TfidfVectorizer

# A phrase is what it says in any language: given a locale, it returns its text there.
Phrase = Callable[[Locale], str]

ENGLISH = Locale.parse("en")
TARGETS = {"zh": Locale.parse("zh"), "de": Locale.parse("de")}
SPLITS = ("train", "validation", "test")
MAX_DRAWS_PER_ROW = 20  # more means that the patterns are nearly used up; a default corpus needs fewer than 2

# The vocabulary is narrow on purpose: CLDR names 290 territories, 580 languages, 300 currencies and 190 units, most of
# them rare or obsolete, and a first run of some minutes would mostly show that it had no time to learn them.
TERRITORIES, LANGUAGES, CURRENCIES, UNITS = (
    codes.split()
    for codes in (
        """
        AE AF AL AM AR AT AU AZ BD BE BG BR BY CA CH CL CN CO CR CU CY CZ DE DK DO DZ EC EE EG ES ET FI FR GB GE GH GR
        GT HR HU ID IE IL IN IQ IR IS IT JM JO JP KE KH KR KW KZ LA LB LK LT LU LV MA MN MT MX MY NG NL NO NP NZ OM PA
        PE PH PK PL PT QA RO RS RU SA SE SG SI SK SN SY TH TN TR TZ UA UG US UY UZ VE VN YE ZA
        """,
        """
        ar bg bn ca cs cy da de el en es et eu fa fi fr ga he hi hr hu hy id is it ja ka kk km ko la lo lt lv mn ms my
        ne nl no pl pt ro ru sk sl sq sr sv sw ta te th tl tr uk ur uz vi zh
        """,
        """
        AED ARS AUD BRL CAD CHF CLP CNY COP CZK DKK EGP EUR GBP HUF IDR ILS INR JPY KRW MXN MYR NGN NOK NZD PHP PLN
        RUB SAR SEK SGD THB TRY USD VND ZAR
        """,
        """
        area-acre area-hectare area-square-kilometer area-square-meter digital-gigabyte digital-megabyte duration-day
        duration-hour duration-minute duration-month duration-second duration-week duration-year energy-calorie
        energy-kilowatt-hour frequency-hertz graphics-pixel length-centimeter length-foot length-inch length-kilometer
        length-meter length-mile length-millimeter mass-gram mass-kilogram mass-pound mass-tonne power-horsepower
        power-kilowatt power-watt speed-kilometer-per-hour speed-meter-per-second speed-mile-per-hour
        temperature-celsius temperature-fahrenheit volume-cubic-meter volume-cup volume-gallon volume-liter
        volume-milliliter volume-tablespoon
        """,
    )
)
# Sums in these have no decimals. Fixed here, as is the word in Chinese ranges, since CLDR changes with its versions:
# the rows of a seed, and so the scores, should not hang on babel's.
WHOLE_CURRENCIES = ("CLP", "JPY", "KRW", "VND")
RANGE_DASH = re.compile(r"\s*–\s*")  # in Chinese ranges of dates, where babel before 2.19 has 至
SECONDS_PER_UNIT: dict[Literal["second", "minute", "hour", "day", "week", "month", "year"], int] = {
    "second": 1,
    "minute": 60,
    "hour": 3600,
    "day": 86400,
    "week": 7 * 86400,
    "month": 30 * 86400,  # babel's own month and year, so that the division comes out even
    "year": 365 * 86400,
}


def normalize(text: str) -> str:
    """Write CLDR's no-break (U+00A0), narrow no-break (U+202F) and thin (U+2009) spaces as plain ones."""
    return text.replace("\u00a0", " ").replace("\u202f", " ").replace("\u2009", " ").strip()


def draw_day(rng: random.Random) -> date:
    return date(1950, 1, 1) + timedelta(days=rng.randrange(36525))  # the hundred years up to 2049


def draw_number(rng: random.Random, max_digits: int) -> int:
    """An integer whose length is uniform in 1..max_digits: drawn evenly, nearly all would be long."""
    digits = rng.randint(1, max_digits)
    return rng.randrange(10 ** (digits - 1), 10**digits)


def draw_date(rng: random.Random) -> Phrase:
    day = draw_day(rng)
    form = rng.choice(["full", "full", "long", "medium", "yMMMM", "MMMEd", "yQQQQ", "yw"])
    if form in ("full", "long", "medium"):
        return lambda locale: format_date(day, form, locale=locale)
    at_midnight = datetime(day.year, day.month, day.day)
    return lambda locale: format_skeleton(form, at_midnight, locale=locale)


def draw_time(rng: random.Random) -> Phrase:
    moment = datetime(2000, 1, 1, rng.randrange(24), rng.randrange(60))
    return lambda locale: format_time(moment, "short", locale=locale)


def draw_date_time(rng: random.Random) -> Phrase:
    day, clock_time = draw_day(rng), draw_time(rng)
    form: Literal["full", "medium"] = rng.choice(("full", "medium"))

    def phrase(locale: Locale) -> str:
        pattern = str(get_datetime_format(form, locale=locale))
        return pattern.replace("{1}", format_date(day, form, locale=locale)).replace("{0}", clock_time(locale))

    return phrase


def draw_relative_time(rng: random.Random) -> Phrase:
    unit = rng.choice(list(SECONDS_PER_UNIT))
    seconds = draw_number(rng, 3) * SECONDS_PER_UNIT[unit] * rng.choice([-1, 1])
    # The threshold keeps the unit: by default babel would round 40 days to a month.
    return lambda locale: format_timedelta(
        seconds, granularity=unit, threshold=10**6, add_direction=True, locale=locale
    )


def draw_interval(rng: random.Random) -> Phrase:
    start = draw_day(rng)
    form, end = rng.choice(
        [
            ("yMMMd", start + timedelta(days=rng.randint(1, 20))),
            ("MMMd", start + timedelta(days=rng.randint(1, 40))),
            ("yMMMM", start + timedelta(days=rng.randint(31, 300))),
        ]
    )

    def phrase(locale: Locale) -> str:
        text = format_interval(start, end, form, locale=locale)
        return RANGE_DASH.sub("至", text) if locale.language == "zh" else text

    return phrase


def format_quantity(value: Decimal, unit: str, locale: Locale) -> str:
    """The value with the unit's long pattern, or its short one where CLDR gives this language no long one.

    CLDR's root locale points a missing long pattern at the short one ("2.5 kilometers" is "2.5公里" in both). babel
    doesn't follow that pointer and prints the raw key ("2.5 length-kilometer").
    """
    text = format_unit(value, unit, "long", locale=locale)
    return format_unit(value, unit, "short", locale=locale) if unit in text else text


def draw_quantity(rng: random.Random) -> Phrase:
    unit = rng.choice(UNITS)
    value = Decimal(draw_number(rng, 4)) / rng.choice([1, 1, 10])
    return lambda locale: format_quantity(value, unit, locale)


def draw_money(rng: random.Random) -> Phrase:
    currency = rng.choice(CURRENCIES)
    value = Decimal(draw_number(rng, 6)) / 100
    pattern = "#,##0" if currency in WHOLE_CURRENCIES else "#,##0.00"
    return lambda locale: format_currency(
        value, currency, pattern, locale=locale, currency_digits=False, format_type="name"
    )


def draw_compact_number(rng: random.Random) -> Phrase:
    # At most three significant digits: then English thousands and Chinese ten-thousands both write the value exactly.
    value = rng.randint(1, 999) * 10 ** rng.randint(3, 12)

    def phrase(locale: Locale) -> str:
        # Chinese has no long compact pattern.
        width: Literal["short", "long"] = "short" if locale.language == "zh" else "long"
        return format_compact_decimal(value, format_type=width, locale=locale, fraction_digits=2)

    return phrase


def draw_list(rng: random.Random) -> Phrase:
    kind = rng.choice(["territories", "languages"])
    codes = rng.sample(TERRITORIES if kind == "territories" else LANGUAGES, rng.choice([2, 2, 3]))
    style: Literal["standard", "or"] = rng.choice(("standard", "or"))
    return lambda locale: format_list([getattr(locale, kind)[code] for code in codes], style=style, locale=locale)


# Kind of composition -> (its share of the draws in percent, how to draw one).
COMPOSITIONS: dict[str, tuple[int, Callable[[random.Random], Phrase]]] = {
    "date": (14, draw_date),
    "time": (2, draw_time),
    "date_time": (9, draw_date_time),
    "relative_time": (8, draw_relative_time),
    "interval": (11, draw_interval),
    "quantity": (18, draw_quantity),
    "money": (14, draw_money),
    "compact_number": (6, draw_compact_number),
    "list": (18, draw_list),
}


def unit_name(unit: str, locale: Locale) -> str | None:
    """The unit's plural name, with the same long-to-short pointer as in `format_quantity` (here babel gives None)."""
    return get_unit_name(unit, "long", locale=locale) or get_unit_name(unit, "short", locale=locale)


def names() -> list[tuple[str, Callable[[Locale], str | None]]]:
    """Every name of the vocabulary as (kind, phrase); the phrase gives None where CLDR has no name."""
    return [
        *[("territory", lambda locale, code=code: locale.territories.get(code)) for code in TERRITORIES],
        *[("language", lambda locale, code=code: locale.languages.get(code)) for code in LANGUAGES],
        *[("currency", lambda locale, code=code: get_currency_name(code, locale=locale)) for code in CURRENCIES],
        *[("unit", lambda locale, unit=unit: unit_name(unit, locale)) for unit in UNITS],
    ]


def split_of(source: str) -> str:
    """The split an English composition belongs to: 80 % train, 10 % validation, 10 % test.

    It depends on nothing else, so a phrase that tests English to German was never trained on as English to Chinese.
    """
    bucket = zlib.crc32(source.encode()) % 10
    return "test" if bucket == 0 else "validation" if bucket == 1 else "train"


def default_corpus(
    target_lang: str = "zh",
    train_size: int = 40_000,
    validation_size: int = 1_000,
    test_size: int = 1_000,
    seed: int = 1,
) -> DatasetDict:
    """Generate the corpus: rows `{"translation": {"en": ..., target_lang: ...}, "kind": ...}` in three splits.

    Args:
        target_lang: `"zh"` or `"de"`.
        train_size: rows of the training split, the some 240 names included.
        validation_size, test_size: rows of these splits, compositions only.
        seed: equal arguments give equal rows, on every machine.

    No English and no translation of a composition occurs twice in the corpus. A composition that reads the same in
    both languages is left out, since copying it would count as translating it.

    Raises:
        ValueError: for another language, and for sizes that the patterns or the names don't fit.
    """
    if target_lang not in TARGETS:
        raise ValueError(f"target_lang={target_lang!r}: the default corpus has {' and '.join(TARGETS)}; choose one.")
    target = TARGETS[target_lang]
    sizes = dict(zip(SPLITS, (train_size, validation_size, test_size), strict=True))
    rows: dict[str, list[dict]] = {split: [] for split in SPLITS}
    sources: set[str] = set()
    translations: set[str] = set()

    def add(split: str, kind: str, source: str, translation: str) -> None:
        sources.add(source)
        translations.add(translation)
        rows[split].append({"translation": {"en": source, target_lang: translation}, "kind": kind})

    for kind, name in names():
        source, translation = name(ENGLISH), name(target)
        if source and translation and source not in sources:
            add("train", kind, normalize(source), normalize(translation))
    if train_size < len(rows["train"]):
        raise ValueError(f"train_size={train_size} is less than the {len(rows['train'])} names; raise it.")

    rng = random.Random(seed)
    kinds = list(COMPOSITIONS)
    shares = [share for share, _ in COMPOSITIONS.values()]
    draws_left = int(10_000 + MAX_DRAWS_PER_ROW * sum(sizes.values()))
    while any(len(rows[split]) < size for split, size in sizes.items()):
        draws_left -= 1
        if draws_left < 0:
            counts = ", ".join(f"{split} {len(rows[split])} of {size}" for split, size in sizes.items())
            raise ValueError(f"The default corpus has too few different phrases ({counts}); ask for fewer.")
        kind = rng.choices(kinds, shares)[0]
        phrase = COMPOSITIONS[kind][1](rng)
        source = normalize(phrase(ENGLISH))
        split = split_of(source)
        if source in sources or len(rows[split]) == sizes[split]:
            continue
        translation = normalize(phrase(target))
        if translation not in translations and translation != source:
            add(split, kind, source, translation)

    rng.shuffle(rows["train"])  # the names stand first otherwise
    return DatasetDict({split: Dataset.from_list(rows[split]) for split in SPLITS})


def corpus_description(corpus: DatasetDict) -> str:
    """Markdown for the model card: what the default corpus covers, with rows and an example per kind."""
    counts = {split: Counter(corpus[split]["kind"]) for split in SPLITS}
    examples: dict[str, str] = {}
    for row in corpus["train"]:
        english = row["translation"].pop("en")  # by name: older versions of pyarrow order keys by the alphabet
        (translation,) = row["translation"].values()
        examples.setdefault(row["kind"], f"{english} → {translation}")
    lines = [
        "Phrases generated from the Unicode CLDR data in babel: names of "
        f"{len(TERRITORIES)} countries, {len(LANGUAGES)} languages, {len(CURRENCIES)} currencies and {len(UNITS)} "
        "units, and compositions by CLDR's patterns (years 1950 to 2049). It is a narrow vocabulary of common names "
        "and holds no sentences; a model trained on it translates such phrases and nothing else. All names are in the "
        "training split. A composition of one split has neither its English nor its translation in another split.",
        "",
        "| kind | train | validation | test | example |",
        "|---|---|---|---|---|",
    ]
    for kind in ("territory", "language", "currency", "unit", *COMPOSITIONS):
        numbers = " | ".join(str(counts[split][kind]) for split in SPLITS)
        lines.append(f"| {kind} | {numbers} | {examples.get(kind, '')} |")
    return "\n".join(lines) + "\n"


def nearest_pair_baseline(
    train_sources: Sequence[str], train_targets: Sequence[str], test_sources: Sequence[str], batch_size: int = 128
) -> list[str]:
    """Translate by memory alone: for each test source, the target of the training pair whose source is nearest.

    Nearest means the largest cosine between TF-IDF vectors of character 2- to 4-grams, case kept; of equals the first.
    A model that doesn't beat this has learned to look up, not to translate.

    Raises:
        ValueError: if there are no training pairs, or not as many targets as sources.
    """
    if not train_sources or len(train_sources) != len(train_targets):
        raise ValueError(
            f"The nearest-pair baseline got {len(train_sources)} training sources and {len(train_targets)} targets; "
            "give one target per source, at least one pair."
        )
    if not test_sources:
        return []
    shortest = min(2, max(map(len, train_sources)))  # a source may be one Chinese character
    vectorizer = TfidfVectorizer(analyzer="char", ngram_range=(shortest, 4), lowercase=False, dtype=np.float32)
    train_vectors = vectorizer.fit_transform(train_sources).T.tocsr()  # [n-grams, training pairs]
    test_vectors = vectorizer.transform(test_sources)  # [test sources, n-grams]
    nearest: list[int] = []
    for start in range(0, len(test_sources), batch_size):
        similarity = (test_vectors[start : start + batch_size] @ train_vectors).toarray()
        nearest.extend(similarity.argmax(axis=1).tolist())  # argmax takes the first of equals
    return [train_targets[index] for index in nearest]
