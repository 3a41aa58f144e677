"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1): V2, V2-Lite, V2.5, V3, R1, V3.1.

Keys and values of all heads are up-projections of one latent c per token; positions live in a separate rotary part,
one key k_r for all heads. Only c and k_r are cached. There are two ways to the same result:

    expanded   [k, v] = W_kv_b c                      score = q_n k + q_r k_r        output = sum p v
    absorbed   q_c = q_n W_k, from W_kv_b = [W_k; W_v]  score = q_c c + q_r k_r      output = W_v sum p c

Expanding costs per cached token, absorbing per query, so prompts expand and decoding absorbs. Letters: B batch,
H heads, S queries, T keys, R latent width, n, r and v: widths of the positionless, rotary and value parts of a head.
"""

from collections.abc import Callable
from contextvars import ContextVar
from functools import wraps
from typing import cast

import torch
from torch import nn
from transformers.cache_utils import Cache

from .attention_core import attend, can_attend_by_blocks, is_plainly_causal
from .cache import refuse_foreign_rows, takes_cache
from .fused import LatentAttention
from .layers import DeepSeekRMSNorm, is_plain_linear, is_plain_norm, project
from .rope import rotate_heads, yarn_softmax_factor
from .weight_state import state_of

# Where all that is linear says so by `bias`: torch's modules, and PEFT's LoRA, DoRA and their like.
LINEAR_MODULES = ("torch.nn.", "peft.tuners.lora.")
# The call of `generate` that is running, within which weights are taken to stay as they are.
RUNNING: ContextVar[object | None] = ContextVar("running generation", default=None)


def keeps_weights(generate: Callable) -> Callable:
    """Decorate `generate`: up-projections that had to be computed are kept while it runs."""

    @wraps(generate)
    def running(*args, **kwargs):
        token = RUNNING.set(object())
        try:
            return generate(*args, **kwargs)
        finally:
            RUNNING.reset(token)

    return running


class DeepSeekMultiHeadLatentAttention(nn.Module):
    """MLA, with the query through a latent of its own (`q_lora_rank`) or projected directly (V2-Lite)."""

    def __init__(self, config, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx, self.is_causal = config, layer_idx, True
        self.num_heads, self.num_key_value_groups = config.num_attention_heads, 1
        self.attention_dropout = config.attention_dropout
        self.nope, self.rope, self.latent = config.qk_nope_head_dim, config.qk_rope_head_dim, config.kv_lora_rank
        self.scaling = config.qk_head_dim**-0.5 * yarn_softmax_factor(config.rope_parameters)

        query_width, bias = config.mla_query_width, config.attention_bias
        self.q_proj: nn.Linear | None = None
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(config.hidden_size, query_width, bias=False)
        else:
            self.q_a_proj = nn.Linear(config.hidden_size, config.q_lora_rank, bias=bias)
            self.q_a_layernorm = DeepSeekRMSNorm(config.q_lora_rank)
            self.q_b_proj = nn.Linear(config.q_lora_rank, query_width, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(config.hidden_size, config.mla_latent_width, bias=bias)
        self.kv_a_layernorm = DeepSeekRMSNorm(self.latent)
        self.kv_b_proj = nn.Linear(self.latent, config.mla_up_width, bias=False)
        self.o_proj = nn.Linear(config.mla_value_width, config.hidden_size, bias=bias)

    @takes_cache
    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[B, S, D] -> [B, S, D] and the attention weights [B, H, S, T] where the implementation gives them."""
        if cache is None and self.is_one_function(hidden_states, attention_mask, kwargs.get("is_causal")):
            return project(self.o_proj, self.attend_at_once(hidden_states, *position_embeddings)), None
        query = self.query(self.query_latent(hidden_states), position_embeddings)  # [B, H, S, n + r]
        rows = self.latent_rows(hidden_states, position_embeddings)  # [B, 1, S, R + r]
        seen: int | torch.Tensor = 0
        if cache is not None:
            seen = self.check_cached(rows, cache)
            rows, _ = cache.update(rows, rows[..., :0], self.layer_idx)
        output, weights = self.attend_all(query, rows, seen, attention_mask, cache, **kwargs)
        return project(self.o_proj, output.flatten(2)), weights

    def is_one_function(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, is_causal: bool | None
    ) -> bool:
        """Whether `LatentAttention` stands for all between the projections, which trains faster on CPUs."""
        length, norm, up = hidden_states.shape[1], self.kv_a_layernorm, self.kv_b_proj
        return (
            is_plainly_causal(self, attention_mask, is_causal)
            and is_plain_norm(norm)
            and is_plain_linear(up)
            and can_attend_by_blocks(self, length, length, hidden_states, norm.weight, cast(torch.Tensor, up.weight))
        )

    def attend_at_once(self, hidden_states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """[B, S, D], angles [B or 1, S, r / 2] -> [B, S, H v]."""
        query = project(self.q_b_proj if self.q_proj is None else self.q_proj, self.query_latent(hidden_states))
        rows = project(self.kv_a_proj_with_mqa, hidden_states)
        widths = self.num_heads, self.nope, self.config.rope_interleave
        norm = self.kv_a_layernorm
        weights = norm.weight, self.kv_b_proj.weight
        return LatentAttention.apply(query, rows, *weights, cos, sin, widths, norm.variance_epsilon, self.scaling)

    def check_cached(self, rows: torch.Tensor, cache: Cache) -> int | torch.Tensor:
        """How many rows are cached before those of this call.

        Raises:
            ValueError: if they are of another kind, or an activated LoRA would be put on the wrong ones of them.
        """
        refuse_foreign_rows(cache, self.layer_idx, rows)
        seen = cache.get_seq_length(self.layer_idx)
        follows = seen > 0 if isinstance(seen, int) else rows.shape[2] == 1
        if follows and is_activated_lora(self.kv_b_proj):
            raise ValueError(
                "an activated LoRA (alora_invocation_tokens) on kv_b_proj would change tokens before its invocation "
                "too, for latents are projected anew at each step; leave kv_b_proj out of target_modules"
            )
        return seen

    def attend_all(
        self,
        query: torch.Tensor,
        rows: torch.Tensor,
        seen: int | torch.Tensor,
        attention_mask: torch.Tensor | None,
        cache: Cache | None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention over all rows, in the cheaper form: [B, H, S, n + r], [B, 1, T, R + r] -> [B, S, H, v], weights.

        Args:
            seen: how many of the rows were cached before this call.
        """
        up_projection = None
        if cache is not None and self.absorbing_is_cheaper(query.shape[2], seen):
            up_projection = self.up_projection(rows, cache)
        if up_projection is None:
            return self.attend_expanded(query, rows, attention_mask, **kwargs)
        return self.attend_absorbed(query, rows, up_projection, attention_mask, **kwargs)

    def up_projection(self, rows: torch.Tensor, cache: Cache | None) -> torch.Tensor | None:
        """`up_projection_of` our projection: [H (n + v), R], or `None`."""
        cache_layer = None if cache is None else cache.layers[self.layer_idx]
        return up_projection_of(self.kv_b_proj, rows, self.latent, cache_layer)

    def query_latent(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """What queries are projected from: the normed query latent (eq. 12), or the input itself (V2-Lite)."""
        return hidden_states if self.q_proj is not None else self.q_a_layernorm(project(self.q_a_proj, hidden_states))

    def query(
        self, query_latent: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        """`query_latent` -> [B, H, S, n + r], the rotary part rotated (eq. 6-8 and 14)."""
        query = project(self.q_b_proj if self.q_proj is None else self.q_proj, query_latent)
        query = query.unflatten(-1, (self.num_heads, -1))
        return rotate_heads(self, query, *position_embeddings, self.config.rope_interleave)

    def latent_rows(
        self, hidden_states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        """[B, S, D] -> [B, 1, S, R + r], cached per token: the normed latent and the rotated key (eq. 9, 15)."""
        latent, rope = project(self.kv_a_proj_with_mqa, hidden_states).split((self.latent, self.rope), dim=-1)
        rope = rotate_heads(self, rope.unsqueeze(2), *position_embeddings, self.config.rope_interleave)
        return torch.cat((self.kv_a_layernorm(latent).unsqueeze(1), rope), dim=-1)

    def attend_expanded(
        self, query: torch.Tensor, rows: torch.Tensor, attention_mask: torch.Tensor | None, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Keys and values of every head from the latents: [B, H, S, n + r], [B, 1, T, R + r] -> [B, S, H, v]."""
        latent, rope = rows.split((self.latent, self.rope), dim=-1)
        expanded = project(self.kv_b_proj, latent.squeeze(1)).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        nope, value = expanded.split((self.nope, expanded.shape[-1] - self.nope), dim=-1)  # [B, H, T, n], [.., v]
        key = torch.cat((nope, rope.expand(-1, self.num_heads, -1, -1)), dim=-1)
        return attend(self, query, key, value, attention_mask, self.scaling, **kwargs)

    def attend_absorbed(
        self,
        query: torch.Tensor,
        rows: torch.Tensor,
        up_projection: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The latents themselves as keys and values of one head, which all queries of all heads share.

        Args:
            query: [B, H, S, n + r]; rows: [B, 1, T, R + r]; up_projection: [H (n + v), R].
        """
        batch, heads, length, _ = query.shape
        query = self.absorb(query, up_projection)
        if attention_mask is not None:
            attention_mask = attention_mask.expand(batch, heads, length, -1).reshape(batch, 1, heads * length, -1)
        kwargs["is_causal"] = False  # rows of the query are heads, not only positions; a mask says what is visible
        query = query.reshape(batch, 1, heads * length, -1)
        # Whole rows are the values too, and the rotary part of what comes out is dropped: fused kernels want one width
        # for keys and values, and without them torch makes a scaled copy of all keys.
        mixed, weights = attend(self, query, rows, rows, attention_mask, self.scaling, **kwargs)
        output = self.lift(mixed.squeeze(2).unflatten(1, (heads, length)), up_projection)
        return output, None if weights is None else weights.view(batch, heads, length, -1)

    # The head is the batch dimension of both products, so that each weight is read once for all sequences.

    def absorb(self, query: torch.Tensor, up_projection: torch.Tensor) -> torch.Tensor:
        """Queries that meet latents: [B, H, S, n + r] -> [B, H, S, R + r]."""
        key_projection = up_projection.unflatten(0, (self.num_heads, -1))[:, : self.nope]  # [H, n, R]
        nope, rope = query.split((self.nope, self.rope), dim=-1)
        by_head = nope.transpose(0, 1).flatten(1, 2) @ key_projection  # [H, B S, R]
        return torch.cat((by_head.unflatten(1, (len(query), -1)).transpose(0, 1), rope), dim=-1)

    def lift(self, mixed: torch.Tensor, up_projection: torch.Tensor) -> torch.Tensor:
        """Values from mixed rows, whose rotary part is dropped: [B, H, S, R + r] -> [B, S, H, v]."""
        value_projection = up_projection.unflatten(0, (self.num_heads, -1))[:, self.nope :]  # [H, v, R]
        by_head = mixed[..., : self.latent].transpose(0, 1).flatten(1, 2)  # [H, B S, R]
        output = by_head @ value_projection.transpose(1, 2)  # [H, B S, v]
        return output.unflatten(1, (len(mixed), -1)).permute(1, 2, 0, 3)

    def absorbing_is_cheaper(self, queries: int, seen: int | torch.Tensor) -> bool:
        """Whether `queries` new tokens after `seen` cached ones should absorb rather than expand.

        Compares multiplications per head: S R (n + v) + S T (2 R + r) against T R (n + v) + S T (n + r + v).
        """
        if self.training or torch.is_grad_enabled():
            return False  # the absorbed form may use a kept up-projection, through which no gradient flows
        if self.config._attn_implementation not in ("eager", "sdpa"):
            return False  # other kernels have no room for heads as wide as the latent
        if not isinstance(seen, int):
            return queries == 1  # static caches count on the device; asking would wait for it
        keys, per_head = seen + queries, self.nope + self.config.v_head_dim
        absorbed = queries * self.latent * per_head + queries * keys * (2 * self.latent + self.rope)
        expanded = keys * self.latent * per_head + queries * keys * (per_head + self.rope)
        return seen > 0 and absorbed < expanded


def is_activated_lora(projection: nn.Module) -> bool:
    """Whether PEFT has just told the module from which token on its adapter holds."""
    hooks = projection._forward_pre_hooks.values()
    return any("alora_offsets" in getattr(hook, "keywords", ()) for hook in hooks)


def bias_is_possible(module: nn.Module) -> bool | None:
    """Whether the module adds something to what is linear: `None` if only its answers can tell."""
    parts = [*module.modules()]
    if any(isinstance(getattr(part, "bias", None), torch.Tensor) for part in parts):
        return True
    are_known = all(type(part).__module__.startswith(LINEAR_MODULES) for part in parts)
    is_changed = any(part._forward_hooks or "forward" in vars(part) for part in parts)
    return False if are_known and not is_changed else None


def up_projection_of(kv_b_proj: nn.Module, rows: torch.Tensor, latent: int, cache_layer) -> torch.Tensor | None:
    """The matrix [H (n + v), R] that `kv_b_proj` applies to a latent, or `None` if no matrix should stand for it.

    A plain Linear gives its weight. Anything else (adapted, quantized, offloaded, hooked) is called on the identity,
    so that it is honoured as in the expanded form; it must be linear. The answer is kept on the cache layer for one
    call of `generate`, while the projection's state lasts. Outside of one it is not, for a hot-swapped adapter leaves
    no trace, nor while compiling; then few rows are expanded more cheaply.

    Args:
        rows: [B, 1, T, R + r], of the type and device that the projection gets.
        latent: R.
        cache_layer: our own kind keeps the answer; with another it is computed at each step.
    """
    if is_plain_linear(kv_b_proj):
        return cast(torch.Tensor, kv_b_proj.weight)
    if any(module._forward_pre_hooks for module in kv_b_proj.modules()):
        return None  # PEFT chooses adapters per row of the batch by such hooks; one matrix cannot
    if torch.compiler.is_compiling() or RUNNING.get() is None or not hasattr(cache_layer, "up_projection"):
        return None if rows.shape[-2] <= latent else matrix_of(kv_b_proj, rows, latent)
    state, kept = (RUNNING.get(), *state_of(kv_b_proj)), cache_layer.up_projection
    if kept is None or kept[0] != state:
        kept = cache_layer.up_projection = state, matrix_of(kv_b_proj, rows, latent)
    return kept[1]


def matrix_of(projection: nn.Module, rows: torch.Tensor, latent: int) -> torch.Tensor | None:
    """What the projection applies to a latent, [H (n + v), R]; `None` if it adds a bias, which a matrix would lose."""
    has_bias = bias_is_possible(projection)
    if has_bias or (has_bias is None and torch.compiler.is_compiling()):
        return None  # looking at the answer would break the graph
    identity = torch.eye(latent, dtype=rows.dtype, device=rows.device)
    if has_bias is None and projection(torch.zeros_like(identity[:1])).any():
        return None
    return projection(identity).T
