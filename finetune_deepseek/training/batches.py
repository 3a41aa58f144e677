"""Which rows a batch has: by their number or by tokens; what is drawn follows from the seed and the epoch alone.

So a resumed run goes on with the same rows, whatever else has drawn random numbers, and all processes agree.
"""

import random
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import IterableDataset, Sampler
from transformers.trainer_pt_utils import BatchRebalanceSampler, get_length_grouped_indices


def batches_by_length(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Indices in batches of like lengths, the longest first: a batch that doesn't fit shows at once."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def batches_with_room(
    lengths: Sequence[int], batch_size: int, most: int, positions: int | None
) -> Iterator[tuple[list[int], int]]:
    """Batches of prompts, and how many tokens may be written behind each: `most`, or what `positions` leave.

    A prompt that leaves less than `most` is a batch of its own: the longest one would cut what the others get.
    """
    rooms = [most if positions is None else min(most, positions - length) for length in lengths]
    whole = [number for number, room in enumerate(rooms) if room == most]
    for batch in batches_by_length([lengths[number] for number in whole], batch_size):
        yield [whole[place] for place in batch], most
    yield from (([number], room) for number, room in enumerate(rooms) if room < most)


class ResumableStream(IterableDataset):
    """Training rows without end that go on where they were, without making those before again."""

    @abstractmethod
    def position(self, rows: int) -> dict[str, Any]:
        """Where the stream is once so many rows, of all processes together, are used; JSON."""

    @abstractmethod
    def go_on(self, position: dict[str, Any]) -> None:
        """Begin there, with the next reading."""


class RowDraws:
    """Random numbers for each row, others in each epoch; the same in whatever worker or process the row is read.

    A collator that draws has one of these; the epoch lies in shared memory, for workers may live on.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.epoch = torch.zeros((), dtype=torch.long).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        self.epoch.fill_(epoch)

    def of(self, row: int) -> random.Random:
        return random.Random(f"{self.seed} {int(self.epoch)} {row}")


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """Other numbers for each pair: a sum of the two would give the next seed's first epoch once more."""
    return torch.Generator().manual_seed(random.Random(f"{seed} {epoch}").getrandbits(63))


def drawn_rows(count: int, weights: torch.Tensor | None, generator: torch.Generator) -> torch.Tensor:
    """All rows in a new order, or as many, drawn with replacement by their weights."""
    if weights is None:
        return torch.randperm(count, generator=generator)
    return torch.multinomial(weights, count, replacement=True, generator=generator)


class RowSampler(Sampler[int]):
    """All rows in a new order at each epoch.

    Args:
        lengths: of each row, to bring rows of like length together; None for any order.
        group: rows of a step, among which lengths should be alike.
        weights: [rows], to draw with replacement; then the order is any.
    """

    def __init__(
        self,
        count: int,
        seed: int,
        lengths: Sequence[int] | None = None,
        group: int = 1,
        weights: torch.Tensor | None = None,
    ) -> None:
        self.count, self.seed, self.epoch = count, seed, 0
        self.lengths, self.group, self.weights = lengths, group, weights

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        generator = epoch_generator(self.seed, self.epoch)
        if self.lengths is None or self.weights is not None:
            return iter(drawn_rows(self.count, self.weights, generator).tolist())
        return iter(get_length_grouped_indices(self.lengths, self.group, generator=generator))


class TokenBatchSampler(BatchRebalanceSampler):
    """Batches of up to `tokens` tokens, padding included; a longer row is a batch of its own.

    The rows are sorted by length, those of the same sizes in a new order at each epoch, and cut into batches, which
    come in a random order: next to nothing is padding, and every epoch has as many batches, of the same sizes.
    Inherits for Trainer, which takes samplers of this class for ready batches of one rank.

    Args:
        sizes: of each row how many texts it has of each kind that is padded by itself, and the length of the longest
            of these: [(1, tokens)] for one text, [(1, of the query), (2, of the passages)] for what has two towers.
        tokens: texts times longest one of a batch, summed over the kinds, at most.
        weights: [rows], to draw rows with replacement; batches are then as many as in a first draw.
        rank, world_size: this process and how many there are; a last incomplete turn of all is left out.

    Raises:
        ValueError: if there are fewer batches than processes.
    """

    def __init__(
        self,
        sizes: Sequence[Sequence[Sequence[int]]],
        tokens: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        weights: torch.Tensor | None = None,
    ) -> None:
        self.sizes, self.tokens, self.weights = sizes, tokens, weights
        keys = [(sum(count * length for count, length in size), *map(tuple, size)) for size in sizes]
        places = {key: place for place, key in enumerate(sorted(set(keys)))}
        self.places = torch.tensor([places[key] for key in keys])  # by length; rows of one length by their sizes
        self.seed, self.rank, self.world_size, self.epoch = seed, rank, world_size, 0
        self.count = len(self._cut(epoch_generator(seed, 0)))
        if self.count < world_size:
            raise ValueError(f"--tokens_per_batch {tokens}: all rows fit in {self.count} batches, fewer than "
                             f"the {world_size} processes; lower it.")  # fmt: skip

    def _cut(self, generator: torch.Generator) -> list[list[int]]:
        """The rows of an epoch in batches, longest rows first."""
        drawn = drawn_rows(len(self.sizes), self.weights, generator)
        batches: list[list[int]] = []
        batch: list[tuple[int, int]] = []  # texts and longest of each kind
        for row in drawn[self.places[drawn].sort(descending=True, stable=True).indices].tolist():
            size = self.sizes[row]
            larger = [(a + b, max(s, t)) for (a, s), (b, t) in zip(batch, size, strict=True)] if batch else []
            if larger and sum(count * length for count, length in larger) <= self.tokens:
                batch = larger
                batches[-1].append(row)
            else:
                batch = [(count, length) for count, length in size]
                batches.append([row])
        return batches

    def __iter__(self) -> Iterator[list[int]]:
        generator = epoch_generator(self.seed, self.epoch)
        batches = self._cut(generator)
        while len(batches) < self.count:  # of longer rows, as drawn by weights
            batches += self._cut(generator)
        order = torch.randperm(len(batches), generator=generator)[: len(self) * self.world_size]
        for number in order[self.rank :: self.world_size].tolist():
            yield batches[number]

    def __len__(self) -> int:
        return self.count // self.world_size
