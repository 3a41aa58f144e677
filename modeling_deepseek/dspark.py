"""DSpark: several tokens drafted at once (arXiv 2607.05147), as V4's releases from July 2026 on and V4.1 have it.

Behind the trunk stand draft stages, decoder layers with a window. They read what the trunk made of the tokens so far,
and a block of b tokens of which the first alone is known:

    context    c_t = norm(W_main [mean of the streams behind layer l]_l)         for every token t, for all stages
    block      [x_{t+1}, noise, ..., noise] at positions t + 1 .. t + b
    sees       the contexts of the last n tokens up to t, and the whole block, forwards and backwards
    drafts     u_j = Head(norm(h_j)) + W_2 w_1[x_{t+1+j}]        scores of token t + 2 + j, after the one before it
    confidence w_c [h_j; w_1[x_{t+1+j}]]                         log odds that the trunk takes it

    tokens     ..  t-2 t-1  t  | x_{t+1}  ~    ~    ~    ~                      b = 5
    drafted                    |   t+2   t+3  t+4  t+5  t+6

The stages run once for a block; only the sums of u_j go token by token. Embedding and head are the language model's.
Keys of contexts and of blocks come from the same weights, without the layer's norm for the contexts. V4.1 takes the
streams before the layers l, its stages have experts of their own number, never chosen by the bias of images, and
streams as its layers have (`mhc_shifted`, residual.py), which each block begins anew.

Letters: B batch, S tokens, A blocks of each row, R = B A blocks, b tokens of a block, n window, D hidden width, W head
width, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .attention_compressed import DeepSeekWindowAttention
from .indexer import Float32Linear
from .layers import norm_of
from .mtp import SharedHead
from .residual import STREAMS
from .row_tokens import RowTokens

Rotation = tuple[torch.Tensor, torch.Tensor]


@dataclass(eq=False)
class DraftBlocks:
    """Where blocks stand, and which contexts they see.

    anchors: [B, A], columns t of the tokens that blocks follow.
    columns: [B, A, n], of the contexts that each block sees; known: [B, A, n], whether there is one.
    positions: [R, b], rotary positions of the blocks.
    """

    anchors: torch.Tensor
    columns: torch.Tensor
    known: torch.Tensor
    positions: torch.Tensor

    def seen(self, keys: torch.Tensor) -> torch.Tensor:
        """[B, S, W] of all contexts -> [R, n, W] of those that each block sees."""
        index = self.columns.flatten(1).unsqueeze(-1).expand(-1, -1, keys.shape[-1])
        return keys.gather(1, index).unflatten(1, self.columns.shape[1:]).flatten(0, 1)

    def mask(self) -> torch.Tensor:
        """[R, b, n + b]: what each token of a block sees."""
        size = self.positions.shape[1]
        known = torch.cat((self.known, self.known.new_ones(*self.known.shape[:2], size)), dim=-1)
        return known.flatten(0, 1).unsqueeze(1).expand(-1, size, -1)


def blocks_behind(
    anchors: torch.Tensor, tokens: RowTokens, position_ids: torch.Tensor, window: int, size: int
) -> DraftBlocks:
    """Blocks of `size` tokens behind the anchors.

    Args:
        anchors: [B, A] columns.
        tokens: of a call without anything cached: padding is left out of the window, and so are other documents.
        position_ids: [B or 1, S], rotary positions of the columns.
    """
    batch = anchors.shape[0]
    ranks, starts = (of_all.expand(batch, -1) for of_all in (tokens.ranks, tokens.starts))
    by_rank = ranks.masked_fill(ranks < 0, tokens.length).argsort(dim=-1, stable=True)  # [B, S] columns
    steps = torch.arange(1 - window, 1, device=anchors.device)
    wanted = ranks.gather(1, anchors).unsqueeze(-1) + steps  # [B, A, n] ranks
    known = wanted >= starts.gather(1, anchors).unsqueeze(-1)
    columns = by_rank.gather(1, wanted.clamp(min=0).flatten(1)).view_as(wanted)
    first = position_ids.expand(batch, -1).gather(1, anchors).flatten().unsqueeze(-1) + 1
    return DraftBlocks(anchors, columns, known, first + torch.arange(size, device=anchors.device))


class DeepSeekDraftAttention(DeepSeekWindowAttention):
    """Queries of a block, keys of the contexts before it and of the block itself."""

    def forward(  # type: ignore[override]  # it has a context in place of a cache
        self,
        hidden_states: torch.Tensor,
        context: torch.Tensor,
        blocks: DraftBlocks,
        rotation: tuple[Rotation, Rotation],
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[R, b, D] -> [R, b, D], and the weights [R, H, b, n + b] where the implementation gives them.

        Args:
            context: [B, S, D]; rotation: cos and sin of its columns, and of the blocks.
        """
        near, own = rotation
        query = self.queries(self.q_norm(self.wq_a(hidden_states)), *own)
        rows = torch.cat((blocks.seen(self.keys(context, *near)), self.keys(hidden_states, *own)), dim=1)
        mixed, weights = self.attend_with_sink(query, rows, blocks.mask(), **kwargs)
        return self.projected(mixed, *own), weights


class MarkovHead(nn.Module):
    """What a token says of the next one, in few numbers: scores W_2 w_1[token] are added to those of a draft."""

    def __init__(self, config):
        super().__init__()
        self.markov_w1 = nn.Embedding(config.vocab_size, config.dspark_markov_rank)
        self.markov_w2 = nn.Linear(config.dspark_markov_rank, config.vocab_size, bias=False)

    def forward(self, token_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[...] -> float32 scores [..., V] of the next token, and what they are made of [..., rank]."""
        states = self.markov_w1(token_ids)
        return self.markov_w2(states).float(), states


class ConfidenceHead(nn.Module):
    """How sure it is that the trunk takes a draft."""

    def __init__(self, config):
        super().__init__()
        self.proj = Float32Linear(config.hidden_size + config.dspark_markov_rank, 1, bias=False)

    def forward(self, hidden_states: torch.Tensor, markov_states: torch.Tensor) -> torch.Tensor:
        """[..., D] before the norm, [..., rank] -> float32 [...] log odds."""
        return self.proj(torch.cat((hidden_states, markov_states), dim=-1)).squeeze(-1)


class DraftStage(nn.Module):
    """What a draft stage has beside the decoder layer that it is; comes before it among the base classes.

    The first reads the trunk, the last makes one state of the streams and has the heads.
    """

    predicts_ahead = True

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.mlp.experts.config = config  # what chooses the implementation, which may change
        stage = layer_idx - config.num_hidden_layers
        if stage == 0:
            width = len(config.dspark_target_layer_ids) * config.hidden_size
            self.main_proj = nn.Linear(width, config.hidden_size, bias=False)
            self.main_norm = norm_of(config)
        if stage == config.num_nextn_predict_layers - 1:
            self.hc_head = STREAMS[config.residual_word](config)
            self.shared_head = SharedHead(config)
            self.markov_head = MarkovHead(config)
            self.confidence_head = ConfidenceHead(config)

    def forward(self, streams: torch.Tensor, context: torch.Tensor, **kwargs) -> torch.Tensor:
        """[R, b, N, D] and contexts [B, S, D] -> [R, b, N, D]."""
        return super().forward(streams, context=context, **kwargs)


class ShiftedDraftStage(DraftStage):
    """The same where the state is the streams and the weights to read them by: tensors one by one, as checkpointing
    of gradients wants them."""

    def __call__(self, state: tuple[torch.Tensor, torch.Tensor], context: torch.Tensor, **kwargs) -> Any:
        return super().__call__(*state, context, **kwargs)

    def forward(  # type: ignore[override]  # the state is two tensors
        self, streams: torch.Tensor, pre: torch.Tensor, context: torch.Tensor, **kwargs
    ) -> Any:
        """[R, b, N, D], [R, b, N] and contexts [B, S, D] -> the first two anew."""
        state: Any = (streams, pre)
        return super().forward(state, context, **kwargs)


class Taps:
    """Collects what some layers are given, as the mean of the streams."""

    def __init__(self, layers: list[int]):
        self.layers = layers
        self.states: list[torch.Tensor] = []  # as list[...]() dynamo would not read it

    def look(self, layer: int, state: Any) -> None:
        """Keep [B, S, N, D], or the first of several such, before a layer, if it is one of them."""
        if layer in self.layers:
            streams = state if isinstance(state, torch.Tensor) else state[0]
            self.states.append(streams.mean(dim=-2))

    def all(self) -> torch.Tensor | None:
        """[B, S, k D] of k layers; None if there are none."""
        return torch.cat(self.states, dim=-1) if self.states else None
