"""Entries of compressed attention (DeepSeek-V4, section 2.3): one row for m tokens, mixed channel by channel.

    c_j = W_kv h_j,  z_j = W_gate h_j + ape[j mod m]               float32, of width W (HCA) or 2 W (CSA)

    HCA    entry w = norm( sum over j in block w of softmax_j(z_j) * c_j )
    CSA    entry w = norm( the same over 2 m rows: first halves of block w - 1, second halves of block w )

    tokens    0 1 2 3 | 4 5 6 7 | 8 9 ..          m = 4
    entry 0   [second ]
    entry 1   [first  ] [second ]                  overlapping: the first block has none before it
    entry 2             [first  ] [second

The softmax is over the rows, one for each channel. The last channels are then rotated by the position of the block's
first token, as keys are. Blocks are counted by a row's own tokens and begin anew with each document (row_tokens.py).

Letters: B batch, S tokens of this call, K pending ones before them, N new entries, m ratio, W width.
"""

from typing import NamedTuple

import torch
from torch import nn

from .cache_compressed import NEVER
from .indexer import Float32Linear
from .layers import DeepSeekFloat32RMSNorm
from .rope import DeepSeekRotaryEmbedding, rotate_tail
from .row_tokens import RowTokens


class Blocks(NamedTuple):
    """The blocks that end within a call.

    positions: [B or 1, N] rotary positions of their first tokens.
    rows: [B or 1, N, L] where their L rows lie among pending and new ones.
    known: [B or 1, N, L] whether a row is of the block's document; `None`: all are.
    places: [B, N] where their entries belong; `None`: behind the others.
    """

    positions: torch.Tensor
    rows: torch.Tensor
    known: torch.Tensor | None
    places: torch.Tensor | None


class DeepSeekCompressor(nn.Module):
    """Rows of tokens to entries. Parameter names are the checkpoints'."""

    def __init__(self, config, width: int, ratio: int, overlaps: bool):
        super().__init__()
        self.ratio, self.span, self.width = ratio, 2 * ratio if overlaps else ratio, width
        inner = 2 * width if overlaps else width
        self.wkv = Float32Linear(config.hidden_size, inner, bias=False)
        self.wgate = Float32Linear(config.hidden_size, inner, bias=False)
        self.ape = nn.Parameter(torch.empty(ratio, inner))
        self.norm = DeepSeekFloat32RMSNorm(width, config.rms_norm_eps)

    @property
    def keep(self) -> int:
        """How many tokens before a call a block that ends in it may begin."""
        return self.span - 1

    def rows(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[B, S, D] -> float32 [B, S, 2 * inner]: contents beside gates, kept until their blocks are whole."""
        return torch.cat((self.wkv(hidden_states), self.wgate(hidden_states)), dim=-1)

    def forward(self, rows: torch.Tensor, blocks: Blocks, rotary: DeepSeekRotaryEmbedding) -> torch.Tensor:
        """Pending and new rows [B, K + S, 2 * inner] -> float32 entries [B, N, W], rotated."""
        batch, count, span = rows.shape[0], *blocks.rows.shape[1:]
        index = blocks.rows.expand(batch, -1, -1).flatten(1)
        picked = rows.gather(1, index.unsqueeze(-1).expand(-1, -1, rows.shape[-1])).unflatten(1, (count, span))
        content, gate = picked.chunk(2, dim=-1)  # [B, N, L, inner]
        gate = gate + self.ape.float().repeat(span // self.ratio, 1)
        if span > self.ratio:
            content, gate = self.halves(content), self.halves(gate)
        if blocks.known is not None:
            gate = gate.masked_fill(~blocks.known.unsqueeze(-1), float("-inf"))
        entries = self.norm((content * gate.softmax(dim=2)).sum(2))
        cos, sin = rotary(entries, blocks.positions)
        return rotate_tail(entries.unsqueeze(1), cos, sin).squeeze(1)

    def halves(self, rows: torch.Tensor) -> torch.Tensor:
        """[B, N, 2 m, 2 W] -> [B, N, 2 m, W]: first halves of the block before, second halves of the block itself."""
        before, itself = rows.chunk(2, dim=2)
        return torch.cat((before[..., : self.width], itself[..., self.width :]), dim=2)


def blocks_of(tokens: RowTokens, position_ids: torch.Tensor, ratio: int, span: int, kept: int) -> Blocks:
    """The blocks of `ratio` tokens that end in a call, where rows don't differ.

    Args:
        span: rows that an entry is made of: `ratio`, or twice that.
        kept: how many rows are pending before those of the call.
    """
    first, last = tokens.seen // ratio, (tokens.seen + tokens.length) // ratio
    ends = torch.arange(first, last, device=tokens.device) * ratio + ratio - 1  # ranks
    rows = ends.unsqueeze(-1) - (tokens.seen - kept) + torch.arange(1 - span, 1, device=tokens.device)
    known = None
    if first == 0 and span > ratio:
        known = (ends.unsqueeze(-1) + torch.arange(1 - span, 1, device=tokens.device) >= 0).unsqueeze(0)
    positions = position_ids[:, ends - tokens.seen] - (ratio - 1)
    return Blocks(positions, rows.clamp(min=0).unsqueeze(0), known, None)


def blocks_of_differing_rows(
    tokens: RowTokens, position_ids: torch.Tensor, ratio: int, span: int, kept: int, ends: torch.Tensor
) -> tuple[Blocks, torch.Tensor]:
    """As `blocks_of`, with `places`, and the ends of all entries after the call.

    Args:
        ends: [B, E], of those before it. Each row gets as many new entries as any could have; those that it hasn't
            lie behind its last one, and are written over by later ones.
    """
    batch, device = tokens.ranks.shape[0], tokens.device
    count = (tokens.length + ratio - 1) // ratio
    ranks = tokens.rank_of_keys(kept).expand(batch, -1)  # [B, K + S]
    starts = tokens.start_of_keys(kept)
    closes = (ranks >= tokens.totals.unsqueeze(-1)) & ((ranks - starts + 1) % ratio == 0)
    number = closes.cumsum(-1)  # of the closing token among those of its row, from 1
    columns = torch.arange(ranks.shape[1], device=device).expand(batch, -1)
    target = torch.where(closes, number - 1, count)
    at = columns.new_zeros(batch, count + 1).scatter(1, target, columns)[:, :count]  # [B, N]
    is_there = torch.arange(count, device=device) < number[:, -1:]
    new_ends = torch.where(is_there, ranks.gather(1, at), NEVER)
    rows = at.unsqueeze(-1) + torch.arange(1 - span, 1, device=device)  # [B, N, L]
    in_document = ranks.gather(1, at).unsqueeze(-1) + torch.arange(1 - span, 1, device=device)
    known = in_document >= starts.gather(1, at).unsqueeze(-1)
    known[..., -1] = True  # one row at least, where there is no block
    filled = (ends < NEVER).sum(-1, keepdim=True)
    places = filled + torch.arange(count, device=device)
    last = (tokens.seen + tokens.length) // ratio
    room = ends.new_full((batch, last + count), NEVER)
    room[:, : ends.shape[1]] = ends
    after = room.scatter(1, places, new_ends)[:, :last]
    positions = _positions_at(tokens, position_ids, new_ends) - (ratio - 1)
    return Blocks(positions, rows.clamp(min=0), known, places), after


def _positions_at(tokens: RowTokens, position_ids: torch.Tensor, ranks: torch.Tensor) -> torch.Tensor:
    """[B, N]: rotary positions of the call's tokens with these ranks [B, N]; 0 where there is none."""
    own = tokens.ranks - tokens.totals.unsqueeze(-1)  # among those of this call
    length = tokens.length
    by_rank = torch.zeros(own.shape[0], length + 1, dtype=position_ids.dtype, device=tokens.device)
    target = torch.where(tokens.ranks >= 0, own, length)
    by_rank = by_rank.scatter(1, target, position_ids.expand(own.shape[0], -1))[:, :length]
    wanted = ranks - tokens.totals.unsqueeze(-1)
    is_there = (wanted >= 0) & (wanted < length)
    return torch.where(is_there, by_rank.gather(1, wanted.clamp(0, length - 1)), 0)
