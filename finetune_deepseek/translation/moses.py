"""Text as the Moses scripts prepare it: lower-cased, punctuation normalised, tokenised.

Published results of small translation models are often on such text: Multi30k's `lc.norm.tok` files are, line by line,
`lowercase | normalize-punctuation.perl -l LANG | tokenizer.perl -l LANG`, without -a (hyphenated words stay whole) and
with special characters escaped (`&quot;`).
"""

from collections.abc import Callable
from functools import lru_cache
from importlib.metadata import version

from ..data.languages import code, has_spaces


@lru_cache
def moses_lower(language: str) -> Callable[[str], str]:
    """What prepares a text of a language. Applied to its own output it changes it: `&` is escaped again.

    Raises:
        ValueError: if sacremoses isn't there, or the language is written without spaces.
    """
    try:
        from sacremoses import MosesPunctNormalizer, MosesTokenizer
    except ImportError as error:
        raise ValueError("Moses tokenization needs sacremoses: pip install 'deepseek-hf[moses]'.") from error
    if not has_spaces(language):
        raise ValueError(f"Moses tokenization is for languages with spaces between words, not {language!r}.")
    normalizer, tokenizer = MosesPunctNormalizer(lang=code(language)), MosesTokenizer(lang=code(language))
    return lambda text: tokenizer.tokenize(normalizer.normalize(text.lower()), return_str=True)


def signature(language: str) -> str:
    return f"lowercase, normalize-punctuation, tokenizer -l {code(language)} by sacremoses {version('sacremoses')}"
