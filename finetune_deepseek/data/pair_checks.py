"""Checks of pairs of texts before training: what is counted, and the report as text, Markdown and JSON.

A check counts rows of one split, as they will be used. A row that repeats an earlier one is counted, the earlier one
isn't, so removing the counted rows mends the split. Texts are compared without the space around them.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeAlias

from datasets import Dataset

# {split: {"rows": number, check: {"count": rows, "examples": [text]}}}
Report: TypeAlias = dict[str, dict[str, Any]]
Pair: TypeAlias = tuple[str, str]

CHECKS = {
    "empty_sides": "no text on one side (left out)",
    "duplicate_pairs": "same pair as an earlier row",
    "duplicate_sources": "same source as an earlier row, another target",
    "reversed_pairs": "pair of an earlier row with its sides swapped",
    "swapped_scripts": "a side in the other side's script",
    "copied_sources": "target equal to its source",
    "replacement_characters": "U+FFFD in place of undecodable bytes",
    "mojibake": "probably decoded in a wrong encoding",
    "long_rows": "more tokens than the length limits",
    "empty_texts": "empty passage or question (left out)",
    "missing_ids": "no id (numbered)",
    "duplicate_ids": "id of an earlier question (numbered)",
    "duplicate_questions": "same question to the same passage as an earlier row",
    "repaired_answers": "answer_start is wrong, the answer was found elsewhere in the passage",
    "lost_answers": "no answer is in the passage (left out of training, scored by its text)",
    "partly_lost_answers": "one of several answers isn't in the passage (scored by its text)",
    "no_answers": "no answer (left out; --version_2_with_negative keeps them)",
    "split_tokens": "the answer begins or ends within a token",
    "passages_in_train": "passage is in the training split",
    "pairs_in_train": "pair is in the training split",
    "sources_in_train": "source is in the training split, another target",
}
EXAMPLES_KEPT = 3
EXAMPLE_CHARACTERS = 60  # per side

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


def clip(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= EXAMPLE_CHARACTERS else line[: EXAMPLE_CHARACTERS - 1] + "…"


def finding(texts: Iterable[str | Pair]) -> dict[str, Any]:
    """The count of some rows' texts, and the first of them as examples."""
    found = list(texts)
    examples = [[text] if isinstance(text, str) else text for text in found[:EXAMPLES_KEPT]]
    return {"count": len(found), "examples": [" => ".join(map(clip, sides)) for sides in examples]}


def repeated(pairs: Sequence[Pair]) -> tuple[list[Pair], list[Pair], list[Pair]]:
    """Rows with the pair, with the source alone, and with the swapped pair of an earlier row."""
    same_pair, same_source, is_reversed = [], [], []
    seen: set[Pair] = set()
    sources: set[str] = set()
    for source, target in pairs:
        if (source, target) in seen:
            same_pair.append((source, target))
        elif source in sources:
            same_source.append((source, target))
        if source != target and (target, source) in seen:
            is_reversed.append((source, target))
        seen.add((source, target))
        sources.add(source)
    return same_pair, same_source, is_reversed


def foreign_script(own: str, other: str) -> re.Pattern[str] | None:
    """Letters of language `other` that language `own` isn't written in; None if there are none that tell."""
    own_letters, letters = (SCRIPTS.get(re.split("[-_]", language)[0].lower(), "") for language in (own, other))
    if not letters or letters == own_letters:
        return None
    return re.compile(f"(?=[{letters}])[^{own_letters}]" if own_letters else f"[{letters}]")


def in_other_script(pairs: Iterable[Pair], source_lang: str, target_lang: str) -> Iterator[Pair]:
    """Rows with a side most of whose letters belong to the other side's language."""
    patterns = foreign_script(source_lang, target_lang), foreign_script(target_lang, source_lang)
    for pair in pairs:
        for text, pattern in zip(pair, patterns, strict=True):
            if pattern and pattern.search(text) and 2 * len(pattern.findall(text)) > sum(map(str.isalpha, text)):
                yield pair
                break


def check_pairs(splits: dict[str, Any], source_lang: str, target_lang: str) -> Report:
    """Count the faults that can be seen in the texts alone.

    Args:
        splits: rows with `source` and `target`. A stream isn't checked, and neither is an overlap with it.
        source_lang: language code, such as en or zh-CN; the part before the hyphen tells the script.
        target_lang: the same.
    """
    pairs_by_split: dict[str, list[Pair]] = {
        split: [(s.strip(), t.strip()) for s, t in zip(rows["source"], rows["target"], strict=True)]
        for split, rows in splits.items()
        if isinstance(rows, Dataset)
    }
    train = set(pairs_by_split.get("train", []))
    train_sources = {source for source, _ in train}
    report: Report = {}
    for split, pairs in pairs_by_split.items():
        same_pair, same_source, is_reversed = repeated(pairs)
        report[split] = {
            "rows": len(pairs),
            "duplicate_pairs": finding(same_pair),
            "duplicate_sources": finding(same_source),
            "reversed_pairs": finding(is_reversed),
            "swapped_scripts": finding(in_other_script(pairs, source_lang, target_lang)),
            "copied_sources": finding(pair for pair in pairs if pair[0] == pair[1]),
            "replacement_characters": finding(pair for pair in pairs if any("\ufffd" in text for text in pair)),
            "mojibake": finding(pair for pair in pairs if any(map(looks_mojibake, pair))),
        }
        if train and split != "train":
            elsewhere = [pair for pair in pairs if pair not in train and pair[0] in train_sources]
            report[split]["pairs_in_train"] = finding(pair for pair in pairs if pair in train)
            report[split]["sources_in_train"] = finding(elsewhere)
    return report


def merged(reports: Iterable[Report]) -> Report:
    """The sum of several reports, such as those of several language pairs; examples are those that come first."""
    total: Report = {}
    for report in reports:
        for split, checks in report.items():
            if split not in total:
                total[split] = checks
                continue
            for name, found in checks.items():
                if name == "rows":
                    total[split]["rows"] += found
                    continue
                known = total[split].setdefault(name, finding([]))
                known["count"] += found["count"]
                known["examples"] = (known["examples"] + found["examples"])[:EXAMPLES_KEPT]
    return total


def count_long_rows(
    sources: Sequence[str], sides: tuple[Sequence[Sequence[int]], ...], limits: tuple[int, ...]
) -> dict[str, Any]:
    """Rows with a side of more tokens than its limit."""
    rows = zip(sources, *sides, strict=True)
    long = [s for s, *ids in rows if any(len(side) > limit for side, limit in zip(ids, limits, strict=True))]
    return {"long_rows": finding(long)}


def count_empty_sides(count: int) -> dict[str, Any]:
    return {"empty_sides": {"count": count, "examples": []}}


def faults(report: Report) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Split, check and finding, for every check that counted something."""
    for split, checks in report.items():
        yield from ((split, name, checks[name]) for name in CHECKS if name in checks and checks[name]["count"])


def fault_list(report: Report) -> str:
    """The faults in one line; empty if there are none."""
    return "; ".join(f"{split}: {CHECKS[name]} ({found['count']:,})" for split, name, found in faults(report))


def report_text(report: Report) -> str:
    """The faults as lines, each with an example."""
    sizes = ", ".join(f"{split} {checks['rows']:,} rows" for split, checks in report.items())
    lines = [f"data checks, {sizes}: {'rows by fault' if any(faults(report)) else 'nothing found'}"]
    for split, name, found in faults(report):
        example = f"   such as  {found['examples'][0]}" if found["examples"] else ""
        lines.append(f"  {split:<12}{found['count']:>8,}  {CHECKS[name]}{example}")
    return "\n".join(lines)


def report_markdown(report: Report) -> str:
    """The faults as a table for the card, one column per split; empty without a report."""
    if not report:
        return ""
    if not any(faults(report)):
        names = {name for checks in report.values() for name in checks}
        return f"Checked, and nothing found: {'; '.join(CHECKS[name] for name in CHECKS if name in names)}."
    present = {name for _, name, _ in faults(report)}
    rows = [["rows by fault", *report], ["---"] * (len(report) + 1)]
    for name in (name for name in CHECKS if name in present):
        counts = [f"{checks[name]['count']:,}" if name in checks else "-" for checks in report.values()]
        rows.append([CHECKS[name], *counts])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
