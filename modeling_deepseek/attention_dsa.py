"""DeepSeek Sparse Attention (DeepSeek-V3.2, arXiv 2512.02556, section 2.1): V3.2-Exp, V3.2.

Multi-head latent attention in which a query attends to the K keys that the indexer scores highest. Three forms:

    all        at most K keys: nothing to select, latent attention as it is
    masked     keys and values of all heads expanded, those not selected masked: short prompts, and training
    gathered   absorbed queries over the selected latents only, a few queries at a time: decoding and long prompts

Letters as in attention_mla.py (B batch, H heads, S queries, T keys, R latent width, n, r and v: widths of the parts of
a head) and K selected keys.
"""

from collections.abc import Iterator

import torch
from transformers.cache_utils import Cache

from .attention_core import attend
from .attention_mla import DeepSeekMultiHeadLatentAttention
from .cache import takes_cache
from .indexer import DeepSeekIndexer, select_keys
from .layers import is_traced

CHUNK_ELEMENTS = 2**26  # at most about so many numbers in the scores and gathered rows of one chunk of queries


class DeepSeekSparseAttention(DeepSeekMultiHeadLatentAttention):
    """Latent attention to the keys that the indexer selects."""

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.indexer = DeepSeekIndexer(config)

    @takes_cache
    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        output_index_scores: bool = False,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[B, S, D] -> [B, S, D] and the attention weights [B, H, S, T] where the implementation gives them.

        With `output_index_scores` the indexer is called once for all queries and under autograd, so that its scores
        [B, S, T] can be recorded and learnt from; else nothing is kept of them.
        """
        query_latent = self.query_latent(hidden_states)
        query = self.query(query_latent, position_embeddings)  # [B, H, S, n + r]
        rows = self.latent_rows(hidden_states, position_embeddings)  # [B, 1, S, R + r]
        with torch.set_grad_enabled(torch.is_grad_enabled() and output_index_scores):
            index_keys = self.indexer.keys(hidden_states, position_embeddings).to(rows.dtype)  # [B, 1, S, W]
        seen: int | torch.Tensor = 0
        if cache is not None:
            seen = self.check_cached(rows, cache)
            seen = seen if isinstance(seen, int) else seen.clone()  # the update counts on in place
            rows, index_keys = cache.update(rows, index_keys, self.layer_idx)

        selection = Selection(self, hidden_states, query_latent, position_embeddings, index_keys, attention_mask, seen)
        if output_index_scores:
            selection.score_all()
        if rows.shape[2] <= self.indexer.topk:
            output, weights = self.attend_all(query, rows, seen, attention_mask, cache, **kwargs)
            return self.o_proj(output.flatten(2)), weights
        up_projection = None
        if self.gathering_is_cheaper(query.shape[2], rows.shape[2]):
            up_projection = self.up_projection(rows, cache)
        if up_projection is None:
            output, weights = self.attend_expanded(query, rows, selection.whole_mask(), **kwargs)
        else:
            output, weights = self.attend_gathered(query, rows, up_projection, selection, **kwargs)
        return self.o_proj(output.flatten(2)), weights

    def attend_gathered(
        self, query: torch.Tensor, rows: torch.Tensor, up_projection: torch.Tensor, selection: "Selection", **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As `attend_absorbed`, but every query has K rows of its own: [B, H, S, n + r] -> [B, S, H, v].

        Weights are spread over all T keys again, zero at those not selected.
        """
        batch, heads, _, _ = query.shape
        outputs, all_weights = [], []
        kwargs["is_causal"] = False
        for chunk in selection.chunks():
            positions, mask = selection.select(chunk)  # [B, s, K]
            absorbed = self.absorb(query[:, :, chunk], up_projection)  # [B, H, s, R + r]
            absorbed = absorbed.transpose(1, 2).flatten(0, 1).unsqueeze(1)  # [B s, 1, H, R + r]
            gathered = gather_rows(rows, positions).flatten(0, 1).unsqueeze(1)  # [B s, 1, K, R + r]
            mask = selection.mask_at(positions, mask)
            mixed, weights = attend(self, absorbed, gathered, gathered, mask, self.scaling, **kwargs)
            mixed = mixed.squeeze(2).unflatten(0, (batch, -1)).transpose(1, 2)  # [B, H, s, R + r]
            outputs.append(self.lift(mixed, up_projection))
            if weights is not None:
                weights = weights.squeeze(1).unflatten(0, (batch, -1)).transpose(1, 2)  # [B, H, s, K]
                spread = weights.new_zeros(*weights.shape[:3], rows.shape[2])
                all_weights.append(spread.scatter(-1, positions.unsqueeze(1).expand_as(weights), weights))
        return torch.cat(outputs, dim=1), torch.cat(all_weights, dim=2) if all_weights else None

    def gathering_is_cheaper(self, queries: int, keys: int) -> bool:
        """Whether `queries` new tokens should gather their rows out of `keys` rather than mask the others.

        Compares multiplications per head: S R (n + v) + S K (2 R + r) against T R (n + v) + S T (n + r + v).
        """
        if self.training or torch.is_grad_enabled():
            return False  # as in absorbing_is_cheaper; and autograd would keep the gathered rows of all queries
        if is_traced() and queries > 1:
            return False  # a graph that leaves Python would hold for lengths of the same answer alone
        if self.config._attn_implementation not in ("eager", "sdpa"):
            return False  # other kernels have no room for heads as wide as the latent
        per_head = self.nope + self.config.v_head_dim
        gathered = queries * (self.latent * per_head + self.indexer.topk * (2 * self.latent + self.rope))
        expanded = keys * self.latent * per_head + queries * keys * (per_head + self.rope)
        return gathered < expanded


class Selection:
    """Which keys the queries of one call attend to, worked out for some queries at a time."""

    def __init__(
        self,
        attention: DeepSeekSparseAttention,
        hidden_states: torch.Tensor,
        query_latent: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        index_keys: torch.Tensor,
        attention_mask: torch.Tensor | None,
        seen: int | torch.Tensor,
    ):
        self.attention, self.indexer = attention, attention.indexer
        self.hidden_states, self.query_latent = hidden_states, query_latent
        self.position_embeddings, self.index_keys = position_embeddings, index_keys
        self.attention_mask, self.seen = attention_mask, seen
        self.scores: torch.Tensor | None = None

    def score_all(self) -> None:
        """Score all queries at once, through the indexer's forward, where hooks see it and gradients flow."""
        self.scores = self.indexer(self.hidden_states, self.query_latent, self.position_embeddings, self.index_keys)

    def chunks(self) -> Iterator[slice]:
        """Consecutive ranges of queries, short enough for `CHUNK_ELEMENTS`."""
        (batch, queries, _), keys = self.hidden_states.shape, self.index_keys.shape[2]
        rows = self.indexer.topk * (self.attention.latent + self.attention.rope)
        if is_traced():
            yield slice(0, queries)
            return
        step = max(CHUNK_ELEMENTS // (batch * (self.indexer.num_heads * keys + rows)), 1)
        for start in range(0, queries, step):
            yield slice(start, min(start + step, queries))

    def select(self, chunk: slice) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Positions [B, s, K] of the selected keys, and the mask of these queries.

        Where fewer than K keys are visible, some of the positions are not.
        """
        mask = self.mask_of(chunk)
        with torch.no_grad():
            scores = self.scores_of(chunk) if self.scores is None else self.scores[:, chunk]
            if mask is not None:
                visible = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
                scores = scores.masked_fill(~visible.any(1), float("-inf"))
            return select_keys(scores, self.indexer.topk), mask

    def scores_of(self, chunk: slice) -> torch.Tensor:
        """Scores [B, s, T] of these queries."""
        cos, sin = self.position_embeddings
        hidden_states, query_latent = self.hidden_states[:, chunk], self.query_latent[:, chunk]
        # Not by a call: who hooks the indexer to record its scores wants those of `score_all`, whole.
        return self.indexer.forward(hidden_states, query_latent, (cos[:, chunk], sin[:, chunk]), self.index_keys)

    def mask_of(self, chunk: slice) -> torch.Tensor | None:
        """The mask of these queries, [B or 1, 1 or H, s, T], boolean or to be added; `None` if they see every key."""
        mask, implementation = self.attention_mask, self.attention.config._attn_implementation
        if "flash" in implementation or not (mask is None or (isinstance(mask, torch.Tensor) and mask.ndim == 4)):
            raise ValueError(
                f"attn_implementation={implementation!r} takes no mask that could say which keys sparse attention "
                "selects; use 'sdpa' or 'eager'"
            )
        if mask is not None:
            return mask[:, :, chunk]
        if self.hidden_states.shape[1] == 1:
            return None
        device = self.hidden_states.device
        positions = torch.arange(chunk.start, chunk.stop, device=device) + self.seen
        return (torch.arange(self.index_keys.shape[2], device=device) <= positions[:, None])[None, None]

    def in_form(self, mask: torch.Tensor) -> torch.Tensor:
        """The mask as the implementation takes it: the eager one adds it to the scores."""
        if mask.dtype != torch.bool or self.attention.config._attn_implementation != "eager":
            return mask
        dtype = self.hidden_states.dtype
        return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)

    def whole_mask(self) -> torch.Tensor:
        """The mask of all queries without the keys that are not selected, [B, 1 or H, S, T]."""
        parts = []
        for chunk in self.chunks():
            positions, mask = self.select(chunk)
            shape = *positions.shape[:2], self.index_keys.shape[2]
            selected = torch.zeros(shape, device=positions.device).scatter(-1, positions, 1.0).bool().unsqueeze(1)
            if mask is not None and mask.dtype != torch.bool:
                parts.append(torch.where(selected, mask, torch.finfo(mask.dtype).min))
            else:
                parts.append(selected if mask is None else selected & mask)
        return self.in_form(torch.cat(parts, dim=2))

    def mask_at(self, positions: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor | None:
        """The mask [B or 1, 1 or H, s, T] at the positions [B, s, K], as [B s, 1, 1 or H, K]."""
        if mask is None:
            return None
        batch, length, count = positions.shape
        positions = positions.unsqueeze(1).expand(-1, mask.shape[1], -1, -1)
        at = mask.expand(batch, -1, -1, -1).gather(-1, positions)
        return self.in_form(at).transpose(1, 2).reshape(batch * length, 1, -1, count)


def gather_rows(rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """[B, 1, T, W] at [B, s, K] -> [B, s, K, W]."""
    # On a CPU index_select copies row by row, where indexing and gather go number by number; it has no batches.
    picked = [row[0].index_select(0, index.flatten()) for row, index in zip(rows, positions, strict=True)]
    return torch.stack(picked).unflatten(1, positions.shape[1:])
