"""Compressed attention with entries that layers share (CSA2; DeepSeek-V4.1's report and released code).

Beside its window a query sees the K entries that an indexer chose. As in V4 (attention_compressed.py), but few layers
make entries, and few choose; the others read what the last one that did has left:

    csa2_full     makes entries and their index keys, chooses        V4.1-Flash: layers 2, 8, 14 (m = 2), 20 (m = 1)
    csa2_reindex  chooses anew, of the same entries by the same keys             24, 28, 32, 36
    csa2_reuse    takes entries and choice as they are                           the others

    layer      2        3        4   ..   20        21  ..   24        25
    entries    make --> read --> read     make ---> read --> read ---> read
    choice     K of all -------> -------  K of all -------> K of blocks ->

    entry      c_w = norm( sum over block w of softmax_j(W_gate h_j) * W_kv h_j )      m = 2; norm(W_kv h) for m = 1
               rotated by the position of the block's first token; no overlap, no bias by place
    index key  k_w = rotate( norm(W_k c_w) )                                           of the entry before its rotation
    score      I(t, w) = sum over heads of w_h(t) relu(q_h(t) . k_w)
    blocks     (layer 20) of 8 entries each, by their best score, the newest always: later layers choose inside of them

    tokens   0 1  2 3  4 5  6 7  8 9  10           window 3, m = 2, K = 2, query 10
    seen     [e0] [  ] [e2] [  ] [  ]
                                   x  x            heads are normalised neither here nor in the first layers

Letters: B batch, H heads, S queries, E entries, W head width, K entries chosen, N blocks of entries, D hidden width.
"""

from typing import Any, NamedTuple

import torch
from torch import nn

from .attention_compressed import (
    CHUNK,
    AllEntries,
    DeepSeekHeavilyCompressedAttention,
    DeepSeekWindowAttention,
    Entered,
)
from .cache_compressed import WindowLayer
from .compressor import Blocks, blocks_of, blocks_of_differing_rows
from .indexer import DeepSeekEntryIndexer, Float32Linear, select_keys
from .layers import DeepSeekFloat32RMSNorm, is_traced
from .rope import DeepSeekRotaryEmbedding, rotate_tail, with_entries
from .row_tokens import RowTokens


class Published(NamedTuple):
    """What layers leave for those behind them, as tensors, so that gradients find their way.

    rows: [B, E, W] entries; ends: [B or 1, E] ranks of their last tokens; keys: [B, E, index width].
    chosen: [B, S, K] entries of each query, -1 where there are fewer; `None`: all that it sees.
    blocks: [B, S, N] whether a block of entries is looked at, counted from the begin of the query's document; `None`:
        all are.
    """

    rows: torch.Tensor | None = None
    ends: torch.Tensor | None = None
    keys: torch.Tensor | None = None
    chosen: torch.Tensor | None = None
    blocks: torch.Tensor | None = None


class Shared:
    """What a layer finds published, and leaves: an object of one call of one layer."""

    def __init__(self, *published: torch.Tensor | None):
        self.published = Published(*published)

    def publish(self, **changes: torch.Tensor | None) -> None:
        """Replace some of it."""
        self.published = self.published._replace(**changes)


class ReadEntries(AllEntries):
    """Entries that another layer made, of which each query sees those that were chosen for it."""

    def __init__(self, published: Published, ratio: int, gathers: bool):
        super().__init__(published.rows, published.ends, ratio)
        self.chosen, self.gathers = published.chosen, gathers

    def beside(self, keys, mask, chunk, tokens):
        """As above."""
        if self.chosen is None:
            return super().beside(keys, mask, chunk, tokens)
        chosen = self.chosen[:, chunk]  # [B, s, K]
        if self.gathers and chosen.shape[1] == 1:
            index = chosen.squeeze(1).clamp(min=0).unsqueeze(-1).expand(-1, -1, keys.shape[-1])
            entries, seen = self.rows.to(keys.dtype).gather(1, index), chosen >= 0
        else:
            count = self.reachable(chunk, tokens)
            entries = self.rows[:, :count].to(keys.dtype)
            seen = chosen.new_zeros(*chosen.shape[:2], count + 1, dtype=torch.float32)
            index = torch.where(chosen < 0, count, chosen)
            seen = seen.scatter(-1, index, 1.0)[..., :count].bool()
        if mask is None:
            mask = seen.new_ones(1, 1, keys.shape[1])
        return torch.cat((keys, entries), dim=1), torch.cat((mask.expand(seen.shape[0], -1, -1), seen), dim=-1)


class DeepSeekPlainCompressor(nn.Module):
    """Blocks of m tokens to rows before their rotation. Parameter names are the checkpoints'; m = 1 has no gate."""

    def __init__(self, config, ratio: int):
        super().__init__()
        self.ratio = self.span = ratio
        projection = Float32Linear if ratio > 1 else nn.Linear
        self.wkv = projection(config.hidden_size, config.head_dim, bias=False)
        if ratio > 1:
            self.wgate = projection(config.hidden_size, config.head_dim, bias=False)
        self.norm = DeepSeekFloat32RMSNorm(config.head_dim, config.rms_norm_eps)

    def rows(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[B, S, D] -> [B, S, 2 W] contents beside gates, kept until their blocks are whole; [B, S, W] for m = 1."""
        parts = [self.wkv] if self.ratio == 1 else [self.wkv, self.wgate]
        return torch.cat([part(hidden_states) for part in parts], dim=-1)

    def forward(self, rows: torch.Tensor, blocks: Blocks) -> torch.Tensor:
        """Pending and new rows [B, K + S, W or 2 W] -> [B, N, W]."""
        batch, count, span = rows.shape[0], *blocks.rows.shape[1:]
        index = blocks.rows.expand(batch, -1, -1).flatten(1).unsqueeze(-1).expand(-1, -1, rows.shape[-1])
        picked = rows.gather(1, index).unflatten(1, (count, span))
        if self.ratio == 1:
            return self.norm(picked.squeeze(2))
        content, gate = picked.chunk(2, dim=-1)  # [B, N, m, W]
        if blocks.known is not None:
            gate = gate.masked_fill(~blocks.known.unsqueeze(-1), float("-inf"))
        return self.norm((content * gate.softmax(dim=2)).sum(2))


class DeepSeekReusingAttention(DeepSeekWindowAttention):
    """A window, and the entries that were chosen for an earlier layer (csa2_reuse)."""

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.ratio = config.compress_ratios[layer_idx]
        self.rotary_emb = DeepSeekRotaryEmbedding(with_entries(config))

    rotation = DeepSeekHeavilyCompressedAttention.rotation

    def entries(
        self,
        hidden_states: torch.Tensor,
        query_latent: torch.Tensor,
        position_ids: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        tokens: RowTokens,
        layer: WindowLayer,
        shared: Shared | None = None,
        output_index_scores: bool = False,
        **kwargs: Any,
    ) -> Entered:
        """What `shared` has, after this layer's part in it.

        Raises:
            ValueError: if no layer before has made entries, as where layers are called one by one.
        """
        shared = Shared() if shared is None else shared
        self.change(shared, hidden_states, query_latent, position_ids, rotation, tokens, layer, output_index_scores)
        if shared.published.rows is None:
            raise ValueError(f"layer {self.layer_idx} reads entries that no layer made; run the layers in order")
        gathers = self.config._attn_implementation != "eager"  # whose weights are given for all entries
        return ReadEntries(shared.published, self.ratio, gathers)

    def change(self, shared: Shared, *args) -> None:
        """Publish what this layer has to: nothing."""


class DeepSeekReindexingAttention(DeepSeekReusingAttention):
    """The same with a choice of its own (csa2_reindex)."""

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.indexer = DeepSeekEntryIndexer(config)
        self.block_size, self.top_blocks = config.candidate_block_size, config.candidate_topk_blocks
        self.offers_blocks = layer_idx == config.candidate_source

    def change(
        self, shared, hidden_states, query_latent, position_ids, rotation, tokens, layer, output_index_scores=False
    ):
        """Choose for each query. With `output_index_scores` the scores are computed under autograd, to be learnt
        from; an entry that a query can't see has one too."""
        keys, scores = shared.published.keys, None
        if keys is None:
            return
        asked = (hidden_states, query_latent, rotation)
        if output_index_scores:
            scores = self.indexer(*asked, keys.unsqueeze(1))
        with torch.no_grad():
            chosen, blocks = self.choose(*asked, shared.published, tokens, scores)
        shared.publish(chosen=chosen)
        if self.offers_blocks:
            shared.publish(blocks=blocks)

    def choose(
        self,
        hidden_states: torch.Tensor,
        query_latent: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        published: Published,
        tokens: RowTokens,
        scores: torch.Tensor | None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """`chosen` and `blocks` as in `Published`, a few queries at a time."""
        keys, topk, (cos, sin) = published.keys, self.indexer.topk, rotation
        entries, length = keys.shape[1], hidden_states.shape[1]
        offers = self.offers_blocks and entries > self.top_blocks * self.block_size
        if entries <= topk and published.blocks is None and not offers:
            return None, None
        step = length if is_traced() else CHUNK
        chosen, offered = [], []
        for start in range(0, length, step):
            chunk = slice(start, min(start + step, length))
            if scores is None:
                turned = cos[:, chunk], sin[:, chunk]
                found = self.indexer.forward(
                    hidden_states[:, chunk], query_latent[:, chunk], turned, keys.detach().unsqueeze(1)
                )
            else:
                found = scores[:, chunk]
            seen = tokens.sees_entries(chunk, published.ends).expand_as(found)
            found = found.masked_fill(~seen, float("-inf"))
            if offers:
                offered.append(self.best_blocks(found, seen, self.block_of(published.ends, chunk, tokens)))
            elif published.blocks is not None and not self.offers_blocks:
                numbers = self.block_of(published.ends, chunk, tokens).expand(*found.shape)
                found = found.masked_fill(~published.blocks[:, chunk].gather(-1, numbers), float("-inf"))
            best = select_keys(found, min(topk, entries))
            chosen.append(best.masked_fill(found.gather(-1, best) == float("-inf"), -1))
        return torch.cat(chosen, dim=1), torch.cat(offered, dim=1) if offered else None

    def block_of(self, ends: torch.Tensor, chunk: slice, tokens: RowTokens) -> torch.Tensor:
        """[B or 1, s or 1, E]: which block of its document an entry is in; anything where a query can't see it."""
        starts = tokens.starts[:, chunk, None]
        blocks = (ends.unsqueeze(1) - starts).clamp(min=0) // (self.ratio * self.block_size)
        return blocks.clamp(max=(ends.shape[1] - 1) // self.block_size)

    def best_blocks(self, scores: torch.Tensor, seen: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """Scores [B, s, E] of what is seen, and blocks of entries -> [B, s, N]: the best by their best, and the
        newest."""
        count = -(-scores.shape[-1] // self.block_size)
        numbers = numbers.expand_as(scores)
        best = scores.new_full((*scores.shape[:2], count), float("-inf")).scatter_reduce(-1, numbers, scores, "amax")
        newest = torch.where(seen, numbers, -1).amax(-1, keepdim=True)
        is_newest = torch.arange(count, device=scores.device) == newest
        kept = select_keys(best.masked_fill(is_newest, float("inf")), min(self.top_blocks, count))
        return torch.zeros_like(best).scatter(-1, kept, 1.0).bool()


class DeepSeekSourceAttention(DeepSeekReindexingAttention):
    """The same with entries and index keys of its own (csa2_full)."""

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.compressor = DeepSeekPlainCompressor(config, self.ratio)
        self.indexer.wk = nn.Linear(config.head_dim, config.index_head_dim, bias=False)
        self.indexer.k_norm = DeepSeekFloat32RMSNorm(config.index_head_dim, config.rms_norm_eps)

    def change(
        self, shared, hidden_states, query_latent, position_ids, rotation, tokens, layer, output_index_scores=False
    ):
        """Make entries, then choose of them."""
        layer.ratio = self.ratio
        rows = layer.roll("compressor", self.compressor.rows(hidden_states), self.ratio - 1, tokens)
        blocks, ends = self.blocks(rows, position_ids, tokens, layer)
        latent = self.compressor(rows, blocks)
        cos, sin = self.rotary_emb(latent, blocks.positions)
        entries = rotate_tail(latent.unsqueeze(1), cos, sin).squeeze(1).to(hidden_states.dtype)
        with torch.set_grad_enabled(torch.is_grad_enabled() and output_index_scores):
            keys = self.indexer.k_norm(self.indexer.wk(latent.detach().to(hidden_states.dtype)))
            keys = rotate_tail(keys.unsqueeze(1), cos, sin).squeeze(1)
            keys = layer.emit("indexer", keys, blocks.places, tokens)
        rows = layer.emit("compressor", entries, blocks.places, tokens)
        layer.ends = None if tokens.are_columns else ends
        shared.publish(rows=rows, ends=ends, keys=keys, chosen=None, blocks=None)
        super().change(shared, hidden_states, query_latent, position_ids, rotation, tokens, layer, output_index_scores)

    def blocks(
        self, rows: torch.Tensor, position_ids: torch.Tensor, tokens: RowTokens, layer: WindowLayer
    ) -> tuple[Blocks, torch.Tensor]:
        """The blocks that end in this call, and the ends of all so far."""
        asked = (tokens, position_ids, self.ratio, self.ratio, rows.shape[1] - tokens.length)
        if not tokens.are_columns:
            return blocks_of_differing_rows(*asked, layer.known_ends(tokens))
        count = (tokens.seen + tokens.length) // self.ratio
        ends = torch.arange(count, device=rows.device) * self.ratio + self.ratio - 1
        return blocks_of(*asked), ends.unsqueeze(0)
