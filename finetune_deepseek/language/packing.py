"""Documents packed into blocks of one length, as if each were alone in its row.

Positions restart with each piece, by which the model keeps attention inside of it (modeling_deepseek/masks.py), and a
piece's first token is no label, so that no token predicts another document's first. What is longer than a block is
split; a piece begins with the last token of the one before, so that every token is predicted once, and sees nothing
else of its past:

    lengths 3, 7 in blocks of 4   ->   a a a .  |  b b b b  |  b b b b      7 = 4 + 3, one token there twice

    sequential   pieces in the documents' order, cut where a block ends; next to no padding, most cuts
    best_fit     whole pieces, longest first, each into the fullest block that holds it (arXiv 2404.10830); fewest cuts

Letters: B batch, T tokens of a block.
"""

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ..training.optimization import IGNORED_LABEL

LEAST = 2  # tokens of a piece: its first one predicts the second


class Piece(NamedTuple):
    """Tokens `start` to `end` (without it) of a document, by its number."""

    document: int
    start: int
    end: int

    def __len__(self) -> int:  # type: ignore[override]
        return self.end - self.start


@dataclass(frozen=True)
class Packing:
    """Which pieces stand in each block, and what became of the documents.

    Attributes:
        tokens: of all pieces; a token where a document is cut counts in both.
        padding: places of the blocks without a token.
        split: documents that are in several pieces.
        left_out: documents of less than two tokens, in which there is nothing to predict.
    """

    blocks: list[list[Piece]]
    tokens: int
    padding: int
    split: int
    left_out: int

    @property
    def pieces(self) -> int:
        return sum(map(len, self.blocks))


def pack(lengths: Sequence[int], block_size: int, method: str = "sequential") -> Packing:
    """Put documents of these lengths, in tokens, into blocks of `block_size` tokens.

    Args:
        method: "sequential", or "best_fit", which leaves documents that fit in a block whole.

    Raises:
        ValueError: for a block of less than two tokens, or an unknown method.
    """
    if block_size < LEAST:
        raise ValueError(f"blocks of {block_size} tokens: a block has two at least, for the first predicts the second")
    if method not in METHODS:
        raise ValueError(f"no packing {method!r}; there is {', '.join(METHODS)}")
    kept = [(number, length) for number, length in enumerate(lengths) if length >= LEAST]
    blocks = METHODS[method](kept, block_size)
    pieces = Counter(piece.document for block in blocks for piece in block)
    tokens = sum(len(piece) for block in blocks for piece in block)
    split = sum(count > 1 for count in pieces.values())
    return Packing(blocks, tokens, len(blocks) * block_size - tokens, split, len(lengths) - len(kept))


def pieces_of(document: int, length: int, size: int) -> Iterator[Piece]:
    """A document in pieces of `size` tokens, the last one shorter; each begins with the last token before it."""
    for start in range(0, max(length - 1, 1), size - 1):
        yield Piece(document, start, min(start + size, length))


def sequential(documents: Sequence[tuple[int, int]], size: int) -> list[list[Piece]]:
    blocks: list[list[Piece]] = []
    room = 0
    for document, length in documents:
        start = 0
        while start < length - 1:
            if room < LEAST:
                blocks.append([])
                room = size
            piece = Piece(document, start, min(start + room, length))
            blocks[-1].append(piece)
            room -= len(piece)
            start = piece.end - 1
    return blocks


def best_fit(documents: Sequence[tuple[int, int]], size: int) -> list[list[Piece]]:
    pieces = [piece for document, length in documents for piece in pieces_of(document, length, size)]
    blocks: list[list[Piece]] = []
    rooms: list[int] = []  # sizes of the rooms that there are, each once, sorted
    blocks_by_room: dict[int, list[int]] = {}
    for piece in sorted(pieces, key=len, reverse=True):  # stable: equal ones stay in order
        place = bisect_left(rooms, len(piece))
        if place == len(rooms):
            block, room = len(blocks), size
            blocks.append([])
        else:
            room = rooms[place]
            block = blocks_by_room[room].pop()
            if not blocks_by_room[room]:
                del blocks_by_room[rooms.pop(place)]
        blocks[block].append(piece)
        rest = room - len(piece)
        if rest not in blocks_by_room:
            insort(rooms, rest)
        blocks_by_room.setdefault(rest, []).append(block)
    return blocks


METHODS = {"sequential": sequential, "best_fit": best_fit}


def packed_rows(
    documents: Sequence[Sequence[int]],
    packing: Packing,
    labels: Sequence[Sequence[int]] | None = None,
) -> dict[str, list[Any]]:
    """The blocks of a packing as columns for `PackedCollator`: `input_ids`, the lengths of their `pieces`, `length`,
    and `labels` if the documents have some."""

    def joined(rows: Sequence[Sequence[int]], block: list[Piece]) -> list[int]:
        return [token for document, start, end in block for token in rows[document][start:end]]

    columns: dict[str, list[Any]] = {
        "input_ids": [joined(documents, block) for block in packing.blocks],
        "pieces": [[len(piece) for piece in block] for block in packing.blocks],
        "length": [sum(map(len, block)) for block in packing.blocks],
    }
    return columns | ({"labels": [joined(labels, block) for block in packing.blocks]} if labels is not None else {})


class PackedCollator:
    """Batches of `packed_rows`: `input_ids`, `position_ids` and `labels`, all [B, T].

    Padding is a piece of its own at the end of a row, without labels. There is no `attention_mask`, beside which
    transformers' classes would not look for packed documents.
    """

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, features: list[dict[str, Any]], width: int | None = None) -> dict[str, torch.Tensor]:
        """`width` is T, without it the length of the longest row."""
        width = width or max(len(row["input_ids"]) for row in features)
        rows = [self._padded(row, width - len(row["input_ids"])) for row in features]
        return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}

    def _padded(self, row: dict[str, Any], pads: int) -> dict[str, list[int]]:
        labels = list(row.get("labels", row["input_ids"])) + [IGNORED_LABEL] * pads
        positions: list[int] = []
        for length in row["pieces"]:
            labels[len(positions)] = IGNORED_LABEL
            positions += range(length)
        return {
            "input_ids": [*row["input_ids"], *[self.pad_token_id] * pads],
            "position_ids": [*positions, *range(pads)],
            "labels": labels,
        }
