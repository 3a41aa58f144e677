"""MIND's news.tsv and behaviors.tsv as they are published (Wu et al., "MIND: A Large-scale Dataset for News
Recommendation", ACL 2020; tab-separated, without a header line):

    news.tsv        news id, category, subcategory, title, abstract, url, title entities, abstract entities
    behaviors.tsv   impression id, user id, time, clicked news before (may be empty), shown news as N123-1 N456-0,
                    without labels in the test split
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...data.table import read_columns
from ...training.scoring.ranks import best_first
from ..arguments import TEXT_FIELDS

NEWS_FILE, BEHAVIORS_FILE = "news.tsv", "behaviors.tsv"
NEWS_COLUMNS = ("id", "category", "subcategory", "title", "abstract", "url", "title_entities", "abstract_entities")
BEHAVIORS_COLUMNS = ("impression", "user", "time", "history", "shown")
LEAST_COLUMNS = 5


def _rows(folder: str, name: str, columns: Sequence[str]) -> list[dict[str, str]]:
    """Cells by column of a file's rows.

    Raises:
        ValueError: if it can't be read, is empty, or a row has fewer columns.
    """
    path = str(Path(folder) / name)
    found = read_columns(path, names=columns, least=LEAST_COLUMNS)
    cells = ([(cell or "").strip() for cell in found[column]] for column in columns)
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*cells, strict=True)]
    if not rows:
        raise ValueError(f"{path}: no rows.")
    return rows


def read_news(folder: str, fields: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Texts by news id, and a line for each kind of gap.

    A text is the fields that aren't missing with ". " between; if all are, the first of `TEXT_FIELDS` that isn't.

    Raises:
        ValueError: for a file that can't be read, or a line of another form.
    """
    texts: dict[str, str] = {}
    gaps, bare, repeated = dict.fromkeys(fields, 0), 0, 0
    rows = _rows(folder, NEWS_FILE, NEWS_COLUMNS)
    for news in rows:
        for field in fields:
            gaps[field] += not news[field]
        parts = [news[field] for field in fields if news[field]]
        if not parts:
            parts = [news[field] for field in TEXT_FIELDS if news[field]][:1]
            bare += not parts
        repeated += news["id"] in texts
        texts.setdefault(news["id"], ". ".join(parts))
    where = f"{Path(folder).name}/{NEWS_FILE}"
    notes = [f"{where}: {count:,} of {len(rows):,} news without {field}" for field, count in gaps.items() if count]
    if bare:
        notes.append(f"{where}: {bare:,} news without any text; all of them get one vector")
    if repeated:
        notes.append(f"{where}: {repeated:,} lines with the id of a line before were left out")
    return texts, notes


def read_behaviors(folder: str, known: dict[str, str]) -> tuple[list[dict[str, Any]], list[str]]:
    """Impressions as `impression`, `user`, `source` (the history), `candidates`, `clicked` (0 or 1 each), and
    `target` (what was clicked); and a line for each kind of gap.

    News that are not among the `known` are left out of histories; among candidates they stay. MIND's test split keeps
    its labels for itself: `clicked` is then empty in all rows.

    Raises:
        ValueError: for a file that can't be read, or a line of another form.
    """
    rows: list[dict[str, Any]] = []
    empty = unseen = unseen_candidates = 0
    where = f"{Path(folder).name}/{BEHAVIORS_FILE}"
    impressions = _rows(folder, BEHAVIORS_FILE, BEHAVIORS_COLUMNS)
    is_labelled = any("-" in row["shown"] for row in impressions)
    for number, row in enumerate(impressions, start=1):
        history = row["history"].split()
        read = [news for news in history if news in known]
        unseen += len(history) - len(read)
        shown = [_candidate(pair, is_labelled, f"{where}, impression {number}") for pair in row["shown"].split()]
        candidates = [news for news, _ in shown]
        empty += not read
        unseen_candidates += sum(news not in known for news in candidates)
        rows.append(
            {
                "impression": row["impression"],
                "user": row["user"],
                "source": read,
                "candidates": candidates,
                "clicked": [int(label) for _, label in shown if label],
                "target": [news for news, label in shown if label == "1"],
            }
        )
    counts = {
        "impressions of users without a history; they are told apart by nothing": empty,
        "news of histories are in no news.tsv and were left out": unseen,
        "candidates are in no news.tsv; they rank last": unseen_candidates,
    }
    return rows, [f"{where}: {count:,} {what}" for what, count in counts.items() if count]


def _candidate(pair: str, is_labelled: bool, where: str) -> tuple[str, str]:
    """A news and its label, which is empty where there are none."""
    news, dash, label = pair.rpartition("-")
    if not is_labelled:
        return pair, ""
    if not dash or label not in ("0", "1"):
        raise ValueError(
            f"{where}: {pair[:40]!r} is not of the form N123-1, as others are; impressions without labels can be "
            "neither learned from nor scored."
        )
    return news, label


def prediction_text(rows: Sequence[dict[str, Any]], predictions: Sequence[Sequence[float]]) -> str:
    """prediction.txt in the competition's form: an impression's id, and the ranks from 1 of what it showed, in the
    order in which it did. Among equal scores the one shown first goes first, and not-a-number goes last."""
    lines = []
    for row, scores in zip(rows, predictions, strict=True):
        order = best_first(np.array(scores, dtype=np.float64))
        ranks = np.argsort(order, kind="stable") + 1
        lines.append(f"{row['impression']} [{','.join(map(str, ranks))}]\n")
    return "".join(lines)
