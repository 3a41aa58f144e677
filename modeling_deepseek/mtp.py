"""Multi-token prediction (DeepSeek-V3, arXiv 2412.19437, section 2.2): one more decoder layer per further token.

    x_i = W_eh [ enorm(Emb(t_{i+d})) ; hnorm(h_i^{d-1}) ]     eq. 21; the checkpoints have the embedding first
    h^d = Block(x)                                            eq. 22
    p_i = Head(norm(h_i^d)) predicts t_{i+d+1}                eq. 23

h^0 is the trunk's state. Embedding and head are those of the language model: checkpoints hold copies of them, which
are not held here (checkpoint_keys.py). V3, R1, V3.1 and V3.2 have d = 1, as layer `num_hidden_layers`.

V4 has residual streams (residual.py) here too, and adds where V3 joins: stream n of N begins as

    x_i^n = W_e enorm(Emb(t_{i+d})) + W_h hnorm(X_i^n)

of the trunk's streams X, and a weighing of its own makes one state of them before the norm of the head.
"""

import torch
from torch import nn

from .layers import norm_of
from .residual import STREAMS


class SharedHead(nn.Module):
    """The norm before the head; the head itself is `lm_head`."""

    def __init__(self, config):
        super().__init__()
        self.norm = norm_of(config)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[B, S, D] -> [B, S, D]."""
        return self.norm(hidden_states)


class MultiTokenPrediction(nn.Module):
    """What a prediction layer has beside the decoder layer that it is; comes before it among the base classes."""

    predicts_ahead = True

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.enorm, self.hnorm = norm_of(config), norm_of(config)
        self.add_projections(config)
        self.shared_head = SharedHead(config)

    def add_projections(self, config) -> None:
        """Register what joins embedding and state."""
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)

    def joined(self, hidden_states: torch.Tensor, next_embeds: torch.Tensor) -> torch.Tensor:
        """[B, S, D] twice -> [B, S, D]."""
        return self.eh_proj(torch.cat((self.enorm(next_embeds), self.hnorm(hidden_states)), dim=-1))

    def forward(self, hidden_states: torch.Tensor, next_embeds: torch.Tensor, **kwargs) -> torch.Tensor:
        """States and embeddings of the tokens ahead, both [B, S, D] -> [B, S, D] before the norm of the head."""
        return super().forward(self.joined(hidden_states, next_embeds), **kwargs)

    def predicted(self, state: torch.Tensor) -> torch.Tensor:
        """What `forward` gave -> [B, S, D] for the head."""
        return self.shared_head(state)


class StreamPrediction(MultiTokenPrediction):
    """The same for a decoder layer with N residual streams: states are [B, S, N, D]."""

    def add_projections(self, config) -> None:
        """Register what joins embedding and streams, and what makes one state of them again."""
        self.e_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.h_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.hc_head = STREAMS["mhc"](config)

    def joined(self, hidden_states: torch.Tensor, next_embeds: torch.Tensor) -> torch.Tensor:
        """[B, S, N, D] and [B, S, D] -> [B, S, N, D]."""
        return self.e_proj(self.enorm(next_embeds)).unsqueeze(-2) + self.h_proj(self.hnorm(hidden_states))

    def predicted(self, state: torch.Tensor) -> torch.Tensor:
        """[B, S, N, D] -> [B, S, D] for the head."""
        return self.shared_head(self.hc_head(state))


def shift_left(states: torch.Tensor, places: int, fill: float = 0) -> torch.Tensor:
    """[B, S, ...] -> the same shape, row i holding what stood at i + places: [a, b, c] -> [b, c, fill]."""
    tail = torch.full_like(states[:, :places], fill)
    return torch.cat((states[:, places:], tail), dim=1)
