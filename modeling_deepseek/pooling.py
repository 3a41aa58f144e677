"""One vector for a whole text: the mean of its tokens' states, the last one, or latent attention (NV-Embed).

Letters: B texts, S tokens, D width, H heads, R latents.
"""

import torch
from torch import nn
from torch.nn import functional as F

from .layers import DeepSeekRMSNorm


def mean_of_tokens(hidden_states: torch.Tensor, is_token: torch.Tensor) -> torch.Tensor:
    """[B, S, D], [B, S] booleans -> [B, D]; zeros for a row without tokens. The sum is taken in float32, where the
    numbers of many tokens don't swamp each other."""
    weights = is_token.unsqueeze(-1).float()
    total = (hidden_states.float() * weights).sum(1)
    return (total / weights.sum(1).clamp(min=1)).to(hidden_states.dtype)


def last_token(hidden_states: torch.Tensor, is_token: torch.Tensor) -> torch.Tensor:
    """[B, S, D], [B, S] booleans -> [B, D]: the state of the last token that is no padding, on either side."""
    positions = torch.arange(hidden_states.shape[1], device=hidden_states.device)
    rows = torch.arange(hidden_states.shape[0], device=hidden_states.device)
    return hidden_states[rows, (positions * is_token).argmax(-1)]


def which_are_tokens(
    hidden_states: torch.Tensor,
    input_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    pad_token_id: int | None,
) -> torch.Tensor:
    """[B, S] booleans, false at padding: by a mask [B, T], else by token id (a ready mask of another shape says
    nothing), else all.

    Raises:
        ValueError: for a batch of rows in which nothing tells where one ends.
    """
    if attention_mask is not None and getattr(attention_mask, "ndim", 0) == 2:
        is_token = attention_mask[:, -hidden_states.shape[1] :].bool()
    elif input_ids is not None and pad_token_id is not None:
        is_token = input_ids != pad_token_id
    elif hidden_states.shape[0] == 1 or input_ids is None:
        is_token = torch.ones(hidden_states.shape[:2], dtype=torch.bool)
    else:
        raise ValueError("batches of more than one row need config.pad_token_id or an attention_mask")
    return is_token.to(hidden_states.device)


class LatentAttentionPooling(nn.Module):
    """Every token's state looks at R learned latents, then the mean over tokens (Lee et al., arXiv 2405.17428,
    section 3.1): the states are the queries, the latents keys and values, and two linear layers with a GELU follow.

    Norms and residual additions stand as in a decoder block, so fresh weights give nearly the mean of the states.
    """

    def __init__(self, hidden_size: int, num_latents: int, num_heads: int, eps: float):
        super().__init__()
        self.num_heads = num_heads
        self.latents = nn.Embedding(num_latents, hidden_size)
        self.query_norm = DeepSeekRMSNorm(hidden_size, eps)
        self.latent_norm = DeepSeekRMSNorm(hidden_size, eps)
        self.query = nn.Linear(hidden_size, hidden_size, bias=False)
        self.key = nn.Linear(hidden_size, hidden_size, bias=False)
        self.value = nn.Linear(hidden_size, hidden_size, bias=False)
        self.output = nn.Linear(hidden_size, hidden_size, bias=False)
        self.feed_forward_norm = DeepSeekRMSNorm(hidden_size, eps)
        self.up = nn.Linear(hidden_size, 4 * hidden_size)
        self.down = nn.Linear(4 * hidden_size, hidden_size)

    def forward(self, hidden_states: torch.Tensor, is_token: torch.Tensor) -> torch.Tensor:
        """[B, S, D], [B, S] booleans -> [B, D]."""
        latents = self.latent_norm(self.latents.weight).unsqueeze(0)  # [1, R, D]
        query = self._heads(self.query(self.query_norm(hidden_states)))  # [B, H, S, D / H]
        key, value = (
            self._heads(projection(latents)).expand(len(query), -1, -1, -1) for projection in (self.key, self.value)
        )  # [B, H, R, D / H]
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        hidden_states = hidden_states + self.output(attended)
        transformed = self.down(F.gelu(self.up(self.feed_forward_norm(hidden_states))))
        return mean_of_tokens(hidden_states + transformed, is_token)

    def _heads(self, states: torch.Tensor) -> torch.Tensor:
        return states.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


POOLING_FUNCTIONS = {"mean": mean_of_tokens, "last_token": last_token}
