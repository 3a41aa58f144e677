"""Multi-token prediction (DeepSeek-V3, arXiv 2412.19437, section 2.2): one more decoder layer per further token.

    x_i = W_eh [ enorm(Emb(t_{i+d})) ; hnorm(h_i^{d-1}) ]     eq. 21; the checkpoints have the embedding first
    h^d = Block(x)                                            eq. 22
    p_i = Head(norm(h_i^d)) predicts t_{i+d+1}                eq. 23

h^0 is the trunk's state. Embedding and head are those of the language model: checkpoints hold copies of them, which
are not held here (checkpoint_keys.py). V3, R1, V3.1 and V3.2 have d = 1, as layer `num_hidden_layers`.
"""

import torch
from torch import nn

from .layers import DeepSeekRMSNorm


class SharedHead(nn.Module):
    """The norm before the head; the head itself is `lm_head`."""

    def __init__(self, config):
        super().__init__()
        self.norm = DeepSeekRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[B, S, D] -> [B, S, D]."""
        return self.norm(hidden_states)


class MultiTokenPrediction(nn.Module):
    """What a prediction layer has beside the decoder layer that it is; comes before it among the base classes."""

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.enorm = DeepSeekRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = DeepSeekRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.shared_head = SharedHead(config)

    def forward(self, hidden_states: torch.Tensor, next_embeds: torch.Tensor, **kwargs) -> torch.Tensor:
        """States and embeddings of the tokens ahead, both [B, S, D] -> [B, S, D] before the norm of the head."""
        joined = torch.cat((self.enorm(next_embeds), self.hnorm(hidden_states)), dim=-1)
        return super().forward(self.eh_proj(joined), **kwargs)


def shift_left(states: torch.Tensor, places: int, fill: float = 0) -> torch.Tensor:
    """[B, S, ...] -> the same shape, row i holding what stood at i + places: [a, b, c] -> [b, c, fill]."""
    tail = torch.full_like(states[:, :places], fill)
    return torch.cat((states[:, places:], tail), dim=1)
