"""Documents: read from texts, tables or the Hub as rows of `text`, made tokens, and blocks of training.

Blocks are made of `CHUNK` documents at a time, so that a stream gives the same blocks as data that are read whole, and
goes on where it was by reading over chunks.
"""

import hashlib
import random
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from datasets import Dataset, IterableDataset
from torch.utils.data import get_worker_info
from transformers import PreTrainedTokenizerBase

from tokenization_deepseek import encode_text

from ..data.cells import Column, absent
from ..data.fault_report import EXAMPLE_CHARACTERS, Report, finding
from ..data.sources import Part, Rows, joined, open_splits, progress
from ..data.table import TEXT_ENDINGS, ending_of
from ..training.batches import ResumableStream
from .arguments import LanguageModelingArguments
from .packing import pack, packed_rows

CHUNK = 1_000  # documents whose blocks are made together
COUNTED = ("documents", "characters", "bytes", "tokens", "split", "left_out")  # of the documents of a chunk


# -- rows --


def load_documents(arguments: LanguageModelingArguments) -> dict[str, Rows]:
    """Rows of `text` by split.

    Raises:
        ValueError: with one line, for whatever can't be read, or where there is no text.
    """
    raw = open_splits(arguments, [arguments.text_column, "text"], arguments.streaming, arguments.document_separator)
    splits = {
        split: joined([documents_of(part, arguments) for part in parts], seed=None) for split, parts in raw.items()
    }
    if arguments.validation_share:
        if "validation" in splits:
            raise ValueError("--validation_share is for data without a validation split; leave it out.")
        splits["train"], splits["validation"] = held_out(splits["train"], arguments.validation_share)
    return splits


def documents_of(part: Part, arguments: LanguageModelingArguments) -> Rows:
    """The documents of a part; those without text are left out, and counted aloud.

    Raises:
        ValueError: if there is no such column, or no text in it.
    """
    is_file = ending_of(part.where) in TEXT_ENDINGS
    column = "text" if is_file else arguments.text_column
    if part.first is None:
        raise ValueError(f"{part.where}: no documents.")
    if column not in part.first:
        raise ValueError(f"{part.where}: {absent(Column(column, 'text', 'text_column'), part.first)}")

    def texts(batch: dict[str, list]) -> dict[str, list[str]]:
        for text in batch[column]:
            if not isinstance(text, str | None):
                raise ValueError(f"{part.where}: {column!r} is {str(text)[:40]!r}, not a text; set --text_column.")
        return {"text": [text for text in batch[column] if text and text.strip()]}

    names = part.rows.column_names or list(part.first)
    rows = part.rows.map(texts, batched=True, remove_columns=names, **progress(part.rows, "read"))
    if next(iter(rows), None) is None:
        raise ValueError(f"{part.where}: no document has text.")
    if isinstance(rows, Dataset):
        empty = len(part.rows) - len(rows)
        ended = f", ended by {said(arguments.document_separator)} (--document_separator)" if is_file else ""
        print(f"{part.where}: {len(rows):,} document(s){ended}" + f", {empty:,} without text left out" * (empty > 0))
    return rows


def said(separator: str) -> str:
    return {"file": "the end of the file", "line": "the end of the line", "blank_line": "blank lines"}.get(
        separator, f"lines {separator!r}"
    )


def held_out(rows: Rows, share: float) -> tuple[Dataset, Dataset]:
    """Training and validation documents: the last ones, of a single document the end of its text."""
    assert isinstance(rows, Dataset)
    if len(rows) > 1:
        first = len(rows) - min(max(1, round(share * len(rows))), len(rows) - 1)
        return rows.select(range(first)), rows.select(range(first, len(rows)))
    text = rows[0]["text"]
    first = len(text) - max(1, round(share * len(text)))
    return Dataset.from_dict({"text": [text[:first]]}), Dataset.from_dict({"text": [text[first:]]})


FAULTS = {
    "duplicate_documents": "same text as an earlier document",
    "replacement_characters": "U+FFFD in place of undecodable bytes",
    "documents_in_train": "document is in the training split",
}


def check_documents(splits: dict[str, Rows]) -> Report:
    """What is there twice, within a split or in training too; texts are compared by SHA-256, without space around."""
    report: Report = {}
    train: set[bytes] = set()
    for split, rows in splits.items():
        if not isinstance(rows, Dataset):
            continue
        found: dict[str, list[str]] = {name: [] for name in FAULTS if split != "train" or name != "documents_in_train"}
        seen: set[bytes] = set()
        for text in rows["text"]:
            mark = hashlib.sha256(text.strip().encode("utf-8", "surrogatepass")).digest()
            faults = (mark in seen, "\ufffd" in text, split != "train" and mark in train)
            for name in (name for name, is_there in zip(FAULTS, faults, strict=True) if is_there):
                found[name].append(text[:EXAMPLE_CHARACTERS])
            seen.add(mark)
        train = seen if split == "train" else train
        report[split] = {"rows": len(rows)} | {name: finding(texts) for name, texts in found.items()}
    return report


# -- tokens --


def document_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """BOS (EOS where the tokenizer has no BOS), the text, EOS; what looks like a control token in a text is text."""
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    encoded = encode_text(tokenizer, texts, add_special_tokens=False, verbose=False)["input_ids"]
    return [[first, *ids, tokenizer.eos_token_id] for ids in encoded]


def num_bytes(text: str) -> int:
    return len(text.encode("utf-8"))


def packer(tokenizer: PreTrainedTokenizerBase, size: int, method: str) -> Callable[[dict[str, list]], dict[str, list]]:
    """What makes blocks of so many tokens of a chunk of documents, as `packed_rows`; the first one has `COUNTED`."""

    def blocks_of(batch: dict[str, list]) -> dict[str, list]:
        texts = batch["text"]
        ids = document_ids(tokenizer, texts)
        packing = pack([*map(len, ids)], size, method)
        columns = packed_rows(ids, packing)
        counts = (len(texts), sum(map(len, texts)), sum(map(num_bytes, texts)), sum(map(len, ids)))
        others = [0] * (len(packing.blocks) - 1)
        for name, count in zip(COUNTED, (*counts, packing.split, packing.left_out), strict=True):
            columns[name] = [count, *others]
        return columns

    return blocks_of


def census(blocks: Dataset, size: int) -> dict[str, int]:
    """What the blocks hold: `COUNTED`, `blocks`, `pieces`, and `padding` in tokens."""
    counts = {name: sum(blocks[name]) for name in COUNTED}
    pieces = sum(map(len, blocks["pieces"]))
    return counts | {"blocks": len(blocks), "pieces": pieces, "padding": len(blocks) * size - sum(blocks["length"])}


def census_text(counts: dict[str, int], size: int) -> str:
    """The census in a line."""
    padding = counts["padding"] / (counts["blocks"] * size)
    line = (
        f"{counts['documents']:,} document(s): {counts['characters']:,} characters, {counts['bytes']:,} bytes, "
        f"{counts['tokens']:,} tokens in {counts['blocks']:,} blocks of {size:,}, {padding:.2%} padding"
    )
    split = f"; {counts['split']:,} split, {counts['pieces']:,} pieces, each seeing itself alone" * (
        counts["split"] > 0
    )
    return line + split + f"; {counts['left_out']:,} too short left out" * (counts["left_out"] > 0)


# -- streams --


class Mark(NamedTuple):
    """Where a chunk begins: blocks before it, passes over the data before it, its number in this pass."""

    blocks: int
    passes: int
    chunk: int


class BlockStream(ResumableStream):
    """Blocks of documents that are read as they are used, over and over; those of a chunk in an order by the seed.

    Args:
        documents: rows of `text`.
        blocks_of: makes blocks of a chunk, see `packer`.
    """

    def __init__(self, documents: IterableDataset, blocks_of: Callable[..., dict[str, list]], seed: int) -> None:
        self.documents, self.blocks_of, self.seed = documents, blocks_of, seed
        self.first = 0  # the block to begin with, in number from the very first
        self.begin = Mark(0, 0, 0)  # the chunk that it is looked for from
        self.marks = deque([self.begin])  # of the chunks that are in use

    def position(self, blocks: int) -> dict[str, int]:
        """Where the stream is after so many blocks, as `go_on` takes it."""
        while len(self.marks) > 1 and self.marks[1].blocks <= blocks:
            self.marks.popleft()
        return {"after": blocks} | self.marks[0]._asdict()

    def go_on(self, position: dict[str, int]) -> None:
        """Begin with the block that follows a position."""
        self.first = position["after"]
        self.begin = Mark(position["blocks"], position["passes"], position["chunk"])
        self.marks = deque([self.begin])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        if worker is not None and worker.id:
            return  # one reads, whatever their number, so that the order is one
        blocks, passes, chunk = self.begin
        while True:
            documents = self.documents.skip(chunk * CHUNK) if chunk else self.documents
            for batch in documents.iter(CHUNK):
                self.marks.append(Mark(blocks, passes, chunk))
                columns = self.blocks_of(batch)
                order = list(range(len(columns["input_ids"])))
                random.Random(f"{self.seed} {passes} {chunk}").shuffle(order)
                for number in order[max(self.first - blocks, 0) :]:
                    yield {name: cells[number] for name, cells in columns.items() if name not in COUNTED}
                blocks, chunk = blocks + len(order), chunk + 1
            if not chunk:
                raise ValueError("the stream has no documents")
            passes, chunk = passes + 1, 0
