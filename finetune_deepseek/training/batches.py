"""Batches of rows of like length, by their number or by tokens."""

from collections.abc import Iterator, Sequence

import torch
from transformers.trainer_pt_utils import BatchRebalanceSampler


def batches_by_length(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Indices in batches of like lengths, the longest first: a batch that doesn't fit shows at once."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


class TokenBatchSampler(BatchRebalanceSampler):
    """Batches of up to `tokens` tokens, padding included; a longer row is a batch of its own.

    The rows are sorted by length, those of one length in a new order at each epoch, and cut into batches, which come
    in a random order: next to nothing is padding, and every epoch has as many batches. Inherits for Trainer, which
    takes samplers of this class for ready batches of one rank.

    Args:
        lengths: tokens of each row.
        tokens: rows times longest row of a batch, at most.
        rank, world_size: this process and how many there are; a last incomplete turn of all is left out.
    """

    def __init__(self, lengths: Sequence[int], tokens: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        self.row_lengths = torch.tensor(lengths)
        self.seed, self.rank, self.world_size, self.epoch = seed, rank, world_size, 0
        self.cuts = [0]  # where batches begin in the sorted order, longest rows first
        longest = 0
        for position, length in enumerate(self.row_lengths.sort(descending=True).values.tolist()):
            if position == self.cuts[-1]:
                longest = length
            elif (position + 1 - self.cuts[-1]) * longest > tokens:
                self.cuts.append(position)
                longest = length
        self.cuts.append(len(lengths))
        if len(self.cuts) - 1 < world_size:
            raise ValueError(f"--tokens_per_batch {tokens}: all rows fit in {len(self.cuts) - 1} batches, fewer than "
                             f"the {world_size} processes; lower it.")  # fmt: skip

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        shuffled = torch.randperm(len(self.row_lengths), generator=generator)
        order = shuffled[self.row_lengths[shuffled].sort(descending=True, stable=True).indices]
        batches = torch.randperm(len(self.cuts) - 1, generator=generator)[: len(self) * self.world_size]
        for batch in batches[self.rank :: self.world_size].tolist():
            yield order[self.cuts[batch] : self.cuts[batch + 1]].tolist()

    def __len__(self) -> int:
        return (len(self.cuts) - 1) // self.world_size
