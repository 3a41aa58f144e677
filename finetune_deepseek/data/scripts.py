"""Text that was decoded in a wrong encoding."""

import re

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
