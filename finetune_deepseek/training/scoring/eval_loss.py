"""The loss of a split: a sum and a count over all of its rows, whatever batches and processes they came in."""

import math
from typing import NamedTuple

import torch

LARGEST = 700.0  # nats: beyond that the exponential of a float overflows


class Predicted(NamedTuple):
    """What a task makes of an evaluation batch of B rows.

    Attributes:
        sums: [B], the loss of each row, summed over what counts in it. None where there is none, or where it isn't a
            sum over rows (see `Task.split_loss`).
        counts: [B], how much counts in each row: tokens, labels, 0 for a row whose target is unknown.
        outputs: [B, ...], what `Task.decode` reads; None where the model generates it.
        bytes: [B], of each row's text in UTF-8, where a language model's loss is of all of it.
        is_text: whether the loss is a language model's, whose exponential is the perplexity.
        unit: what is counted, in one word, where its bits are asked for.
    """

    sums: torch.Tensor | None = None
    counts: torch.Tensor | None = None
    outputs: torch.Tensor | None = None
    bytes: torch.Tensor | None = None
    is_text: bool = False
    unit: str = ""


class LossOfSplit:
    """Adds up the rows of a split."""

    def __init__(self) -> None:
        self.total, self.count, self.bytes, self.is_text, self.unit = 0.0, 0, 0, False, ""

    def add(self, sums: torch.Tensor, counts: torch.Tensor, bytes: torch.Tensor | None = None) -> None:
        """All [B]. A row that counts nothing adds nothing, be its sum a number or not."""
        kept = counts > 0
        self.total += math.fsum(sums[kept].tolist())  # Python's floats: not every device has float64
        self.count += sum(counts[kept].tolist())
        self.bytes += 0 if bytes is None else sum(bytes[kept].tolist())

    def scores(self) -> dict[str, float]:
        """`loss` in nats and, of text, `perplexity` and `bits_per_byte` if bytes are known; `bits_per_token` and the
        like where there is a unit; nothing where nothing counted."""
        if not self.count:
            return {}
        loss = self.total / self.count
        perplexity = {"perplexity": math.exp(min(loss, LARGEST))} if self.is_text else {}
        bits = {"bits_per_byte": self.total / math.log(2) / self.bytes} if self.bytes else {}
        bits |= {f"bits_per_{self.unit}": loss / math.log(2)} if self.unit else {}
        return {"loss": loss} | perplexity | bits
