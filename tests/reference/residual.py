"""Manifold-constrained hyper-connections of one token, number by number (DeepSeek-V4's report, section 2.2)."""

from collections.abc import Callable

import torch


def sinkhorn(logits: torch.Tensor, iterations: int, eps: float) -> torch.Tensor:
    """[N, N]: softmax of each row, plus eps; columns, then rows and columns in turn, divided by their sums + eps."""
    count = len(logits)
    matrix = [[torch.exp(x - row.max().detach()) for x in row] for row in logits]
    matrix = [[x / sum(row) + eps for x in row] for row in matrix]
    for iteration in range(iterations):
        if iteration:
            matrix = [[x / (sum(row) + eps) for x in row] for row in matrix]
        columns = [sum(matrix[i][j] for i in range(count)) + eps for j in range(count)]
        matrix = [[x / columns[j] for j, x in enumerate(row)] for row in matrix]
    return torch.stack([torch.stack(row) for row in matrix])


def sigmoid(x: torch.Tensor) -> torch.Tensor:
    return 1 / (1 + torch.exp(-x))


def normed(streams: torch.Tensor, eps: float) -> torch.Tensor:
    """[N, D] -> [N D], all streams together divided by their root mean square."""
    flat = torch.cat(list(streams))
    return flat / (sum(x * x for x in flat) / len(flat) + eps) ** 0.5


def collapse(pre: torch.Tensor, streams: torch.Tensor) -> torch.Tensor:
    return sum(pre[i] * streams[i] for i in range(len(streams)))


def hyper_connection(streams: torch.Tensor, sublayer: Callable, weights: dict, config: dict, prefix: str = ""):
    """[N, D] -> [N, D]: one token's streams around `sublayer`, [D] -> [D].

    Args:
        weights: {prefix}fn [2 N + N N, N D], {prefix}base [2 N + N N], {prefix}scale [3].
        config: hc_mult, hc_sinkhorn_iters, hc_eps, rms_norm_eps.
    """
    count, eps = config["hc_mult"], config["hc_eps"]
    z = weights[f"{prefix}fn"] @ normed(streams, config["rms_norm_eps"])
    scale, base = weights[f"{prefix}scale"], weights[f"{prefix}base"]
    pre = [sigmoid(scale[0] * z[i] + base[i]) + eps for i in range(count)]
    post = [2 * sigmoid(scale[1] * z[count + i] + base[count + i]) for i in range(count)]
    logits = (scale[2] * z[2 * count :] + base[2 * count :]).reshape(count, count)
    comb = sinkhorn(logits, config["hc_sinkhorn_iters"], eps)
    output = sublayer(collapse(pre, streams))
    return torch.stack([post[k] * output + sum(comb[j, k] * streams[j] for j in range(count)) for k in range(count)])


def hyper_head(streams: torch.Tensor, weights: dict, config: dict, prefix: str = "") -> torch.Tensor:
    """[N, D] -> [D], with {prefix}fn [N, N D], {prefix}base [N], {prefix}scale [1]."""
    z = weights[f"{prefix}fn"] @ normed(streams, config["rms_norm_eps"])
    scale, base = weights[f"{prefix}scale"], weights[f"{prefix}base"]
    return collapse([sigmoid(scale[0] * x + b) + config["hc_eps"] for x, b in zip(z, base, strict=True)], streams)
