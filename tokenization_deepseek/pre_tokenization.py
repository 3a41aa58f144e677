"""How each generation cuts a text before BPE merges inside the pieces: an ordered list of regular expressions.

"llm"    LLM, MoE-16B, V2: newlines; cased letters; punctuation; runs of CJK and Hangul; single digits
         (DeepSeek LLM paper, section 2.1: categories don't merge, numbers are split into digits).
"coder"  Coder: newlines; letters of any script; punctuation; runs of CJK and Hangul; single digits.
"v3"     V3, R1, V3.1, V3.2, V4: digits in groups of one to three; runs of Han and kana; then words, punctuation
         (which may take the word behind it or the newlines after it) and blanks.

Every regular expression isolates what it matches and leaves the rest to the next one, so nothing is ever lost.
"""

from tokenizers import Regex, pre_tokenizers

# Letters with upper and lower case, as the released files of LLM and V2 list them.
_CASED = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώ"
    "ᾀ-ᾴᾶ-ᾼ\u1fbeῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗ"
    "Ａ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
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
}


def pre_tokenizer(generation: str) -> pre_tokenizers.PreTokenizer:
    """The cuts of one generation, followed by the byte alphabet. Raises ValueError for an unknown word."""
    if generation not in PATTERNS:
        raise ValueError(f"generation {generation!r} has no pre-tokenizer; choose one of {', '.join(PATTERNS)}")
    splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in PATTERNS[generation]]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
