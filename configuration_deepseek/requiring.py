"""How a config refuses: in one line."""

import difflib
from typing import Any


def require(condition: bool, message: str) -> None:
    """Raise ValueError with the message unless the condition holds."""
    if not condition:
        raise ValueError(f"DeepSeekConfig: {message}")


def require_word(where: str, word: Any, known: tuple[str, ...]) -> None:
    """Raise ValueError for a word that is not known, with the nearest that is."""
    if word not in known:
        nearest = difflib.get_close_matches(str(word), known, n=1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else "use one of " + ", ".join(map(repr, known))
        raise ValueError(f"DeepSeekConfig: {where} has the unknown word {word!r}; {hint}")
