"""How each generation cuts a text before BPE merges inside the pieces: an ordered list of regular expressions.

"llm"    LLM, MoE-16B, V2: newlines; cased letters; punctuation; runs of CJK and Hangul; single digits
         (DeepSeek LLM paper, section 2.1: categories don't merge, numbers are split into digits). Its punctuation
         spans `:` to `~`, ASCII letters included, as released: they are cut from other letters (Stra|ß|e).
"coder"  Coder: newlines; letters of any script; punctuation; runs of CJK and Hangul; single digits.
"v3"     V3, R1, V3.1, V3.2, V4: digits in groups of one to three; runs of Han and kana; then words, punctuation
         (which may take the word behind it or the newlines after it) and blanks.
"characters"  every character by itself, for models of letters; no release cuts so.

Every regular expression isolates what it matches and leaves the rest to the next one, so nothing is ever lost.
"""

from tokenizers import Regex, pre_tokenizers

# Letters with upper and lower case as the released files of LLM and V2 list them, with their gaps (small Armenian and
# Georgian letters, say). As code points, since editors turn some of these letters into their normal form.
_CASED_SPANS = """
41-5a 61-7a b5 c0-d6 d8-f6 f8-1ba 1bc-1bf 1c4-293 295-2af 370-373 376 377 37b-37d 37f 386 388-38a 38c 38e-3a1
3a3-3f5 3f7-481 48a-52f 531-556 10a0-10c5 13a0-13f5 13f8-13fd 1c90-1cba 1cbd-1cbf 1d00-1d2b 1d6b-1d77 1d79-1d9a
1e00-1f15 1f18-1f1d 1f20-1f45 1f48-1f4d 1f50-1f57 1f59 1f5b 1f5d 1f5f-1f7d 1f80-1fb4 1fb6-1fbc 1fbe 1fc2-1fc4
1fc6-1fcc 1fd0-1fd3 1fd6-1fdb 1fe0-1fec 1ff2-1ff4 1ff6-1ffc 2102 2107 210a-2113 2115 2119-211d 2124 2126 2128
212a-212d 212f-2134 2139 213c-213f 2145-2149 214e 2183 2184 2c00-2c7b 2c7e-2ce4 2ceb-2cee 2cf2 2cf3 a640-a66d
a680-a69b a722-a76f a771-a787 a78b-a78e ab70-abbf fb00-fb06 fb13-fb17 ff21-ff3a ff41-ff5a 10400-1044f
104b0-104d3 104d8-104fb 10c80-10cb2 10cc0-10cf2 118a0-118df 1e900-1e943
"""
_CASED = "".join("-".join(chr(int(code, 16)) for code in span.split("-")) for span in _CASED_SPANS.split())
_CJK = "[一-龥ࠀ-一가-퟿]+"

PATTERNS: dict[str, tuple[str, ...]] = {
    "llm": ("[\r\n]", rf"\s?[{_CASED}]+", r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", _CJK, r"\p{N}"),
    "coder": ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, r"\p{N}"),
    "v3": (
        r"\p{N}{1,3}",
        "[一-龥぀-ゟ゠-ヿ]+",
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
        "|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
        "| ?[\\p{P}\\p{S}]+[\r\n]*"
        r"|\s*[" + "\r\n" + r"]+|\s+(?!\S)|\s+",
    ),
    "characters": (r"[\s\S]",),
}


def pre_tokenizer(generation: str) -> pre_tokenizers.PreTokenizer:
    """The cuts of one generation, followed by the byte alphabet. Raises ValueError for an unknown word."""
    if generation not in PATTERNS:
        raise ValueError(f"generation {generation!r} has no pre-tokenizer; choose one of {', '.join(PATTERNS)}")
    splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in PATTERNS[generation]]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
