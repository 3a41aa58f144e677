"""Multi-head and grouped-query attention with rotary positions over whole heads: DeepSeek-LLM and DeepSeekMoE-16B.

DeepSeek LLM (arXiv 2401.02954, section 2.2); grouped queries as in arXiv 2305.13245. The R1-Distill models add a bias
on queries, keys and values (Qwen2), or norms over the heads of queries and keys (Qwen3).
"""

import torch
from torch import nn
from transformers.cache_utils import Cache

from .attention_core import attend
from .cache import takes_cache
from .layers import DeepSeekRMSNorm, project
from .rope import rotate_heads


class DeepSeekMultiHeadAttention(nn.Module):
    """q, k, v projections per head, rotary on q and k, softmax attention, output projection."""

    def __init__(self, config, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx, self.is_causal = config, layer_idx, True
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.attention_dropout = config.attention_dropout
        self.scaling = config.head_dim**-0.5
        query_width, key_width = config.mha_query_width, config.mha_key_width
        self.q_proj = nn.Linear(config.hidden_size, query_width, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_width, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_width, bias=config.attention_bias)
        self.o_proj = nn.Linear(query_width, config.hidden_size, bias=config.mha_out_bias)
        self.q_norm = self.k_norm = None
        if config.use_qk_norm:
            self.q_norm = DeepSeekRMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = DeepSeekRMSNorm(config.head_dim, config.rms_norm_eps)

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

        def heads(states: torch.Tensor) -> torch.Tensor:
            return states.unflatten(-1, (-1, self.head_dim))  # [B, S, heads, W]

        query, key = heads(project(self.q_proj, hidden_states)), heads(project(self.k_proj, hidden_states))
        value = heads(project(self.v_proj, hidden_states)).transpose(1, 2)  # [B, heads, S, W]
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        query = rotate_heads(self, query, *position_embeddings, self.config.rope_interleave)
        key = rotate_heads(self, key, *position_embeddings, self.config.rope_interleave)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        output, weights = attend(self, query, key, value, attention_mask, self.scaling, **kwargs)
        return project(self.o_proj, output.flatten(2)), weights
