"""Augmentation of training texts: changed copies of a row's source, with its target as it is.

The four operations are those of Wei and Zou's "EDA" (2019): synonyms, random insertion, deletion and swap. Each is
done to a word with its own probability: a known word becomes a synonym; a word of the text (as a synonym, if known)
follows; the word is left out; it changes places with another. In languages without spaces, a character is a word.
Rows from text of the target language alone are made by translation/back_translation.py.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..data.files import json_of, read_text
from ..data.languages import has_spaces

OPERATIONS = ("synonym", "insert", "delete", "swap")


@dataclass
class AugmentationArguments:
    """How to change copies of the training rows."""

    augment: list[str] | None = field(
        default=None,
        metadata={"help": "Share of words to change: synonym=0.1 insert=0.1 delete=0.1 swap=0.1", "metavar": "RATE"},
    )
    augment_copies: int = field(default=1, metadata={"help": "Changed copies of a row, with --augment."})
    synonyms_file: str | None = field(default=None, metadata={"help": ".tsv (word, synonyms) or .json."})
    back_translation_file: str | None = field(
        default=None, metadata={"help": "Text in the target language, a line each, to make more training rows from."}
    )
    back_translation_model: str | None = field(
        default=None, metadata={"help": "Folder of a model of yours that translates it to --source_lang."}
    )
    back_translation_lang: str | None = field(
        default=None, metadata={"help": "Language of the text, where it could be several."}
    )
    back_translation_beams: int = field(default=1, metadata={"help": "Width of that model's beam search."})

    def __post_init__(self) -> None:
        rates = self.augmentation_rates
        if rates["synonym"] and not self.synonyms_file:
            raise ValueError("--augment synonym needs --synonyms_file.")
        if self.synonyms_file and not (rates["synonym"] or rates["insert"]):
            raise ValueError("--synonyms_file has no effect without --augment synonym=... or insert=...; add one.")

        if bool(self.back_translation_file) != bool(self.back_translation_model):
            raise ValueError("--back_translation_file and --back_translation_model need each other; give both.")

    @property
    def augmentation_rates(self) -> dict[str, float]:
        """A probability for each of `OPERATIONS`.

        Raises:
            ValueError: for an unknown operation, and for a rate that isn't above 0 and below 1.
        """
        rates = dict.fromkeys(OPERATIONS, 0.0)
        for word in filter(None, ",".join(self.augment or []).split(",")):
            operation, _, rate = word.partition("=")
            if operation not in OPERATIONS:
                raise ValueError(f"--augment {word}: write operation=rate; operations are {', '.join(OPERATIONS)}.")
            if not re.fullmatch(r"0?\.\d*[1-9]\d*", rate):
                raise ValueError(f"--augment {word}: the rate must be above 0 and below 1, such as {operation}=0.1.")
            rates[operation] = float(rate)
        return rates


def read_synonyms(path: str) -> dict[str, list[str]]:
    """Read a dictionary of synonyms.

    Raises:
        ValueError: if the file can't be read, has another ending, or holds something else (with the line or word).
    """
    content = read_text(path, f"--synonyms_file {path}")
    synonyms: dict[str, list[str]] = {}
    if path.endswith(".tsv"):
        for number, line in enumerate(content.split("\n"), start=1):
            word, *others = [cell.strip() for cell in line.split("\t")]
            if line.strip() and not (word and others and all(others)):
                raise ValueError(f"--synonyms_file {path}, line {number}: expected a word, a tab and its synonyms.")
            if word:
                synonyms.setdefault(word, []).extend(others)
    elif path.endswith(".json"):
        synonyms = json_of(content, f"--synonyms_file {path}")
        if not isinstance(synonyms, dict):
            raise ValueError(f"--synonyms_file {path}: expected {{word: [synonyms]}}.")
        for word, others in synonyms.items():
            if not word or not isinstance(others, list) or not others or not all(isinstance(o, str) for o in others):
                raise ValueError(
                    f"--synonyms_file {path}: expected a list of synonyms for {word!r}, found {others!r}."
                )
    else:
        raise ValueError(f"--synonyms_file {path}: unknown ending; use .tsv or .json.")
    if not synonyms:
        raise ValueError(f"--synonyms_file {path}: no words.")
    return synonyms


class Words:
    """Splits texts of a language into words and looks up their synonyms.

    Without spaces between words, the dictionary's words and runs of Latin letters and digits are kept whole, and every
    other character is a word.
    """

    def __init__(self, language: str, synonyms: dict[str, list[str]]) -> None:
        self.synonyms = synonyms
        self.has_spaces = has_spaces(language)
        known = "".join(f"{re.escape(word)}|" for word in sorted(synonyms, key=len, reverse=True))
        self.pattern = re.compile(r"\S+" if self.has_spaces else rf"{known}[A-Za-z0-9]+|.", re.DOTALL)

    def split(self, text: str) -> list[str]:
        return self.pattern.findall(text)

    def join(self, words: Sequence[str]) -> str:
        return (" " if self.has_spaces else "").join(words)

    def synonym(self, word: str, rng: random.Random) -> str:
        """A synonym with the word's punctuation and first capital; the word itself if none is known."""
        match = re.fullmatch(r"(\W*)(.*?)(\W*)", word, re.DOTALL)
        assert match is not None  # the three parts together fit everything
        before, core, after = match.groups()
        if core in self.synonyms:
            return before + rng.choice(self.synonyms[core]) + after
        if core.lower() in self.synonyms:
            other = rng.choice(self.synonyms[core.lower()])
            return before + other[:1].upper() + other[1:] + after
        return word


def augment(text: str, words: Words, rates: dict[str, float], rng: random.Random) -> str:
    """A changed copy of a text, never without words; `rates` has a probability for each of `OPERATIONS`."""
    found = words.split(text)
    result = []
    for word in found:
        result.append(words.synonym(word, rng) if rng.random() < rates["synonym"] else word)
        if rng.random() < rates["insert"]:
            result.append(words.synonym(rng.choice(found), rng))
    kept = [word for word in result if rng.random() >= rates["delete"]] or result[:1]
    for place in range(len(kept)):
        if rng.random() < rates["swap"]:
            other = rng.randrange(len(kept))
            kept[place], kept[other] = kept[other], kept[place]
    return words.join(kept)


class Augmenter:
    """Makes the changed copies that the arguments ask for: the same ones for the same text and seed, in any order."""

    def __init__(self, arguments: AugmentationArguments, language: str, seed: int) -> None:
        synonyms = read_synonyms(arguments.synonyms_file) if arguments.synonyms_file else {}
        self.words = Words(language, synonyms)
        self.copies, self.rates, self.seed = arguments.augment_copies, arguments.augmentation_rates, seed

    def __call__(self, text: str) -> list[str]:
        """The copies of a text; one that came out unchanged, or like another, is left out."""
        text = self.words.join(self.words.split(text))
        drawn = (
            augment(text, self.words, self.rates, random.Random(f"{self.seed} {copy} {text}"))
            for copy in range(self.copies)
        )
        return [copy for copy in dict.fromkeys(drawn) if copy != text]

    def __str__(self) -> str:
        rates = ", ".join(f"{operation} {rate:g}" for operation, rate in self.rates.items() if rate)
        return f"up to {self.copies} changed copies of each source ({rates})"
