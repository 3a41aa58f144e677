"""Softmax attention over given queries, keys and values: what all attention mechanisms end in.

The function behind `attn_implementation` comes from transformers' interface; here are its eager form and the choice
that all our mechanisms share. Letters: B batch, H heads, S query length, T key length, W head width.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .fused import CausalAttention, is_trained_as_it_is

LONGEST = 1024  # tokens of a sequence whose attention weights are kept in training


def repeat_heads(states: torch.Tensor, groups: int) -> torch.Tensor:
    """[B, H / groups, T, W] -> [B, H, T, W]: every key / value head serves `groups` query heads."""
    return states if groups == 1 else states.repeat_interleave(groups, dim=1)


def eager_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(q k^T * scaling + mask) v, with the softmax in float32.

    Args:
        query: [B, H, S, W]; key, value: [B, H / groups, T, W].
        attention_mask: added to the scores, [B or 1, 1 or H, S, T].

    Returns:
        Output [B, S, H, W] and weights [B, H, S, T].
    """
    groups = query.shape[1] // key.shape[1]
    scores = query @ repeat_heads(key, groups).transpose(-1, -2) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    output = F.dropout(weights, dropout, module.training) @ repeat_heads(value, groups)
    return output.transpose(1, 2), weights


def is_plainly_causal(module: nn.Module, attention_mask: torch.Tensor | None, is_causal: bool | None = None) -> bool:
    """Whether a token sees all up to itself, none is dropped, and torch's kernels were asked for, or what stands in
    for them."""
    is_dropped = module.training and module.attention_dropout > 0
    sees_back = bool(module.is_causal if is_causal is None else is_causal)
    return sees_back and attention_mask is None and not is_dropped and module.config._attn_implementation == "sdpa"


def can_attend_by_blocks(module: nn.Module, queries: int, keys: int, *tensors: torch.Tensor) -> bool:
    """Whether `attend_by_blocks` serves, which on CPUs trains faster than torch's kernels, and keeps weights: S^2 / 2
    of each head, so of no longer sequences than those where all else that is kept weighs more."""
    are_float32 = all(tensor.dtype == torch.float32 for tensor in tensors)
    return are_float32 and queries == keys <= LONGEST and is_trained_as_it_is(module, *tensors)


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention by the configured implementation.

    Args:
        module: has `config`, `layer_idx`, `is_causal`, `num_key_value_groups` and `attention_dropout`.
        query, key, value, attention_mask, scaling: as in `eager_attention`; the mask may also be `None` or of the
            form that the implementation asks for.

    Returns:
        Output [B, S, H, width of value], and the weights where the implementation gives them.
    """
    implementation, width = module.config._attn_implementation, value.shape[-1]
    is_causal = is_plainly_causal(module, attention_mask, kwargs.get("is_causal"))
    if is_causal and can_attend_by_blocks(module, query.shape[2], key.shape[2], query, key, value):
        groups = query.shape[1] // key.shape[1]
        return CausalAttention.apply(query, repeat_heads(key, groups), repeat_heads(value, groups), scaling), None
    dropout = module.attention_dropout if module.training else 0.0
    missing = key.shape[-1] - width
    if missing > 0 and implementation != "eager" and (implementation != "sdpa" or query.shape[2] > 1):
        # Fused kernels want one width for keys and values; without it torch falls back to the slow one.
        value = F.pad(value, (0, missing))
    output, weights = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention)(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
    )
    return output[..., :width], weights
