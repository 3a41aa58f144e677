"""Reading SQuAD's format: nested as published, or flat rows, as questions with a passage and answers in it.

Nested is `{"data": [{"paragraphs": [{"context": ..., "qas": [{"id", "question", "answers": [{"text",
"answer_start"}]}]}]}]}`, flat is `{"id", "question", "context", "answers": {"text": [...], "answer_start": [...]}}`.
Nothing is left out without being counted, by the names of `FAULTS`.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from datasets import Dataset

from ..data import cells
from ..data.cells import Column, Kind, absent, one, plain, typed
from ..data.fault_report import CHECKS

FIELDS = ("question", "context", "answers")
LAYOUT = "question, context and answers {text, answer_start}, or SQuAD's nested data"
KINDS: dict[str, Kind] = {
    "id": "label", "question": "text", "context": "text", "answers": "record", "is_impossible": "record",
}  # fmt: skip
YES, NO = ("true", "1", "1.0", "yes"), ("false", "0", "0.0", "no")
COLUMNS = ("id", "source", "context", "target", "answers", "starts")
# What is said of a fault, see data/fault_report.py.
FAULTS = {name: CHECKS[name] for name in ("replacement_characters", "mojibake")} | {
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
}


def flat_rows(raw: Mapping[str, Sequence[Any]], where: str) -> Iterator[dict[str, Any]]:
    """Questions as they stand in the data, of either layout.

    Raises:
        ValueError: if the data have neither.
    """
    if "data" in raw:
        for value in one(raw, Column("data", "record"), where):
            for article in value if isinstance(value, list) else [value]:
                try:
                    for paragraph in article["paragraphs"]:
                        for question in paragraph["qas"]:
                            yield question | {"context": paragraph["context"]}
                except (KeyError, TypeError) as error:
                    raise ValueError(
                        f"{where}: 'data' is not as SQuAD nests it (paragraphs, context, qas): {error}."
                    ) from error
        return
    missing = [name for name in FIELDS if name not in raw]
    if missing:
        raise ValueError(f"{where}: {absent(Column(missing[0], 'text'), raw)} Needed: {LAYOUT}.")
    columns = typed(raw, [Column(name, kind, required=False) for name, kind in KINDS.items()], where)
    for row in zip(*columns.values(), strict=True):
        yield dict(zip(columns, row, strict=True))


def listed_answers(value: Any) -> list[tuple[str, Any]]:
    """Texts and starts of a cell of answers; one answer needs no list.

    Raises:
        ValueError: if it is none.
    """
    value = [] if plain(value) is None else value
    if isinstance(value, dict):
        found, starts = as_list(value.get("text")), as_list(value.get("answer_start")) or None
        starts = starts or [None] * len(found)
        if "text" not in value or len(starts) != len(found):
            raise ValueError("expected lists `text` and `answer_start` of one length")
        pairs = list(zip(found, starts, strict=True))
    elif isinstance(value, list) and all(isinstance(answer, dict) for answer in value):
        pairs = [(answer.get("text"), answer.get("answer_start")) for answer in value]
    else:
        raise ValueError(f"expected {{text, answer_start}}, found {str(value)[:40]!r}")
    if not all(isinstance(text, str) for text, _ in pairs):
        raise ValueError("an answer's text is no text")
    return [(text, answer_start(start)) for text, start in pairs if text.strip()]


def as_list(value: Any) -> list[Any]:
    value = plain(value)
    return list(value) if isinstance(value, (list, tuple)) else [] if value is None else [value]


def answer_start(value: Any) -> int | None:
    """A place, which may have become a fraction or a text on the way, or none.

    Raises:
        ValueError: if it is anything else.
    """
    found = None if isinstance(value, bool) else cells.number(plain(value))
    if isinstance(value, bool) or (found is not None and found != int(found)):
        raise ValueError(f"answer_start is {value!r}, not a whole number")
    return None if found is None else int(found)


def is_yes(value: Any) -> bool:
    """Whether `is_impossible` says so.

    Raises:
        ValueError: if it says neither yes nor no.
    """
    said = str(cells.label(plain(value)) or "false").lower()
    if said not in YES + NO:
        raise ValueError(f"is_impossible is {str(value)[:40]!r}, neither true nor false")
    return said in YES


def place(text: str, start: int | None, context: str) -> tuple[str, int | None]:
    """An answer without space around, and where it stands: at `start`, else nearest to it, else nowhere (None)."""
    bare, wanted = text.strip(), start or 0
    wanted += len(text) - len(text.lstrip())
    places = []
    found = context.find(bare)
    while found >= 0:
        places.append(found)
        found = context.find(bare, found + 1)
    return bare, min(places, key=lambda found: abs(found - wanted), default=None)


def simplifier() -> Callable[[str], str]:
    """Traditional to Simplified Chinese, by OpenCC.

    Raises:
        ValueError: if it isn't installed.
    """
    try:
        from opencc import OpenCC
    except ImportError as error:
        raise ValueError('--convert_to_simplified needs OpenCC: pip install "deepseek-hf[chinese]".') from error
    return lru_cache(maxsize=10_000)(OpenCC("t2s").convert)


class Questions:
    """Rows of `COLUMNS` from raw rows, with what was found wrong in them.

    `source` is the question, `target` its first answer or nothing, `starts` are the answers' places in the context,
    -1 where there is none.

    Args:
        version_2: keep questions without an answer.
        simplify: applied to all texts; see `simplifier`.
    """

    def __init__(self, version_2: bool, simplify: Callable[[str], str] | None = None) -> None:
        self.version_2, self.simplify = version_2, simplify
        self.faults: dict[str, list[str]] = defaultdict(list)
        self.ids: set[str] = set()
        self.count = 0

    def read(self, rows: Mapping[str, Sequence[Any]], where: str, limit: int | None = None) -> Dataset:
        """Raises ValueError for rows that aren't questions, and if none is left."""
        columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}
        total = 0
        for number, raw in enumerate(flat_rows(rows, where), start=1):
            if number == (limit or 0) + 1 and limit:
                break
            total = number
            for name, value in zip(COLUMNS, self._row(raw, f"{where}, question {number}") or (), strict=False):
                columns[name].append(value)
        kept = len(columns["id"])
        if not kept:
            raise ValueError(f"{where}: no question with a passage and an answer.")
        if kept < total:
            print(f"{where}: left out {total - kept:,} of {total:,} questions without passage, question or answer")
        return Dataset.from_dict(columns)

    def _row(self, raw: dict[str, Any], where: str) -> tuple[Any, ...] | None:
        question, context = raw.get("question"), raw.get("context")
        for name, text in (("question", question), ("context", context)):
            if text is not None and not isinstance(text, str):
                raise ValueError(f"{where}: {name!r} is {str(text)[:40]!r}, not a text.")
        if not (question and question.strip() and context and context.strip()):
            self.faults["empty_texts"].append(question or "")
            return None
        try:
            answers = [] if is_yes(raw.get("is_impossible")) else listed_answers(raw.get("answers"))
        except ValueError as error:
            raise ValueError(f"{where}, 'answers': {error}.") from None
        if not answers and not self.version_2:
            self.faults["no_answers"].append(question)
            return None
        placed = [place(text, start, context) for text, start in answers]
        if any(
            start is not None and (said is None or said < 0 or not context.startswith(text, said))
            for (_, start), (text, said) in zip(placed, answers, strict=True)
        ):
            self.faults["repaired_answers"].append(question)
        lost = sum(start is None for _, start in placed)
        if lost:
            self.faults["lost_answers" if lost == len(placed) else "partly_lost_answers"].append(question)
        if self.simplify:
            context, placed = self._simplified(context, placed)
            question = self.simplify(question)
        texts = [text for text, _ in placed]
        starts = [-1 if start is None else start for _, start in placed]
        return self._id(raw.get("id"), question), question.strip(), context, (texts or [""])[0], texts, starts

    def _simplified(
        self, context: str, placed: list[tuple[str, int | None]]
    ) -> tuple[str, list[tuple[str, int | None]]]:
        """Passage and answers converted alike: a word alone may become another than in its sentence."""
        assert self.simplify is not None
        converted = self.simplify(context)
        if len(converted) == len(context):
            return converted, [
                (self.simplify(text) if start is None else converted[start : start + len(text)], start)
                for text, start in placed
            ]
        return converted, [place(self.simplify(text), start, converted) for text, start in placed]

    def _id(self, value: Any, question: str) -> str:
        """The row's id, or one made of its number where it has none or an earlier row has it."""
        self.count += 1
        name = "" if value is None else str(value).strip()
        if not name:
            self.faults["missing_ids"].append(question)
            name = f"question-{self.count}"
        elif name in self.ids:
            self.faults["duplicate_ids"].append(name)
        unique, number = name, 2
        while unique in self.ids:
            unique, number = f"{name}#{number}", number + 1
        self.ids.add(unique)
        return unique
