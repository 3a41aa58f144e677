"""The lightning indexer of DeepSeek Sparse Attention (DeepSeek-V3.2, arXiv 2512.02556, section 2.1): V3.2-Exp, V3.2.

It says for every query which keys are worth attending to, by many narrow heads that share one key per token:

    score[t, s] = sum over heads h of w[t, h] * relu(q[t, h] . k[s])                                  (eq. 1)

q is projected from the query latent of the attention, k from the layer's input through a LayerNorm with bias, w from
the layer's input. The first dimensions of q and k are rotated, in the half layout: the attention beside it rotates
interleaved pairs. The released code also turns q and k by a normalised Hadamard matrix before it rounds them to FP8;
a rotation of both changes no product, so there is none here.

Letters: B batch, S queries, T keys, J heads of the indexer, W width of each, K keys to select.
"""

import torch
from torch import nn
from torch.nn import functional as F

from .layers import without_autocast
from .rope import apply_rotary, rotate_tail


class Float32Linear(nn.Linear):
    """A projection computed in float32 whatever the type of its weight."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out] in float32."""
        with without_autocast(x):
            return F.linear(x.float(), self.weight.float(), None if self.bias is None else self.bias.float())


class DeepSeekIndexer(nn.Module):
    """Scores of all keys for each query. Module names are the checkpoints'."""

    def __init__(self, config):
        super().__init__()
        self.num_heads, self.head_dim, self.rope = config.index_n_heads, config.index_head_dim, config.qk_rope_head_dim
        self.topk = config.index_topk
        self.wq_b = nn.Linear(config.q_lora_rank, config.index_query_width, bias=False)
        self.wk = nn.Linear(config.hidden_size, self.head_dim, bias=False)
        self.k_norm = nn.LayerNorm(self.head_dim, eps=1e-6)
        self.weights_proj = Float32Linear(config.hidden_size, self.num_heads, bias=False)

    def keys(
        self, hidden_states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        """[B, S, D] -> [B, 1, S, W], cached per token."""
        return self.rotated(self.k_norm(self.wk(hidden_states.detach())).unsqueeze(1), position_embeddings)

    def forward(
        self,
        hidden_states: torch.Tensor,
        query_latent: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        keys: torch.Tensor,
    ) -> torch.Tensor:
        """Scores of queries with keys, masked by nothing.

        Differentiable in the indexer's weights only: the inputs are detached, as in the training of V3.2.

        Args:
            hidden_states: [B, S, D], the layer's input; query_latent: [B, S, query latent width].
            position_embeddings: cos, sin [B or 1, S, rotary width / 2].
            keys: [B, 1, T, W], those of `keys` for all tokens so far.

        Returns:
            [B, S, T] in float32.
        """
        query = self.wq_b(query_latent.detach()).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        query = self.rotated(query, position_embeddings)  # [B, J, S, W]
        weights = self.weights_proj(hidden_states.detach()) * (self.num_heads * self.head_dim) ** -0.5  # [B, S, J]
        with without_autocast(query):
            # One product for all heads, queries outermost, so that the sum over heads is a product too.
            products = query.transpose(1, 2).flatten(1, 2).float() @ keys.squeeze(1).float().transpose(1, 2)
            products = products.relu().unflatten(1, (-1, self.num_heads))  # [B, S, J, T]
            return (weights.float().unsqueeze(2) @ products).squeeze(2)

    def rotated(self, x: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """[B, J or 1, S, W] with the first dimensions rotated in the half layout."""
        rope, nope = x.split((self.rope, self.head_dim - self.rope), dim=-1)
        return torch.cat((apply_rotary(rope, *position_embeddings, interleaved=False), nope), dim=-1)


class DeepSeekEntryIndexer(DeepSeekIndexer):
    """The indexer of V4, which scores entries of several tokens; `compressor`, set by its attention, makes its keys.

    The last dimensions of queries and keys are rotated, in interleaved pairs.
    """

    def __init__(self, config):
        nn.Module.__init__(self)
        self.num_heads, self.head_dim, self.topk = config.index_n_heads, config.index_head_dim, config.index_topk
        self.wq_b = nn.Linear(config.q_lora_rank, config.index_query_width, bias=False)
        self.weights_proj = Float32Linear(config.hidden_size, self.num_heads, bias=False)

    def rotated(self, x: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """[B, J, S, W] with the last dimensions rotated."""
        return rotate_tail(x, *position_embeddings)


def select_keys(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Positions of the highest scores, of equal ones the later positions: [..., T] float32 -> [..., count].

    Equal scores are common (all products may be negative), and `topk` promises nothing about them: padding or packing
    would change the choice. So the position is made part of the key: the upper half of an integer is the score's bits
    in an order that integers have too, the lower half is the position.
    """
    if torch.jit.is_tracing():  # a saved trace loses the view of bits
        latest = scores.flip(-1).argsort(dim=-1, descending=True, stable=True)[..., :count]
        return scores.shape[-1] - 1 - latest
    bits = (scores + 0.0).view(torch.int32)  # the sum makes -0.0 the same as 0.0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # negative floats grow with their bits: turn them round
    positions = torch.arange(scores.shape[-1], device=scores.device)
    return ((ordered.long() << 32) | positions).topk(count, dim=-1, sorted=False).indices
