"""Checks of pairs of texts before training.

A check counts rows of one split, as they will be used. A row that repeats an earlier one is counted, the earlier one
isn't, so removing the counted rows mends the split. Texts are compared without the space around them.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from datasets import Dataset

from .fault_report import Pair, Report, finding
from .languages import foreign_script
from .scripts import looks_mojibake


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
        source_lang: name of a language (see languages.py), which tells the script.
        target_lang: the same.
    """
    pairs_by_split: dict[str, list[Pair]] = {
        split: [(s.strip(), t.strip()) for s, t in zip(rows["source"], rows["target"], strict=True)]
        for split, rows in splits.items()
        if isinstance(rows, Dataset)
    }
    train = set(pairs_by_split.get("train", []))
    train_sources, train_targets = {source for source, _ in train}, {target for _, target in train}
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
            # As back-translation of a text brings them that the split was taken from.
            known = [pair for pair in pairs if pair not in train and pair[1] in train_targets]
            report[split]["targets_in_train"] = finding(known)
    return report


def count_long_rows(
    sources: Sequence[str], sides: tuple[Sequence[Sequence[int]], ...], limits: tuple[int, ...]
) -> dict[str, Any]:
    """Rows with a side of more tokens than its limit."""
    rows = zip(sources, *sides, strict=True)
    long = [s for s, *ids in rows if any(len(side) > limit for side, limit in zip(ids, limits, strict=True))]
    return {"long_rows": finding(long)}


def count_empty_sides(count: int) -> dict[str, Any]:
    return {"empty_sides": {"count": count, "examples": []}}
