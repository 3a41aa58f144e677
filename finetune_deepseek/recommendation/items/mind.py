"""MIND's news.tsv and behaviors.tsv as they are published (Wu et al., "MIND: A Large-scale Dataset for News
Recommendation", ACL 2020; tab-separated, without a header line):

    news.tsv        news id, category, subcategory, title, abstract, url, title entities, abstract entities
    behaviors.tsv   impression id, user id, time, clicked news before (may be empty), shown news as N123-1 N456-0
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..arguments import TEXT_FIELDS

NEWS_FILE, BEHAVIORS_FILE = "news.tsv", "behaviors.tsv"
NEWS_COLUMNS = ("id", "category", "subcategory", "title", "abstract", "url", "title_entities", "abstract_entities")


def _lines(folder: str, name: str, columns: int) -> list[list[str]]:
    """Cells of a file's lines that aren't empty.

    Raises:
        ValueError: if it can't be read, is empty, or a line has fewer columns.
    """
    path = Path(folder) / name
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        bad = path.read_bytes()[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {bad}: not UTF-8; convert the file.") from error
    except OSError as error:
        raise ValueError(f"{path}: can't be read ({error.strerror}); MIND's folders have it.") from error
    rows = []
    # Titles may hold characters that splitlines takes for the end of a line.
    for number, line in enumerate(text.replace("\r\n", "\n").split("\n"), start=1):
        if not line.strip():
            continue
        cells = line.split("\t")
        if len(cells) < columns:
            raise ValueError(f"{path}, line {number}: {len(cells)} columns between tabs, not {columns}.")
        rows.append([cell.strip() for cell in cells])
    if not rows:
        raise ValueError(f"{path}: no lines.")
    return rows


def read_news(folder: str, fields: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Texts by news id, and a line for each kind of gap.

    A text is the fields that aren't missing with ". " between; if all are, the first of `TEXT_FIELDS` that isn't.

    Raises:
        ValueError: for a file that can't be read, or a line of another form.
    """
    texts: dict[str, str] = {}
    gaps, bare, repeated = dict.fromkeys(fields, 0), 0, 0
    rows = _lines(folder, NEWS_FILE, 5)
    for cells in rows:
        news = dict(zip(NEWS_COLUMNS, cells, strict=False))
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

    News that are not among the `known` are left out of histories; among candidates they stay.

    Raises:
        ValueError: for a file that can't be read, or a line of another form.
    """
    rows: list[dict[str, Any]] = []
    empty = unseen = unseen_candidates = 0
    where = f"{Path(folder).name}/{BEHAVIORS_FILE}"
    for number, (impression, user, _, history, shown, *_) in enumerate(_lines(folder, BEHAVIORS_FILE, 5), start=1):
        read = [news for news in history.split() if news in known]
        unseen += len(history.split()) - len(read)
        candidates, clicked = [], []
        for pair in shown.split():
            news, dash, label = pair.rpartition("-")
            if not dash or label not in ("0", "1"):  # MIND's test split keeps its labels for itself
                raise ValueError(
                    f"{where}, impression {number}: {pair[:40]!r} is not of the form N123-1; impressions without "
                    "labels can be neither learned from nor scored."
                )
            candidates.append(news)
            clicked.append(int(label))
        empty += not read
        unseen_candidates += sum(news not in known for news in candidates)
        rows.append(
            {
                "impression": impression,
                "user": user,
                "source": read,
                "candidates": candidates,
                "clicked": clicked,
                "target": [news for news, click in zip(candidates, clicked, strict=True) if click],
            }
        )
    counts = {
        "impressions of users without a history; they are told apart by nothing": empty,
        "news of histories are in no news.tsv and were left out": unseen,
        "candidates are in no news.tsv; they rank last": unseen_candidates,
    }
    return rows, [f"{where}: {count:,} {what}" for what, count in counts.items() if count]
