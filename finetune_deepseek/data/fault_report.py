"""Faults found in data: what is counted, and the report as text, Markdown and JSON."""

from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias

Pair: TypeAlias = tuple[str, str]

# {split: {"rows": number, check: {"count": rows, "examples": [text]}}}
Report: TypeAlias = dict[str, dict[str, Any]]

# What is said of a fault, by its name, in the order of reports; a task with faults of its own has its own such words.
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
    "pairs_in_train": "pair is in the training split",
    "sources_in_train": "source is in the training split, another target",
    "targets_in_train": "target is in the training split, another source",
}

EXAMPLES_KEPT = 3

EXAMPLE_CHARACTERS = 60  # per side


def clip(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= EXAMPLE_CHARACTERS else line[: EXAMPLE_CHARACTERS - 1] + "…"


def finding(texts: Iterable[str | Pair]) -> dict[str, Any]:
    """The count of some rows' texts, and the first of them as examples."""
    found = list(texts)
    examples = [[text] if isinstance(text, str) else text for text in found[:EXAMPLES_KEPT]]
    return {"count": len(found), "examples": [" => ".join(map(clip, sides)) for sides in examples]}


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


def faults(report: Report, names: dict[str, str]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Split, check and finding, for every check that counted something."""
    for split, checks in report.items():
        yield from ((split, name, checks[name]) for name in names if name in checks and checks[name]["count"])


def fault_list(report: Report, names: dict[str, str] = CHECKS) -> str:
    """The faults in one line; empty if there are none."""
    return "; ".join(f"{split}: {names[name]} ({found['count']:,})" for split, name, found in faults(report, names))


def report_text(report: Report, names: dict[str, str] = CHECKS) -> str:
    """The faults as lines, each with an example."""
    sizes = ", ".join(f"{split} {checks['rows']:,} rows" for split, checks in report.items())
    lines = [f"data checks, {sizes}: {'rows by fault' if any(faults(report, names)) else 'nothing found'}"]
    for split, name, found in faults(report, names):
        example = f"   such as  {found['examples'][0]}" if found["examples"] else ""
        lines.append(f"  {split:<12}{found['count']:>8,}  {names[name]}{example}")
    return "\n".join(lines)


def report_markdown(report: Report, names: dict[str, str] = CHECKS) -> str:
    """The faults as a table for the card, one column per split; empty without a report."""
    if not report:
        return ""
    if not any(faults(report, names)):
        done = {name for checks in report.values() for name in checks}
        return f"Checked, and nothing found: {'; '.join(names[name] for name in names if name in done)}."
    present = {name for _, name, _ in faults(report, names)}
    rows = [["rows by fault", *report], ["---"] * (len(report) + 1)]
    for name in (name for name in names if name in present):
        counts = [f"{checks[name]['count']:,}" if name in checks else "-" for checks in report.values()]
        rows.append([names[name], *counts])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
