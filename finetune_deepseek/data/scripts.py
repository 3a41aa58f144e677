"""Letters of languages by script, and text that was decoded in a wrong encoding."""

import re

# Letters of the languages that Latin letters don't write. A text in another script is a fault there and in languages
# with Latin letters, but Latin letters (names, units) aren't one anywhere.
HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
CYRILLIC, ARABIC, DEVANAGARI = "\u0400-\u052f", "\u0600-\u06ff\u0750-\u077f\ufb50-\ufdff\ufe70-\ufeff", "\u0900-\u097f"
SCRIPTS = {
    "zh": HAN,
    "ja": HAN + "\u3040-\u30ff",
    "ko": HAN + "\u1100-\u11ff\u3130-\u318f\uac00-\ud7af",
    **dict.fromkeys(("ru", "uk", "be", "bg", "mk", "kk"), CYRILLIC),
    **dict.fromkeys(("ar", "fa", "ur"), ARABIC),
    **dict.fromkeys(("hi", "mr", "ne"), DEVANAGARI),
    "el": "\u0370-\u03ff",
    "he": "\u0590-\u05ff",
    "th": "\u0e00-\u0e7f",
}

# What the bytes 0x80-0xBF look like in Latin-1 and in Windows-1252.
_CONTINUATION = "[\u0080-\u00bf€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ]"
MOJIBAKE = re.compile(
    # UTF-8 read as one of those: two bytes of Latin, Greek and Cyrillic letters,
    f"[ÂÃÄÅÎÏÐÑ]{_CONTINUATION}"
    # three bytes of punctuation, and of two East Asian characters in a row (one alone may be French: "été…”"),
    f"|â[\u0080€]{_CONTINUATION}|(?:[ã-ï]{_CONTINUATION}{{2}}){{2}}"
    # four bytes of an emoji.
    f"|ð[Ÿ\u009f]{_CONTINUATION}{{2}}"
    # GBK or another encoding of two bytes read as Latin-1; C1 control characters; U+FFFD in UTF-8 read as GBK.
    "|[À-ÖØ-öø-ÿ]{4}|[\u0080-\u0084\u0086-\u009f]|锟斤拷"
)


def looks_mojibake(text: str) -> bool:
    return not text.isascii() and MOJIBAKE.search(text) is not None


def foreign_script(own: str, other: str) -> re.Pattern[str] | None:
    """Letters of language `other` that language `own` isn't written in; None if there are none that tell."""
    own_letters, letters = (SCRIPTS.get(re.split("[-_]", language)[0].lower(), "") for language in (own, other))
    if not letters or letters == own_letters:
        return None
    return re.compile(f"(?=[{letters}])[^{own_letters}]" if own_letters else f"[{letters}]")
