"""The answer at the end of a reply, as gsm8k's `#### 18`: found by a pattern, compared as a number, and counted."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

Z = 1.96  # standard deviations of a 95% interval
BESIDE_NUMBERS = re.compile(r"[\s,$€£¥%]|\.$")  # thousands separators, currencies, the end of a sentence


def answer_of(text: str, pattern: str) -> str | None:
    """What the group of the pattern found last; None if it found nothing."""
    found = [match.group(1) for match in re.finditer(pattern, text)]
    return (found[-1] or "").strip() or None if found else None


def value_of(answer: str) -> Decimal | str:
    """The number that an answer is, without what may stand beside one; else its text."""
    try:
        number = Decimal(BESIDE_NUMBERS.sub("", answer))
    except InvalidOperation:
        return answer.strip()
    return number if number.is_finite() else answer.strip()


def same_answer(reply: str, reference: str, pattern: str) -> bool:
    """Whether both have an answer, and it is the same number or text."""
    found, expected = answer_of(reply, pattern), answer_of(reference, pattern)
    return found is not None and expected is not None and value_of(found) == value_of(expected)


def wilson(hits: int, count: int) -> tuple[float, float]:
    """The 95% interval of a share (Wilson 1927), which is sound for few hits, too."""
    share = hits / count
    middle = share + Z * Z / (2 * count)
    spread = Z * math.sqrt(share * (1 - share) / count + Z * Z / (4 * count * count))
    return tuple((middle + sign * spread) / (1 + Z * Z / count) for sign in (-1, 1))  # type: ignore[return-value]


def answer_scores(replies: Sequence[str], references: Sequence[str], pattern: str) -> dict[str, Any]:
    """The share of replies with the reference's answer, its interval, and how many have an answer at all.

    References without an answer don't count; nothing where none has one.
    """
    pairs = [pair for pair in zip(replies, references, strict=True) if answer_of(pair[1], pattern) is not None]
    if not pairs:
        return {}
    hits = sum(same_answer(reply, reference, pattern) for reply, reference in pairs)
    low, high = wilson(hits, len(pairs))
    return {
        "answer_accuracy": hits / len(pairs),
        "answer_accuracy_low": low,
        "answer_accuracy_high": high,
        "answers_expected": len(pairs),
        "answers_found": sum(answer_of(reply, pattern) is not None for reply, _ in pairs),
    }


def most_frequent(references: Sequence[str], pattern: str) -> str | None:
    """A reference with the answer that most have; None if none has one. The first of equals."""
    found = {text: answer for text in references if (answer := answer_of(text, pattern)) is not None}
    if not found:
        return None
    counts = Counter(value_of(answer_of(text, pattern) or "") for text in references if text in found)
    best = max(counts, key=counts.__getitem__)
    return next(text for text, answer in found.items() if value_of(answer) == best)
