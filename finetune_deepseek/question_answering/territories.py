"""The question answering command's embedded corpus: a passage of facts for each territory, and questions about them.

Nothing is downloaded: babel, an installed dependency, carries the Unicode CLDR tables that the facts come from. A
passage has a sentence for each fact, in one of two wordings and in an order of its own; a question asks for one fact,
in four wordings. Territories are split, so no training question is about a place of the scored ones.

So the corpus asks whether a model finds what a question asks for in a passage that it has never seen. It isn't natural
language: every sentence is made by a pattern.
"""

import random
import zlib
from typing import Any

from babel import Locale
from babel.core import get_global

# Fact: two patterns of the sentence that tells it, and four of the question that asks for it.
PATTERNS: dict[str, tuple[tuple[str, str], tuple[str, str, str, str]]] = {
    "currency": (
        ("The currency of {name} is the {fact}.", "In {name} people pay with the {fact}."),
        (
            "What is the currency of {name}?",
            "Which currency does {name} use?",
            "What do people pay with in {name}?",
            "What is the money of {name} called?",
        ),
    ),
    "currency_code": (
        ("Banks write this money as {fact}.", "Its currency code is {fact}."),
        (
            "What is the currency code of {name}?",
            "How do banks write the money of {name}?",
            "Which code does the currency of {name} have?",
            "What is the code for the money of {name}?",
        ),
    ),
    "currency_since": (
        ("That money has been legal tender since {fact}.", "The present money was introduced in {fact}."),
        (
            "Since when has the money of {name} been legal tender?",
            "In which year was the present money of {name} introduced?",
            "When did {name} introduce its present currency?",
            "Since which year has {name} used its currency?",
        ),
    ),
    "former_currency": (
        ("Before that, people paid with the {fact}.", "The former currency was the {fact}."),
        (
            "What was the former currency of {name}?",
            "What did people pay with in {name} before?",
            "Which money did {name} use before the present one?",
            "Which currency did {name} give up?",
        ),
    ),
    "language": (
        ("Most people speak {fact}.", "The main language is {fact}."),
        (
            "What is the main language of {name}?",
            "Which language do most people in {name} speak?",
            "What do most people speak in {name}?",
            "Which language is the most common in {name}?",
        ),
    ),
    "language_percent": (
        (
            "Of all inhabitants, {fact} percent know the main language.",
            "The main language is known by {fact} percent of the people.",
        ),
        (
            "How many percent of the people in {name} know the main language?",
            "What share of the inhabitants of {name} knows the main language?",
            "Which percentage of people know the main language of {name}?",
            "How many percent of the inhabitants know the main language in {name}?",
        ),
    ),
    "second_language": (
        ("The second language is {fact}.", "Next in number are the speakers of {fact}."),
        (
            "What is the second language of {name}?",
            "Which language comes second in {name}?",
            "Which language has the next most speakers in {name}?",
            "After the main language, what is spoken in {name}?",
        ),
    ),
    "zone_city": (
        ("Clocks follow the time of {fact}.", "The time zone is named after {fact}."),
        (
            "Which place gives its name to the time zone of {name}?",
            "Whose time do clocks in {name} follow?",
            "What is the time zone of {name} named after?",
            "Which time do clocks follow in {name}?",
        ),
    ),
    "alpha_3": (
        ("Its code of three letters is {fact}.", "In three letters the place is abbreviated {fact}."),
        (
            "What is the code of three letters of {name}?",
            "How is {name} abbreviated in three letters?",
            "Which three letters stand for {name}?",
            "What is the abbreviation of {name} in three letters?",
        ),
    ),
    "number": (
        ("Its code of three digits is {fact}.", "Statistics list the place under number {fact}."),
        (
            "What is the code of three digits of {name}?",
            "Under which number do statistics list {name}?",
            "Which number stands for {name}?",
            "Which three digits stand for {name}?",
        ),
    ),
    "german_name": (
        ("In German its name is {fact}.", "Germans call the place {fact}."),
        (
            "What is {name} called in German?",
            "What is the German name of {name}?",
            "How do Germans call {name}?",
            "What do Germans call {name}?",
        ),
    ),
}
SPLIT_TERRITORIES = {"validation": 25, "test": 25}  # the others are for training
ENGLISH, GERMAN = Locale.parse("en"), Locale.parse("de")


def territory_codes() -> dict[str, dict[str, str]]:
    """Territories of ISO 3166: the codes of two letters, and for each its `alpha_3` and its `number`."""
    codes: dict[str, dict[str, str]] = {}
    for alias, territories in get_global("territory_aliases").items():
        if len(alias) == 3 and len(territories) == 1:
            kind = "number" if alias.isdigit() else "alpha_3"
            codes.setdefault(territories[0], {})[kind] = alias
    return {code: found for code, found in sorted(codes.items()) if len(found) == 2 and code in ENGLISH.territories}


def territory_facts(code: str) -> dict[str, str]:
    """What CLDR says of a territory, by the keys of `PATTERNS`; what it doesn't say is absent."""
    facts: dict[str, str] = {}
    tender = [entry for entry in get_global("territory_currencies").get(code, []) if entry[3]]
    present = [entry for entry in tender if entry[2] is None]
    former = sorted((entry for entry in tender if entry[2] is not None), key=lambda entry: entry[2])
    if present:
        currency, since = present[0][:2]
        facts["currency"], facts["currency_code"] = ENGLISH.currencies[currency], currency
        if since:
            facts["currency_since"] = str(since[0])
    if former and present and former[-1][0] in ENGLISH.currencies and former[-1][0] != present[0][0]:
        facts["former_currency"] = ENGLISH.currencies[former[-1][0]]
    languages = [
        (details["population_percent"], language)
        for language, details in get_global("territory_languages").get(code, {}).items()
        if language in ENGLISH.languages and language != "und"
    ]
    languages.sort(key=lambda entry: (-entry[0], entry[1]))
    for (percent, language), key in zip(languages, ("language", "second_language"), strict=False):
        facts[key] = ENGLISH.languages[language]
        if key == "language":
            facts["language_percent"] = f"{percent:g}"
    zones = get_global("territory_zones").get(code, [])
    if len(zones) == 1:
        facts["zone_city"] = zones[0].split("/")[-1].replace("_", " ")
    facts |= territory_codes()[code]
    facts["german_name"] = GERMAN.territories[code]
    return {key: facts[key] for key in PATTERNS if key in facts}


def passage(code: str) -> tuple[str, dict[str, int]]:
    """A territory's text, and where in it each fact stands."""
    name, facts = ENGLISH.territories[code], territory_facts(code)
    rng = random.Random(zlib.crc32(code.encode()))
    keys = list(facts)
    rng.shuffle(keys)
    text, starts = f"This is about {name}.", {}
    for key in keys:
        before, after = rng.choice(PATTERNS[key][0]).split("{fact}")
        before, after = before.format(name=name), after.format(name=name)
        starts[key] = len(text) + 1 + len(before)
        text += f" {before}{facts[key]}{after}"
    return text, starts


def territory_rows(with_unanswerable: bool = False) -> dict[str, list[dict[str, Any]]]:
    """Rows of SQuAD's flat form by split.

    Args:
        with_unanswerable: also ask for what a passage doesn't tell.
    """
    codes = sorted(territory_codes(), key=lambda code: zlib.crc32(f"{code} split".encode()))
    splits: dict[str, list[str]] = {}
    for split, count in SPLIT_TERRITORIES.items():
        splits[split], codes = codes[:count], codes[count:]
    splits = {"train": codes, **splits}
    return {split: [row for code in sorted(of) for row in _questions(code, with_unanswerable)]
            for split, of in splits.items()}  # fmt: skip


def _questions(code: str, with_unanswerable: bool) -> list[dict[str, Any]]:
    name, facts = ENGLISH.territories[code], territory_facts(code)
    context, starts = passage(code)
    return [
        {
            "id": f"{code}-{key}-{number}",
            "context": context,
            "question": pattern.format(name=name),
            "answers": {
                "text": [facts[key]] if key in facts else [],
                "answer_start": [starts[key]] if key in facts else [],
            },
        }
        for key, (_, questions) in PATTERNS.items()
        for number, pattern in enumerate(questions)
        if key in facts or with_unanswerable
    ]
