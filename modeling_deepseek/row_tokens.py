"""Which tokens of a call belong together: a row's own count, without its padding and its other documents.

Compressed attention (DeepSeek-V4) makes entries of m consecutive tokens, so it has to know which are consecutive. A
column of the batch says that only where nothing is padded or packed:

    column     0  1  2  3  4  5  6  7             0  1  2  3  4  5  6  7
    mask       0  0  0  1  1  1  1  1   positions 0  1  2  0  1  2  3  4
    rank       -  -  -  0  1  2  3  4             0  1  2  3  4  5  6  7     the row's tokens, counted
    start      .  .  .  0  0  0  0  0             0  0  0  3  3  3  3  3     rank that the token's document begins at

A query sees what lies between its document's start and itself. Keys that are kept from call to call are moved to the
right, so that the last of them is the row's last token, whatever padding came between.

Letters: B batch, S tokens of this call, K kept ones before them.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch.nn import functional as F

from .layers import is_traced


class Counted(Protocol):
    """What a cache remembers of the rows: columns, and where rows differ their tokens and last document's begin."""

    seen: int
    totals: torch.Tensor | None  # [B]
    starts: torch.Tensor | None  # [B]


@dataclass(eq=False)
class RowTokens:
    """The tokens of one call.

    `seen` columns came before. Where every row is one document without padding, `totals` is `None`, and ranks are
    columns; else

    ranks: [B, S], -1 at padding; starts: [B, S].
    totals: [B], tokens before this call; last_starts: [B], where their last document begins.
    has_padding: whether this call brings any.
    known: what layers have asked for by `once`.
    """

    length: int
    seen: int
    device: torch.device
    totals: torch.Tensor | None = None
    last_starts: torch.Tensor | None = None
    ranks: torch.Tensor = field(default=None)  # type: ignore[assignment]  # made below
    starts: torch.Tensor = field(default=None)  # type: ignore[assignment]
    has_padding: bool = False
    known: dict[Hashable, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.totals is None:
            self.ranks = torch.arange(self.seen, self.seen + self.length, device=self.device).unsqueeze(0)
            self.starts = torch.zeros_like(self.ranks)

    @property
    def are_columns(self) -> bool:
        """Whether ranks are columns."""
        return self.totals is None

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What `make` gives, made for the first layer that asks under this key; the others of a call need the same."""
        if key not in self.known:
            self.known[key] = make()
        return self.known[key]

    def totals_after(self) -> torch.Tensor | None:
        """[B], tokens after this call."""
        return None if self.totals is None else self.totals + (self.ranks >= 0).sum(-1)

    def starts_after(self) -> torch.Tensor | None:
        """[B], where the last document begins after this call."""
        return None if self.totals is None else self.starts[:, -1]

    # Keys: the kept columns and those of this call, right-aligned ---------------------------------------------------

    def aligned(self, rows: torch.Tensor, kept: int) -> torch.Tensor:
        """[B, K + S, W] -> the same rows with each row's own tokens moved to the right."""
        if not self.has_padding:
            return rows
        return rows.gather(1, self._order(kept).unsqueeze(-1).expand_as(rows))

    def _order(self, kept: int) -> torch.Tensor:
        ages = torch.arange(kept, 0, -1, device=self.device)
        are_tokens = torch.cat((ages <= self.totals.unsqueeze(-1), self.ranks >= 0), dim=1)
        return are_tokens.int().argsort(dim=1, stable=True)

    def rank_of_keys(self, kept: int) -> torch.Tensor:
        """[B or 1, K + S] ranks of what `aligned` gives, -1 where there is no token."""
        ages = torch.arange(kept + self.length, 0, -1, device=self.device)
        if self.totals is None:
            return (self.seen + self.length - ages).unsqueeze(0)
        count = self.totals.clamp(max=kept) + (self.ranks >= 0).sum(-1)
        return (self.totals_after().unsqueeze(-1) - ages).masked_fill(ages > count.unsqueeze(-1), -1)

    def start_of_keys(self, kept: int) -> torch.Tensor:
        """[B, K + S] starts of what `aligned` gives, right for the tokens of this call; kept ones have the last."""
        before = self.last_starts.unsqueeze(-1).expand(-1, kept)
        return self.aligned(torch.cat((before, self.starts), dim=1).unsqueeze(-1), kept).squeeze(-1)

    # Who sees what --------------------------------------------------------------------------------------------------

    def sees_keys(self, chunk: slice, keys: slice, kept: int, window: int) -> torch.Tensor:
        """[B or 1, s, k]: whether queries see uncompressed keys, the last `window` tokens of their document."""
        query, start = self.ranks[:, chunk, None], self.starts[:, chunk, None]
        rank = self.rank_of_keys(kept)[:, None, keys]
        return (rank >= start) & (rank <= query) & (rank > query - window)

    def sees_entries(self, chunk: slice, ends: torch.Tensor) -> torch.Tensor:
        """[B or 1, s, E]: whether queries see entries [B or 1, E], given by the rank of their last token."""
        query, start = self.ranks[:, chunk, None], self.starts[:, chunk, None]
        return (ends.unsqueeze(1) >= start) & (ends.unsqueeze(1) <= query)


def row_tokens(
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    shape: tuple[int, int],
    device: torch.device,
    counted: Counted | None,
) -> RowTokens:
    """What a call's mask and positions say, after what a cache has counted.

    Args:
        attention_mask: [B, T], 0 at padding wherever it stands; `None`: there is none.
        position_ids: [B or 1, S]. In a call without anything cached, documents begin where they restart.
        shape: B, S.

    Raises:
        ValueError: for a mask of another form, which can't say what an entry is made of.
    """
    batch, length = shape
    seen = counted.seen if counted is not None else 0
    if (
        attention_mask is None
        and (position_ids is None or length == 1 or seen)
        and getattr(counted, "totals", None) is None
    ):
        return RowTokens(length, seen, device)
    if attention_mask is not None and attention_mask.ndim != 2:
        raise ValueError(
            f"attention_mask has {attention_mask.ndim} dimensions, but compressed attention counts the tokens of a "
            "row: give a mask [batch, tokens] with 0 at padding, and position_ids that restart for packed documents"
        )
    is_token = torch.ones(shape, dtype=torch.bool, device=device)
    if attention_mask is not None:
        is_token = attention_mask[:, -length:].to(device).bool().expand(shape)
    begins = torch.zeros_like(is_token)
    if position_ids is not None and length > 1 and not seen:
        begins = where_documents_begin(is_token, position_ids)
    has_padding = is_packed = True
    # A graph takes the general form. Else one wait for the device a call: a batch without padding goes without its
    # gathers in every layer, and who generates has waited for the last token, so that nothing else is under way.
    if not is_traced():
        has_padding, is_packed = torch.stack((~is_token.all(), begins.any())).tolist()
    totals, starts = getattr(counted, "totals", None), getattr(counted, "starts", None)
    if totals is None and not has_padding and not is_packed:
        return RowTokens(length, seen, device)
    if totals is None:
        totals = torch.full((batch,), seen, device=device)
    if starts is None:
        starts = torch.zeros_like(totals)
    ranks = totals.unsqueeze(-1) + is_token.cumsum(-1) - 1
    started = torch.where(begins, ranks, starts.unsqueeze(-1)).cummax(-1).values
    return RowTokens(
        length, seen, device, totals, starts, ranks.masked_fill(~is_token, -1), started, has_padding=has_padding
    )


def where_documents_begin(is_token: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
    """[B, S]: tokens before which a document ended, as transformers' masks find them (masks.py)."""
    positions = torch.where(is_token, position_ids, -2)
    restarts = is_token[:, 1:] & (positions[:, 1:] <= positions.cummax(-1).values[:, :-1])
    is_packed = is_token.all() | restarts.any()
    breaks = F.pad(positions.diff() != 1, (1, 0), value=False)
    return breaks & is_token & is_packed
