"""Compressed attention (DeepSeek-V4, section 2.3): V4 Flash, Pro, Base and their later releases.

All heads share one key per token, which is the value too. A query sees the last n tokens as they are, and of what came
before entries that stand for m tokens each (compressor.py):

    swa    nothing else
    hca    every entry whose tokens all came before it                                    m = 128
    csa    those K of them that the indexer scores highest                                m = 4, K = 512

    tokens   0 1 2 3  4 5 6 7  8 9 10 11  12            n = 5, m = 4, query 12
    seen     [ entry ][ entry ][ entry  ]
                                x  x x  x  x            the window overlaps the entries

    query    q = rotate( unit_rms( W_b norm(W_a h) ) )          per head, no weight
    key      k = rotate( norm(W_kv h) )
    weights  softmax over keys and one sink per head, which takes weight and gives nothing
    output   W_o_b ( W_o_a^g [heads of group g] )_g             of the mixed keys, turned back by the query's position

Layers that compress rotate everything with `compress_rope_theta` and YaRN, the others with `rope_theta` alone.

Letters: B batch, H heads, S queries, K kept keys, E entries, W head width, D hidden width, G groups.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.cache_utils import Cache

from .attention_core import attend
from .cache import takes_cache
from .cache_compressed import WindowLayer, layer_of
from .compressor import Blocks, DeepSeekCompressor, blocks_of, blocks_of_differing_rows
from .indexer import DeepSeekEntryIndexer, select_keys
from .layers import DeepSeekFloat32RMSNorm, is_traced, project, unit_rms
from .rope import DeepSeekRotaryEmbedding, rotate_tail, with_entries
from .row_tokens import RowTokens

CHUNK = 256  # queries at a time: more would mask more keys outside of their windows, fewer would wait more often
SINK_WIDTH = 8  # two numbers, and what keeps rows at whole 16 bytes in bfloat16


class GroupedLinear(nn.Module):
    """G projections side by side: [B, S, G, in] -> [B, S, G * out], of a weight [G * out, in] as it is stored."""

    def __init__(self, groups: int, width: int, out_width: int):
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(torch.empty(groups * out_width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, S, G, in] -> [B, S, G * out]."""
        by_group = x.flatten(0, 1).transpose(0, 1) @ self.weight.unflatten(0, (self.groups, -1)).mT  # [G, B S, out]
        return by_group.transpose(0, 1).flatten(1).unflatten(0, x.shape[:2])


def attend_alone(
    query: torch.Tensor, rows: torch.Tensor, mask: torch.Tensor | None, sink: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one query [B, H, 1, W] to rows [B, T, W] and sinks [H]: [B, 1, H, W] and weights [B, H, 1, T].

    Heads are the rows of its products, so that each key is read once, and scores are float32.
    """
    scores = query.squeeze(2).float() @ rows.float().mT * scaling  # [B, H, T]
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    sinks = sink.float().view(1, -1, 1).expand(len(scores), -1, -1)
    weights = torch.cat((scores, sinks), dim=-1).softmax(-1)[..., :-1].to(rows.dtype)
    return (weights @ rows).unsqueeze(1), weights.unsqueeze(2)


class DeepSeekWindowAttention(nn.Module):
    """A sliding window with sinks: queries, keys and output as all layers of V4 have them."""

    def __init__(self, config, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx, self.is_causal = config, layer_idx, True
        self.num_heads, self.num_key_value_groups = config.num_attention_heads, 1
        self.attention_dropout, self.eps = config.attention_dropout, config.rms_norm_eps
        self.normalizes_heads = config.normalizes_query_heads
        self.window, self.groups, self.scaling = config.sliding_window, config.o_groups, config.head_dim**-0.5
        self.wq_a = nn.Linear(config.hidden_size, config.q_lora_rank, bias=False)
        self.q_norm = DeepSeekFloat32RMSNorm(config.q_lora_rank, self.eps)
        self.wq_b = nn.Linear(config.q_lora_rank, config.mha_query_width, bias=False)
        self.wkv = nn.Linear(config.hidden_size, config.head_dim, bias=False)
        self.kv_norm = DeepSeekFloat32RMSNorm(config.head_dim, self.eps)
        self.wo_a = GroupedLinear(config.o_groups, config.o_group_width, config.o_lora_rank)
        self.wo_b = nn.Linear(config.o_latent_width, config.hidden_size, bias=False)
        self.attn_sink = nn.Parameter(torch.empty(config.num_attention_heads))

    @takes_cache
    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: RowTokens,
        position_ids: torch.Tensor,
        cache: Cache | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[B, S, D] -> [B, S, D], and the weights [B, H, S, K + S + entries] where the implementation gives them.

        Args:
            attention_mask: which tokens belong together.
            position_ids: [B or 1, S], rotary positions.
            kwargs: what the implementation takes.
        """
        cos, sin = self.rotation(hidden_states, position_ids, position_embeddings, attention_mask)
        query_latent = self.q_norm(project(self.wq_a, hidden_states))
        query, keys = self.queries(query_latent, cos, sin), self.keys(hidden_states, cos, sin)

        layer = WindowLayer() if cache is None else layer_of(cache, self.layer_idx)
        keys = layer.roll("keys", keys, self.window - 1, attention_mask)  # [B, K + S, W]
        entries = self.entries(hidden_states, query_latent, position_ids, (cos, sin), attention_mask, layer, **kwargs)
        layer.finish(attention_mask, keys)
        output, weights = self.attend_in_chunks(query, keys, entries, attention_mask, **kwargs)
        return self.projected(output, cos, sin), weights

    def queries(self, query_latent: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """[B, S, query latent width] -> [B, H, S, W], rotated."""
        query = project(self.wq_b, query_latent).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        return rotate_tail(unit_rms(query, self.eps) if self.normalizes_heads else query, cos, sin)

    def keys(self, hidden_states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """[B, S, D] -> [B, S, W], rotated."""
        return rotate_tail(self.kv_norm(project(self.wkv, hidden_states)).unsqueeze(1), cos, sin).squeeze(1)

    def projected(self, mixed: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Mixed keys [B, S, H, W] -> [B, S, D], turned back by the query's position."""
        mixed = rotate_tail(mixed.transpose(1, 2), cos, -sin).transpose(1, 2)
        return project(self.wo_b, self.wo_a(mixed.flatten(2).unflatten(-1, (self.groups, -1))))

    def rotation(
        self,
        hidden_states: torch.Tensor,
        position_ids: torch.Tensor,
        main: tuple[torch.Tensor, torch.Tensor],
        tokens: RowTokens,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin of this layer."""
        return main

    def entries(self, *args, **kwargs) -> "Entered":
        """What queries see beyond the window: nothing."""
        return Entered()

    def attend_in_chunks(
        self, query: torch.Tensor, keys: torch.Tensor, entries: "Entered", tokens: RowTokens, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[B, H, S, W], [B, K + S, W] -> [B, S, H, W], a few queries at a time and only the keys that they may see."""
        length, kept = query.shape[2], keys.shape[1] - query.shape[2]
        # eager weights are given whole, and a graph holds for other lengths too
        is_whole = is_traced() or self.config._attn_implementation == "eager" or length <= CHUNK
        outputs, weights = [], None
        for start in (0,) if is_whole else range(0, length, CHUNK):
            chunk = slice(start, length if is_whole else min(start + CHUNK, length))
            near = slice(0, keys.shape[1])
            if tokens.are_columns and not is_whole:
                near = slice(max(kept + chunk.start - self.window + 1, 0), kept + chunk.stop)
            mask = None
            if length > 1 or not tokens.are_columns:
                asked = chunk, near, kept, self.window  # [B or 1, s, k]
                if is_whole:
                    mask = tokens.once(("keys", kept, self.window), partial(tokens.sees_keys, *asked))
                else:
                    mask = tokens.sees_keys(*asked)
            rows, mask = entries.beside(keys[:, near], mask, chunk, tokens)
            output, weights = self.attend_with_sink(query[:, :, chunk], rows, mask, **kwargs)
            outputs.append(output)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1), weights if is_whole else None

    def attend_with_sink(
        self, query: torch.Tensor, rows: torch.Tensor, mask: torch.Tensor | None, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention of [B, H, s, W] to rows [B, T, W] that are keys and values, and to the head's sink.

        The sink is one more row: it meets two further numbers of the query, which hold the sink's score and what
        rounding took of it. So every implementation computes it as any other key.
        """
        batch, heads, length, width = query.shape
        if length == 1 and self.is_plain_attention():
            return attend_alone(query, rows, mask, self.attn_sink, self.scaling)
        score = self.attn_sink.float() / self.scaling
        high = score.to(query.dtype)
        low = (score - high.float()).to(query.dtype)
        further = F.pad(torch.stack((high, low), dim=-1), (0, SINK_WIDTH - 2))  # [H, 8]
        query = torch.cat((query, further[None, :, None].expand(batch, -1, length, -1)), dim=-1)
        sink = F.pad(rows.new_ones(1, 1, 2), (width, SINK_WIDTH - 2)).expand(batch, -1, -1)
        rows = torch.cat((F.pad(rows, (0, SINK_WIDTH)), sink), dim=1).unsqueeze(1)  # [B, 1, T + 1, W + 8]
        if mask is not None:
            mask = self.in_form(F.pad(mask, (0, 1), value=True).unsqueeze(1), query.dtype)
        kwargs["is_causal"] = False
        rows = rows.expand(-1, heads, -1, -1)
        mixed, weights = attend(self, query, rows, rows, mask, self.scaling, **kwargs)
        return mixed[..., :width], None if weights is None else weights[..., :-1]

    def is_plain_attention(self) -> bool:
        """Whether the implementation asked for computes what `attend_alone` does, and nothing random."""
        return self.config._attn_implementation in ("eager", "sdpa") and not (self.training and self.attention_dropout)

    def in_form(self, mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """A boolean mask as the implementation takes it: the eager one adds it to the scores."""
        implementation = str(self.config._attn_implementation)
        if "flash" in implementation or "flex" in implementation:
            raise ValueError(
                f"attn_implementation={implementation!r} has no form for keys and entries; use 'sdpa' or 'eager'"
            )
        if implementation != "eager":
            return mask
        return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


class Entered:
    """What the queries of one call see beyond their windows; nothing."""

    def beside(
        self, keys: torch.Tensor, mask: torch.Tensor | None, chunk: slice, tokens: RowTokens
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Keys [B, k, W] and their mask [B or 1, s, k] with the entries that these queries see: rows and mask."""
        return keys, mask


class AllEntries(Entered):
    """Entries [B, E, W], each seen once its last token, of rank `ends` [B or 1, E], is past."""

    def __init__(self, rows: torch.Tensor, ends: torch.Tensor, ratio: int):
        self.rows, self.ends, self.ratio = rows, ends, ratio

    def beside(self, keys, mask, chunk, tokens):
        """As above."""
        count = self.reachable(chunk, tokens)
        rows = torch.cat((keys, self.rows[:, :count].to(keys.dtype)), dim=1)
        if mask is None:
            return rows, None  # one query at the end sees all
        return rows, torch.cat((mask, tokens.sees_entries(chunk, self.ends[:, :count])), dim=-1)

    def reachable(self, chunk: slice, tokens: RowTokens) -> int:
        """How many entries the last of these queries could see."""
        return (tokens.seen + chunk.stop) // self.ratio if tokens.are_columns else self.rows.shape[1]


class ChosenEntries(AllEntries):
    """Of the entries that it could see, each query sees the `topk` that `scores_of` queries and entries finds best."""

    def __init__(
        self, rows: torch.Tensor, ends: torch.Tensor, ratio: int, topk: int, gathers: bool, scores_of: Callable
    ):
        super().__init__(rows, ends, ratio)
        self.topk, self.gathers, self.scores_of = topk, gathers, scores_of

    def beside(self, keys, mask, chunk, tokens):
        """As above."""
        count = self.reachable(chunk, tokens)
        if count <= self.topk:
            return super().beside(keys, mask, chunk, tokens)
        with torch.no_grad():
            scores = self.scores_of(chunk, count)  # [B, s, E]
        if mask is None and self.gathers:  # one query at the end, which could see all
            return torch.cat((keys, self.rows_at(select_keys(scores, self.topk), keys.dtype)), dim=1), None
        seen = tokens.sees_entries(chunk, self.ends[:, :count]).expand_as(scores)
        chosen = select_keys(scores.masked_fill(~seen, float("-inf")), self.topk)
        if self.gathers and chosen.shape[1] == 1:
            entries, seen = self.rows_at(chosen, keys.dtype), seen.gather(-1, chosen)
        else:
            entries = self.rows[:, :count].to(keys.dtype)
            seen = seen & torch.zeros_like(scores).scatter(-1, chosen, 1.0).bool()
        rows = torch.cat((keys, entries), dim=1)
        if mask is None:
            mask = seen.new_ones(1, 1, keys.shape[1])
        return rows, torch.cat((mask.expand(seen.shape[0], -1, -1), seen), dim=-1)

    def rows_at(self, chosen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """[B, 1, K] places -> [B, K, W]."""
        return self.rows.gather(1, chosen.mT.expand(-1, -1, self.rows.shape[-1])).to(dtype)


class DeepSeekHeavilyCompressedAttention(DeepSeekWindowAttention):
    """A window, and every entry of many tokens (hca)."""

    overlaps = False

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.ratio = config.compress_ratios[layer_idx]
        self.compressor = DeepSeekCompressor(config, config.head_dim, self.ratio, self.overlaps)
        self.rotary_emb = DeepSeekRotaryEmbedding(with_entries(config))

    def rotation(self, hidden_states, position_ids, main, tokens):
        """As above, of layers that compress."""
        key = "rotation", hidden_states.dtype, hidden_states.device
        return tokens.once(key, lambda: self.rotary_emb(hidden_states, position_ids))

    def entries(
        self,
        hidden_states: torch.Tensor,
        query_latent: torch.Tensor,
        position_ids: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        tokens: RowTokens,
        layer: WindowLayer,
        **kwargs: Any,
    ) -> Entered:
        """The entries so far, those that this call ends among them."""
        layer.ratio = self.ratio
        rows, ends = self.compress("compressor", self.compressor, hidden_states, position_ids, tokens, layer)
        layer.ends = None if tokens.are_columns else ends
        return AllEntries(rows, ends, self.ratio)

    def compress(
        self,
        name: str,
        compressor: DeepSeekCompressor,
        hidden_states: torch.Tensor,
        position_ids: torch.Tensor,
        tokens: RowTokens,
        layer: WindowLayer,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Entries [B, E, W] of this kind, old and new, and the ranks [B or 1, E] of their last tokens."""
        rows = layer.roll(name, compressor.rows(hidden_states), compressor.keep, tokens)
        kept = rows.shape[1] - tokens.length
        asked = (tokens, position_ids, self.ratio, compressor.span, kept)

        def find() -> tuple[Blocks, torch.Tensor]:
            if not tokens.are_columns:
                return blocks_of_differing_rows(*asked, layer.known_ends(tokens))
            count = (tokens.seen + tokens.length) // self.ratio
            return blocks_of(*asked), (torch.arange(count, device=rows.device) * self.ratio + self.ratio - 1)[None]

        blocks, ends = tokens.once(("blocks", *asked[2:], rows.device), find)
        if not blocks.rows.shape[1]:
            return layer.emit(name, hidden_states[:, :0, : compressor.width], None, tokens), ends
        new = compressor(rows, blocks, self.rotary_emb).to(hidden_states.dtype)
        return layer.emit(name, new, blocks.places, tokens), ends


class DeepSeekCompressedSparseAttention(DeepSeekHeavilyCompressedAttention):
    """A window, and of overlapping entries of few tokens those that the indexer chooses (csa)."""

    overlaps = True

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.indexer = DeepSeekEntryIndexer(config)
        self.indexer.compressor = DeepSeekCompressor(config, config.index_head_dim, self.ratio, self.overlaps)

    def entries(
        self,
        hidden_states: torch.Tensor,
        query_latent: torch.Tensor,
        position_ids: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        tokens: RowTokens,
        layer: WindowLayer,
        output_index_scores: bool = False,
        **kwargs: Any,
    ) -> Entered:
        """As above. With `output_index_scores` all scores are computed at once and under autograd, to be learnt from;
        an entry that a query can't see has one too."""
        layer.ratio, indexer = self.ratio, self.indexer
        rows, ends = self.compress("compressor", self.compressor, hidden_states, position_ids, tokens, layer)
        with torch.set_grad_enabled(torch.is_grad_enabled() and output_index_scores):
            detached = hidden_states.detach()
            keys, _ = self.compress("indexer", indexer.compressor, detached, position_ids, tokens, layer)
        layer.ends = None if tokens.are_columns else ends
        cos, sin = rotation
        scores = indexer(hidden_states, query_latent, rotation, keys.unsqueeze(1)) if output_index_scores else None

        def scores_of(chunk: slice, count: int) -> torch.Tensor:
            """[B, s, E] scores of these queries with the first entries."""
            if scores is not None:
                return scores[:, chunk, :count]
            asked = hidden_states[:, chunk], query_latent[:, chunk], (cos[:, chunk], sin[:, chunk])
            return indexer.forward(*asked, keys[:, None, :count])

        gathers = self.config._attn_implementation != "eager"  # whose weights are given for all entries
        return ChosenEntries(rows, ends, self.ratio, indexer.topk, gathers, scores_of)
