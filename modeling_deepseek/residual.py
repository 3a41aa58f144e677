"""How a sub-layer f (norm, then attention or feed-forward) is joined to the residual stream.

`add`, V1 to V3.2:  x + f(x).

`mhc`, V4: manifold-constrained hyper-connections (arXiv 2512.24880; DeepSeek-V4's report, section 2.2). The state is N
streams X of width D, which begin as N copies of the embedding:

    z = vec(X) fn^T / rms(vec(X))                      [N + N + N N], split in this order, each with its scale s
    pre = sigmoid(s z + base) + eps                    [N]     what f reads:       x = sum_i pre_i X_i
    post = 2 sigmoid(s z + base)                       [N]     where f(x) goes
    C = sinkhorn(s z + base)                           [N, N]  where the streams go, no row or column beyond 1
    X'_k = post_k f(x) + sum_j C_jk X_j

    X_0 .. X_3 --+-- pre --> x --> f --> post --+--> X'_0 .. X'_3
                 '---------- C -----------------'

and behind the last layer one more `pre`, with weights of its own, makes one state of them.

`mhc_shifted`, V4.1 (its "single-pass" mHC): the same coefficients of the same streams, but f reads by the `pre` that
the sub-layer before has found, so that all of a sub-layer's coefficients can be computed while f is:

    sub-layer       0           1           2     ..   2 L - 1       final norm
    reads by        1, 0 .. 0   pre of 0    pre of 1   pre of 2 L-2  pre of 2 L - 1

so the state that is handed on is two tensors, the streams and the `pre`.

A decoder layer calls its residual as `residual(streams, sublayer, **kwargs)`, a trunk its streams as `enter(hidden)`
before the first layer and as a module behind the last; words say which (`config.specs`). All coefficients are float32,
and so are the sums: a stream gains from every layer. Letters: B batch, S tokens, N streams, D hidden width.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from .layers import inverse_rms, without_autocast


def sinkhorn(logits: torch.Tensor, iterations: int, eps: float) -> torch.Tensor:
    """[..., N, N] -> about doubly stochastic: softmax over rows, + eps, then columns and rows divided in turn.

    The first division is by sum + eps, as published. After it no sum is small, and the others are taken in the
    logarithm: one operation each, whose gradient is bounded. There eps changes the result by less than float32 tells.

    Args:
        iterations: divisions of the columns; the rows are divided one time less.
    """
    entries = torch.softmax(logits, dim=-1) + eps
    entries = entries.movedim((-2, -1), (0, 1)).contiguous()  # tokens last: one vector per entry
    logs = (entries / (entries.sum(0, keepdim=True) + eps)).log()
    for _ in range(iterations - 1):
        logs = logs.log_softmax(1).log_softmax(0)
    return (logs.exp() / (1 + eps if iterations > 1 else 1)).movedim((0, 1), (-2, -1))


def project(streams: torch.Tensor, weight: torch.Tensor, norm_eps: float) -> torch.Tensor:
    """[B, S, N, D] and [M, N D] -> float32 [B, S, M], divided by the root mean square of a token's streams."""
    flat = streams.flatten(-2).float()
    return F.linear(flat, weight.float()) * inverse_rms(flat, norm_eps)


def weighted_sum(weights: torch.Tensor, streams: torch.Tensor) -> torch.Tensor:
    """[B, S, N] and [B, S, N, D] -> [B, S, D], in the streams' type."""
    return (weights.unsqueeze(-2) @ streams.float()).squeeze(-2).to(streams.dtype)


class AddResidual:
    """x + f(x)."""

    def __init__(self, config):
        pass

    def __call__(self, streams: torch.Tensor, sublayer: Callable[..., torch.Tensor], **kwargs) -> torch.Tensor:
        """[B, S, D] -> [B, S, D]; kwargs are the sub-layer's."""
        return streams + sublayer(streams, **kwargs)


class HyperConnection(nn.Module):
    """mHC around one sub-layer. `fn` is [2 N + N N, N D], `base` [2 N + N N], `scale` [3]."""

    def __init__(self, config):
        super().__init__()
        streams = self.num_streams = config.hc_mult
        self.iterations, self.eps, self.norm_eps = config.hc_sinkhorn_iters, config.hc_eps, config.rms_norm_eps
        coefficients = streams * (2 + streams)
        self.fn = nn.Parameter(torch.empty(coefficients, streams * config.hidden_size))
        self.base = nn.Parameter(torch.empty(coefficients))
        self.scale = nn.Parameter(torch.empty(3))

    def forward(self, streams: torch.Tensor, sublayer: Callable[..., torch.Tensor], **kwargs) -> torch.Tensor:
        """[B, S, N, D] -> [B, S, N, D]; the sub-layer, [B, S, D] -> [B, S, D], gets kwargs."""
        with without_autocast(streams):
            pre, post, comb = self.coefficients(streams)
            collapsed = weighted_sum(pre, streams)
        return self.joined(streams, sublayer(collapsed, **kwargs), post, comb)

    def joined(
        self, streams: torch.Tensor, output: torch.Tensor, post: torch.Tensor, comb: torch.Tensor
    ) -> torch.Tensor:
        """The streams mixed, and the sub-layer's output [B, S, D] added: [B, S, N, D]."""
        with without_autocast(streams):
            mixed = torch.matmul(comb.mT, streams.float())  # sums over the first axis of comb, which is not symmetric
            return torch.addcmul(mixed, post.unsqueeze(-1), output.unsqueeze(-2).float()).to(streams.dtype)

    def coefficients(self, streams: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[B, S, N, D] -> float32 pre [B, S, N], post [B, S, N], comb [B, S, N, N]."""
        count = self.num_streams
        sizes = [count, count, count * count]
        parts = project(streams, self.fn, self.norm_eps).split(sizes, dim=-1)
        scales, bases = self.scale.float().unbind(), self.base.float().split(sizes)
        pre, post, comb = (base + scale * z for z, scale, base in zip(parts, scales, bases, strict=True))
        comb = sinkhorn(comb.unflatten(-1, (count, count)), self.iterations, self.eps)
        return torch.sigmoid(pre) + self.eps, 2 * torch.sigmoid(post), comb


class ShiftedHyperConnection(HyperConnection):
    """mHC around one sub-layer, which reads by the weights that come with the streams."""

    def forward(  # type: ignore[override]  # the state is two tensors
        self, state: tuple[torch.Tensor, torch.Tensor], sublayer: Callable[..., torch.Tensor], **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Streams [B, S, N, D] and float32 weights [B, S, N] -> the same; the sub-layer gets kwargs."""
        streams, before = state
        with without_autocast(streams):
            pre, post, comb = self.coefficients(streams)
            collapsed = weighted_sum(before, streams)
        return self.joined(streams, sublayer(collapsed, **kwargs), post, comb), pre


class SingleStream:
    """The stream of `add`: the state itself."""

    def __init__(self, config):
        pass

    def enter(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[B, S, D] as it is."""
        return hidden_states

    def __call__(self, streams: torch.Tensor) -> torch.Tensor:
        """[B, S, D] as it is."""
        return streams


class HyperStreams(nn.Module):
    """The streams of `mhc`. `fn` is [N, N D], `base` [N], `scale` [1]."""

    def __init__(self, config):
        super().__init__()
        streams = self.num_streams = config.hc_mult
        self.eps, self.norm_eps = config.hc_eps, config.rms_norm_eps
        self.fn = nn.Parameter(torch.empty(streams, streams * config.hidden_size))
        self.base = nn.Parameter(torch.empty(streams))
        self.scale = nn.Parameter(torch.empty(1))

    def enter(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[B, S, D] -> [B, S, N, D], all alike."""
        return hidden_states.unsqueeze(-2).expand(*hidden_states.shape[:-1], self.num_streams, -1)

    def forward(self, streams: torch.Tensor) -> torch.Tensor:
        """[B, S, N, D] -> [B, S, D], weighed by what the streams hold."""
        with without_autocast(streams):
            logits = self.base.float() + self.scale.float() * project(streams, self.fn, self.norm_eps)
            return weighted_sum(torch.sigmoid(logits) + self.eps, streams)


class ShiftedStreams:
    """The streams of `mhc_shifted`, which have no weights of their own."""

    def __init__(self, config):
        self.num_streams = config.hc_mult

    def enter(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, S, D] -> [B, S, N, D], all alike, and float32 [B, S, N], of which the first is 1."""
        streams = hidden_states.unsqueeze(-2).expand(*hidden_states.shape[:-1], self.num_streams, -1)
        first = torch.arange(self.num_streams, device=hidden_states.device) == 0
        return streams, first.float().expand(streams.shape[:-1])

    def __call__(self, state: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Streams, weights and whatever else is handed on -> [B, S, D]."""
        streams, pre = state[:2]
        with without_autocast(streams):
            return weighted_sum(pre, streams)


RESIDUALS: dict[str, Callable] = {"add": AddResidual, "mhc": HyperConnection, "mhc_shifted": ShiftedHyperConnection}
STREAMS: dict[str, Callable] = {"add": SingleStream, "mhc": HyperStreams, "mhc_shifted": ShiftedStreams}
