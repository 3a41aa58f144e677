"""What a language is, by whatever name data have for it: its code, script and letters, and how its words are told.

A name is a code of two or three letters, with or without script and region (zh, zh-CN, zho_Hans, cmn, pt_BR), or the
English word (Chinese). Codes and likely scripts are those of the Unicode CLDR, as babel has them.
"""

import re
from functools import lru_cache
from typing import NamedTuple

from babel import Locale
from babel.core import get_global

HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
# Letters by script (ISO 15924), of scripts that aren't Latin. A text in another script is a fault there and in
# languages with Latin letters, but Latin letters (names, units) aren't one anywhere.
LETTERS = {
    **dict.fromkeys(("Hani", "Hans", "Hant"), HAN),
    "Jpan": HAN + "\u3040-\u30ff",
    **dict.fromkeys(("Kore", "Hang"), HAN + "\u1100-\u11ff\u3130-\u318f\uac00-\ud7af"),
    "Cyrl": "\u0400-\u052f",
    "Arab": "\u0600-\u06ff\u0750-\u077f\ufb50-\ufdff\ufe70-\ufeff",
    "Deva": "\u0900-\u097f",
    "Grek": "\u0370-\u03ff",
    "Hebr": "\u0590-\u05ff",
    "Thai": "\u0e00-\u0e7f",
}
# Written in two scripts: only a named one says which letters are right.
AMBIGUOUS = frozenset({"sr", "bs", "uz", "az", "tg", "tk", "ky", "tt", "mn", "ku", "pa", "sd", "ks"})
# sacrebleu's tokenizer where words aren't told apart by spaces, or are by an extra package (MeCab for Japanese and
# Korean): by character, so that a score doesn't depend on what is installed.
TOKENIZERS = {
    **dict.fromkeys(("Hani", "Hans", "Hant"), "zh"),
    **dict.fromkeys(("Jpan", "Kore", "Hang", "Thai", "Laoo", "Khmr", "Mymr"), "char"),
}
WITH_SPACES = ("Kore", "Hang")


class Language(NamedTuple):
    """A language by its shortest code (ISO 639), the script that its name gives (ISO 15924), and the likely one."""

    code: str
    given_script: str | None
    script: str | None


@lru_cache
def english_names() -> dict[str, str]:
    return {name.lower(): code for code, name in Locale("en").languages.items() if "_" not in code}


@lru_cache
def language(name: str) -> Language | None:
    """The language of a name; None if it is the name of none."""
    first, *rest = re.split("[-_]", name.strip())
    code = first.lower()
    code = english_names().get(name.strip().lower()) or get_global("language_aliases").get(code, code)
    if code not in Locale("en").languages:
        return None
    given = next((part.title() for part in rest if part.title() in Locale("en").scripts), None)
    subtags = get_global("likely_subtags")  # zh: zh_Hans_CN, zh_TW: zh_Hant_TW
    likely = next(
        (subtags[key] for part in (*rest, "") if (key := f"{code}_{part.upper()}".strip("_")) in subtags), ""
    )
    return Language(code, given, given or next((part for part in likely.split("_") if len(part) == 4), None))


def code(name: str) -> str:
    """The shortest code of a language (zho_Hans: zh), or the name itself where it is of none."""
    known = language(name)
    return known.code if known else name


def hub_codes(names: list[str]) -> list[str] | None:
    """The languages as the Hub's cards name them, each once; None if none of the names is one of a language."""
    return list(dict.fromkeys(known.code for name in names if (known := language(name)))) or None


def letters(name: str) -> str:
    """The letters of a language as a class of a regular expression; empty where they are Latin, or may be."""
    known = language(name)
    if known is None or (known.code in AMBIGUOUS and not known.given_script):
        return ""
    return LETTERS.get(known.script or "", "")


def foreign_script(own: str, other: str) -> re.Pattern[str] | None:
    """Letters of language `other` that language `own` isn't written in; None if there are none that tell."""
    own_letters, others = letters(own), letters(other)
    if not others or others == own_letters:
        return None
    return re.compile(f"(?=[{others}])[^{own_letters}]" if own_letters else f"[{others}]")


def bleu_tokenizer(name: str) -> str:
    """sacrebleu's tokenizer for a language; 13a for all that have spaces between words."""
    known = language(name)
    return TOKENIZERS.get(known.script or "", "13a") if known else "13a"


def has_spaces(name: str) -> bool:
    """Whether a language has spaces between words."""
    known = language(name)
    return known is None or known.script in WITH_SPACES or known.script not in TOKENIZERS
